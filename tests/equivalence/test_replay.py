"""Theorem 11: what a Runner with a cache writes, the one without a cache writes, for every strategy and batch.

Catches: keys of rejected or noisy rows that stay, rows of a branch that are read as another's, a sequence that takes
the keys or spans of one that left, a mask that forgets what was committed, and a position, span or mask that is rebuilt
from anything but the rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hf_hybrid import ModelDrafter, Span, TreeDrafter, generate_many
from hf_hybrid.core.plan import Plan
from hf_hybrid.models.replay import ReplayRunner
from tests.models_for_tests import MODELS, PROMPTS, VOCAB, hybrid, tiny

PLANNED: dict[str, Any] = {"strategy": "planned_diffusion", "return_control_tokens": True}
MODES: dict[str, dict[str, Any]] = {
    "autoregressive": {"strategy": "autoregressive"},
    "suffix": {"strategy": "speculative", "adaptive": False, "draft_length": 4},
    "self": {"strategy": "speculative", "drafter": "self", "window_length": 4, "adaptive": False},
    "blocks": {"strategy": "block_diffusion", "window_length": 4, "confidence_threshold": 0.3},
    "kept blocks": {"strategy": "block_diffusion", "window_length": 4, "commit": "block", "confidence_threshold": 0.3},
    "verified": {**PLANNED, "window_length": 4},
    "plan window": {**PLANNED, "window_length": 4, "plan_window": 4},
    "unverified": {**PLANNED, "verify_spans": False, "confidence_threshold": 0.3},
    "parts": {**PLANNED, "span_decoding": "autoregressive"},
    "sparse": {**PLANNED, "visibility": "sparse"},
    "dense": {**PLANNED, "visibility": "dense", "max_rounds": 2},
    "given": {**PLANNED, "plan": Plan((Span((4,), 4), Span((7, 8), 6, (0,)), Span((9,), 3)), lead=(5,))},
}


def batch(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    padded = [[0] * (width - len(p)) + list(p) for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}


def both(model: Any, inputs: Any, **options: Any) -> None:
    """Written with a cache and without: the same tokens, in as many passes."""
    options = {"max_new_tokens": 40, "return_dict_in_generate": True, **options}
    cached = model.generate(**inputs, **options)
    replayed = model.generate(**inputs, **options, runner=ReplayRunner)
    assert torch.equal(cached.sequences, replayed.sequences)
    for one, other in zip(cached.report, replayed.report, strict=True):
        assert (one.num_forwards, one.accepted_per_round) == (other.num_forwards, other.accepted_per_round)
        assert one.ended == other.ended and one.spans == other.spans


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("mode", MODES)
def test_every_strategy_in_a_batch(mode: str, sampled: bool) -> None:
    sampling: dict[str, Any] = {"do_sample": True, "temperature": 1.3, "seed": 5} if sampled else {"do_sample": False}
    both(hybrid(seed=26), batch([list(p) for p in PROMPTS]), **sampling, **MODES[mode])


@pytest.mark.parametrize("name", MODELS)
def test_every_class(name: str) -> None:
    for mode in ("suffix", "verified", "blocks"):
        both(hybrid(name, seed=13), batch([list(p) for p in PROMPTS]), do_sample=False, **MODES[mode])


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_drafts_of_a_model(tree: bool) -> None:
    target, near = hybrid(seed=26), tiny("llama", seed=26)
    drafter = TreeDrafter(near) if tree else ModelDrafter(near)
    options = {"strategy": "speculative", "drafter": drafter, "adaptive": False, "draft_length": 4, "do_sample": False}
    both(target, batch([list(p) for p in PROMPTS]), **options)


def test_sequences_that_come_and_go() -> None:
    model = hybrid(seed=26)
    prompts = [[*PROMPTS[i % len(PROMPTS)], 13 + i] for i in range(7)]
    options = {"batch_size": 3, "max_new_tokens": 30, "do_sample": False, "strategy": "planned_diffusion"}
    cached = {a.index: (a.tokens, a.report.num_forwards) for a in generate_many(model, prompts, **options)}
    replayed = generate_many(model, prompts, **options, runner=ReplayRunner)
    assert cached == {a.index: (a.tokens, a.report.num_forwards) for a in replayed} and len(cached) == 7
    assert len({passes for _, passes in cached.values()}) > 1, "some leave before others"


def test_a_processor_that_reads_the_text() -> None:
    for mode in ("suffix", "verified"):
        both(hybrid(seed=26), batch([list(p) for p in PROMPTS]), do_sample=False, repetition_penalty=1.3, **MODES[mode])


@pytest.mark.parametrize(
    ("lacks", "served", "refused"),
    [
        ("noisy_rows", ("autoregressive", "suffix", "parts"), ("self", "blocks", "verified", "dense", "plan window")),
        ("spans", ("autoregressive", "suffix", "self", "blocks"), ("parts", "verified", "given", "dense")),
    ],
)
def test_a_strategy_that_needs_more_than_the_runner_can_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, lacks: str, served: tuple[str, ...], refused: tuple[str, ...]
) -> None:
    monkeypatch.setattr(ReplayRunner, "abilities", replace(ReplayRunner.abilities, **{lacks: False}))
    model, ids = hybrid(seed=26), torch.tensor([[3, 7, 9]])
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "runner": ReplayRunner}
    for mode in served:
        assert model.generate(ids, **options, **MODES[mode]).shape[1] > 3
    for mode in refused:
        with pytest.raises(ValueError, match=f"needs .*{lacks.replace('_', ' ')}.* use strategy='autoregressive'"):
            model.generate(ids, **{**options, "max_new_tokens": 40}, **MODES[mode])


def test_what_it_has_no_keys_for_is_refused_or_read_again() -> None:
    model, ids = hybrid(seed=26), torch.tensor([[3, 7, 9, 2, 11]])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "strategy": "autoregressive"}
    first = model.generate(ids, **options, return_dict_in_generate=True)
    held = getattr(first, "cache", None) or first.past_key_values
    with pytest.raises(ValueError, match="ReplayRunner keeps no keys"):
        model.generate(first.sequences, past_key_values=held, runner=ReplayRunner, **options)
    replayed = model.generate(
        ids, **options, runner=ReplayRunner, return_dict_in_generate=True, return_past_key_values=True
    )
    again = getattr(replayed, "cache", None) or replayed.past_key_values
    assert again.get_seq_length() == held.get_seq_length() == 12
    torch.testing.assert_close(again.layers[1].keys, held.layers[1].keys, rtol=0, atol=1e-11)  # float64, two layers
    assert model.config.vocab_size == VOCAB
