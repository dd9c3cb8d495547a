"""Theorem 8: the training mask, restricted to what decoding sees, is the decoding mask, for both commits.

The engine is led along a known answer: the model computes real logits in every pass, which are kept, and the engine
gets one-hot logits of the answer instead. What the engine carried must be what `lay_out` lays out, and the kept logits
must be those of one training forward over the same rows.

Catches: a span, ``<sync/>`` or window that decoding puts elsewhere than training, dependencies that only one of them
closes transitively, a plan rendered differently, an opening that is learned at another position, gaps of a dense round
that only one of them fills, and any pass of the engine that sees more or less than the training mask allows.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from models_for_tests import tiny
from oracles import Row, clean, pack
from torch import Tensor
from training_examples import BARE, CONTROL, FORMS, OVERRUN, PAD, TWO_ROUNDS, batch_of, rows_of

import hf_hybrid
from hf_hybrid import Plan, Span
from hf_hybrid.core.canvas import Canvas
from hf_hybrid.core.grammars import grammar_of
from hf_hybrid.core.rows import PADDING, Rows
from hf_hybrid.models.cached import CachedRunner
from hf_hybrid.models.runner import Scores
from hf_hybrid.training.collators import CollatorSettings, HybridCollator
from hf_hybrid.training.examples import Example
from hf_hybrid.training.layout import IGNORE, Form, Layout, lay_out
from hf_hybrid.training.objectives import attention_mask

# Sums of a few dozen products of order ten in another order, float64, two layers: 1e-13 at most was seen.
TOLERANCE = 1e-10
WINDOW = 4


def model() -> Any:
    made = tiny("llama", eos_token_id=CONTROL.noise.end, pad_token_id=PAD)
    made.config.hf_hybrid = {
        "mask_token_id": CONTROL.noise.mask,
        "par": CONTROL.tags.par,
        "topic": CONTROL.tags.topic,
        "async": CONTROL.tags.async_,
        "sync": CONTROL.tags.sync,
        "spad": CONTROL.noise.filler,
        "lengths": [list(pair) for pair in CONTROL.tags.lengths],
        "depends": list(CONTROL.tags.depends),
    }
    return hf_hybrid.enable(made)


@torch.no_grad()
def training_logits(made: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits ``(rows, vocab)`` of the training forward over one collated example."""
    return made(
        input_ids=batch["input_ids"],
        position_ids=batch["position"],
        attention_mask=attention_mask(batch),
        use_cache=False,
    ).logits[0]


@dataclass
class Led:
    """What the engine did: every pass with its real logits, the lanes it ended with, and its CachedRunner."""

    passes: list[tuple[list[Row], Tensor]] = field(default_factory=list)
    canvas: Canvas | None = None
    runner: CachedRunner | None = None
    answer: list[int] = field(default_factory=list)

    # A streamer: the engine shows it the canvas.
    def put(self, tokens: Tensor) -> None: ...
    def end(self) -> None: ...
    def put_canvas(self, canvas: Canvas, mask_token: int) -> None:
        self.canvas = canvas


Lead = Callable[..., Led]


@pytest.fixture
def lead(monkeypatch: pytest.MonkeyPatch) -> Lead:
    """Decode along a layout's answer: ``lead(model, example, layout, **settings)``."""

    def go(made: Any, example: Example, layout: Layout, **settings: Any) -> Led:
        led, real = Led(), CachedRunner.run
        nexts, here = answer_of(layout)

        def run(self: CachedRunner, tokens: Tensor, rows: Rows, keep: int, **options: Any) -> Scores:
            logits = real(self, tokens, rows, keep, **options).logits
            columns = (tokens, rows.position, rows.span, rows.noisy, rows.anchor, rows.block)
            seen = [Row(*r) for r in zip(*(c[0].tolist() for c in columns), strict=True)]
            led.runner = self
            led.passes.append((seen, torch.cat([logits.new_zeros(len(seen) - keep, logits.shape[-1]), logits[0]])))
            forced = torch.zeros_like(logits)
            for column, row in enumerate(seen[len(seen) - keep :]):
                token = here(row) if row.noisy else nexts.get((row.span, row.position, row.token))
                if token is not None:
                    # Every third position is unsure, so that windows fill piece by piece.
                    forced[0, column, token] = 3.0 if row.noisy and row.position % 3 == 0 else 30.0
            return Scores(forced)

        with monkeypatch.context() as patch:
            patch.setattr(CachedRunner, "run", run)
            ids = torch.tensor([example.prompt])
            out = made.generate(ids, max_new_tokens=100, do_sample=False, streamer=led, **settings)
        led.answer = out[0, len(example.prompt) :].tolist()
        return led

    return go


