"""The off-switch in a real call, on a clock of its own: a pass takes 1 and a twentieth for each further row, a drafted
token what the drafter costs.

Bugs these tests catch: a drafter that goes on although it never pays; one that has nothing to say and is asked before
every pass; probes that are charged for the pass alone and not for the draft; drafting that is off where it pays.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_hybrid import Draft, Drafter, Text
from hf_hybrid.decoding import drafting, loop, session
from hf_hybrid.decoding.draft_length import PROBE_SHARE
from hf_hybrid.decoding.writers import speculative
from tests.models_for_tests import VOCAB, hybrid, watching

LENGTH = 240
STARTING = 12.0
"""Passes of plain decoding that it may take to find out what a drafter is worth."""


class Clock:
    """Tells the time that passes and drafts are said to take."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Paid(Drafter):
    """Drafts the right tokens, or wrong ones, or none, at a cost."""

    costly = True

    def __init__(self, clock: Clock, answer: list[int], cost: float, right: float, silent: bool = False):
        self.clock, self.answer, self.cost, self.right, self.silent = clock, answer, cost, right, silent
        self.draws = random.Random(0)

    def propose(self, texts: Sequence[Text], length: int, sampler: Any) -> list[Draft]:
        self.clock.now += self.cost * (1 if self.silent else length)
        done = len(texts[0].tokens) - texts[0].prompt_length
        tokens = [] if self.silent else self.answer[done : done + length]
        return [Draft([t if self.draws.random() < self.right else (t + 1) % VOCAB for t in tokens])]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made: Any = Clock()
    for module in (drafting, session, speculative, loop):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=made.perf_counter))
    return made


@pytest.fixture
def host(clock: Clock) -> Iterator[Any]:
    """A new model, of which no costs are known."""
    made = hybrid("llama", seed=26, max_position_embeddings=512)

    def take(_: Any, __: Any, arguments: dict[str, Any]) -> None:
        clock.now += 1 + (arguments["input_ids"].numel() - 1) / 20

    hook = made.register_forward_pre_hook(watching(take), with_kwargs=True)
    yield made
    hook.remove()


def timed(clock: Clock, host: Any, **settings: Any) -> tuple[float, Any]:
    began = clock.now
    options = {"min_new_tokens": LENGTH, "max_new_tokens": LENGTH, "do_sample": False, "return_dict_in_generate": True}
    output = host.generate(torch.tensor([[3, 7, 9, 2, 11]]), **options, **settings)
    return clock.now - began, output


@pytest.mark.parametrize(
    ("cost", "right", "silent"),
    [(0.3, 0.0, False), (0.95, 0.5, False), (0.02, 0.0, False), (0.3, 0.0, True)],
    ids=["wrong", "as slow as the model", "cheap and wrong", "silent"],
)
def test_what_does_not_pay_is_switched_off(clock: Clock, host: Any, cost: float, right: float, silent: bool) -> None:
    plain, expected = timed(clock, host, strategy="autoregressive")
    drafter = Paid(clock, expected.sequences[0, 5:].tolist(), cost, right, silent)
    first, found = timed(clock, host, strategy="speculative", drafter=drafter)
    again, more = timed(clock, host, strategy="speculative", drafter=drafter)
    for output in (found, more):
        assert torch.equal(output.sequences, expected.sequences)
    # One probe is allowed once its share of the past would pay for it, so the last one may be just behind.
    assert first <= plain * (1 + PROBE_SHARE) + STARTING
    assert again <= plain * (1 + PROBE_SHARE) + STARTING / 2, "what was found out is known in the next call"
    report = more.report[0].drafting
    assert report.off > LENGTH / 2
    asked = report.empty if silent else report.probes
    # The last pass has room for no draft, which counts as an empty one.
    assert silent < asked < LENGTH / 2, "it goes on looking"


def test_what_pays_stays_on(clock: Clock, host: Any) -> None:
    plain, expected = timed(clock, host, strategy="autoregressive")
    drafter = Paid(clock, expected.sequences[0, 5:].tolist(), 0.1, 0.97)
    seconds, found = timed(clock, host, strategy="speculative", drafter=drafter)
    assert torch.equal(found.sequences, expected.sequences)
    assert found.report[0].drafting.share_off < 0.05 and seconds < plain / 2
