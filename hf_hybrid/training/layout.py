"""From an example to clean rows: each token's position, its span, and what it should predict.

Two forms of the same answer are trained:

* plain: ``prompt text eos``, one span, consecutive positions;
* planned: ``prompt switch (text plan spans resume)* text eos`` (`hf_hybrid.core.grammars`), where every span starts
  behind its own entry of the plan, shifted by the planned lengths before it, and reads the trunk up to that entry
  and, in dag form, the parts that it names. So a part need not wait for the rest of the plan in decoding. In dense form
  the whole round is one span, which reads the whole plan.

The trunk of a round is a chain of spans, one per entry of the plan: its first entry belongs to the segment before it.
With the trunk at id s, part k (from 0) has the id s + 1 + 2k and its entry, for k > 0, the id s + 2k.

The switch is never a target: in planned form nothing is learned about what follows the prompt.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Literal

from hf_hybrid.core.grammars import Grammar
from hf_hybrid.core.plan import Plan, Span
from hf_hybrid.training.examples import Example, Part, Parts

IGNORE = -100
"""Target of a row without a term in the loss (the host's convention)."""

Form = Literal["plain", "sparse", "dag", "dense"]


@dataclass(frozen=True)
class Stretch:
    """Consecutive tokens that noisy blocks are cut from.

    Attributes:
        span: id of the span. start: position of ``tokens[0]``. tokens: what is to be written, with its terminator.
        tail: True: positions behind the terminator are trained to hold the filler.
        fixed: offsets of tokens that are never hidden (openings inside a dense round).
        whole: True: the stretch is one block (dense), never a window of it.
        breaks: ``(offset, span)``, rising: from this offset on the tokens belong to another span (entries of a plan).
    """

    span: int
    start: int
    tokens: tuple[int, ...]
    tail: bool = True
    fixed: frozenset[int] = frozenset()
    whole: bool = False
    breaks: tuple[tuple[int, int], ...] = ()

    def span_at(self, offset: int) -> int:
        """The span of the token at ``offset``."""
        return next((span for begin, span in reversed(self.breaks) if offset >= begin), self.span)


@dataclass
class Layout:
    """The clean rows of one example, in text order, and the stretches that noisy rows come from."""

    tokens: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    span: list[int] = field(default_factory=list)
    target: list[int] = field(default_factory=list)
    depends: list[set[int]] = field(default_factory=list)
    stretches: list[Stretch] = field(default_factory=list)

    def new_span(self, depends: set[int]) -> int:
        """Make a span that reads ``depends`` (a transitive set) and return its id."""
        self.depends.append(depends | {len(self.depends)})
        return len(self.depends) - 1

    def write(self, span: int, start: int, tokens: tuple[int, ...], targets: tuple[int, ...]) -> int:
        """Append clean rows at consecutive positions; returns the position behind them."""
        self.tokens += tokens
        self.position += range(start, start + len(tokens))
        self.span += [span] * len(tokens)
        self.target += targets
        return start + len(tokens)


def lay_out(
    example: Example,
    form: Form,
    grammar: Grammar,
    rng: random.Random,
    longer_plan: float = 0.15,
    guessed_lengths: float = 0.0,
) -> Layout:
    """Lay ``example`` out as clean rows and stretches.

    Args:
        form: plain, or planned with sparse, dag or dense visibility.
        grammar: of the plans.
        rng: decides which planned lengths are one step longer than needed.
        longer_plan: share of such lengths, so that the model has seen plans that are too long.
        guessed_lengths: share of the planned lengths that rows read as random ones (not in dense form); the target
            stays the true length. In decoding a length is a guess: a part must end where its text ends, not where the
            plan said.
    """
    if form == "plain":
        layout = Layout()
        trunk = layout.new_span(set())
        answer = (*example.answer, grammar.end)
        first = len(example.prompt)
        targets = (IGNORE,) * (first - 1) + answer
        layout.write(trunk, 0, (*example.prompt, *answer[:-1]), targets)
        layout.stretches.append(Stretch(trunk, first, answer))
        return layout
    return _Planned(example, form, grammar, rng, longer_plan, guessed_lengths).layout


class _Planned:
    """Builds the planned form, piece by piece."""

    def __init__(
        self,
        example: Example,
        form: Form,
        grammar: Grammar,
        rng: random.Random,
        longer_plan: float,
        guessed_lengths: float,
    ):
        self.guessed_lengths = 0.0 if form == "dense" else guessed_lengths
        self.layout, self.form, self.grammar, self.rng, self.longer_plan = Layout(), form, grammar, rng, longer_plan
        self.trunk = self.layout.new_span(set())
        switch = (*example.prompt, *grammar.switch)
        self.at = self.layout.write(self.trunk, 0, switch, (IGNORE,) * len(switch))
        self.segment: list[int] = []  # trunk tokens behind the switch, not laid out yet
        for piece in example.pieces:
            if piece and isinstance(piece[0], Part):
                self._round(piece)  # type: ignore[arg-type]
            else:
                self.segment += piece  # type: ignore[arg-type]
        self._end_segment(grammar.end)

    def _end_segment(self, terminator: int, plan: Plan | None = None, shown: Plan | None = None) -> None:
        """Write the trunk text gathered so far and the plan behind it; the row before them predicts their first token.

        Args:
            plan: the targets. shown: the plan that rows read, which may have guessed lengths.
        """
        layout, spans = self.layout, self._spans_of_entries(plan)
        entries = self.grammar.entries(plan) if plan else ()
        tokens = [*self.segment, *(token for entry in entries for token in entry), terminator]
        layout.target[-1] = tokens[0]
        offsets = accumulate((len(entry) for entry in entries), initial=len(self.segment))
        breaks = tuple((at, span) for at, span in zip(offsets, spans, strict=False) if span != self.trunk)
        tail = terminator == self.grammar.end
        layout.stretches.append(Stretch(self.trunk, self.at, tuple(tokens), tail=tail, breaks=breaks))
        read = zip(spans, self.grammar.entries(shown) if shown else (), strict=True)
        for span, piece in [(self.trunk, tuple(self.segment)), *read]:
            targets, tokens = tokens[1 : 1 + len(piece)], tokens[len(piece) :]
            self.at = layout.write(span, self.at, piece, tuple(targets))
        self.segment = []

    def _spans_of_entries(self, plan: Plan | None) -> list[int]:
        """The span of every entry; makes those that are new, and those of the parts between them."""
        layout = self.layout
        if plan is None or self.form == "dense":
            return [self.trunk] * (len(plan.spans) if plan else 0)
        related = plan.depends("dag" if self.form == "dag" else "sparse")
        read, entries = set(layout.depends[self.trunk]), list[int]()
        for k, named in enumerate(related.tolist()):
            entries.append(layout.new_span(read) if k else self.trunk)
            read = read | {entries[-1]}
            layout.new_span(read | {self.trunk + 1 + 2 * j for j, reads in enumerate(named) if reads})
        return entries

    def _plan(self, parts: Parts) -> Plan:
        sizes = self.grammar.lengths
        spans: list[Span] = []
        for part in parts:
            index = next((i for i, n in enumerate(sizes) if n >= len(part.text)), len(sizes) - 1)
            if self.rng.random() < self.longer_plan:
                index = min(index + 1, len(sizes) - 1)
            spans.append(Span(part.label, sizes[index], tuple(sorted(part.depends))))
        return Plan(tuple(spans))

    def _guessed(self, plan: Plan) -> Plan:
        """The plan with some of its lengths replaced by random ones."""
        if not self.guessed_lengths:
            return plan
        longest = 2 * max(span.length for span in plan.spans)
        sizes = [size for size in self.grammar.lengths if size <= longest]
        spans = (
            replace(span, length=self.rng.choice(sizes)) if self.rng.random() < self.guessed_lengths else span
            for span in plan.spans
        )
        return Plan(tuple(spans))

    def _round(self, parts: Parts) -> None:
        layout, grammar = self.layout, self.grammar
        true = self._plan(parts)
        plan = self._guessed(true)
        begin = self.at + len(self.segment)
        self._end_segment(grammar.plan_end, true, plan)
        if self.form == "dense":
            self._next_segment(self._dense_round(parts, plan))
            return
        last = self.at
        for index, (part, span, start) in enumerate(zip(parts, plan.spans, grammar.starts(plan, begin), strict=True)):
            own = self.trunk + 1 + 2 * index
            # An opening is forced and nothing in it is a target; its last token predicts the text.
            opening, body = grammar.opening(span), (*part.text, grammar.part_end)
            targets = (IGNORE,) * (len(opening) - 1) + body
            end = layout.write(own, start, (*opening, *part.text), targets)
            layout.stretches.append(Stretch(own, start + len(opening), body))
            last = max(last, end)
        self._next_segment(last)

    def _dense_round(self, parts: Parts, plan: Plan) -> int:
        """Lay the whole round out as one span, with every part at its planned position.

        Gaps have no clean rows; noisy rows hold the end of a part there. Text beyond a planned length is cut off.
        """
        layout, grammar = self.layout, self.grammar
        own = layout.new_span(set(range(len(layout.depends))))
        starts = grammar.dense_starts(plan, self.at)
        end = starts[0]
        canvas: list[int] = []
        fixed: set[int] = set()
        for part, span, start in zip(parts, plan.spans, starts, strict=True):
            opening = grammar.opening(span)
            body = (*part.text, grammar.part_end)
            text = part.text[: span.length]
            fixed |= set(range(start - starts[0], start - starts[0] + len(opening)))
            canvas += [*opening, *text, *[grammar.part_end] * (span.length - len(text))]
            targets = (IGNORE,) * (len(opening) - 1) + body[: len(text) + 1]  # a cut text has not ended
            end = layout.write(own, start, (*opening, *text), targets)
        layout.stretches.append(Stretch(own, starts[0], tuple(canvas), fixed=frozenset(fixed), whole=True))
        return end

    def _next_segment(self, at: int) -> None:
        """Begin the next trunk segment, which reads everything before it."""
        self.trunk = self.layout.new_span(set(range(len(self.layout.depends))))
        resume = self.grammar.resume
        self.at = self.layout.write(self.trunk, at, resume, (IGNORE,) * len(resume))