def answer_of(layout: Layout) -> tuple[dict[tuple[int, int, int], int], Callable[[Row], int | None]]:
    """Next token behind a clean row ``(span, position, token)``, and the token at the position of a noisy row."""
    columns = zip(layout.span, layout.position, layout.tokens, layout.target, strict=True)
    nexts = {(s, p, token): target for s, p, token, target in columns if target != IGNORE}

    def here(row: Row) -> int | None:
        for stretch in layout.stretches:
            if row.span in (stretch.span, *(span for _, span in stretch.breaks)) and row.position >= stretch.start:
                offset = row.position - stretch.start
                if offset < len(stretch.tokens):
                    return stretch.tokens[offset]
                return CONTROL.noise.filler if stretch.tail else None
        return None

    return nexts, here


def check_rows(led: Led, layout: Layout) -> None:
    """Lanes, committed rows and dependencies of the engine are those of the layout."""
    assert led.canvas is not None and led.runner is not None
    written = [
        (token, lane.start + i, lane.span_at(i))
        for lane in led.canvas.lanes
        for i, token in enumerate(lane.tokens)
        if token != CONTROL.noise.end
    ]
    laid_out = list(zip(layout.tokens, layout.position, layout.span, strict=True))
    assert written == laid_out
    held = led.runner.committed(0)
    committed = zip(held.position[0].tolist(), held.span[0].tolist(), strict=True)
    assert sorted(committed) == sorted((p, s) for _, p, s in laid_out)
    spans = len(layout.depends)
    for span in range(spans):
        assert set(led.runner._slots.depends[0, span, :spans].nonzero()[0].tolist()) == layout.depends[span], span
    assert led.canvas.num_spans == spans


def span_before(layout: Layout, row: Row) -> int:
    """Whose text stands in front of the window of ``row``: all of it is seen, and a plan has a span for every entry."""
    lane = next(lane for lane in layout.stretches if row.span in (lane.span, *(span for _, span in lane.breaks)))
    return lane.span_at(row.anchor - 1 - lane.start)


def check_logits(made: Any, led: Led, layout: Layout) -> tuple[int, int]:
    """Every logit of the engine is that of the training forward; how many clean rows and windows were compared."""
    laid_out = [Row(*r) for r in zip(layout.tokens, layout.position, layout.span, strict=True)]
    index_of = {row[:3]: i for i, row in enumerate(laid_out)}
    rows, compare = list(laid_out), []
    for seen, logits in led.passes:
        # A draft that was wrong (an optimistic <topic>) is no row of the layout, nor is a window behind it.
        strays = {row.span for row in seen if not row.noisy and row.span != PADDING and row[:3] not in index_of}
        window: dict[int, int] = {}
        for i, row in enumerate(seen):
            if row.span in strays or not logits[i].any():
                continue
            if row.noisy:
                block = window.setdefault(row.block, len(rows) + 1)
                rows.append(row._replace(block=block, span=span_before(layout, row)))
                compare.append((len(rows) - 1, logits[i]))
            elif row.span != PADDING:
                compare.append((index_of[row[:3]], logits[i]))
    expected = training_logits(made, batch_of(rows, layout.depends))
    for i, logits in compare:
        torch.testing.assert_close(logits, expected[i], rtol=0, atol=TOLERANCE)
    blocks = {row.block for row in rows if row.noisy}
    return sum(not rows[i].noisy for i, _ in compare), len(blocks)


SPANS: dict[str, dict[str, Any]] = {
    "verified": {},
    "prefix": {"verify_spans": False},
    "block": {"verify_spans": False, "commit": "block"},
    "tokens": {"span_decoding": "autoregressive"},
    "planned-window": {"plan_window": 3},
    "several-entries": {"plan_window": 12, "draft_threshold": 0.0},
}


EXAMPLES = {"two-rounds": TWO_ROUNDS, "bare": BARE, "overrun": OVERRUN}
CASES = [(form, how, name) for form in ("sparse", "dag") for how in SPANS for name in EXAMPLES]
# A dense round has no room to overrun.
CASES += [("dense", how, name) for how in ("prefix", "block") for name in ("two-rounds", "bare")]


@pytest.mark.parametrize("longer_plan", [0.0, 1.0])
@pytest.mark.parametrize(("form", "how", "name"), CASES)
def test_planned_decoding_sees_what_training_showed(
    lead: Lead, form: Form, how: str, name: str, longer_plan: float
) -> None:
    example = EXAMPLES[name]
    made = model()
    layout = lay_out(example, form, grammar_of(CONTROL), random.Random(0), longer_plan)
    led = lead(made, example, layout, strategy="planned_diffusion", visibility=form, window_length=WINDOW, **SPANS[how])
    assert led.answer == [*example.answer, CONTROL.noise.end]
    check_rows(led, layout)
    num_clean, num_blocks = check_logits(made, led, layout)
    assert num_clean >= len(layout.stretches)  # a check behind every stretch at least
    assert (num_blocks == 0) == (how == "tokens")


