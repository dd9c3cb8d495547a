"""``hf-hybrid export`` and ``bench --loading``: whole repositories, clear errors, ratios of what was measured.

Bugs these tests catch: an export that changes weights or their type, forgets the card or a strategy, or overwrites its
own source; a ratio upside down, or a load that is timed only once.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_for_tests import write_checkpoint
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hf_hybrid.cli import app
from hf_hybrid.evaluation import loading, loading_cost
from hf_hybrid.portable import custom_generate_files


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def call(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_a_whole_model(checkpoint: Path, tmp_path: Path) -> None:
    half = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "half")
    (tmp_path / "half" / "training.json").write_text("{}")
    out = tmp_path / "repo"
    assert f"written to {out}" in call("export", tmp_path / "half", out, "--strategy", "block_diffusion")
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "half", out))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert next(iter(after.values())).dtype == torch.bfloat16
    assert json.loads((out / "generation_config.json").read_text())["hf_hybrid"]["strategy"] == "block_diffusion"
    assert {p.name for p in (out / "custom_generate").iterdir()} == set(custom_generate_files())
    assert (out / "training.json").read_text() == "{}" and (out / "tokenizer.json").is_file()
    card = ModelCard.load(out / "README.md")
    assert set(card.data.tags) == {"hf_hybrid", "custom_generate"} and "by `block_diffusion`" in card.text
    (out / "README.md").write_text("mine")
    call("export", tmp_path / "half", out)
    assert (out / "README.md").read_text() == "mine"


def test_decoding_alone(tmp_path: Path) -> None:
    call("export", "--speculative", tmp_path / "speculative")
    assert {p.name for p in (tmp_path / "speculative").iterdir()} == {"README.md", "custom_generate"}
    card = ModelCard.load(tmp_path / "speculative" / "README.md")
    assert card.data.library_name == "transformers" and "custom_generate" in card.data.tags
    assert 'custom_generate="speculative"' in card.text
    entry = (tmp_path / "speculative" / "custom_generate" / "generate.py").read_text()
    assert 'STRATEGY: str | None = "speculative"' in entry


def test_wrong_usage(checkpoint: Path, tmp_path: Path) -> None:
    assert "MODEL FOLDER" in call("export", tmp_path / "alone", code=2)
    assert "MODEL FOLDER" in call("export", "--speculative", "a", "b", code=2)
    assert "one of them" in call("export", "--speculative", "-s", "speculative", tmp_path / "x", code=2)
    assert "choose one of autoregressive" in call("export", checkpoint, tmp_path / "x", "-s", "fast", code=2)
    assert "is the model itself" in call("export", checkpoint, checkpoint, code=2)
    (tmp_path / "file").write_text("")
    assert "is a file" in call("export", checkpoint, tmp_path / "file", code=2)
    foreign = tmp_path / "foreign" / "custom_generate"
    foreign.mkdir(parents=True)
    (foreign / "generate.py").write_text("")
    assert "not hf_hybrid's" in call("export", checkpoint, tmp_path / "foreign", code=1)
    assert not (tmp_path / "x").exists() and [p.name for p in (tmp_path / "foreign").iterdir()] == ["custom_generate"]


def test_loading_is_measured_in_pairs(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path) -> None:
    order: list[str] = []
    clock = iter(range(10_000))

    class Loader:
        def __init__(self, name: str, cost: int):
            self.name, self.cost = name, cost

        def from_pretrained(self, name: str, **kwargs: object) -> object:
            assert (name, kwargs) == ("a", {"dtype": torch.float32})
            order.append(self.name)
            for _ in range(self.cost):
                next(clock)
            return object()

    with monkeypatch.context() as patch:
        patch.setattr(loading, "AutoModelForCausalLM", Loader("host", 3))
        patch.setattr(loading, "AutoHybridModelForCausalLM", Loader("plugin", 7))
        patch.setattr(loading.time, "perf_counter", lambda: next(clock))
        marks = iter([10.0, 14.0, 10.0, 12.0] * 10)  # before and after: plugin first in even rounds
        patch.setattr(loading, "peak_mb", lambda device: next(marks))
        cost = loading_cost("a", 2, dtype=torch.float32)
    assert order == ["plugin", "host", "host", "plugin"] * 2
    assert (cost.host_seconds, cost.plugin_seconds, cost.time_ratio) == (4, 8, 2.0)
    assert cost.rounds == 2 and cost.host_mb == cost.plugin_mb == 3.0 and cost.memory_ratio == 1.0

    shown = call("bench", "--loading", "-m", checkpoint, "--repeats", 2, "--json", tmp_path / "loading.json")
    assert "2 pairs, medians" in shown
    written = json.loads((tmp_path / "loading.json").read_text())
    assert written["time_ratio"] == written["plugin_seconds"] / written["host_seconds"] > 0
    assert "--dtype" in call("bench", "--loading", "-m", checkpoint, "--dtype", "float32,bfloat16", code=2)
