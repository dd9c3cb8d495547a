"""Canvas and Lane: what stands, what is drafted and what is open in one batch row.

A *lane* is a stretch of text that grows on its own: the trunk (the prompt, texts and plans) or a span. A *canvas*
holds the lanes of one batch row in text order. Lanes are kept as Python lists, not tensors: a pass changes a handful
of tokens in each of a handful of lanes, and the host needs every token anyway; the tensor work of a pass (masks,
scores, selection) is batched over all lanes elsewhere.

    settled tokens           drafted, on trial     noisy window
    [t t t t t t t | t t]    [d d d]               [m m m m]
     in the cache    pending

A pass carries the pending tokens and the draft as clean rows and the window as noisy rows behind them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["trunk", "span", "canvas"]


@dataclass(eq=False)
class Lane:
    """One growing stretch of text.

    Attributes:
        kind: ``trunk``; ``span``: a part; ``canvas``: a dense round (noisy until every part is full).
        span: its id in the row rule. start: position of ``tokens[0]``.
        tokens: settled tokens, openings included. cached: how many of them have keys in the cache.
        window: open positions to carry behind settled and drafted tokens; 0: token by token.
        verified: True: what the window proposes is drafted and checked by the clean rows of the next pass.
        limit: most tokens that ``tokens`` may hold. positions: the first position that the model does not have.
        opening: how many leading tokens were given, not written.
        draft: tokens on trial in the next pass. parents: of a draft that is a tree, for each token the index of the one
        that it follows, -1: the settled text; empty: a chain. branches: of a tree, whose text each token is until it is
        settled (a span). ending: True: its end is expected right behind the draft, so no window
            stands there. trial: lanes that are expected to end with these tokens in the next pass, of which this lane
            already reads the drafts; empty: it does not run ahead.
        fills: what stands in the window so far, None: still open; empty: a fresh window.
        part: index of the part in its round, None for the trunk. depends: lanes that must be finished before this one
        starts.
        hidden: half-open ranges of ``tokens`` that are no text (control tokens and plan).
        sees: spans that a trunk segment reads besides its own. breaks: rising indices into tokens and draft at which
            the next of ``segments`` begins: there the text is another span's (entries of a plan).
        done: no token will be added. reason: why it ended: ``end`` (its terminator), ``limit``, ``length`` (the answer
        is cut in it), ``stop``, or ``given``.
        low: passes in a row without a confident open position. passes: passes it took part in.
        planned: planned length of the text in tokens (spans). fallback: what was switched off and why, if anything.
    """

    kind: Kind
    span: int
    start: int
    tokens: list[int]
    window: int = 0
    verified: bool = True
    limit: int = 1 << 40
    positions: int = 1 << 40
    opening: int = 0
    cached: int = 0
    draft: list[int] = field(default_factory=list[int])
    parents: tuple[int, ...] = ()
    branches: tuple[int, ...] = ()
    ending: bool = False
    trial: list[tuple[Lane, list[int]]] = field(default_factory=list["tuple[Lane, list[int]]"])
    fills: list[int | None] = field(default_factory=list[int | None])
    part: int | None = None
    depends: tuple[Lane, ...] = ()
    hidden: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    sees: tuple[int, ...] = ()
    breaks: list[int] = field(default_factory=list[int])
    segments: list[int] = field(default_factory=list[int])
    done: bool = False
    reason: str = ""
    low: int = 0
    passes: int = 0
    planned: int = 0
    fallback: str = ""

    @property
    def open_length(self) -> int:
        """Positions of the noisy window in the next pass: one more than the room left, for the terminator."""
        room = min(self.limit - len(self.tokens) - len(self.draft) + 1, self.positions - self.anchor)
        return max(0, min(self.window, room)) if not (self.done or self.ending) else 0

    @property
    def most(self) -> int:
        """Most tokens that ``tokens`` may hold: its limit, and what the model has positions for."""
        return min(self.limit, self.positions - self.start)

    @property
    def pending(self) -> list[int]:
        """Settled tokens whose keys are not in the cache."""
        return self.tokens[self.cached :]

    @property
    def anchor(self) -> int:
        """First position of the noisy window."""
        return self.start + len(self.tokens) + len(self.draft)

    @property
    def end(self) -> int:
        """Position behind the last settled token."""
        return self.start + len(self.tokens)

    def span_at(self, index: int) -> int:
        """Whose text the settled or drafted token at ``index`` is."""
        number = bisect_right(self.breaks, index)
        return self.segments[number - 1] if number else self.span

    def depths(self) -> list[int]:
        """How far behind the last settled token that token itself (0) and each drafted one stand."""
        if not self.parents:
            return list(range(1 + len(self.draft)))
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent + 1] + 1)
        return depths

    @property
    def planning(self) -> bool:
        """True: what it writes now is no text."""
        return bool(self.hidden) and self.hidden[-1][1] > len(self.tokens)

    def ready(self) -> bool:
        """True: everything it depends on is finished."""
        return all(lane.done for lane in self.depends)

    def came_true(self) -> bool:
        """True: what it reads on trial ended as expected."""
        return all(lane.done and lane.tokens == tokens for lane, tokens in self.trial)

    def settle(self, tokens: Sequence[int], terminators: Mapping[int, bool]) -> int:
        """Append ``tokens`` up to a terminator or the limit; marks the lane done when either is met.

        Args:
            terminators: token id -> True: it is a token of the text (``eos``), False: it only ends the lane.

        Returns:
            how many were appended.
        """
        for count, token in enumerate(tokens):
            if token in terminators:
                if terminators[token] and len(self.tokens) >= self.most:  # no room for it: the answer is cut in front
                    self.finish_full()
                    return count
                self.tokens += [token] * terminators[token]
                self.finish("end")
                return count + terminators[token]
            if len(self.tokens) >= self.most:
                self.finish_full()
                return count
            self.tokens.append(token)
        return len(tokens)

    def finish(self, reason: str) -> None:
        """No token will be added any more."""
        self.done, self.reason = True, reason
        self.draft, self.fills = [], []

    def finish_full(self) -> None:
        """It holds as much as it may. Where positions end, so does the answer."""
        self.finish("limit" if self.limit == self.most else "length")

    def size(self, control: bool) -> int:
        """Length of ``text``."""
        held = len(self.tokens)
        if control:
            return held
        return held - sum(max(0, min(stop, held) - begin) for begin, stop in self.hidden)

    def behind(self, count: int, control: bool) -> int:
        """How many of ``tokens`` the first ``count`` of ``text`` reach to."""
        for begin, stop in () if control else self.hidden:
            count += (stop - begin) * (begin < count)
        return min(count, len(self.tokens))

    def text(self, control: bool = False) -> list[int]:
        """The settled tokens that are text; with ``control`` all of them."""
        if control or not self.hidden:
            return self.tokens
        keep: list[int] = []
        at = 0
        for begin, stop in self.hidden:
            keep += self.tokens[at:begin]
            at = max(at, min(stop, len(self.tokens)))
        return keep + self.tokens[at:]


@dataclass(eq=False)
class Canvas:
    """The lanes of one batch row, in text order.

    Attributes:
        row: place of the row in the caller's batch. seed: of its sampling noise. prompt: its tokens, padding left out.
        given: the ids of prompt and padding as the host holds them, None: ``prompt``. lanes: in text order.
        budget: most new tokens that are returned. control: True: plans and control tokens are returned too, and count.
        least: new tokens before an end token is allowed, None: as for every row of the call.
        positions: those that the model has. plain: True: the prompt ends inside an answer, which goes on without a
        plan.
        finished: nothing more will be written. cut: ``length`` or ``stop`` where the answer was cut; empty: it was not.
        num_forwards: passes it took part in.
    """

    row: int
    seed: int
    prompt: list[int]
    budget: int
    given: list[int] | None = None
    lanes: list[Lane] = field(default_factory=list[Lane])
    control: bool = False
    positions: int = 1 << 40
    plain: bool = False
    least: int | None = None
    finished: bool = False
    cut: Literal["", "length", "stop"] = ""
    num_spans: int = 0
    num_forwards: int = 0

    def new_span(self) -> int:
        """The id of a new span."""
        self.num_spans += 1
        return self.num_spans - 1

    @property
    def num_new(self) -> int:
        """New tokens of the text so far."""
        return sum(lane.size(False) for lane in self.lanes) - len(self.prompt)

    @property
    def room(self) -> int:
        """How many more tokens can be returned."""
        return self.budget + len(self.prompt) - sum(lane.size(self.control) for lane in self.lanes)

    @property
    def ended(self) -> Literal["eos", "stop", "length"]:
        """How the answer ended, once it is finished."""
        if self.cut:
            return self.cut
        last = self.lanes[-1]
        return "eos" if last.kind == "trunk" and last.reason == "end" else "length"

    @property
    def end(self) -> int:
        """One past the largest position used by a settled token."""
        return max(lane.end for lane in self.lanes)

    def running(self) -> list[Lane]:
        """Lanes that a pass advances: started, not done, and everything they depend on finished, or expected to be."""
        if self.finished:
            return []
        return [lane for lane in self.lanes if not lane.done and (lane.trial or lane.ready())]

    def expected(self, lanes: Sequence[Lane]) -> list[tuple[Lane, list[int]]]:
        """The unfinished ones of ``lanes`` and what they hold once they end as their drafts say; empty when one of
        them does not seem to end in the next pass, or all are finished."""
        waiting = [lane for lane in lanes if not lane.done]
        if not all(lane.ready() and (lane.done or (lane.ending and not lane.trial)) for lane in lanes):
            return []
        return [(lane, lane.tokens + lane.draft) for lane in waiting]

    def pending(self) -> list[Lane]:
        """Finished lanes whose last tokens are not in the cache; they ride with whatever comes next. A given text that
        reads a part waits until that part is finished."""
        return [lane for lane in self.lanes if lane.done and lane.cached < len(lane.tokens) and lane.ready()]

    def clip(self) -> None:
        """Cut the answer in text order, behind ``budget`` returned tokens or where a lane ran out of positions.

        What is sure to stand behind that place is dropped at once, and once all in front of it is settled the answer is
        finished.
        """
        left, settled = self.budget + len(self.prompt), True
        for number, lane in enumerate(self.lanes):
            if lane.kind == "trunk" and lane.trial:  # it may be taken back
                return
            size, planning = lane.size(self.control), lane.planning and not self.control
            if size >= left or (lane.reason == "length" and not planning):
                dropped = self._drop_behind(number, min(size, left), self.control, "length")
                if settled and (dropped or not self.finished):
                    self.end_by_length()
                return
            left -= size
            settled = settled and (lane.done or planning)

    def end_by_length(self) -> None:
        """The answer ends here because there is no room for more of it."""
        self.finished, self.cut = True, "length"

    def stop(self, count: int) -> None:
        """A stopping criterion ends the answer behind ``count`` tokens of its text."""
        left = count + len(self.prompt)
        for number, lane in enumerate(self.lanes):
            if lane.size(False) >= left:
                if self._drop_behind(number, left, False, "stop") or not self.finished or self.cut:
                    self.finished, self.cut = True, "stop"
                return
            left -= lane.size(False)

    def _drop_behind(self, number: int, count: int, control: bool, reason: str) -> bool:
        """Drop what stands behind the first ``count`` tokens of lane ``number``; True: there was something."""
        keep = [self.lanes[number].behind(count, control)] + [0] * (len(self.lanes) - number - 1)
        dropped = False
        for lane, kept in zip(self.lanes[number:], keep, strict=True):
            gone = len(lane.tokens) > kept
            dropped |= gone or lane is not self.lanes[number]
            if gone or not lane.done:
                del lane.tokens[kept:]
                lane.cached = min(lane.cached, kept)
                lane.finish(reason)
        return dropped

    def confirmed(self, control: bool = False) -> list[int]:
        """New tokens in text order, up to the first place where something is still open. The prompt is left out.

        A plan is no text, so that parts may be confirmed while it grows, unless it is returned as well.
        """
        out: list[int] = []
        for number, lane in enumerate(self.lanes):
            text = lane.text(control)
            out += text[len(self.prompt) :] if number == 0 else text
            if not (lane.done or (lane.planning and not self.control)):
                break
        return out

    def draft(self, mask: int) -> list[int]:
        """The whole answer as it stands, in text order: settled tokens, drafts and fills, ``mask`` at open
        positions."""
        out: list[int] = []
        for number, lane in enumerate(self.lanes):
            text = lane.text()
            out += text[len(self.prompt) :] if number == 0 else text
            if lane.done or lane.planning:
                continue
            out += lane.draft
            fills = lane.fills[: lane.open_length]
            out += [mask if token is None else token for token in fills] + [mask] * (lane.open_length - len(fills))
        return out