@pytest.mark.parametrize("how", SPANS)
@pytest.mark.parametrize("form", ["sparse", "dag"])
def test_given_texts_are_seen_as_training_showed_them(lead: Lead, form: Form, how: str) -> None:
    """A given part that reads a written one, and is read by another and by ``<sync/>``, which may run ahead."""
    made, first, second = model(), TWO_ROUNDS.pieces[1], TWO_ROUNDS.pieces[3]
    layout = lay_out(TWO_ROUNDS, form, grammar_of(CONTROL), random.Random(0), 0.0)
    planned = [
        tuple(Span(p.label, length, p.depends) for p, length in zip(parts, lengths, strict=True))  # type: ignore[union-attr]
        for parts, lengths in ((first, (2, 4, 2)), (second, (8, 2)))
    ]
    last = replace(planned[1][1], text=(28, 29))
    given = Plan((planned[0][0], replace(planned[0][1], text=(15, 16, 17)), planned[0][2]), lead=(4, 5))
    for plans in (
        [given, Plan((planned[1][0], last), (6,))],
        [Plan(planned[0], (4, 5)), Plan((planned[1][0], last), (6,))],
    ):
        settings = {"strategy": "planned_diffusion", "visibility": form, "window_length": WINDOW, **SPANS[how]}
        led = lead(made, TWO_ROUNDS, layout, plan=plans, **settings)
        assert led.answer == [*TWO_ROUNDS.answer, CONTROL.noise.end]
        check_rows(led, layout)
        check_logits(made, led, layout)


@pytest.mark.parametrize("settings", [{"commit": "prefix"}, {"commit": "block"}, None])
def test_plain_decoding_sees_what_training_showed(lead: Lead, settings: dict[str, Any] | None) -> None:
    made = model()
    layout = lay_out(TWO_ROUNDS, "plain", grammar_of(CONTROL), random.Random(0))
    if settings is None:
        led = lead(made, TWO_ROUNDS, layout, strategy="autoregressive")
    else:
        led = lead(made, TWO_ROUNDS, layout, strategy="block_diffusion", window_length=WINDOW, **settings)
    assert led.answer == [*TWO_ROUNDS.answer, CONTROL.noise.end]
    laid_out = list(zip(layout.tokens, layout.position, layout.span, strict=True))
    assert led.canvas is not None
    (lane,) = led.canvas.lanes
    assert [(t, i, 0) for i, t in enumerate(lane.tokens[:-1])] == laid_out
    num_clean, num_blocks = check_logits(made, led, layout)
    assert num_clean > 0 and (num_blocks > 0) == (settings is not None)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("form", FORMS)
def test_every_collated_block_is_a_window_of_decoding(form: Form, name: str) -> None:
    """The CachedRunner gives the training logits, with the cache that decoding has when it opens that window."""
    made = model()
    settings = CollatorSettings(num_rows=150, max_spans=12, forms={form: 1.0}, block_lengths={1: 1, 3: 1, 5: 1})
    batch = HybridCollator(CONTROL, PAD, settings, seed=1)([(0, EXAMPLES[name])])
    rows, depends = rows_of(batch), batch["depends"][0]
    expected = training_logits(made, batch)
    committed = [row for row in rows if not row.noisy and row.span != PADDING]
    blocks = sorted({row.block for row in rows if row.noisy})
    assert len(blocks) > 5
    for block in blocks:
        index = [i for i, row in enumerate(rows) if row.noisy and row.block == block]
        first = rows[index[0]]
        runner = CachedRunner(made, 1)
        for span in range(1, first.span + 1):
            runner.relate(0, span, depends[span].nonzero().flatten().tolist())
        # Spans before it and its siblings are committed, its own one up to the anchor, nothing later.
        settled = [r for r in committed if r.span < first.span or (r.span == first.span and r.position < first.anchor)]
        if settled:
            runner.run(*pack([settled]), 0)
            runner.commit()
        window = [rows[i] for i in index]
        got = runner.run(*pack([window]), len(window)).logits[0]
        torch.testing.assert_close(got, expected[index], rtol=0, atol=TOLERANCE)


def test_plain_training_is_the_causal_model() -> None:
    made = model()
    layout = lay_out(TWO_ROUNDS, "plain", grammar_of(CONTROL), random.Random(0))
    with torch.no_grad():
        causal = made(torch.tensor([layout.tokens])).logits[0]
    got = training_logits(made, batch_of(clean(layout.tokens), layout.depends))
    torch.testing.assert_close(got, causal, rtol=0, atol=TOLERANCE)
