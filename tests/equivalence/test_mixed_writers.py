"""Answers of one batch, and stretches of one answer, that are written in different ways.

Catches: what a writer keeps for a call and not for its answer, drafts or plans that reach the answers of other writers,
and a lane that keeps the window or the rule of whoever wrote it before.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from hf_hybrid.config import Settings, settings_for
from hf_hybrid.core.canvas import Canvas
from hf_hybrid.core.lane import Lane
from hf_hybrid.decoding import engine
from hf_hybrid.decoding.call import Context
from hf_hybrid.decoding.output import GenerationReport
from hf_hybrid.decoding.writer import Shared, Way, Writer
from hf_hybrid.decoding.writers import WRITERS
from tests.models_for_tests import PROMPTS, hybrid, left_padded

OPTIONS: dict[str, Any] = {"max_new_tokens": 40, "return_dict_in_generate": True, "return_control_tokens": True}
WAYS: list[dict[str, Any]] = [
    {"strategy": "planned_diffusion", "window_length": 4},
    {"strategy": "speculative", "adaptive": False, "draft_length": 4},
    {"strategy": "autoregressive"},
    {"strategy": "block_diffusion", "window_length": 4, "confidence_threshold": 0.3, "commit": "block"},
]


def way_of(options: dict[str, Any]) -> Way:
    settings = dict(options)
    name = settings.pop("strategy")
    return Way(name, WRITERS[name], settings_for(name, {**settings, "return_control_tokens": True}))


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_each_answer_of_a_batch_in_its_own_way(monkeypatch: pytest.MonkeyPatch, sampled: bool) -> None:
    model = hybrid(seed=26)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": 1.2} if sampled else {"do_sample": False}
    alone: list[tuple[list[int], str, int]] = []
    for row, (prompt, options) in enumerate(zip(PROMPTS, WAYS, strict=True)):
        out = model.generate(torch.tensor([prompt]), **OPTIONS, **sampling, **options, seed=row)
        alone.append((out.sequences[0, len(prompt) :].tolist(), out.report[0].strategy, out.report[0].num_forwards))
    session, ways = engine.Session, [way_of(options) for options in WAYS]

    def mixed(loop: Any, way: Any, *rest: Any) -> Any:
        return session(loop, lambda canvas: ways[canvas.index], *rest)

    monkeypatch.setattr(engine, "Session", mixed)
    batch = left_padded()
    out = model.generate(**batch, **OPTIONS, **sampling, **WAYS[0], seed=0)
    width = batch["input_ids"].shape[1]
    for row, (tokens, strategy, passes) in enumerate(alone):
        found = out.sequences[row, width:].tolist()
        assert found[: len(tokens)] == tokens and not any(found[len(tokens) :])
        assert (out.report[row].strategy, out.report[row].num_forwards) == (strategy, passes)


class Relay(Writer):
    """The first tokens in one way, the rest in another."""

    STRETCHES: ClassVar[list[tuple[Way, int]]] = []

    def __init__(self, context: Context, shared: Shared | None, canvas: Canvas, report: GenerationReport):
        super().__init__(context, shared, canvas, report)
        self.number = 0
        self.inner = self._next()

    def _next(self) -> Writer:
        way = self.STRETCHES[self.number][0]
        return way.writer(self.context, way.writer.share(self.context, way.settings), self.canvas, self.report)

    def take_over(self, trunk: Lane) -> None:
        self.inner.take_over(trunk)

    def settled(self, lane: Lane, tokens: list[int]) -> None:
        self.inner.settled(lane, tokens)
        if not lane.done and self.canvas.num_new >= self.STRETCHES[self.number][1]:
            self.number += 1
            self.inner = self._next()
            self.inner.take_over(lane)

    def stage(self) -> str:
        return self.inner.stage()

    def look_ahead(self) -> None:
        if self.inner.shared is not None:  # the loop asks what it knows of
            self.inner.shared.prepare([self.inner])

    def __getattribute__(self, name: str) -> Any:
        if name in (
            "allowed",
            "forbidden",
            "terminators",
            "draft",
            "guesses",
            "close",
            "check",
            "accepted",
            "prefix_of",
        ):
            return getattr(object.__getattribute__(self, "inner"), name)
        return object.__getattribute__(self, name)


@pytest.mark.parametrize("first", [1, 2], ids=["speculative first", "autoregressive first"])
def test_stretches_of_one_answer(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    model = hybrid(seed=26, favours={})
    plain = model.generate(torch.tensor([PROMPTS[0]]), **OPTIONS, do_sample=False, strategy="autoregressive")
    one, other = way_of(WAYS[first]), way_of(WAYS[3 - first])
    monkeypatch.setattr(Relay, "STRETCHES", [(one, 7), (other, 16), (one, 1 << 30)])
    monkeypatch.setitem(WRITERS, "autoregressive", Relay)
    out = model.generate(torch.tensor([PROMPTS[0]]), **OPTIONS, do_sample=False, strategy="autoregressive")
    assert torch.equal(out.sequences, plain.sequences) and out.sequences.shape[1] == len(PROMPTS[0]) + 40
    assert sum(out.report[0].accepted_per_round) > 0, "drafts were checked on the way"
    assert isinstance(one.settings, Settings)
