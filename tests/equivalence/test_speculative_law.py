"""Theorem 4 for sampling with ``acceptance="rejection"``: the text follows the model's law, whoever drafts.

Every joint probability of four tokens over a vocabulary of six is computed exactly and compared with draws by a
chi-square test with a false-alarm rate of 1e-4 (fixed seeds: it fails always or never).

Bugs these tests catch: a residual that is not normalised or taken from the wrong row; a draft that is cut by what was
drawn; noise that is used twice; processors that act on drafts but not on checks; and a drafter that lies about its
probabilities goes unnoticed by the test itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_hybrid
from hf_hybrid import Draft, Drafter, ModelDrafter, Text
from hf_hybrid.core.acceptance import keyed_noise, keyed_uniform, reject, sample
from tests.models_for_tests import tiny

VOCAB, HORIZON, BATCH = 6, 4, 1000
PROMPT = torch.tensor([[3, 1, 4]])
WARPED: dict[str, Any] = {"do_sample": True, "temperature": 1.3, "top_k": 0, "top_p": 0.93}
PENALISED: dict[str, Any] = {**WARPED, "repetition_penalty": 1.5}


@cache
def model(seed: int = 3, layers: int = 2) -> Any:
    return hf_hybrid.enable(tiny("llama", seed=seed, vocab_size=VOCAB, num_hidden_layers=layers))


def warped(host: Any, penalty: float = 1.0) -> Any:
    """The host's processors: ids ``(n, length)`` and logits ``(n, vocab)`` to scores."""
    config = host.generation_config.__class__(**{**WARPED, "repetition_penalty": penalty})
    return host._get_logits_processor(config, input_ids_seq_length=3, encoder_input_ids=PROMPT)


def exact(settings: dict[str, Any], host: Any = None) -> Tensor:
    """The law of four tokens of a vocabulary of six behind the prompt, ``(vocab ** 4,)``, with the host's own
    processors."""
    host = model() if host is None else host
    warp = warped(host, settings.get("repetition_penalty", 1.0))
    prefixes, law = PROMPT, torch.ones(1, dtype=torch.float64)  # (n, length), (n,)
    with torch.no_grad():
        for _ in range(HORIZON):
            following = warp(prefixes, host(prefixes).logits[:, -1]).softmax(dim=-1)[:, :VOCAB]  # (n, vocab)
            law = (law[:, None] * following).flatten()
            tokens = torch.arange(VOCAB).repeat(len(prefixes))[:, None]
            prefixes = torch.cat([prefixes.repeat_interleave(VOCAB, dim=0), tokens], dim=1)
    return law


def drawn(drafter: Any, draws: int, settings: dict[str, Any], **more: Any) -> tuple[Tensor, float]:
    """How often each text came, ``(vocab ** 4,)``, and the share of drafted tokens that accepted."""
    counts, tried, accepted = torch.zeros(VOCAB**HORIZON, dtype=torch.float64), 0, 0
    weights = VOCAB ** torch.arange(HORIZON - 1, -1, -1)
    for start in range(0, draws, BATCH):
        arguments = {"strategy": "speculative", "acceptance": "rejection", "draft_length": 3, **settings, **more}
        output = model().generate(
            PROMPT,
            drafter=drafter,
            max_new_tokens=HORIZON,
            num_return_sequences=BATCH,
            seed=start,
            return_dict_in_generate=True,
            **arguments,
        )
        counts += torch.bincount((output.sequences[:, 3:] * weights).sum(dim=1), minlength=len(counts))
        tried += sum(sum(report.drafting.tried) for report in output.report)
        accepted += sum(sum(report.drafting.accepted) for report in output.report)
    return counts, accepted / max(tried, 1)


def excess(counts: Tensor, law: Tensor) -> float:
    """Chi-square statistic over its 1 - 1e-4 quantile (Wilson and Hilferty, 1931; 3.719 is the normal one)."""
    expected = law * counts.sum()
    assert float(counts[law == 0].sum()) == 0, "a token that the warpers cut off"
    often = expected >= 5  # the usual condition of the test; the rest is one cell
    both = [torch.cat([x[often], x[~often].sum()[None]]) for x in (counts, expected)]
    kept = both[1] > 0
    freedom = int(kept.sum()) - 1
    assert freedom > 20
    statistic = float(((both[0] - both[1])[kept] ** 2 / both[1][kept]).sum())
    part = 2 / (9 * freedom)
    return statistic / (freedom * (1 - part + 3.719 * math.sqrt(part)) ** 3)


