"""The native grammar, whose lengths and dependencies are tokens of their own.

    answer := text eos | <par> (text? round)* text? eos
    round  := (<topic> label <len:N> <dep:i>*)+ (<async> label text)+ <sync/>

A label ends where its ``<len:N>`` begins; the length is a token of its own, never digits in a label. ``<dep:i>`` names
the i-th part (from 1) of the same round, always an earlier one, in rising order. The first ``<async>`` ends the plan
and opens the first part; a part ends where the filler ``<spad>`` begins. The tags follow Planned Diffusion (Israel et
al., 2025, section 3); the length token, the dependencies and the text between the rounds are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_hybrid.core.grammars.grammar import Entry, Grammar, PlanState
from hf_hybrid.core.plan import PlanError, PlanLimits, Span
from hf_hybrid.core.tokens import ControlTokens, Record, Tags, VocabularyError

_TEXTS = {"par": "<par>", "topic": "<topic>", "async": "<async>", "sync": "<sync/>", "spad": "<spad>"}
"""Name in the record -> text of every tag that there is one of, the filler among them."""


@dataclass(frozen=True)
class PlanTags(Tags):
    """Ids of the native tags.

    Attributes:
        par: input switch for a planned answer, never written. topic, async_, sync: open a plan entry, open a part,
        close a round. lengths: ``(tokens, id)`` of every ``<len:N>``, rising. depends: ids of ``<dep:1>``, ...
    """

    par: int
    topic: int
    async_: int
    sync: int
    lengths: tuple[tuple[int, int], ...]
    depends: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """Every id among them."""
        return (self.par, self.topic, self.async_, self.sync, *(i for _, i in self.lengths), *self.depends)


class NativeGrammar(Grammar):
    """Plans in the native tags."""

    entries_of_record = ("par", "topic", "async", "sync", "lengths", "depends")
    marks = tuple(_TEXTS.values())

    def __init__(self, control: ControlTokens, vocab_size: int | None = None, limits: PlanLimits | None = None):
        super().__init__(control, vocab_size, limits)
        filler, tags = control.noise.filler, control.tags
        if not isinstance(tags, PlanTags) or filler is None:
            raise VocabularyError("the native grammar needs its own tags and a filler token")
        self.tags = tags
        self.switch, self.resume = (tags.par,), (tags.sync,)
        self.plan_end, self.part_end = tags.async_, filler
        self.lengths = tuple(length for length, _ in tags.lengths)
        self.guesses, self.max_depends = frozenset(token for _, token in tags.lengths), len(tags.depends)
        self.never_in_window = (control.noise.mask, tags.par, tags.sync)
        self._length_of = {token: length for length, token in tags.lengths}
        self._token_of = dict(tags.lengths)

    @staticmethod
    def texts(lengths: Sequence[int], max_depends: int) -> tuple[str, ...]:
        """Texts of all tags, for lengths in tokens and the first ``max_depends`` parts of a round."""
        depends = range(1, max_depends + 1)
        return (*_TEXTS.values(), *(f"<len:{length}>" for length in lengths), *(f"<dep:{i}>" for i in depends))

    @staticmethod
    def record_of(ids: Mapping[str, int], lengths: Sequence[int], max_depends: int) -> dict[str, Any]:
        """What ``config.hf_hybrid`` says of the tags whose ``texts`` have these ids."""
        return {
            **{name: ids[text] for name, text in _TEXTS.items()},
            "lengths": [[length, ids[f"<len:{length}>"]] for length in lengths],
            "depends": [ids[f"<dep:{i}>"] for i in range(1, max_depends + 1)],
        }

    @classmethod
    def tags_of(cls, record: Record) -> PlanTags:
        """The tags in a record."""
        record.require((*cls.entries_of_record, "spad"))
        return PlanTags(
            par=record.token("par"),
            topic=record.token("topic"),
            async_=record.token("async"),
            sync=record.token("sync"),
            lengths=record.lengths("lengths"),
            depends=record.tokens("depends"),
        )

    def opens(self, token: int) -> bool:
        """``<topic>`` does."""
        return token == self.tags.topic

    def advance(self, state: PlanState, token: int) -> PlanState:
        """The state behind ``token``; a token that the grammar does not allow is a ``PlanError``."""
        tags = self.tags
        if token == tags.topic and state.stage in ("text", "length"):
            if len(state.parts) >= self.limits.max_parts and state.stage == "length":
                raise PlanError(f"more than max_parts={self.limits.max_parts} parts; raise the limit or cut the plan")
            return PlanState("label", state.parts if state.stage == "length" else (), ())
        if state.stage == "text" and token not in self.banned:
            return state
        if state.stage == "label":
            length = self._length_of.get(token)
            if length is not None and state.label:
                return PlanState("length", (*state.parts, Span(state.label, length)), ())
            if length is None and token not in self.banned and token != self.end:
                if len(state.label) >= self.limits.max_label_length:
                    raise PlanError(
                        f"a label is longer than max_label_length={self.limits.max_label_length} tokens; "
                        "shorten it or raise the limit"
                    )
                return replace(state, label=(*state.label, token))
        if state.stage == "length":
            if token == tags.async_:
                return replace(state, stage="written")
            if token in tags.depends:
                last = state.parts[-1]
                part = tags.depends.index(token)
                if part < len(state.parts) - 1 and part > max(last.depends, default=-1):
                    return replace(state, parts=(*state.parts[:-1], replace(last, depends=(*last.depends, part))))
        raise PlanError(f"token {token} is not allowed in stage {state.stage!r} of a plan")

    def choices(
        self, state: PlanState, rounds_left: bool = True, room: int | None = None
    ) -> tuple[bool, tuple[int, ...]]:
        """What may follow: ``(ordinary text allowed, ids of the control tokens allowed)``."""
        tags, limits, shortest = self.tags, self.limits, self.lengths[0]
        total = self.total(state.parts)
        if state.stage == "text":
            begin = rounds_left and limits.max_parts > 0 and self._fits(total, room, 3, 1, shortest)
            return True, (self.end, tags.topic) if begin else (self.end,)
        if state.stage == "label":
            label = len(state.label)
            if label == 0:
                return True, ()
            fitting = tuple(i for n, i in tags.lengths if self._fits(total, room, 1, label, n))
            longer = label < limits.max_label_length and self._fits(total, room, 2, label + 1, shortest)
            # Nothing fits only when the room shrank behind the grammar's back; the label must still end.
            return longer, fitting or (tags.lengths[0][1],)
        if state.stage == "length":
            named = max(state.parts[-1].depends, default=-1) + 1
            earlier = tags.depends[named : len(state.parts) - 1] if room is None or room > total else ()
            more = len(state.parts) < limits.max_parts and self._fits(total, room, 3, 1, shortest)
            return False, (*earlier, *((tags.topic,) if more else ()), tags.async_)
        return False, ()

    def _fits(self, total: int, room: int | None, plan_tokens: int, label: int, length: int) -> bool:
        """True: one more part (``label`` and ``length`` in tokens) behind others of ``total`` respects the caps, and
        all of them and ``plan_tokens`` more tokens of plan fit into ``room``."""
        total += 1 + label + length
        if length > self.limits.max_part_length or total > self.limits.max_plan_length:
            return False
        return room is None or plan_tokens + total <= room

    def complete(self, state: PlanState) -> int:
        """All entries but one that may still name a part it depends on."""
        if state.stage != "length":
            return len(state.parts)
        named = max(state.parts[-1].depends, default=-1) + 1
        return len(state.parts) - (named < len(state.parts) - 1)

    def entry(self, span: Span) -> tuple[int, ...]:
        """``<topic>``, label, length (rounded up) and dependencies."""
        length = self._token_of[self.rounded(span.length)]
        return (self.tags.topic, *span.label, length, *(self.tags.depends[d] for d in span.depends))

    def opening(self, span: Span) -> tuple[int, ...]:
        """``<async>`` and the label."""
        return (self.tags.async_, *span.label)

    def closed(self, fills: Sequence[int | None]) -> list[int | None]:
        """``<spad>`` closes the rest of its part, up to the next ``<async>``."""
        closed: list[int | None] = []
        ended = False
        for token in fills:
            ended = token == self.part_end or (ended and token != self.tags.async_)
            closed.append(self.part_end if ended else token)
        return closed

    def read(self, tokens: Sequence[int]) -> tuple[list[int], list[Entry]]:
        """The text of a trunk segment, and the entries of its plan."""
        text: list[int] = []
        entries: list[Entry] = []
        for token in tokens:
            length = self._length_of.get(token)
            if self.opens(token):
                entries.append(Entry())
            elif length is not None and entries:
                entries[-1].length = length
            elif token in self.tags.depends and entries:
                entries[-1].reads.append(self.tags.depends.index(token) + 1)
            elif token in self.banned or token == self.end:
                continue
            elif entries and entries[-1].length is None:
                entries[-1].label.append(token)
            else:
                text.append(token)
        return text, entries
