"""``recheck_margin``: where rounding might decide a token, a pass without drafts does.

Two tokens that are almost alike (twins) make a tie; a head that favours the second one in every pass that scores more
than one row imitates another order of its sums.

Bugs these tests catch: a token in doubt that is settled, or decided by a pass of several rows again; keys of a row that
is fed twice; a draft that is thrown away although nothing was in doubt; counts that do not add up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_hybrid import SettingsError
from hf_hybrid.core.acceptance import keyed_noise
from hf_hybrid.decoding.recheck import DRIFT
from tests.equivalence.test_speculative import Oracle, answers_of
from tests.models_for_tests import PROMPTS, hybrid, left_padded

LENGTH = 40
BASE: dict[str, Any] = {**left_padded(), "max_new_tokens": LENGTH, "do_sample": False, "hf_hybrid": {}}
TWINS = {31: 32, 17: 18}
"""Token -> the one that almost ties with it."""


def tied(dtype: torch.dtype = torch.float32) -> Any:
    """A model in which some tokens have a twin that scores a hair less, in plain decoding."""
    model = hybrid(seed=13, favours={40: -99.0})  # no end
    head, first, second = model.get_output_embeddings(), list(TWINS), list(TWINS.values())
    with torch.no_grad():
        head.weight = torch.nn.Parameter(head.weight.clone())
        head.weight[second] = head.weight[first]
        head.bias[first] += 1.0  # so that twins lead often
        head.bias[second] = head.bias[first]
    return model.to(dtype)


# By how much logits drift: in bfloat16 as measured (``recheck.py``), though nothing is rechecked there unasked.
DRIFTS = {torch.float32: DRIFT[torch.float32], torch.bfloat16: 2e-2}


@pytest.fixture(params=DRIFTS, ids=str)
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The model, with a head that flips ties in passes that score several rows. The layers are those of float32 for
    either dtype, so that the head alone drifts, by as much as it does in the dtype."""
    drift = DRIFTS[request.param]
    monkeypatch.setitem(DRIFT, torch.float32, drift)
    host = tied()

    def flip(_: Any, __: Any, logits: Tensor) -> Tensor:
        rows = logits.to(request.param).float()
        # A tie goes to the lower id: alone, the first twin leads by a step, and beside others the second one does.
        favoured = list(TWINS) if logits.shape[1] == 1 else list(TWINS.values())
        rows[..., favoured] += drift / 4 * rows.amax(dim=-1, keepdim=True).abs()
        return rows

    hook = host.get_output_embeddings().register_forward_hook(flip)
    yield host
    hook.remove()


def plain(model: Any, **arguments: Any) -> Tensor:
    return model.generate(**{**BASE, **arguments}, strategy="autoregressive")


def speculative(model: Any, drafter: Any, **arguments: Any) -> Any:
    options = {"strategy": "speculative", "adaptive": False, "return_dict_in_generate": True, "draft_length": 6}
    return model.generate(**{**BASE, **options, **arguments}, drafter=drafter)


@pytest.mark.parametrize("kind", ["oracle", "drawn", "normalised", "suffix", "self"])
def test_a_tie_is_decided_as_by_plain_decoding(model: Any, kind: str) -> None:
    arguments: dict[str, Any] = {}
    if kind == "drawn":
        arguments = {"do_sample": True, "temperature": 0.9, "seed": 5}
    elif kind == "normalised":  # log-probabilities: that of the best token is far smaller than its logit
        arguments = {"renormalize_logits": True}
    expected = plain(model, **arguments)
    drafter: Any = kind if kind in ("suffix", "self") else Oracle(answers_of(expected), wrong=0.2)
    found = speculative(model, drafter, **arguments)
    assert torch.equal(found.sequences, expected)
    for report in found.report:
        drafting = report.drafting
        assert drafting.rounds + drafting.off + drafting.empty + drafting.rechecked == report.num_forwards
        assert sum(drafting.accepted) == sum(report.accepted_per_round)
        assert report.num_tokens == LENGTH
    if kind == "oracle":
        assert sum(report.drafting.rechecked for report in found.report) > 8
        assert sum(sum(report.accepted_per_round) for report in found.report) > 8, "not everything is in doubt"


def test_without_it_the_text_parts(model: Any) -> None:
    expected = plain(model)
    found = speculative(model, Oracle(answers_of(expected)), recheck_margin=0)
    assert not torch.equal(found.sequences, expected)
    assert all(report.drafting.rechecked == 0 for report in found.report)


def test_a_margin_of_ones_own() -> None:
    """In float64 nothing is in doubt; with a margin beyond all logits everything is, and the text is the same."""
    model = tied(torch.float64)
    expected = plain(model)
    oracle = Oracle(answers_of(expected))
    none, all_ = speculative(model, oracle), speculative(model, oracle, recheck_margin=1000)
    assert torch.equal(none.sequences, expected) and torch.equal(all_.sequences, expected)
    assert all(sum(report.accepted_per_round) == 0 for report in all_.report)
    assert sum(report.drafting.rechecked for report in all_.report) > LENGTH


def test_when_sampling_the_lead_is_that_of_what_was_drawn() -> None:
    """With its noise: scores that are close are not in doubt when their noise is not."""
    model, own = tied(torch.float64), left_padded((PROMPTS[0],))
    drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "seed": 5}
    text = plain(model, **own, **drawn)
    begin, vocab = len(PROMPTS[0]), model.config.vocab_size
    with torch.no_grad():
        scores = model(text).logits[0, begin - 1 : -1]  # (length, vocab)
    noisy = scores + keyed_noise([5] * LENGTH, list(range(begin, begin + LENGTH)), vocab)
    allowed = noisy.argmax(-1) == text[0, begin:]  # True: no token that is banned would have been drawn
    assert allowed.sum() > LENGTH // 2

    def least_lead(of: Tensor) -> float:
        best = of[allowed].topk(2).values  # (positions, 2)
        return float((best[:, 0] - best[:, 1]).min())

    margin = least_lead(noisy) / 2
    assert least_lead(scores) < margin, "without its noise a token would be in doubt"
    found = speculative(model, Oracle({PROMPTS[0]: text[0, begin:].tolist()}), recheck_margin=margin, **own, **drawn)
    assert torch.equal(found.sequences, text)
    assert found.report[0].drafting.rechecked == 0


def test_a_row_equals_its_own_batch_of_one(model: Any) -> None:
    expected = plain(model)
    for prompt in PROMPTS[:2]:
        own = left_padded((prompt,))
        alone = plain(model, **own)
        found = speculative(model, Oracle(answers_of(expected), wrong=0.3), **own)
        assert torch.equal(found.sequences, alone)


def test_processors_that_read_the_text_are_called_once(model: Any) -> None:
    """They may count their calls, so that nothing is decided twice."""
    found = speculative(model, "suffix", repetition_penalty=1.2)
    assert all(report.drafting.rechecked == 0 for report in found.report)


def test_a_margin_out_of_range_is_refused() -> None:
    with pytest.raises(SettingsError, match="recheck_margin"):
        speculative(tied(torch.float64), "suffix", recheck_margin=-1.0)
