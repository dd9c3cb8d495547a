"""Strategy: the one loop under every way of writing. Propose, then settle.

A pass carries clean rows (settled tokens on their way into the cache, and drafts on trial) and noisy rows (open
positions). The clean rows' logits check the drafts and give the first open position in autoregressive quality; the
noisy rows propose the rest. What a lane may write, when it ends and what follows is left to the subclass.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hf_hybrid.config import DiffusionSettings, WindowSettings
from hf_hybrid.core.canvas import Canvas, Lane
from hf_hybrid.decoding.call import Context
from hf_hybrid.decoding.denoise import Window
from hf_hybrid.decoding.output import GenerationReport
from hf_hybrid.decoding.passes import LaneRows, Pass, build_pass
from hf_hybrid.decoding.scoring import Bans, Scored, choose, noise_of
from hf_hybrid.decoding.transcript import Transcript
from hf_hybrid.decoding.verify import along, check_in_order, check_lane, path_of


class Strategy(ABC):
    """Advances the canvases of a batch pass by pass. Subclasses fill the holes and are never subclassed."""

    def __init__(self, context: Context):
        self.context, self.runner = context, context.runner
        self.reports: dict[int, GenerationReport] = {}
        self._bans = Bans()

    # The holes.

    @abstractmethod
    def begin(self, canvas: Canvas, line: int) -> None:
        """Set up the first lanes of ``canvas``, which is batch row ``line`` of the Runner."""

    @abstractmethod
    def settled(self, canvas: Canvas, lane: Lane, tokens: list[int], line: int) -> None:
        """``tokens`` were just appended to ``lane`` (none when it only ended); start what follows."""

    @abstractmethod
    def stage(self, canvas: Canvas) -> str:
        """Name of the stage that the canvas is in: ``text``, ``plan`` or ``spans``."""

    def allowed(self, canvas: Canvas, lane: Lane, draft: list[int]) -> list[Tensor | None]:
        """For each row behind the last settled token and behind each drafted one: bool ``(vocab,)``, True: may follow;
        None: no constraint beyond ``forbidden``."""
        return [None] * (1 + len(draft))

    def forbidden(self, lane: Lane) -> tuple[int, ...]:
        """Ids that no row of ``lane`` may write."""
        return ()

    def terminators(self, lane: Lane) -> dict[int, bool]:
        """What ends ``lane``: id -> True: a token of the text."""
        return dict.fromkeys(self.context.ends, True)

    def draft(self, canvas: Canvas, lane: Lane, proposed: list[int]) -> list[int]:
        """The part of ``proposed`` (which follows the settled tokens) that is worth a trial; notes whether the lane
        should end behind it."""
        ends = self.terminators(lane)
        stop = next((i for i, token in enumerate(proposed) if token in ends), len(proposed))
        room = max(lane.most - len(lane.tokens), 0)
        lane.ending = stop < len(proposed) and stop < room
        return proposed[: min(stop, room)]

    def guesses(self, lane: Lane) -> frozenset[int]:
        """Ids of which nothing behind them depends much: one in place of another leaves the rest worth a trial."""
        return frozenset()

    def look_ahead(self, canvas: Canvas, line: int) -> None:
        """Let lanes run on trial beside those whose end is expected in the next pass."""
        return

    def dismiss(self, canvas: Canvas, lane: Lane) -> None:
        """``lane`` ran ahead and what it read did not come true; its rows are gone."""
        lane.trial = []
        lane.passes -= 1

    def prepare(self, canvases: list[Canvas], first: int) -> None:
        """A pass over ``canvases``, batch rows from ``first`` on, is about to be built: the last chance to put
        something on trial."""
        return

    def check(self, rows: LaneRows, batch: Pass, scored: Scored) -> list[int]:
        """The token that decoding without drafts writes behind the last settled token and behind each drafted one (of a
        tree: that stands); it may end at the first that differs from the draft, or in front of one that the next pass
        is to decide."""
        lane = rows.lane
        places = [batch.flat(rows.line, c) for c in rows.checks]
        if not places or not self.context.processors.needs_prefix:
            tokens = [scored.tokens[place] for place in places]
            return along(lane.parents, lane.draft, tokens) if lane.parents else tokens
        drawn = None if scored.noise is None else scored.noise[places]
        process = self.process_in_order(rows)
        prefix = prefix_of(rows.canvas, lane)
        return check_in_order(scored.raw[places], drawn, prefix, lane.draft, process, lane.parents, rows.in_order)

    def process_in_order(self, rows: LaneRows) -> Callable[[Tensor, Tensor], Tensor]:
        """The whole list of processors for this lane, to be called once per emitted token."""
        return partial(self.context.processors.in_order, row=rows.canvas.row, lane=rows.lane.span)

    def tried(self, canvas: Canvas, lane: Lane, stand: int, checked: list[int]) -> None:
        """Of ``lane.draft`` the first ``stand`` tokens were found right by ``checked``, and are about to be settled."""
        return

    def measured(self, canvases: list[Canvas], batch: Pass, seconds: float) -> None:
        """A pass over ``canvases`` took ``seconds``, with everything that it settled."""
        return

    def finished(self, canvas: Canvas) -> None:
        """``canvas`` leaves the batch: complete its report."""
        return

    def release(self) -> None:
        """The call is over, or was broken off: give back what other calls may be waiting for."""
        return

    def forget(self, canvas: Canvas) -> None:
        """``canvas`` was reported and will not be asked for again."""
        del self.reports[canvas.row]

    # The loop.

    @property
    def window_settings(self) -> WindowSettings | None:
        """The settings of noisy windows, None for a strategy without them."""
        settings = self.context.call.settings
        return settings if isinstance(settings, WindowSettings) else None

    @property
    def mask_token(self) -> int:
        """Id that stands at open positions; 0 for a model without one, which then has no open positions."""
        control = self.context.call.control
        return control.mask if control is not None else 0

    def advance(self, canvases: list[Canvas], first: int = 0) -> None:
        """One pass over all lanes of ``canvases``, the active batch rows of the Runner from ``first`` on, and what it
        settles."""
        self.prepare(canvases, first)
        started = time.perf_counter()
        stages = [self.stage(canvas) if canvas.num_forwards else "prefill" for canvas in canvases]
        batch = build_pass(canvases, self.mask_token, self.runner.filled, first)
        logits = self.runner.run(batch.tokens, batch.rows, batch.keep, plain=batch.plain, first=first).logits
        flat = logits.reshape(-1, logits.shape[-1])  # (active * keep, vocab)
        if self.context.sampling or not self.context.processors.trivial:
            # As for the host's processors: in half precisions their results would tie.
            flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        transcript = self.context.transcript
        unbiased = flat.clone() if transcript is not None and transcript.logits else None
        self._constrain(flat, batch)
        raw = flat.clone() if self.context.processors.needs_prefix else flat
        flat = self.context.processors.batched(flat)
        noise = noise_of(flat, batch) if self.context.sampling else None
        scored = Scored(raw, flat, noise, *choose(flat, batch, noise, self.window_settings), unbiased)
        for rows in batch.lanes:
            lane = rows.lane
            if lane.trial and not lane.came_true():
                batch.rejected += [(rows.line, column) for column in (*rows.silent, *rows.checks)]
                self.dismiss(rows.canvas, lane)
                continue
            lane.trial = []
            if not lane.done:
                self._settle(rows, batch, scored)
            else:
                lane.cached += rows.fed
        self._commit(batch)
        for line, canvas in enumerate(canvases, first):
            if not canvas.finished:
                self.look_ahead(canvas, line)
        seconds = time.perf_counter() - started
        self.measured(canvases, batch, seconds)
        for canvas, stage in zip(canvases, stages, strict=True):
            canvas.num_forwards += 1
            spent = self.reports[canvas.row].seconds
            spent[stage] = spent.get(stage, 0.0) + seconds

    def _constrain(self, flat: Tensor, batch: Pass) -> None:
        """Ban, in place, what a lane may not write."""
        bans = [-1] * len(flat)  # per row, line of the table; -1: nobody reads the row
        for rows in batch.lanes:
            lane = rows.lane
            if lane.done:
                continue
            ids = self.forbidden(lane)
            least = self.context.min_new_tokens if rows.canvas.least is None else rows.canvas.least
            short = least - rows.canvas.num_new - sum(len(t) - len(o.tokens) for o, t in lane.trial)
            ban, early = self._bans.line(ids), self._bans.line((*ids, *self.context.ends)) if short > 0 else 0
            depths = lane.depths()[: len(rows.checks)]
            ahead = [*depths, *range(len(depths), len(depths) + len(rows.opens))]
            for i, column in zip(ahead, (*rows.checks, *rows.opens), strict=True):
                bans[batch.flat(rows.line, column)] = early if i < short else ban
            if rows.checks:
                for column, mask in zip(rows.checks, self.allowed(rows.canvas, lane, lane.draft), strict=True):
                    if mask is not None:
                        flat[batch.flat(rows.line, column)].masked_fill_(~mask.to(flat.device), float("-inf"))
        self._bans.apply(flat, bans)

    def _settle(self, rows: LaneRows, batch: Pass, scored: Scored) -> None:
        """What the pass settles in one lane."""
        lane, canvas = rows.lane, rows.canvas
        ends = self.terminators(lane)
        checked = self.check(rows, batch, scored)
        drafted = len(lane.draft)
        if lane.parents:
            path = path_of(lane.parents, lane.draft, checked)
            new, stand = list(checked[: len(path) + 1]), len(path)
        else:
            new, stand = check_lane(lane.draft, checked)
            path = range(stand)
        self.tried(canvas, lane, stand, checked)
        fed_again = bool(rows.checks) and not new  # without a token the row in front of it must be
        lane.cached += rows.fed + stand - fed_again
        kept = {*rows.checks[: not fed_again], *(rows.checks[1 + node] for node in path)}
        batch.rejected += [(rows.line, column) for column in rows.checks if column not in kept]
        if lane.parents:
            batch.settled += [(rows.line, rows.checks[1 + node], lane.span) for node in path]
        report = self.reports[canvas.row]
        if drafted:
            report.accepted_per_round.append(stand)
        window = scored.windows.get(rows)
        proposed: list[int] = []
        whole = stand == drafted and not fed_again  # True: the window stands behind a prefix that is right
        if not whole and new and {lane.draft[stand], new[-1]} <= (guesses := self.guesses(lane)):
            behind = window.sure(0, self.context.call.settings, guesses) if window is not None else []
            proposed = lane.draft[stand + 1 :] + behind
        if window is not None and (whole or not rows.checks):
            if lane.verified:
                proposed = window.draft(new[-1], self.context.call.settings, self.guesses(lane))
            else:
                new = self._denoise(lane, new, window, bool(rows.checks))
            self._note_confidence(canvas, lane, window)
        lane.draft, lane.parents = [], ()
        before = len(lane.tokens)
        lane.settle(new, ends)
        written = lane.tokens[before:]
        if self.context.transcript is not None:
            self._transcribe(self.context.transcript, rows, batch, scored, [0, *(1 + node for node in path)], before)
        row = batch.first + rows.line
        self.settled(canvas, lane, written, row)
        if not lane.done:
            if len(lane.tokens) >= lane.most:
                lane.finish_full()
                self.settled(canvas, lane, [], row)
            else:
                lane.draft = self.draft(canvas, lane, proposed)

    def _transcribe(
        self, transcript: Transcript, rows: LaneRows, batch: Pass, scored: Scored, wrote: list[int], before: int
    ) -> None:
        """Keep what the rows said that wrote ``lane.tokens[before:]``; ``wrote``: of each its number in ``checks``."""
        for number, check in enumerate(wrote[: len(rows.lane.tokens) - before]):
            place = batch.flat(rows.line, rows.checks[check])
            logits = scored.unbiased[place] if scored.unbiased is not None else None
            scores = rows.in_order[number] if rows.in_order else scored.processed[place]
            transcript.note(rows.lane, before + number, logits, scores if transcript.scores else None)

    def _denoise(self, lane: Lane, new: list[int], window: Window, checked: bool) -> list[int]:
        """Tokens that an unverified window settles behind ``new`` (the autoregressive token, if the pass had one)."""
        settings = self.window_settings
        assert isinstance(settings, DiffusionSettings)
        if settings.commit == "prefix" and lane.kind != "canvas":
            # Behind a first token that the window did not expect, its other proposals belong to another text.
            if checked and window.tokens[0] != new[-1]:
                return new
            run = next((i for i, settled in enumerate(window.settled) if not settled and i > 0), len(window.tokens))
            return new[:-1] + new[-1:] + window.tokens[1:run] if checked else window.tokens[:run]
        fills: list[int | None] = lane.fills or [None] * len(window.tokens)
        for place, (token, settled) in enumerate(zip(window.tokens, window.settled, strict=True)):
            if fills[place] is None and settled:
                fills[place] = token
        if checked:
            fills[0] = new[-1]
        lane.fills = self.close(lane, fills)
        if any(token is None for token in lane.fills):
            return []
        done = [token for token in lane.fills if token is not None]
        lane.fills = []
        return done

    def close(self, lane: Lane, fills: list[int | None]) -> list[int | None]:
        """Positions behind the first terminator need not be filled: they repeat it."""
        ends = self.terminators(lane)
        stop = next((i for i, token in enumerate(fills) if token in ends), None)
        return fills if stop is None else fills[: stop + 1] + [fills[stop]] * (len(fills) - stop - 1)

    def _note_confidence(self, canvas: Canvas, lane: Lane, window: Window) -> None:
        """Finish token by token what the window is not sure of for two passes in a row."""
        limit = getattr(self.context.call.settings, "span_fallback_confidence", None)
        if limit is None or lane.kind != "span" or not window.score or lane.fallback:
            return
        lane.low = lane.low + 1 if max(window.score) < limit else 0
        if lane.low >= 2 and not any(token is not None for token in lane.fills):
            # A block whose clean rows are all in the cache has nothing to feed but an open position: blocks of one.
            lane.window = 1 if not lane.verified and self._keeps_blocks() else 0
            lane.fills = []
            lane.fallback = f"token by token: no open position above {limit} for two passes"
            self.reports[canvas.row].fallbacks.append(f"part {(lane.part or 0) + 1} went on {lane.fallback}")

    def _keeps_blocks(self) -> bool:
        settings = self.window_settings
        return isinstance(settings, DiffusionSettings) and settings.commit == "block"

    def _commit(self, batch: Pass) -> None:
        if not batch.rejected:
            self.runner.commit(spans=batch.settled)
            return
        kept = torch.ones(batch.tokens.shape, dtype=torch.bool)  # (active, rows), True: stays
        lines, columns = zip(*batch.rejected, strict=True)
        kept[list(lines), list(columns)] = False
        self.runner.commit(kept, batch.settled)


def prefix_of(canvas: Canvas, lane: Lane) -> list[int]:
    """The true prefix of ``lane``: the prompt and every token that it sees, in text order."""
    before = canvas.lanes[: canvas.lanes.index(lane)]
    trunks = [other for other in before if other.kind == "trunk"]
    seen = list(canvas.prompt if canvas.given is None else canvas.given)
    skip = len(canvas.prompt)  # it stands in the first lane
    for other in before:
        if lane.kind == "trunk" or other in lane.depends or other.span in trunks[-1].sees:
            seen += other.tokens[skip:]
        elif other is trunks[-1]:
            # A part reads the plan as far as its own entry.
            whole = lane.part is None or lane.part >= len(other.breaks)
            seen += other.tokens[skip : None if whole else other.breaks[lane.part or 0]]
        skip = 0
    return seen + lane.tokens[skip:]
