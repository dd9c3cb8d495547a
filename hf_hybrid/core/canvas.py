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
        limit: most tokens that ``tokens`` may hold. opening: how many leading tokens were given, not written.
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
        done: no token will be added. reason: why it ended: ``end`` (its terminator), ``limit``, or ``stop``.
        low: passes in a row without a confident open position. passes: passes it took part in.
        planned: planned length of the text in tokens (spans). fallback: what was switched off and why, if anything.
    """

    kind: Kind
    span: int
    start: int
    tokens: list[int]
    window: int = 0
    verified: bool = True
    limit: int = 1 << 30
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
        room = self.limit - len(self.tokens) - len(self.draft) + 1
        return max(0, min(self.window, room)) if not (self.done or self.ending) else 0

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
                if terminators[token] and len(self.tokens) < self.limit:
                    self.tokens.append(token)
                    count += 1
                self.finish("end")
                return count
            if len(self.tokens) >= self.limit:
                self.finish("limit")
                return count
            self.tokens.append(token)
        return len(tokens)

    def finish(self, reason: str) -> None:
        """No token will be added any more."""
        self.done, self.reason = True, reason
        self.draft, self.fills = [], []

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
        given: the ids of prompt and padding as the host holds them, None: ``prompt``. lanes: in text order. budget:
        most new tokens, control tokens included. least: new tokens before an end token is allowed, None: as for every
        row of the call.
        finished: nothing more will be written. stop: length of the text at which a stopping criterion ended it, None:
        none did.
        num_forwards: passes it took part in.
    """

    row: int
    seed: int
    prompt: list[int]
    budget: int
    given: list[int] | None = None
    lanes: list[Lane] = field(default_factory=list[Lane])
    least: int | None = None
    finished: bool = False
    stop: int | None = None
    num_spans: int = 0
    num_forwards: int = 0

    def new_span(self) -> int:
        """The id of a new span."""
        self.num_spans += 1
        return self.num_spans - 1

    @property
    def num_new(self) -> int:
        """New tokens so far, control tokens included."""
        return sum(len(lane.tokens) for lane in self.lanes) - len(self.prompt)

    def new_upto(self, lane: Lane) -> int:
        """New tokens as far as ``lane`` has come, in text order: what stands behind it is left out."""
        return sum(len(one.tokens) for one in self.lanes[: self.lanes.index(lane) + 1]) - len(self.prompt)

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
        if not all(lane.ending and lane.ready() and not lane.trial for lane in waiting):
            return []
        return [(lane, lane.tokens + lane.draft) for lane in waiting]

    def pending(self) -> list[Lane]:
        """Finished lanes whose last tokens are not in the cache; they ride with whatever comes next."""
        return [lane for lane in self.lanes if lane.done and lane.cached < len(lane.tokens)]

    def clip(self) -> bool:
        """Cut the answer at ``budget`` new tokens, in text order, once everything before the cut is settled.

        Returns:
            True: it was cut, and the canvas is finished.
        """
        left = self.budget + len(self.prompt)
        for number, lane in enumerate(self.lanes):
            if len(lane.tokens) >= left and self.num_new > self.budget:
                for cut, keep in [(lane, left), *((later, 0) for later in self.lanes[number + 1 :])]:
                    del cut.tokens[keep:]
                    cut.cached = min(cut.cached, keep)
                    cut.finish("limit")
                self.finished = True
                return True
            left -= len(lane.tokens)
            if not lane.done:
                return False
        return False

    def confirmed(self, control: bool = False) -> list[int]:
        """New tokens in text order, up to the first place where something is still open. The prompt is left out.

        A plan is no text, so parts may be confirmed while it grows. But what is still to be planned may take the room
        into which a part outgrows its planned length, so until the plan is whole that much of a part is sure.
        """
        out: list[int] = []
        growing = False  # True: the plan of the lanes at hand is not whole
        for number, lane in enumerate(self.lanes):
            text = lane.text(control)
            sure = lane.opening + lane.planned - (len(lane.tokens) - len(text)) if growing else len(text)
            out += text[len(self.prompt) :] if number == 0 else text[:sure]
            growing = growing or (lane.planning and not lane.done and not control)
            if len(text) > sure or not (lane.done or (lane.planning and growing)):
                break
        return out[: self.stop]

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
