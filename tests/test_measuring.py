"""Measuring: order of the candidates, warm-up, interrupts, what one answer's numbers hold.

Bugs these tests catch: the warm-up counted; an order that favours one candidate; a half-finished prompt kept after
Ctrl-C; tokens counted behind the end; a host candidate that runs the checkpoint's strategy; a peak of memory that is
another call's.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_for_tests import read_checkpoint, write_checkpoint

from hf_hybrid.config import settings_for
from hf_hybrid.evaluation import (
    CANDIDATES,
    SWEEP,
    Candidate,
    environment,
    even_subset,
    in_types,
    measure,
    memory,
    results_of,
    shape_of,
    to_json,
)
from hf_hybrid.training.recipes.sheets import Sheet, TestItem

RESULT_KEYS = {"strategy", "settings", "seconds_per_answer", "speedup", "speedup_all", "tokens_per_second"} | {
    "tokens_per_forward",
    "num_forwards",
    "num_rows",
    "seconds_to_first_text",
    "peak_memory_mb",
    "field_exact_match",
    "answer_exact_match",
}


def item(name: str, country: str, answer: str = "- a\n") -> TestItem:
    return TestItem(name, "test", Sheet(f"prompt {name}", (answer,), (country,)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, list[TestItem]]:
    folder = write_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    return read_checkpoint(folder, torch.float64)


class Scripted:
    """A model that notes its calls; the answer is token 7 and the end, and then a token that is none of it."""

    def __init__(self, interrupt_at: int | None = None):
        self.calls: list[dict[str, Any]] = []
        self.device, self.interrupt_at = torch.device("cpu"), interrupt_at
        self.generation_config = SimpleNamespace(eos_token_id=1)

    def generate(self, input_ids: torch.Tensor, **options: Any) -> Any:
        self.calls.append(options)
        if len(self.calls) == self.interrupt_at:
            raise KeyboardInterrupt
        new = torch.tensor([[7, 1, 9]]).expand(len(input_ids), -1)  # (batch, 3)
        row = SimpleNamespace(
            num_forwards=2, num_rows=8, seconds_to_first_text=0.1, seconds={"text": 0.1}, spans=[], fallbacks=[]
        )
        return SimpleNamespace(sequences=torch.cat([input_ids, new], 1), report=[row] * len(input_ids))


class Digits:
    """A tokenizer that reads three tokens into every prompt and writes the ids as text."""

    pad_token_id = 0

    def __call__(self, texts: list[str], **options: Any) -> dict[str, torch.Tensor]:
        return {name: torch.ones(len(texts), 3, dtype=torch.long) for name in ("input_ids", "attention_mask")}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


THREE = (Candidate("a", None), Candidate("b", "autoregressive", {"seed": 1}), Candidate("c", "block_diffusion"))


def test_the_order_rotates_and_the_warm_up_is_not_counted() -> None:
    model, items = Scripted(), [item(str(n), "A", "7 1") for n in range(3)]
    run = measure(model, Digits(), items, THREE, max_new_tokens=5)
    names = [call.get("strategy") for call in model.calls]
    host, plain, block = None, "autoregressive", "block_diffusion"
    assert names == [host, plain, block, host, plain, block, plain, block, host, block, host, plain]
    assert [len(m) for m in run.measurements.values()] == [3, 3, 3] and not run.interrupted
    one = run.measurements["a"][0]
    assert (one.text, one.num_tokens, one.right) == ("7 1", 2, True)  # nothing behind the end token
    assert (one.num_forwards, one.num_rows) == (2, 4)  # prompt and one token; the last one is never fed


def test_a_candidate_runs_with_the_weights_of_its_type() -> None:
    first, second = Scripted(), Scripted()
    pair = in_types(THREE[:1], ("float32", "bfloat16"))
    measure(first, Digits(), [item("0", "A")], pair, others={"bfloat16": second})
    assert len(first.calls) == len(second.calls) == 2  # a warm-up and an answer each
    with pytest.raises(ValueError, match="no model in bfloat16"):
        measure(first, Digits(), [item("0", "A")], pair)


def test_the_host_is_the_host_and_everyone_is_greedy() -> None:
    model = Scripted()
    measure(model, Digits(), [item("0", "A")], THREE, max_new_tokens=5)
    host, plain = model.calls[:2]
    assert host["hf_hybrid"] == {} and "strategy" not in host
    assert plain["seed"] == 1 and "streamer" not in plain
    assert all(not call["do_sample"] and call["max_new_tokens"] == 5 for call in model.calls)


@pytest.mark.parametrize(("call", "finished"), [(2, 0), (4, 0), (7, 1), (8, 1), (12, 2)])
def test_an_interrupt_keeps_whole_prompts(call: int, finished: int) -> None:
    items = [item(str(n), "A") for n in range(3)]
    told: list[tuple[str, str, int, int]] = []
    run = measure(Scripted(call), Digits(), items, THREE, progress=lambda *step: told.append(step))
    assert run.interrupted and [i.id for i in run.items] == [str(n) for n in range(finished)]
    assert [len(m) for m in run.measurements.values()] == [finished] * 3
    # Every answer was told before it began, the warm-up first, then in the order that rotates.
    stages = ["warming up"] * 3 + ["answering"] * 9
    assert told == list(zip(stages, "abcabcbcacab", range(12), [12] * 12, strict=True))[:call]


def test_a_subset_takes_every_country_in_turn() -> None:
    items = [item(f"{c}{n}", c) for c in "ABC" for n in range(3)]
    assert [i.id for i in even_subset(items, 5)] == ["A0", "B0", "C0", "A1", "B1"]
    assert sorted(i.id for i in even_subset(items)) == [i.id for i in items]
    for wrong in (0, 10):
        with pytest.raises(ValueError, match="1 to 9"):
            even_subset(items, wrong)


def test_nothing_to_measure_and_equal_names_are_errors() -> None:
    with pytest.raises(ValueError, match="at least one"):
        measure(Scripted(), Digits(), [], THREE)
    with pytest.raises(ValueError, match="same name"):
        measure(Scripted(), Digits(), [item("0", "A")], (*THREE, THREE[0]))


def test_the_peak_of_memory_is_that_of_the_call() -> None:
    cpu, size = torch.device("cpu"), 64
    memory.reset_peak(cpu)
    before = memory.peak_mb(cpu)
    block = torch.ones(size * 2**18)  # float32: `size` times 2**20 bytes
    during = memory.peak_mb(cpu)
    del block
    memory.reset_peak(cpu)
    after = memory.peak_mb(cpu)
    if before is None:  # no honest number on this system, and none invented
        assert during is None and after is None
    else:
        assert during is not None and after is not None
        assert during > before + size / 2  # half: the allocator may have had room of its own
        assert after < during - size / 2  # large blocks go back to the system


@pytest.mark.parametrize("table", [CANDIDATES, SWEEP])
def test_every_candidate_has_settings_that_exist(table: tuple[Candidate, ...]) -> None:
    assert len({c.name for c in table}) == len(table)
    for candidate in table:
        assert candidate.equals is None or candidate.equals in {c.name for c in table}
        if candidate.strategy is not None:
            assert settings_for(candidate.strategy, candidate.settings) is not None


def test_a_real_run_in_float64(checkpoint: tuple[Any, Any, list[TestItem]], tmp_path: Path) -> None:
    model, tokenizer, items = checkpoint
    items = even_subset([i for i in items if i.split == "test"], 2)
    run = measure(model, tokenizer, items, CANDIDATES, max_new_tokens=24)
    results = {result.name: result for result in results_of(run)}
    for name in ("autoregressive", "planned_verified"):
        assert results[name].equal_share == 1.0, name
    # Random weights plan too, so the line above is about parts.
    assert results["planned_verified"].seconds_per_stage.get("plan", 0.0) > 0.0
    for name in ("host", "autoregressive"):
        one = run.measurements[name][0]
        assert one.num_forwards == one.num_tokens and results[name].tokens_per_forward == 1.0
    assert run.measurements["host"][0].num_rows == run.measurements["autoregressive"][0].num_rows
    assert all(m.seconds_to_first_text is not None for m in run.measurements["host"])
    content = to_json(run, list(results.values()), shape_of(items, tokenizer), environment(model), "hf-hybrid bench")
    head = ["command", "commit", "versions", "device", "num_prompts", "batch_size", "temperature"]
    assert list(content) == [*head, "shape", "groups", "kinds", "results"]
    content = json.loads(json.dumps(content))
    assert content["num_prompts"] == 2 and len(content["results"]) == len(CANDIDATES)
    assert all(set(result) >= RESULT_KEYS for result in content["results"])
    assert content["device"]["dtype"] == "float64" and content["versions"]["torch"] == torch.__version__


def test_sampled_answers_keep_the_equalities(checkpoint: tuple[Any, Any, list[TestItem]]) -> None:
    model, tokenizer, items = checkpoint
    names = ("autoregressive", "span_autoregressive", "planned_verified", "speculative_self")
    candidates = [c for c in CANDIDATES if c.name in names]
    greedy, hot, again = (
        measure(model, tokenizer, items[:2], candidates, max_new_tokens=24, temperature=t) for t in (0.0, 1.0, 1.0)
    )
    assert (greedy.temperature, hot.temperature) == (0.0, 1.0)
    for name in names:
        texts = [[m.text for m in run.measurements[name]] for run in (greedy, hot, again)]
        assert texts[0] != texts[1] == texts[2], name  # sampled, with a seed
    for name, twin in (("planned_verified", "span_autoregressive"), ("speculative_self", "autoregressive")):
        assert [m.text for m in hot.measurements[name]] == [m.text for m in hot.measurements[twin]]


def test_a_batch_gives_the_texts_of_single_calls(checkpoint: tuple[Any, Any, list[TestItem]]) -> None:
    model, tokenizer, items = checkpoint
    candidates = [c for c in CANDIDATES if c.name in ("host", "planned_verified")]
    single, batch = (
        measure(model, tokenizer, items[:3], candidates, max_new_tokens=24, batch_size=size) for size in (1, 2)
    )
    for name in single.measurements:
        assert [m.text for m in single.measurements[name]] == [m.text for m in batch.measurements[name]]
        assert [m.num_tokens for m in single.measurements[name]] == [m.num_tokens for m in batch.measurements[name]]
