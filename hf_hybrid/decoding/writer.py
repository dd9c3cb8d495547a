"""Writer: how one answer is written. What a lane may write, when it ends and what follows; the loop does the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from hf_hybrid.config import Settings
from hf_hybrid.core.canvas import Canvas
from hf_hybrid.core.lane import Bounds, Lane
from hf_hybrid.decoding.call import Context
from hf_hybrid.decoding.output import GenerationReport
from hf_hybrid.decoding.passes import LaneRows, Pass
from hf_hybrid.decoding.scoring import Scored
from hf_hybrid.decoding.verify import along, check_in_order


class Shared:
    """What the answers of a call that are written in one way share, such as a drafter."""

    def prepare(self, writers: Sequence[Writer]) -> None:
        """A pass over the answers of ``writers`` is about to be built: the last chance to draft."""
        return

    def measured(self, writers: Sequence[Writer], batch: Pass, seconds: float) -> None:
        """That pass took ``seconds``, with everything that it settled."""
        return

    def close(self) -> None:
        """The call is over, or was broken off: give back what other calls may be waiting for."""
        return


@dataclass(frozen=True, eq=False)
class Way:
    """One way of writing: the name of the strategy, its writer and its settings."""

    strategy: str
    writer: type[Writer]
    settings: Settings


class Writer(ABC):
    """Writes one answer, pass by pass. Subclasses fill the holes and are never subclassed.

    Args:
        context: of the call. shared: what ``share`` made. canvas: of the answer. report: of it, to be filled.
    """

    def __init__(self, context: Context, shared: Shared | None, canvas: Canvas, report: GenerationReport):
        self.context, self.shared, self.canvas, self.report = context, shared, canvas, report

    @classmethod
    def share(cls, context: Context, settings: Settings) -> Shared | None:
        """What its writers of one call share; ``settings`` and the partners of the call are checked here."""
        return None

    def begin(self) -> None:
        """The first lane: the prompt."""
        canvas = self.canvas
        trunk = Lane("trunk", canvas.new_span(), 0, list(canvas.prompt))
        trunk.bounds = Bounds(len(canvas.prompt) + canvas.budget, canvas.positions)
        canvas.lanes.append(trunk)
        self.take_over(trunk)

    # The holes.

    @abstractmethod
    def take_over(self, trunk: Lane) -> None:
        """Go on behind what ``trunk`` holds, whoever wrote it: the prompt, or an answer that is under way."""

    @abstractmethod
    def settled(self, lane: Lane, tokens: list[int]) -> None:
        """``tokens`` were just appended to ``lane`` (none when it only ended); start what follows."""

    @abstractmethod
    def stage(self) -> str:
        """Name of the stage that the answer is in, one of ``Settings.stages``."""

    def allowed(self, lane: Lane) -> list[Tensor | None]:
        """For each row behind the last settled token and behind each drafted one: bool ``(vocab,)``, True: may follow;
        None: no constraint beyond ``forbidden``."""
        return [None] * (1 + len(lane.drafted.tokens))

    def forbidden(self, lane: Lane) -> tuple[int, ...]:
        """Ids that no row of ``lane`` may write."""
        return ()

    def terminators(self, lane: Lane) -> dict[int, bool]:
        """What ends ``lane``: id -> True: a token of the text."""
        return dict.fromkeys(self.context.ends, True)

    def draft(self, lane: Lane, proposed: list[int]) -> list[int]:
        """The part of ``proposed`` (which follows the settled tokens) that is worth a check; notes whether the lane
        should end behind it."""
        ends = self.terminators(lane)
        stop = next((i for i, token in enumerate(proposed) if token in ends), len(proposed))
        room = max(lane.most - len(lane.tokens), 0)
        lane.drafted.ending = stop < len(proposed) and stop < room
        return proposed[: min(stop, room)]

    def guesses(self, lane: Lane) -> frozenset[int]:
        """Ids that are guesses, such as a planned length: where another of them is written, the draft behind it is
        still worth a check."""
        return frozenset()

    def close(self, lane: Lane, fills: list[int | None]) -> list[int | None]:
        """Positions of a window behind the first terminator need not be filled: they repeat it."""
        ends = self.terminators(lane)
        stop = next((i for i, token in enumerate(fills) if token in ends), None)
        return fills if stop is None else fills[: stop + 1] + [fills[stop]] * (len(fills) - stop - 1)

    def check(self, rows: LaneRows, batch: Pass, scored: Scored) -> list[int]:
        """The token that decoding without drafts writes behind the last settled token and behind each drafted one (of a
        tree: each accepted one); it may end at the first that differs from the draft, or in front of one that the next
        pass is to decide."""
        lane = rows.lane
        drafted = lane.drafted
        places = [batch.flat(rows.line, c) for c in rows.checks]
        if not places or not self.context.processors.needs_prefix:
            tokens = [scored.tokens[place] for place in places]
            return along(drafted.parents, drafted.tokens, tokens) if drafted.parents else tokens
        drawn = None if scored.noise is None else scored.noise[places]
        process, prefix = self.process_in_order(rows), self.prefix_of(lane)
        raw = scored.raw[places]
        return check_in_order(raw, drawn, prefix, drafted.tokens, process, drafted.parents, rows.in_order)

    def process_in_order(self, rows: LaneRows) -> Callable[[Tensor, Tensor], Tensor]:
        """The whole list of processors for this lane, to be called once per emitted token."""
        return partial(self.context.processors.in_order, row=rows.canvas.index, lane=rows.lane.span)

    def prefix_of(self, lane: Lane) -> list[int]:
        """The true prefix of ``lane``: the prompt, as the host holds it, and every token that it sees, in text order.
        Here it is the only lane."""
        prompt = self.canvas.prompt
        return (prompt if self.canvas.given is None else self.canvas.given) + lane.tokens[len(prompt) :]

    def accepted(self, lane: Lane, count: int, checked: list[int]) -> None:
        """``count`` drafted tokens of ``lane`` are what ``check`` gave (``checked``), and about to be settled."""
        return

    def look_ahead(self) -> None:
        """Begin lanes that read the drafts of those whose end is expected in the next pass."""
        return

    def dismiss(self, lane: Lane) -> None:
        """``lane`` read drafts that were rejected; its rows are gone."""
        lane.assumed = []
        if lane.part is not None:
            lane.part.passes -= 1

    def finished(self) -> None:
        """The answer is complete: complete its report."""
        return
