"""Theorem 4 for sampling, with 100,000 draws for every rule: what the pipeline writes follows the law of the model.

A text is a function of its seed, so the claim has two halves. A slow-motion oracle of the rules, over tables of exact
probabilities (a vocabulary of six, four tokens), draws 100,000 texts at once, which a chi-square test compares with the
exact law (false-alarm rate 1e-4, fixed seeds). And the pipeline writes, seed for seed, what the oracle says.

Bugs these tests catch: those of ``test_speculative_law.py``, at effects ten times smaller; and noise that is not the
one that the rule names.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_hybrid.core.acceptance import keyed_noise, keyed_uniform, reject, sample
from hf_hybrid.decoding.sampling import DRAW
from hf_hybrid.decoding.speculative import _ACCEPT, _REDRAW
from tests.equivalence.test_speculative_law import (
    HORIZON,
    PENALISED,
    PROMPT,
    VOCAB,
    WARPED,
    Stubborn,
    exact,
    excess,
    model,
    other,
)

DRAWS, SAME = 100_000, 300
SETTINGS = {"warped": WARPED, "penalised": PENALISED}
STUBBORN = torch.tensor([2, 5, 0])


@cache
def table(name: str, mine: bool) -> list[Tensor]:
    """For every length, the probabilities behind every prefix ``(vocab ** length, vocab)``: of the model, or of the one
    that drafts, which no processor that reads the text acts on."""
    host = model() if mine else model(seed=8, layers=1)
    settings = SETTINGS[name] if mine else WARPED
    config = host.generation_config.__class__(**settings)
    warp = host._get_logits_processor(config, input_ids_seq_length=3, encoder_input_ids=PROMPT)
    prefixes, found = PROMPT, list[Tensor]()
    with torch.no_grad():
        for _ in range(HORIZON):
            found.append(warp(prefixes, host(prefixes).logits[:, -1]).softmax(dim=-1))
            tokens = torch.arange(VOCAB).repeat(len(prefixes))[:, None]
            prefixes = torch.cat([prefixes.repeat_interleave(VOCAB, dim=0), tokens], dim=1)
    return found


def oracle(name: str, rule: str, draws: int) -> Tensor:
    """Codes of the texts of seeds 0 to ``draws``, ``(draws,)``. Of four tokens the last is never drafted: a pass writes
    one more than it checks."""
    code = torch.zeros(draws, dtype=torch.long)
    place = torch.zeros(draws, dtype=torch.long)  # of a token in the draft of its round

    def noise(salt: int, t: int) -> Tensor:
        return keyed_noise([seed ^ salt for seed in range(draws)], [3 + t] * draws, VOCAB)

    for t in range(HORIZON):
        target = table(name, True)[t][code]  # (draws, vocab)
        if rule == "shared noise" or t == HORIZON - 1:
            out = sample(target.log(), noise(0 if rule == "shared noise" else _REDRAW, t))
        else:
            if rule == "stubborn":
                drafted = STUBBORN[place]
                claimed = torch.nn.functional.one_hot(drafted, VOCAB).double()
            else:
                claimed = table(name, False)[t][code]
                drafted = sample(claimed.log(), noise(DRAW, t))
            if rule == "liar":
                claimed = torch.full_like(claimed, 1 / VOCAB)
            uniform = keyed_uniform([seed ^ _ACCEPT for seed in range(draws)], [3 + t] * draws)
            out, stands = reject(target, claimed, drafted, uniform, noise(_REDRAW, t))
            place = torch.where(stands, place + 1, 0)
        code = code * VOCAB + out
    return code


RULES: dict[str, tuple[dict[str, Any], Any]] = {
    "shared noise": ({}, other),
    "model": ({"acceptance": "rejection"}, other),
    "stubborn": ({"acceptance": "rejection"}, Stubborn),
}
"""Rule -> what a call says, and its drafter."""


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("rule", RULES)
def test_a_hundred_thousand_draws_follow_the_law_and_are_those_of_the_pipeline(rule: str, name: str) -> None:
    code = oracle(name, rule, DRAWS)
    assert excess(torch.bincount(code, minlength=VOCAB**HORIZON).double(), exact(SETTINGS[name])) < 1
    options, drafter = RULES[rule]
    weights = VOCAB ** torch.arange(HORIZON - 1, -1, -1)
    ids = model().generate(
        PROMPT,
        strategy="speculative",
        drafter=drafter(),
        draft_length=3,
        adaptive=False,
        max_new_tokens=HORIZON,
        num_return_sequences=SAME,
        seed=0,
        **options,
        **SETTINGS[name],
    )
    assert torch.equal((ids[:, 3:] * weights).sum(dim=1), code[:SAME])


def test_a_drafter_that_lies_about_its_probabilities_is_caught() -> None:
    code = oracle("warped", "liar", DRAWS)
    assert excess(torch.bincount(code, minlength=VOCAB**HORIZON).double(), exact(WARPED)) > 10
