"""Plans: the parts of an answer, their lengths and dependencies, and the grammar that writes them as tokens.

    answer := text eos | <par> (text? round)* text? eos
    round  := (<topic> label <len:N> <dep:i>*)+ (<async> label text)+ <sync/>

A label ends where its ``<len:N>`` begins; the length is a token of its own, never digits in a label. ``<dep:i>`` names
the i-th part (from 1) of the same round, always an earlier one, in rising order. The tags follow Planned Diffusion
(Israel et al., 2025, section 3); the length token, the dependencies and the text between the rounds are ours.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from hf_hybrid.core.given import PlanError, numbers, whole
from hf_hybrid.core.rows import transitive_closure


@dataclass(frozen=True)
class ControlTokens:
    """Ids of the mask token and of the control tags.

    Attributes:
        mask: stands at an open position. eos: ends the answer. par: input switch for a planned answer, never written.
        topic, async_, sync: open a plan entry, open a span, close a round. spad: behind the end of a span, never
        committed.
        lengths: ``(tokens, id)`` of every ``<len:N>``, rising. depends: ids of ``<dep:1>``, ``<dep:2>``, ...
    """

    mask: int
    eos: int
    par: int
    topic: int
    async_: int
    sync: int
    spad: int
    lengths: tuple[tuple[int, int], ...]
    depends: tuple[int, ...]

    @property
    def banned(self) -> tuple[int, ...]:
        """Every id that is never part of a text: all of them except ``eos``."""
        tags = (self.mask, self.par, self.topic, self.async_, self.sync, self.spad)
        return tags + tuple(i for _, i in self.lengths) + self.depends

    def length_id(self, num_tokens: int) -> int:
        """The smallest ``<len:N>`` with N >= ``num_tokens``, or the largest there is."""
        return next((i for n, i in self.lengths if n >= num_tokens), self.lengths[-1][1])

    def length_of(self, token: int) -> int | None:
        """N of a ``<len:N>`` id, None for any other id."""
        return next((n for n, i in self.lengths if i == token), None)


@dataclass(frozen=True)
class Span:
    """One part of a plan. Lists, arrays and tensors of whole numbers become tuples.

    Attributes:
        label: token ids, at least one. length: planned length of the text behind the label, in tokens.
        depends: rising 0-based indices of earlier parts. text: ids of a text that is given and not to be written (the
        planned length still decides where the next part begins); None: it is to be written.
    """

    label: tuple[int, ...]
    length: int
    depends: tuple[int, ...] = ()
    text: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        given = None if self.text is None else numbers(self.text, "the text of a part")
        values = {
            "label": numbers(self.label, "the label of a part"),
            "length": whole(self.length, "the length of a part"),
            "depends": numbers(self.depends, "the dependencies of a part"),
            "text": given,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def opening(self) -> int:
        """Rows of the forced opening: ``<async>`` and the label."""
        return 1 + len(self.label)

    @property
    def entry(self) -> int:
        """Tokens of its entry in the plan: ``<topic>``, label, length and dependencies."""
        return 2 + len(self.label) + len(self.depends)


@dataclass(frozen=True)
class PlanLimits:
    """Caps on a plan. Lengths are in tokens; ``max_plan_length`` bounds the sum of openings and planned lengths."""

    max_parts: int = 16
    max_part_length: int = 256
    max_plan_length: int = 2048
    max_label_length: int = 16


@dataclass(frozen=True)
class Plan:
    """The parts of one round, in text order, and the text right before them (``lead``, token ids)."""

    spans: tuple[Span, ...]
    lead: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        spans: tuple[Any, ...] = self.spans if type(self.spans) is tuple else tuple(self.spans)
        if not all(isinstance(span, Span) for span in spans):
            raise PlanError("the parts of a plan must be Spans: Plan((Span(label, length), ...))")
        object.__setattr__(self, "spans", spans)
        object.__setattr__(self, "lead", numbers(self.lead, "the text before the parts"))

    def check(self, limits: PlanLimits, tokens: ControlTokens, vocab_size: int | None = None) -> Plan:
        """The plan itself if it can be carried out, else ``PlanError``; nothing is allocated before.

        Args:
            limits: caps. tokens: ids of the tags. vocab_size: ids that the model knows; None: they are not compared.
        """
        if not self.spans:
            raise PlanError("a plan needs at least one part")
        if len(self.spans) > limits.max_parts:
            raise PlanError(f"the plan has {len(self.spans)} parts, more than max_parts={limits.max_parts}")
        banned = {*tokens.banned, tokens.eos}
        longest = max([len(self.lead), *(len(span.text or ()) for span in self.spans)])
        if longest > limits.max_plan_length:
            raise PlanError(f"a given text has {longest} tokens, more than max_plan_length={limits.max_plan_length}")
        if banned & set(self.lead):
            raise PlanError("the text before the parts holds a control token; it is ordinary text")
        for number, span in enumerate(self.spans, 1):
            if banned & set(span.text or ()):
                raise PlanError(f"the text of part {number} holds a control token; it is ordinary text")
            if not span.label:
                raise PlanError(f"part {number} has no label; a part needs a label of one token or more")
            if len(span.label) > limits.max_label_length:
                raise PlanError(
                    f"the label of part {number} has {len(span.label)} tokens, "
                    f"more than max_label_length={limits.max_label_length}"
                )
            if banned & set(span.label):
                raise PlanError(f"the label of part {number} holds a control token; labels are ordinary text")
            if not 1 <= span.length <= limits.max_part_length:
                raise PlanError(
                    f"part {number} has length {span.length}, outside 1 to max_part_length={limits.max_part_length}"
                )
            later = next((d + 1 for d in span.depends if not 0 <= d < number - 1), None)
            if later is not None:
                raise PlanError(
                    f"part {number} depends on part {later}, which is not an earlier part; "
                    "order the parts so that each depends on earlier ones only (Plan.sorted does it)"
                )
            if any(a >= b for a, b in pairwise(span.depends)):
                raise PlanError(
                    f"the dependencies of part {number} must rise and name a part once (Plan.sorted sorts them)"
                )
            if span.depends and span.depends[-1] >= len(tokens.depends):
                raise PlanError(
                    f"part {number} depends on part {span.depends[-1] + 1}, but there are only "
                    f"{len(tokens.depends)} dependency tags; add tags to the vocabulary or depend on an earlier part"
                )
        total = sum(s.opening + s.length for s in self.spans)
        if total > limits.max_plan_length:
            raise PlanError(f"the plan asks for {total} tokens, more than max_plan_length={limits.max_plan_length}")
        ids = chain(self.lead, *(chain(span.label, span.text or ()) for span in self.spans))
        unknown = next((i for i in ids if i < 0 or (vocab_size is not None and i >= vocab_size)), None)
        if unknown is not None:
            known = "ids begin at 0" if vocab_size is None else f"the model knows 0 to {vocab_size - 1}"
            raise PlanError(f"the plan holds the token id {unknown}, and {known}; tokenize with its own tokenizer")
        return self

    def sorted(self) -> Plan:
        """The same parts in a topological order (stable: a part moves only behind what it depends on); a cycle is a
        ``PlanError``."""
        count = len(self.spans)
        for number, span in enumerate(self.spans, 1):
            if any(not 0 <= d < count for d in span.depends):
                raise PlanError(f"part {number} depends on a part that does not exist; there are {count} parts")
        waiting = [set(span.depends) for span in self.spans]
        readers: list[list[int]] = [[] for _ in range(count)]
        for i, needed in enumerate(waiting):
            for d in needed:
                readers[d].append(i)
        ready = [i for i in range(count) if not waiting[i]]  # rising, so already a heap
        order: list[int] = []
        while ready:
            order.append(heapq.heappop(ready))
            for i in readers[order[-1]]:
                waiting[i].discard(order[-1])
                if not waiting[i]:
                    heapq.heappush(ready, i)
        if len(order) < count:
            cycle = [i + 1 for i in range(count) if waiting[i]]
            raise PlanError(f"the dependencies of parts {cycle} form a cycle; remove one of them")
        place = {old: new for new, old in enumerate(order)}
        depends = (tuple(sorted({place[d] for d in self.spans[i].depends})) for i in order)
        spans = (replace(self.spans[i], depends=d) for i, d in zip(order, depends, strict=True))
        return replace(self, spans=tuple(spans))

    def reopen(self, part: int) -> Plan:
        """The plan with ``part`` (0-based) and what depends on it to be written again; other given texts stay."""
        if not 0 <= part < len(self.spans):
            raise PlanError(f"there is no part {part + 1}; the plan has {len(self.spans)} parts")
        reads = self.depends("dag")  # (parts, parts)
        spans = (replace(span, text=None) if reads[i, part] else span for i, span in enumerate(self.spans))
        return replace(self, spans=tuple(spans))

    def entries(self, tokens: ControlTokens) -> tuple[tuple[int, ...], ...]:
        """The entry of every part as trunk tokens, from ``<topic>`` to its length or last dependency."""
        lengths = (tokens.length_id(span.length) for span in self.spans)
        return tuple(
            (tokens.topic, *span.label, length, *(tokens.depends[d] for d in span.depends))
            for span, length in zip(self.spans, lengths, strict=True)
        )

    def render(self, tokens: ControlTokens) -> tuple[int, ...]:
        """The plan as trunk tokens: its entries (``<async>`` opens the first span)."""
        return tuple(token for entry in self.entries(tokens) for token in entry)

    def starts(self, begin: int) -> tuple[int, ...]:
        """First position of every part, ``begin`` being that of the plan's first ``<topic>``.

        A part starts behind its own entry, moved by the openings and planned lengths of the parts before it: so its
        place is known as soon as its entry is, and a part never starts inside a planned one that it may read.
        """
        entries = accumulate(span.entry for span in self.spans)
        moved = accumulate((span.opening + span.length for span in self.spans), initial=0)
        return tuple(begin + entry + before for entry, before in zip(entries, moved, strict=False))

    def dense_starts(self, end: int) -> tuple[int, ...]:
        """First position of every part of a dense round, which stands as one piece behind the plan: ``end`` is the
        position behind the last plan token."""
        return tuple(accumulate((s.opening + s.length for s in self.spans), initial=end))[:-1]

    def depends(self, visibility: Literal["sparse", "dag"]) -> Tensor:
        """bool ``(parts, parts)``, reflexive and transitively closed: part s reads part t. ``sparse`` ignores the
        dependencies."""
        matrix = torch.eye(len(self.spans), dtype=torch.bool)
        if visibility == "dag":
            for s, span in enumerate(self.spans):
                matrix[s, list(span.depends)] = True
        return transitive_closure(matrix)


Stage = Literal["text", "label", "length", "written"]


@dataclass(frozen=True)
class PlanState:
    """Where the trunk stands in the grammar.

    ``text``: outside a plan. ``label``: inside a label. ``length``: behind a ``<len:N>`` or a ``<dep:i>``. ``written``:
    the plan is complete (``<async>`` was chosen).
    """

    stage: Stage = "text"
    parts: tuple[Span, ...] = ()
    label: tuple[int, ...] = ()

    @property
    def complete(self) -> int:
        """Entries of the plan that no token will be added to: the last one while it may name a part it depends on is
        not."""
        if self.stage != "length":
            return len(self.parts)
        named = max(self.parts[-1].depends, default=-1) + 1
        return len(self.parts) - (named < len(self.parts) - 1)

    @property
    def total(self) -> int:
        """Tokens that the parts written so far ask for, openings included."""
        return sum(s.opening + s.length for s in self.parts)

    @property
    def plan(self) -> Plan:
        """The plan written so far."""
        return Plan(self.parts)


@dataclass(frozen=True)
class PlanGrammar:
    """The grammar over token ids: advance a state, list what may follow, parse and render.

    Attributes:
        tokens: ids of the tags. vocab_size: width of the logits. limits: caps that the grammar enforces while writing.
    """

    tokens: ControlTokens
    vocab_size: int
    limits: PlanLimits = PlanLimits()
    _cache: dict[tuple[object, ...], Tensor] = field(
        default_factory=dict[tuple[object, ...], Tensor], repr=False, compare=False
    )

    def advance(self, state: PlanState, token: int) -> PlanState:
        """The state behind ``token``; a token that the grammar does not allow is a ``PlanError``."""
        tokens = self.tokens
        if token == tokens.topic and state.stage in ("text", "length"):
            if len(state.parts) >= self.limits.max_parts and state.stage == "length":
                raise PlanError(f"more than max_parts={self.limits.max_parts} parts; raise the limit or cut the plan")
            return PlanState("label", state.parts if state.stage == "length" else (), ())
        if state.stage == "text" and token not in tokens.banned:
            return state
        if state.stage == "label":
            length = tokens.length_of(token)
            if length is not None and state.label:
                return PlanState("length", (*state.parts, Span(state.label, length)), ())
            if length is None and token not in tokens.banned and token != tokens.eos:
                if len(state.label) >= self.limits.max_label_length:
                    raise PlanError(
                        f"a label is longer than max_label_length={self.limits.max_label_length} tokens; "
                        "shorten it or raise the limit"
                    )
                return replace(state, label=(*state.label, token))
        if state.stage == "length":
            if token == tokens.async_:
                return replace(state, stage="written")
            if token in tokens.depends:
                last = state.parts[-1]
                part = tokens.depends.index(token)
                if part < len(state.parts) - 1 and part > max(last.depends, default=-1):
                    return replace(state, parts=(*state.parts[:-1], replace(last, depends=(*last.depends, part))))
        raise PlanError(f"token {token} is not allowed in stage {state.stage!r} of a plan")

    def choices(
        self, state: PlanState, rounds_left: bool = True, room: int | None = None
    ) -> tuple[bool, tuple[int, ...]]:
        """What may follow: ``(ordinary text allowed, ids of the control tokens allowed)``.

        Args:
            state: where the trunk stands.
            rounds_left: False forbids a further round.
            room: tokens left in the answer, None for no bound. A part is allowed while the rest of the plan, every
                opening and every planned length fit into it; ``<sync/>`` is not counted, an answer that ends with its
                last part needs none.
        """
        tokens, limits = self.tokens, self.limits
        shortest = tokens.lengths[0][0]
        if state.stage == "text":
            begin = rounds_left and limits.max_parts > 0 and self._fits(state, room, 3, 1, shortest)
            return True, (tokens.eos, tokens.topic) if begin else (tokens.eos,)
        if state.stage == "label":
            label = len(state.label)
            if label == 0:
                return True, ()
            fitting = tuple(i for n, i in tokens.lengths if self._fits(state, room, 1, label, n))
            longer = label < limits.max_label_length and self._fits(state, room, 2, label + 1, shortest)
            # Nothing fits only when the room shrank behind the grammar's back; the label must still end.
            return longer, fitting or (tokens.lengths[0][1],)
        if state.stage == "length":
            named = max(state.parts[-1].depends, default=-1) + 1
            earlier = tokens.depends[named : len(state.parts) - 1] if room is None or room > state.total else ()
            more = len(state.parts) < limits.max_parts and self._fits(state, room, 3, 1, shortest)
            return False, (*earlier, *((tokens.topic,) if more else ()), tokens.async_)
        return False, ()

    def _fits(self, state: PlanState, room: int | None, plan_tokens: int, label: int, length: int) -> bool:
        """True: one more part (``label`` and ``length`` in tokens) respects the caps, and the spans and ``plan_tokens``
        more tokens of plan fit into ``room``."""
        total = state.total + 1 + label + length
        if length > self.limits.max_part_length or total > self.limits.max_plan_length:
            return False
        return room is None or plan_tokens + total <= room

    def allowed(self, state: PlanState, rounds_left: bool = True, room: int | None = None) -> Tensor:
        """bool ``(vocab,)``, True: the token may follow. The same tensor comes back for the same choices; do not
        write into it."""
        text, control = self.choices(state, rounds_left, room)
        key = (text, control)
        if key not in self._cache:
            mask = torch.full((self.vocab_size,), text, dtype=torch.bool)
            mask[[i for i in (*self.tokens.banned, self.tokens.eos) if i < self.vocab_size]] = False
            mask[list(control)] = True
            self._cache[key] = mask
        return self._cache[key]

    def parse(self, ids: Sequence[int]) -> tuple[PlanState, int]:
        """Read trunk tokens behind ``<par>`` or ``<sync/>``: the state behind them and how many were read (up to and
        with ``<async>``)."""
        state = PlanState()
        for count, token in enumerate(ids):
            if state.stage == "written":
                return state, count
            state = self.advance(state, int(token))
        return state, len(ids)

    def render(self, plan: Plan) -> tuple[int, ...]:
        """The plan as trunk tokens (``Plan.render``)."""
        return plan.render(self.tokens)

    def opening(self, span: Span) -> tuple[int, ...]:
        """The forced tokens that open a span: ``<async>`` and its label."""
        return (self.tokens.async_, *span.label)