class Stubborn(Drafter):
    """Drafts the same tokens always, and says nothing of probabilities."""

    def propose(self, texts: Sequence[Text], length: int, sampler: Any) -> list[Draft]:
        return [Draft([2, 5, 0][:length])] * len(texts)


class Liar(ModelDrafter):
    """Draws from its model, and claims to draw evenly."""

    def propose(self, texts: Sequence[Text], length: int, sampler: Any) -> list[Draft]:
        drafts = super().propose(texts, length, sampler)
        even = torch.full((VOCAB,), 1 / VOCAB, dtype=torch.float64)
        return [Draft(d.tokens, even.expand(len(d.tokens), -1) if d.tokens else None) for d in drafts]


def other(kind: type[ModelDrafter] = ModelDrafter) -> ModelDrafter:
    return kind(model(seed=8, layers=1), least_chance=0.0)


DRAFTERS: dict[str, Any] = {
    "suffix": lambda: "suffix",
    "stubborn": Stubborn,
    "model": other,
    "unsure model": lambda: ModelDrafter(model(seed=8, layers=1), least_chance=0.4),
    "same model": lambda: ModelDrafter(model(), least_chance=0.0),
}


@pytest.mark.parametrize("kind", DRAFTERS)
def test_rejection_follows_the_law(kind: str) -> None:
    counts, share = drawn(DRAFTERS[kind](), 3 * BATCH, WARPED)
    assert excess(counts, exact(WARPED)) < 1
    assert share > 0.99 if kind == "same model" else 0.02 < share < 0.9


@pytest.mark.parametrize("kind", ["stubborn", "model"])
def test_rejection_follows_the_law_under_a_penalty(kind: str) -> None:
    counts, _ = drawn(DRAFTERS[kind](), BATCH, PENALISED)
    assert excess(counts, exact(PENALISED)) < 1


def test_a_drafter_that_lies_about_its_probabilities_is_caught() -> None:
    counts, _ = drawn(other(Liar), 3 * BATCH, WARPED)
    assert excess(counts, exact(WARPED)) > 1.5


def test_the_test_tells_laws_apart() -> None:
    counts, _ = drawn("suffix", 3 * BATCH, {**WARPED, "temperature": 1.1})
    assert excess(counts, exact(WARPED)) > 1.2


@pytest.mark.parametrize("honest", [True, False])
def test_a_chain_of_rejections(honest: bool) -> None:
    """100,000 chains of four tokens at once, drafted three at a time, against the product law."""
    draws, rng = 100_000, torch.Generator().manual_seed(5)
    target = torch.rand(HORIZON, VOCAB, VOCAB, generator=rng, dtype=torch.float64).pow(2)  # (depth, before, token)
    target /= target.sum(dim=-1, keepdim=True)
    draft = torch.rand(HORIZON, VOCAB, VOCAB, generator=rng, dtype=torch.float64)
    draft /= draft.sum(dim=-1, keepdim=True)
    claimed = draft if honest else torch.full_like(draft, 1 / VOCAB)
    before = torch.zeros(draws, dtype=torch.long)
    code = torch.zeros(draws, dtype=torch.long)
    for depth in range(HORIZON):  # a chain is rejection at one depth: the rest is drafted anew
        seeds = [(depth << 32) + i for i in range(draws)]
        token = sample(draft[depth][before].log(), keyed_noise(1, seeds, VOCAB))
        out, accepted = reject(
            target[depth][before],
            claimed[depth][before],
            token,
            keyed_uniform(2, seeds),
            keyed_noise(3, seeds, VOCAB),
        )
        assert torch.equal(out == token, accepted)
        before, code = out, code * VOCAB + out
    law = target[0][0]
    for depth in range(1, HORIZON):
        law = (law[:, None] * target[depth].repeat(VOCAB ** (depth - 1), 1)).flatten()
    found = excess(torch.bincount(code, minlength=VOCAB**HORIZON).double(), law)
    assert found < 1 if honest else found > 10
