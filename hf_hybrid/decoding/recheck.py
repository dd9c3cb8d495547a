"""Recheck: a token that rounding might decide is decided by a pass without drafts, as in plain decoding.

Passes of other shapes add in another order, so the logits of a pass that checks a draft differ a little from those of
a pass of one row. Where the two best tokens lie closer than that, the draft is cut in front of the place, and the next
pass, which carries no drafts at all, decides it. What stays of the difference is that of the keys in the cache.
"""

from __future__ import annotations

import torch

from hf_hybrid.decoding.passes import LaneRows, Pass
from hf_hybrid.decoding.scoring import Scored
from hf_hybrid.decoding.verify import along, check_lane, path_of

DRIFT: dict[torch.dtype, float] = {torch.float64: 2e-14, torch.float32: 1e-5}
"""By how much two logits moved apart, at most, in passes of 2 to 16 rows instead of one, in units of the larger one: in
float32 1.0e-6 for SmolLM2-135M-Instruct and 8.8e-6 for hybrid-pocket. In bfloat16 it is 2e-2, and every tenth token of
SmolLM2 leads by less, so that a recheck would cost more than drafts bring; half precisions have to ask for it."""


class Recheck:
    """Finds places in doubt, and remembers who waits for a pass without drafts.

    Args:
        margin: of the two best scores, logits divided by the temperature; None: ``DRIFT``, in half precisions no doubt
            ever; 0: no doubt ever.
        dtype: of the model.

    Attributes:
        waiting: indices of the sequences whose next token is in doubt.
    """

    def __init__(self, margin: float | None, dtype: torch.dtype):
        self._margin, self._drift = margin, DRIFT.get(dtype, 0.0)
        self.waiting: set[int] = set()
        self._found: tuple[Pass | None, dict[LaneRows, int | None]] = (None, {})

    def cut(self, rows: LaneRows, batch: Pass, scored: Scored, checked: list[int]) -> list[int]:
        """``checked`` up to the first token in doubt, which may be the first one of all."""
        if batch.keep == 1 or not (self._drift if self._margin is None else self._margin):
            return checked
        if self._found[0] is not batch:
            self._found = (batch, self._doubts(batch, scored))
        place = self._found[1].get(rows)
        if place is None:
            return checked
        self.waiting.add(rows.canvas.index)
        return checked[:place]

    def _doubts(self, batch: Pass, scored: Scored) -> dict[LaneRows, int | None]:
        """For each lane the index of its first token in doubt, None: there is none; one operation and transfer for all.
        The drafts and windows of other lanes widen a pass too."""
        lanes = [rows for rows in batch.lanes if rows.checks and not rows.lane.done]
        places: list[int] = []
        counts: list[int] = []
        for rows in lanes:
            own = [batch.flat(rows.line, column) for column in rows.checks]
            drafted, tokens = rows.lane.drafted, [scored.tokens[place] for place in own]
            if drafted.parents:
                path = path_of(drafted.parents, drafted.tokens, along(drafted.parents, drafted.tokens, tokens))
            else:
                path = range(check_lane(drafted.tokens, tokens)[1])
            counts.append(len(path) + 1)
            places += [own[0], *(own[1 + node] for node in path)]
        scores, raw = scored.processed[places].float(), scored.raw[places].float()  # (places, vocab)
        # Of the logits: a processor may take log-probabilities of them, whose best one is next to 0.
        size = torch.maximum(scores.amax(dim=-1).abs(), raw.amax(dim=-1).abs())  # (places,)
        if scored.noise is not None:
            scores = scores + scored.noise[places]
        best = scores.topk(2, dim=-1).values  # (places, 2)
        margin = self._drift * size if self._margin is None else torch.full_like(size, self._margin)
        near = (best[:, 0] - best[:, 1] < margin).tolist()  # True: in doubt
        found: dict[LaneRows, int | None] = {}
        begin = 0
        for rows, count in zip(lanes, counts, strict=True):
            found[rows] = next((i for i in range(count) if near[begin + i]), None)
            begin += count
        return found
