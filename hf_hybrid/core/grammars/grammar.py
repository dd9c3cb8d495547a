"""Grammar: how plans and parts are written as tokens. Nothing outside this folder names a tag.

    answer := text end | switch (text? round)* text? end
    round  := entry+ plan_end (opening text part_end)+ resume

An entry says label, length and dependencies of a part. ``plan_end`` and ``part_end`` end what is before them and are
not kept: the first opening may repeat ``plan_end``. What an entry looks like is left to the subclass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, pairwise, takewhile
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hf_hybrid.core.plan import Plan, PlanError, PlanLimits, Span
from hf_hybrid.core.tokens import ControlTokens, Record, Tags, VocabularyError

Stage = Literal["text", "label", "length", "written"]


@dataclass(frozen=True)
class PlanState:
    """Where the trunk is in the grammar.

    ``text``: outside a plan. ``label``: inside an entry. ``length``: behind an entry that may be the last one.
    ``written``: the plan is complete (``plan_end`` was chosen). ``parts``: of the plan so far. ``label``: what was
    written of the entry that is not complete.
    """

    stage: Stage = "text"
    parts: tuple[Span, ...] = ()
    label: tuple[int, ...] = ()

    @property
    def plan(self) -> Plan:
        """The plan written so far."""
        return Plan(self.parts)


@dataclass
class Entry:
    """A part in a plan that is being written: token ids of its label, its planned tokens (None: not written yet), and
    the parts that it reads (from 1)."""

    label: list[int] = field(default_factory=list[int])
    length: int | None = None
    reads: list[int] = field(default_factory=list[int])


class Grammar(ABC):
    """The form of plans and parts for one vocabulary. Subclasses are never subclassed.

    Args:
        control: tokens of the model, with the tags of this grammar. vocab_size: width of the logits; None: nothing is
        masked, and ids of a plan are not compared with it. limits: caps that are enforced while a plan is written.

    Attributes:
        end: ends the answer.
        switch: behind the prompt, makes the model plan; never written by it, and may be empty.
        plan_end: ends a plan on the trunk. part_end: ends a part, and fills the rest of it in a dense round.
        resume: behind a round, opens the next trunk segment; at least one token.
        lengths: planned lengths that can be written, rising.
        guesses: ids, such as lengths, that may change without changing what is written behind them.
        max_depends: a part can name the first so many parts of its round.
        never_in_part: ids that a part must not hold; ``part_end`` is not among them. never_in_window: ids that a noisy
        window over the trunk must not propose.
    """

    entries_of_record: ClassVar[tuple[str, ...]]
    """Names in ``config.hf_hybrid`` under which the ids of its tags are."""

    marks: ClassVar[tuple[str, ...]]
    """Texts of tags that every tokenizer of the grammar has."""

    end: int
    switch: tuple[int, ...]
    plan_end: int
    part_end: int
    resume: tuple[int, ...]
    lengths: tuple[int, ...]
    guesses: frozenset[int]
    max_depends: int
    never_in_window: tuple[int, ...]

    def __init__(self, control: ControlTokens, vocab_size: int | None = None, limits: PlanLimits | None = None):
        if control.noise.end is None:
            raise VocabularyError("plans need a token that ends the answer; set model.generation_config.eos_token_id")
        self.end, self.noise = control.noise.end, control.noise
        self.vocab_size, self.limits = vocab_size, limits or PlanLimits()
        self.banned = frozenset(control.noise.banned)
        self._masks: dict[tuple[bool, tuple[int, ...]], Tensor] = {}

    # What a grammar must say.

    @classmethod
    @abstractmethod
    def tags_of(cls, record: Record) -> Tags:
        """The tags in a record; those that are missing or damaged are a ``VocabularyError``."""

    @abstractmethod
    def advance(self, state: PlanState, token: int) -> PlanState:
        """The state behind ``token``; a token that the grammar does not allow is a ``PlanError``."""

    @abstractmethod
    def choices(
        self, state: PlanState, rounds_left: bool = True, room: int | None = None
    ) -> tuple[bool, tuple[int, ...]]:
        """What may follow: ``(ordinary text allowed, ids of the control tokens allowed)``.

        Args:
            state: where the trunk is.
            rounds_left: False forbids a further round.
            room: tokens left in the answer, None for no bound. A part is allowed while the rest of the plan, every
                opening and every planned length fit into it; ``resume`` is not counted, an answer that ends with its
                last part needs none.
        """

    @abstractmethod
    def complete(self, state: PlanState) -> int:
        """How many entries of the plan will not change any more."""

    @abstractmethod
    def opens(self, token: int) -> bool:
        """True: ``token`` opens an entry, and a plan where none is open."""

    @abstractmethod
    def entry(self, span: Span) -> tuple[int, ...]:
        """The entry of a part as trunk tokens; it does not depend on the entries behind it."""

    @abstractmethod
    def opening(self, span: Span) -> tuple[int, ...]:
        """The forced tokens that open a part, at least one: those of no text, then those that are its text."""

    @abstractmethod
    def closed(self, fills: Sequence[int | None]) -> list[int | None]:
        """The positions of a dense round (None: open), with the rest of every part filled whose end is known."""

    @abstractmethod
    def read(self, tokens: Sequence[int]) -> tuple[list[int], list[Entry]]:
        """The text of a trunk segment without plan and control tokens, and the entries of its plan, for display.

        Unlike ``parse`` it also takes a plan that ends anywhere, and never fails.
        """

    # What follows from it.

    @property
    def never_in_part(self) -> tuple[int, ...]:
        """Ids that a part must not hold."""
        return tuple(self.banned - {self.part_end})

    def allowed(self, state: PlanState, rounds_left: bool = True, room: int | None = None) -> Tensor:
        """bool ``(vocab,)``, True: the token may follow. The same tensor comes back for the same choices; do not
        write into it."""
        key = self.choices(state, rounds_left, room)
        if key not in self._masks:
            if self.vocab_size is None:
                raise PlanError("the grammar does not know the width of the logits; build it with vocab_size")
            text, control = key
            mask = torch.full((self.vocab_size,), text, dtype=torch.bool)
            mask[[i for i in (*self.banned, self.end) if i < self.vocab_size]] = False
            mask[list(control)] = True
            self._masks[key] = mask
        return self._masks[key]

    def parse(self, ids: Sequence[int]) -> tuple[PlanState, int]:
        """Read trunk tokens behind ``switch`` or ``resume``: the state behind them and how many were read (up to and
        with ``plan_end``)."""
        state = PlanState()
        for count, token in enumerate(ids):
            if state.stage == "written":
                return state, count
            state = self.advance(state, int(token))
        return state, len(ids)

    def entries(self, plan: Plan) -> tuple[tuple[int, ...], ...]:
        """The entry of every part as trunk tokens."""
        return tuple(self.entry(span) for span in plan.spans)

    def render(self, plan: Plan) -> tuple[int, ...]:
        """The plan as trunk tokens: its entries."""
        return tuple(chain(*self.entries(plan)))

    def silent(self, span: Span) -> int:
        """How many tokens of the opening of a part are no text."""
        return sum(1 for _ in takewhile(self.banned.__contains__, self.opening(span)))

    def size(self, span: Span) -> int:
        """Positions that a part asks for: its opening and its planned length."""
        return len(self.opening(span)) + span.length

    def total(self, spans: Sequence[Span]) -> int:
        """Positions that all of ``spans`` ask for."""
        return sum(self.size(span) for span in spans)

    def starts(self, plan: Plan, begin: int) -> tuple[int, ...]:
        """First position of every part, ``begin`` being that of the plan's first token.

        A part starts behind its own entry, moved by the openings and planned lengths of the parts before it: so its
        position is known as soon as its entry is, and a part never starts inside a planned one that it may read.
        """
        entries = accumulate(len(entry) for entry in self.entries(plan))
        moved = accumulate((self.size(span) for span in plan.spans), initial=0)
        return tuple(begin + entry + before for entry, before in zip(entries, moved, strict=False))

    def dense_starts(self, plan: Plan, end: int) -> tuple[int, ...]:
        """First position of every part of a dense round, which is one piece behind the plan: ``end`` is the
        position behind the last plan token."""
        return tuple(accumulate((self.size(span) for span in plan.spans), initial=end))[:-1]

    def rounded(self, length: int) -> int:
        """The smallest of ``lengths`` that holds ``length`` tokens, or the largest there is."""
        return next((known for known in self.lengths if known >= length), self.lengths[-1])

    @property
    def least_round(self) -> int:
        """Positions that a round of one part may need: switch, the longest label in its entry and its opening, and the
        shortest text."""
        span = Span((0,) * self.limits.max_label_length, self.lengths[0])
        return len(self.switch) + len(self.entry(span)) + self.size(span)

    def check(self, plan: Plan) -> Plan:
        """The plan itself if it can be carried out, else ``PlanError``; nothing is allocated before."""
        limits = self.limits
        if not plan.spans:
            raise PlanError("a plan needs at least one part")
        if len(plan.spans) > limits.max_parts:
            raise PlanError(f"the plan has {len(plan.spans)} parts, more than max_parts={limits.max_parts}")
        banned = {*self.banned, self.end}
        longest = max([len(plan.lead), *(len(span.text or ()) for span in plan.spans)])
        if longest > limits.max_plan_length:
            raise PlanError(f"a given text has {longest} tokens, more than max_plan_length={limits.max_plan_length}")
        if banned & set(plan.lead):
            raise PlanError("the text before the parts holds a control token; it is ordinary text")
        for number, span in enumerate(plan.spans, 1):
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
            self._check_depends(number, span)
        total = self.total(plan.spans)
        if total > limits.max_plan_length:
            raise PlanError(f"the plan asks for {total} tokens, more than max_plan_length={limits.max_plan_length}")
        ids = chain(plan.lead, *(chain(span.label, span.text or ()) for span in plan.spans))
        size = self.vocab_size
        unknown = next((i for i in ids if i < 0 or (size is not None and i >= size)), None)
        if unknown is not None:
            known = "ids begin at 0" if size is None else f"the model knows 0 to {size - 1}"
            raise PlanError(f"the plan holds the token id {unknown}, and {known}; tokenize with its own tokenizer")
        return plan

    def _check_depends(self, number: int, span: Span) -> None:
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
        if span.depends and span.depends[-1] >= self.max_depends:
            raise PlanError(
                f"part {number} depends on part {span.depends[-1] + 1}, but there are only "
                f"{self.max_depends} dependency tags; add tags to the vocabulary or depend on an earlier part"
            )
