"""``hf-hybrid bench --loading``: what is measured, of whom, and how it is put together.

Bugs these tests catch: a ratio upside down, a load that is timed only once, memory that an earlier load left behind,
tied weights counted twice, threads of the host in the process that reads the peak, and a process that fails in silence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_for_tests import write_checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from hf_hybrid.cli import app
from hf_hybrid.evaluation import ProcessError, compared, load_cost, loading_cost, one_load

MB = 2**20


def test_the_ratio_is_that_of_pairs() -> None:
    found = compared([(2.0, 4.0), (4.0, 6.0), (10.0, 10.0)])
    assert (found.host, found.plugin, found.ratio) == (4.0, 6.0, 1.5)
    assert found.interval is not None and 1.0 <= found.interval[0] < 1.5 < found.interval[1] <= 2.0
    assert compared([(1.0, 3.0)]).interval is None


def test_both_load_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    clock = iter(range(10_000))

    class Loader:
        def __init__(self, name: str, cost: int):
            self.name, self.cost = name, cost

        def from_pretrained(self, name: str, **kwargs: object) -> object:
            assert (name, kwargs) == ("a", {"dtype": "float32"})
            order.append(self.name)
            for _ in range(self.cost):
                next(clock)
            return object()

    def process(loader: str, name: str, kwargs: dict[str, Any]) -> dict[str, float | None]:
        order.append(loader)
        return {"peak_mb": 30.0 if "Hybrid" in loader else 10.0, "stays_mb": None}

    monkeypatch.setattr(load_cost, "AutoModelForCausalLM", Loader("host", 3))
    monkeypatch.setattr(load_cost, "AutoHybridModelForCausalLM", Loader("plugin", 7))
    monkeypatch.setattr(load_cost.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(load_cost, "_process", process)
    monkeypatch.setattr(load_cost, "MOST_PROCESSES", 1)
    told: list[tuple[str, str, int, int]] = []
    cost = loading_cost("a", 2, lambda *step: told.append(step), dtype="float32")
    host, plugin = load_cost.LOADERS
    assert order == ["plugin", "host", "host", "plugin"] * 2 + [plugin, host]
    assert [(name, done, total) for _, name, done, total in told] == [
        ({"plugin": "hf_hybrid", "host": "transformers"}.get(who, who.partition(":")[0]), number, 10)
        for number, who in enumerate(order)
    ]
    assert [stage for stage, *_ in told] == ["loading"] * 8 + ["loading in a process of its own"] * 2
    assert (cost.rounds, cost.processes) == (2, 1)
    assert (cost.seconds.host, cost.seconds.plugin, cost.seconds.ratio) == (4, 8, 2.0)
    assert cost.readings.keys() == {"peak_mb"} and cost.readings["peak_mb"].ratio == 3.0


def model(tied: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    config.tie_word_embeddings = tied
    return LlamaForCausalLM(config)


def test_tied_weights_are_held_once() -> None:
    tied, apart = model(True), model(False)
    assert one_load.tensor_bytes(apart) == sum(t.nbytes for t in (*apart.parameters(), *apart.buffers()))
    assert one_load.tensor_bytes(apart) - one_load.tensor_bytes(tied) == 256 * 16 * 4
    before = one_load.tensor_bytes(tied)
    tied.register_buffer("view", next(tied.parameters()).detach()[2:4])
    assert one_load.tensor_bytes(tied) == before, "another view of the same storage"


class Wasteful:
    """Loads a model that carries along 48 MB of tensors and 4 MB of Python, and throws away twice as much."""

    @classmethod
    def from_pretrained(cls, name: str) -> Any:
        lost, passing = torch.ones(96 * MB // 4), bytes(8 * MB)
        found: Any = model(True)
        found.register_buffer("kept", torch.ones(48 * MB // 4))
        found.python = bytes(4 * MB)
        del lost, passing
        return found


def test_what_stays_and_what_passes() -> None:
    found = one_load.measure({"loader": f"{__name__}:Wasteful", "name": "", "kwargs": {}})
    tensors, python, most = (found[key] or 0 for key in ("tensors_mb", "python_mb", "python_peak_mb"))
    # The tiny model and its Python objects are less than 2 MB.
    assert 48 <= tensors < 50 and 4 <= python < 6 and 12 <= most < 14
    if found["process_mb"] is None:  # no honest number on this system, and none invented
        assert found["stays_mb"] is None and found["peak_mb"] is None
        return
    stays, peak = found["stays_mb"] or 0, found["peak_mb"] or 0
    # Room of the allocator's own may serve the small parts (less than 1 MB of them), never blocks of this size, which
    # go back to the system.
    assert 48 <= stays < 60 and 143 <= peak < 170 and found["process_mb"] > stays


def test_the_command(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")

    def call(*arguments: object, code: int = 0) -> str:
        result = CliRunner().invoke(app, ["bench", "--loading", *map(str, arguments)])
        assert result.exit_code == code, (result.output, result.exception)
        return result.output

    shown = call("-m", checkpoint, "--repeats", 1, "--json", tmp_path / "load_cost.json")
    assert "pairs of loads: 1, of processes: 1" in shown and "MB of Python objects" in shown
    written = json.loads((tmp_path / "load_cost.json").read_text())
    assert written["seconds"]["ratio"] == written["seconds"]["plugin"] / written["seconds"]["host"] > 0
    readings = written["readings"]
    assert readings["tensors_mb"]["plugin"] == readings["tensors_mb"]["host"] > 0
    # Both hold the same tensors; ours remembers no more than the names of a class and a few settings beside them.
    assert readings["python_mb"]["ratio"] < 1.05
    assert "--dtype" in call("-m", checkpoint, "--dtype", "float32,bfloat16", code=2)


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(ProcessError, match=r"AutoModelForCausalLM failed: .*no-such-folder"):
        load_cost._process(load_cost.LOADERS[0], str(tmp_path / "no-such-folder"), {})
