"""From an example to clean rows: where every token stands, whose text it is, and what it should predict.

Two forms of the same answer are trained:

* plain: ``prompt text eos``, one span, consecutive positions;
* planned: ``prompt <par> (text plan spans <sync/>)* text eos`` (`hf_hybrid.core.plan`), where every span starts at the
  plan's end plus the planned lengths before it and reads the trunk and, in dag form, the parts that it names. In dense
  form the whole round is one span.

``<par>`` is an input switch: it is never a target, and nothing is learned about what follows the prompt in planned
form.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Literal

from hf_hybrid.core.plan import ControlTokens, Plan, Span
from hf_hybrid.training.examples import Example, Part, Round

IGNORE = -100
"""Target of a row without a term in the loss (the host's convention)."""

Form = Literal["plain", "sparse", "dag", "dense"]


@dataclass(frozen=True)
class Lane:
    """A stretch of text that noisy blocks may be cut from.

    Attributes:
        span: whose text. start: position of ``tokens[0]``. tokens: what is to be written, its terminator included.
        tail: True: positions behind the terminator are trained to hold ``<spad>``.
        fixed: offsets of tokens that are given (openings inside a dense round), never hidden.
        whole: True: the lane is one block (dense), never a window of it.
    """

    span: int
    start: int
    tokens: tuple[int, ...]
    tail: bool = True
    fixed: frozenset[int] = frozenset()
    whole: bool = False


@dataclass
class Layout:
    """The clean rows of one example, in text order, and the lanes for noisy rows."""

    tokens: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    span: list[int] = field(default_factory=list)
    target: list[int] = field(default_factory=list)
    depends: list[set[int]] = field(default_factory=list)
    lanes: list[Lane] = field(default_factory=list)

    def new_span(self, depends: set[int]) -> int:
        """A span that reads ``depends`` (a transitive set); its id."""
        self.depends.append(depends | {len(self.depends)})
        return len(self.depends) - 1

    def write(self, span: int, start: int, tokens: tuple[int, ...], targets: tuple[int, ...]) -> int:
        """Append clean rows at consecutive positions; the position behind them."""
        self.tokens += tokens
        self.position += range(start, start + len(tokens))
        self.span += [span] * len(tokens)
        self.target += targets
        return start + len(tokens)


def lay_out(
    example: Example,
    form: Form,
    control: ControlTokens,
    rng: random.Random,
    longer_plan: float = 0.15,
    guessed_lengths: float = 0.0,
) -> Layout:
    """Clean rows and lanes of ``example``.

    Args:
        form: plain, or planned with sparse, dag or dense visibility.
        control: ids of the tags.
        rng: decides which planned lengths are one bucket longer than needed.
        longer_plan: share of such lengths, so that a too long plan is nothing new in decoding.
        guessed_lengths: share of the planned lengths that rows read as a random one (not in dense form), while what
            they should predict stays the true one. A decoded length is a guess: a part must end where its text ends,
            and not where the plan said.
    """
    if form == "plain":
        layout = Layout()
        trunk = layout.new_span(set())
        answer = (*example.answer, control.eos)
        first = len(example.prompt)
        targets = (IGNORE,) * (first - 1) + answer
        layout.write(trunk, 0, (*example.prompt, *answer[:-1]), targets)
        layout.lanes.append(Lane(trunk, first, answer))
        return layout
    return _Planned(example, form, control, rng, longer_plan, guessed_lengths).layout


class _Planned:
    """Builds the planned form, piece by piece."""

    def __init__(
        self,
        example: Example,
        form: Form,
        control: ControlTokens,
        rng: random.Random,
        longer_plan: float,
        guessed_lengths: float,
    ):
        self.guessed_lengths = 0.0 if form == "dense" else guessed_lengths
        self.layout, self.form, self.control, self.rng, self.longer_plan = Layout(), form, control, rng, longer_plan
        self.trunk = self.layout.new_span(set())
        switch = (*example.prompt, control.par)
        self.at = self.layout.write(self.trunk, 0, switch, (IGNORE,) * len(switch))
        self.segment: list[int] = []  # trunk tokens behind the switch, not laid out yet
        for piece in example.pieces:
            if piece and isinstance(piece[0], Part):
                self._round(piece)  # type: ignore[arg-type]
            else:
                self.segment += piece  # type: ignore[arg-type]
        self._end_segment((), control.eos)

    def _end_segment(self, plan: tuple[int, ...], terminator: int, shown: tuple[int, ...] = ()) -> None:
        """Write the trunk text and plan gathered so far. The last row before them predicts their first token.

        Args:
            shown: the plan as rows read it, when lengths were guessed.
        """
        tokens = (*self.segment, *plan)
        self.layout.target[-1] = (*tokens, terminator)[0]
        self.layout.lanes.append(Lane(self.trunk, self.at, (*tokens, terminator), tail=terminator == self.control.eos))
        read = (*self.segment, *(shown or plan))
        self.at = self.layout.write(self.trunk, self.at, read, (*tokens[1:], terminator) if tokens else ())
        self.segment = []

    def _plan(self, parts: Round) -> Plan:
        sizes = [n for n, _ in self.control.lengths]
        spans: list[Span] = []
        for part in parts:
            index = next((i for i, n in enumerate(sizes) if n >= len(part.text)), len(sizes) - 1)
            if self.rng.random() < self.longer_plan:
                index = min(index + 1, len(sizes) - 1)
            spans.append(Span(part.label, sizes[index], tuple(sorted(part.depends))))
        return Plan(tuple(spans))

    def _guessed(self, plan: Plan) -> Plan:
        """The plan with random lengths in the place of some."""
        if not self.guessed_lengths:
            return plan
        longest = 2 * max(span.length for span in plan.spans)
        sizes = [n for n, _ in self.control.lengths if n <= longest]
        spans = (
            replace(span, length=self.rng.choice(sizes)) if self.rng.random() < self.guessed_lengths else span
            for span in plan.spans
        )
        return Plan(tuple(spans))

    def _round(self, parts: Round) -> None:
        layout, control = self.layout, self.control
        true = self._plan(parts)
        plan = self._guessed(true)
        self._end_segment(true.render(control), control.async_, plan.render(control))
        before = set(range(len(layout.depends)))  # every trunk segment and span so far
        starts = plan.starts(self.at)
        last = self.at
        if self.form == "dense":
            last = self._dense_round(parts, plan, starts, before)
        else:
            first_id = len(layout.depends)
            related = plan.depends("dag" if self.form == "dag" else "sparse")
            for index, (part, span, start) in enumerate(zip(parts, plan.spans, starts, strict=True)):
                seen = {first_id + int(k) for k in related[index].nonzero().flatten()}
                own = layout.new_span(before | seen)
                # <async> predicts its label and is forced; the label's last token predicts the text.
                body = (*part.text, control.spad)
                targets = (IGNORE,) * len(span.label) + body
                end = layout.write(own, start, (control.async_, *span.label, *part.text), targets)
                layout.lanes.append(Lane(own, start + span.opening, body))
                last = max(last, end)
        self._next_segment(last)

    def _dense_round(self, parts: Round, plan: Plan, starts: tuple[int, ...], before: set[int]) -> int:
        """The whole round as one span: parts stand at their planned places, gaps hold nothing in clean form and
        ``<spad>`` when noisy. What a part has beyond its planned length is cut off.
        """
        layout, control = self.layout, self.control
        own = layout.new_span(before)
        end = starts[0]
        canvas: list[int] = []
        fixed: set[int] = set()
        for part, span, start in zip(parts, plan.spans, starts, strict=True):
            opening = (control.async_, *span.label)
            body = (*part.text, control.spad)
            text = part.text[: span.length]
            fixed |= set(range(start - starts[0], start - starts[0] + span.opening))
            canvas += [*opening, *text, *[control.spad] * (span.length - len(text))]
            targets = (IGNORE,) * len(span.label) + body[: len(text) + 1]  # a cut text has not ended
            end = layout.write(own, start, (*opening, *text), targets)
        layout.lanes.append(Lane(own, starts[0], tuple(canvas), fixed=frozenset(fixed), whole=True))
        return end

    def _next_segment(self, at: int) -> None:
        """``<sync/>`` opens the next trunk segment, which reads everything."""
        self.trunk = self.layout.new_span(set(range(len(self.layout.depends))))
        self.at = self.layout.write(self.trunk, at, (self.control.sync,), (IGNORE,))
