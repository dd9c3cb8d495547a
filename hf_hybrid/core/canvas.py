"""Canvas: the lanes of one sequence, in text order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from hf_hybrid.core.lane import Lane


@dataclass(eq=False)
class Canvas:
    """The lanes of one sequence, in text order.

    Attributes:
        index: of the sequence in the caller's batch. line: among those that are running now.
        seed: of its sampling noise. prompt: its tokens, padding left out. given: the ids of prompt and padding as the
        host holds them, None: ``prompt``. lanes: in text order.
        budget: most new tokens that are returned. control: True: plans and control tokens are returned too, and count.
        least: new tokens before an end token is allowed, None: as for every sequence of the call.
        positions: those that the model has. plain: True: the prompt ends inside an answer, which goes on without a
        plan.
        finished: nothing more will be written. cut: ``length`` or ``stop`` where the answer was cut; empty: it was not.
        num_forwards: passes it took part in.
    """

    index: int
    seed: int
    prompt: list[int]
    budget: int
    line: int = 0
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
        return [lane for lane in self.lanes if not lane.done and (lane.assumed or lane.ready())]

    def expected(self, lanes: Sequence[Lane]) -> list[tuple[Lane, list[int]]]:
        """The unfinished ones of ``lanes`` and what they hold once they end as their drafts say; empty when one of
        them does not seem to end in the next pass, or all are finished."""
        waiting = [lane for lane in lanes if not lane.done]
        if not all(lane.ready() and (lane.done or (lane.drafted.ending and not lane.assumed)) for lane in lanes):
            return []
        return [(lane, lane.tokens + lane.drafted.tokens) for lane in waiting]

    def pending(self) -> list[Lane]:
        """Finished lanes whose last tokens are not in the cache; they ride with whatever comes next. A given text that
        reads a part waits until that part is finished."""
        return [lane for lane in self.lanes if lane.done and lane.cached < len(lane.tokens) and lane.ready()]

    def clip(self) -> None:
        """Cut the answer in text order, behind ``budget`` returned tokens or where a lane ran out of positions.

        What is sure to follow is dropped at once, and once all in front of it is settled the answer is
        finished.
        """
        left, settled = self.budget + len(self.prompt), True
        for number, lane in enumerate(self.lanes):
            if lane.kind == "trunk" and lane.assumed:  # it may be taken back
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
        """Drop what is behind the first ``count`` tokens of lane ``number``; True: there was something."""
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
        """The whole answer so far, in text order: settled tokens, drafts and fills, ``mask`` at open
        positions."""
        out: list[int] = []
        for number, lane in enumerate(self.lanes):
            text = lane.text()
            out += text[len(self.prompt) :] if number == 0 else text
            if lane.done or lane.planning:
                continue
            out += lane.drafted.tokens
            fills = lane.window.fills[: lane.open_length]
            out += [mask if token is None else token for token in fills] + [mask] * (lane.open_length - len(fills))
        return out
