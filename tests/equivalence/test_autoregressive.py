"""The strategy ``autoregressive`` against the host's own ``generate()``: token for token, and in law.

Bugs these tests catch: positions of a left-padded row counted from the padding; logits of the wrong row; processors
called with a prefix that lacks the padding or the prompt, twice, or for a finished row; ``eos`` banned too long or too
short; a row that goes on after its end, or whose slot is taken by a neighbour; noise that is shared between rows, or
that bends the law.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_hybrid
from tests.models_for_tests import CONTROL, MODELS, VOCAB, hybrid, left_padded


def ends_soon(name: str, seed: int = 4) -> Any:
    return hybrid(name, seed=seed, favours={CONTROL.noise.end: 4.0})


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "min_new_tokens": {"min_new_tokens": 9},
    "min_length": {"min_length": 14},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "bad_words": {"bad_words_ids": [[22], [34, 34], [17, 18], [CONTROL.noise.end]]},
    "suppressed": {"suppress_tokens": list(range(1, 20)), "forced_eos_token_id": CONTROL.noise.end},
    "several": {"num_return_sequences": 2, "repetition_penalty": 1.3, "do_sample": False},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_greedy_equals_the_host(name: str, case: str) -> None:
    model = ends_soon(name)
    arguments = {**left_padded(), "max_new_tokens": 24, **CASES[case]}
    if case == "several":  # the host refuses several greedy answers
        arguments |= {"do_sample": True, "top_k": 1}
    expected = model.generate(**arguments)
    assert torch.equal(model.generate(**arguments, strategy="autoregressive"), expected)


def test_the_cases_have_what_they_claim() -> None:
    """Ends at different times, and every processor changes something."""
    model, base = ends_soon("llama"), {**left_padded(), "max_new_tokens": 24}
    plain = model.generate(**base)[:, 8:]
    lengths = {int((row == CONTROL.noise.end).float().argmax()) for row in plain}
    assert len(lengths) >= 2
    for case, changes in CASES.items():
        if case not in ("plain", "several"):
            changed = model.generate(**base, **changes)[:, 8:]
            assert changed.shape != plain.shape or not torch.equal(changed, plain), case


def test_without_padding_and_with_many_ends() -> None:
    model = ends_soon("llama")
    ids = torch.tensor([[3, 7, 9], [4, 4, 1]])
    arguments = {"max_new_tokens": 20, "eos_token_id": [CONTROL.noise.end, 18, 35]}
    assert torch.equal(model.generate(ids, strategy="autoregressive", **arguments), model.generate(ids, **arguments))


def test_a_model_without_control_tokens_is_served() -> None:
    model = hybrid("llama", favours={CONTROL.tags.topic: 9.0})
    del model.config.hf_hybrid
    arguments = {**left_padded(), "max_new_tokens": 12}
    expected = model.generate(**arguments)
    assert (expected[:, 8:] == CONTROL.tags.topic).any(), "an id like any other"
    assert torch.equal(model.generate(**arguments, strategy="autoregressive"), expected)


DRAWS = 600


@pytest.mark.parametrize(
    "host", [{"temperature": 1.4}, {"top_k": 6}, {"top_p": 0.7}], ids=["temperature", "top-k", "top-p"]
)
def test_sampling_follows_the_law_of_the_host(host: dict[str, Any]) -> None:
    """Pairs of tokens against the exact law, by a chi-square test with a false-alarm rate of 1e-4."""
    model, prompt = hybrid(seed=4, favours={CONTROL.noise.end: -99.0}), torch.tensor([[3, 7, 9]])
    arguments = {"do_sample": True, "top_k": 0, "max_new_tokens": 2, **host}
    rows = model.generate(prompt, strategy="autoregressive", num_return_sequences=DRAWS, seed=5, **arguments)
    drawn: Tensor = rows[:, 3] * VOCAB + rows[:, 4]  # (draws,)
    law = _law(model, prompt, arguments).flatten()  # (vocab * vocab,)
    count = torch.bincount(drawn, minlength=VOCAB * VOCAB).double()
    assert float(count[law == 0].sum()) == 0, "a token that the warpers cut off"
    often = law * DRAWS >= 5  # the usual condition of the test; the rest is one cell
    expected = torch.cat([law[often], law[~often].sum()[None]]) * DRAWS
    found = torch.cat([count[often], count[~often].sum()[None]])
    kept = expected > 0
    cells = int(kept.sum())
    assert cells > 5
    statistic = float(((found - expected)[kept] ** 2 / expected[kept]).sum())
    assert statistic < _chi_square_quantile(cells - 1)


@torch.no_grad()
def _law(model: Any, prompt: Tensor, arguments: dict[str, Any]) -> Tensor:
    """The exact law of two tokens behind ``prompt``, ``(vocab, vocab)``, with the host's own warpers."""
    config = model.generation_config.__class__(**{k: v for k, v in arguments.items() if k != "max_new_tokens"})
    warp = model._get_logits_processor(config, input_ids_seq_length=3, encoder_input_ids=prompt)
    first = warp(prompt, model(prompt).logits[:, -1]).softmax(dim=-1)[0]  # (vocab,)
    both = torch.cat([prompt.expand(VOCAB, -1), torch.arange(VOCAB)[:, None]], dim=1)  # (vocab, 4)
    return first[:, None] * warp(both, model(both).logits[:, -1]).softmax(dim=-1)


def _chi_square_quantile(freedom: int) -> float:
    """The 1 - 1e-4 quantile, by Wilson and Hilferty's cube (1931); 3.719 is the normal one."""
    part = 2 / (9 * freedom)
    return freedom * (1 - part + 3.719 * math.sqrt(part)) ** 3


def test_a_seed_fixes_the_text_and_rows_differ() -> None:
    model, prompt = hybrid(seed=4), torch.tensor([[3, 7, 9]])

    def sample(**settings: Any) -> Tensor:
        arguments = {"do_sample": True, "top_k": 0, "temperature": 1.5, "max_new_tokens": 12}
        return model.generate(
            prompt, strategy="autoregressive", num_return_sequences=4, **arguments, **settings
        )  # (4, 15)

    first = sample(seed=3)
    assert torch.equal(first, sample(seed=3)) and len({tuple(row) for row in first.tolist()}) == 4
    assert not torch.equal(first, sample(seed=100))
    assert torch.equal(first[1:], sample(seed=[4, 5, 6, 7])[:3])
    torch.manual_seed(0)
    unset = sample()
    torch.manual_seed(0)
    assert torch.equal(unset, sample()), "torch.manual_seed fixes the text too"
    assert hf_hybrid.control_tokens(model) == CONTROL
