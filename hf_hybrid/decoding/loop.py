"""The one loop under every way of writing. Propose, then settle.

A pass carries clean rows (settled tokens on their way into the cache, and drafts) and noisy rows (open positions). The
scores of the clean rows check the drafts and give the first open position in autoregressive quality; the noisy rows
propose the rest. What a lane may write, when it ends and what follows is up to the ``Writer`` of its answer; the
writers of one batch may differ.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_hybrid.decoding.call import Context
from hf_hybrid.decoding.passes import Pass, build_pass
from hf_hybrid.decoding.scoring import Bans, Scored, choose, noise_of
from hf_hybrid.decoding.settling import settle
from hf_hybrid.decoding.writer import Writer
from hf_hybrid.models.runner import Scores


@dataclass(frozen=True)
class _Begun:
    """When a pass began, and in which stage each answer was."""

    at: float
    stages: list[str]


class Loop:
    """Advances the answers of a batch pass by pass.

    Args:
        context: of the call.
    """

    def __init__(self, context: Context):
        self.context, self.runner = context, context.runner
        self._bans = Bans()

    def advance(self, writers: Sequence[Writer], first: int = 0) -> None:
        """One pass over all lanes of ``writers``, the active sequences of the Runner from ``first`` on."""
        begun = self._draft(writers)
        batch = build_pass([w.canvas for w in writers], self.context.mask, self.runner.filled, first)
        scores = self.runner.run(batch.tokens, batch.rows, batch.keep, plain=batch.plain, first=first)
        self._settle(self._score(scores, batch, writers), batch, writers)
        self._commit(batch)
        self._look_ahead(writers)
        self._report(writers, batch, begun)

    def _draft(self, writers: Sequence[Writer]) -> _Begun:
        """Drafters propose for all answers together."""
        for shared in dict.fromkeys(writer.shared for writer in writers):
            if shared is not None:
                shared.prepare([writer for writer in writers if writer.shared is shared])
        stages = [writer.stage() if writer.canvas.num_forwards else "prefill" for writer in writers]
        return _Begun(time.perf_counter(), stages)

    def _score(self, scores: Scores, batch: Pass, writers: Sequence[Writer]) -> Scored:
        """Constrain, process, draw: the token of every row, and what the windows propose."""
        processors, transcript = self.context.processors, self.context.transcript
        flat = scores.logits.reshape(-1, scores.logits.shape[-1])  # (active * keep, vocab)
        if self.context.sampling or not processors.trivial:
            # As for the host's processors: in half precisions their results would tie.
            flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        unbiased = flat.clone() if transcript is not None and transcript.logits else None
        self._constrain(flat, batch, writers)
        raw = flat.clone() if processors.needs_prefix else flat
        flat = processors.batched(flat)
        noise = noise_of(flat, batch) if self.context.sampling else None
        return Scored(raw, flat, noise, *choose(flat, batch, noise), unbiased)

    def _constrain(self, flat: torch.Tensor, batch: Pass, writers: Sequence[Writer]) -> None:
        """Ban, in place, what a lane may not write."""
        bans = [-1] * len(flat)  # per row, line of the table; -1: nobody reads the row
        for rows in batch.lanes:
            lane, writer = rows.lane, writers[rows.line]
            if lane.done:
                continue
            ids = writer.forbidden(lane)
            least = self.context.min_new_tokens if rows.canvas.least is None else rows.canvas.least
            short = least - rows.canvas.num_new - sum(len(t) - len(o.tokens) for o, t in lane.assumed)
            ban, early = self._bans.line(ids), self._bans.line((*ids, *self.context.ends)) if short > 0 else 0
            depths = lane.drafted.depths()[: len(rows.checks)]
            ahead = [*depths, *range(len(depths), len(depths) + len(rows.opens))]
            for i, column in zip(ahead, (*rows.checks, *rows.opens), strict=True):
                bans[batch.flat(rows.line, column)] = early if i < short else ban
            if rows.checks:
                for column, mask in zip(rows.checks, writer.allowed(lane), strict=True):
                    if mask is not None:
                        flat[batch.flat(rows.line, column)].masked_fill_(~mask.to(flat.device), float("-inf"))
        self._bans.apply(flat, bans)

    def _settle(self, scored: Scored, batch: Pass, writers: Sequence[Writer]) -> None:
        """What the pass settles; lanes that read drafts which were rejected are taken back."""
        for rows in batch.lanes:
            lane, writer = rows.lane, writers[rows.line]
            if lane.assumed and not lane.assumed_rightly():
                batch.rejected += [(rows.line, column) for column in (*rows.silent, *rows.checks)]
                writer.dismiss(lane)
                continue
            lane.assumed = []
            if lane.done:
                lane.cached += rows.fed
            else:
                settle(writer, rows, batch, scored)

    def _commit(self, batch: Pass) -> None:
        if not batch.rejected:
            self.runner.commit(spans=batch.moved)
            return
        kept = torch.ones(batch.tokens.shape, dtype=torch.bool)  # (active, rows), True: stays
        lines, columns = zip(*batch.rejected, strict=True)
        kept[list(lines), list(columns)] = False
        self.runner.commit(kept, batch.moved)

    def _look_ahead(self, writers: Sequence[Writer]) -> None:
        for writer in writers:
            if not writer.canvas.finished:
                writer.look_ahead()

    def _report(self, writers: Sequence[Writer], batch: Pass, begun: _Begun) -> None:
        seconds = time.perf_counter() - begun.at
        for shared in dict.fromkeys(writer.shared for writer in writers):
            if shared is not None:
                shared.measured([writer for writer in writers if writer.shared is shared], batch, seconds)
        for writer, stage in zip(writers, begun.stages, strict=True):
            writer.canvas.num_forwards += 1
            spent = writer.report.seconds
            spent[stage] = spent.get(stage, 0.0) + seconds
