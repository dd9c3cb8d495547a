"""ReplayRunner: no cache. Every pass reads everything again.

It is slow and simple, so it is the oracle of all runners that keep something between passes: what they write, it
writes. And it serves what no cache can hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_hybrid.core.rows import PADDING, Rows, visible
from hf_hybrid.models.host import mask_dtype
from hf_hybrid.models.layers import layers_of
from hf_hybrid.models.refusals import (
    refuse_attention_without_masks,
    refuse_counted_positions,
    refuse_encoder_decoders,
    refuse_missing_arguments,
    refuse_states,
)
from hf_hybrid.models.runner import Abilities, Runner, Scores, kept_rows

_Held = list[tuple[int, int, int]]  # (token, position, span) of every committed row


class ReplayRunner(Runner):
    """One model, and the committed rows of every sequence as a list; arguments as for ``Runner``."""

    abilities = Abilities(keys=False)

    def __init__(self, model: Any, batch_size: int, *, capacity: int = 256, synced_gpus: bool | None = None) -> None:
        super().__init__(model, batch_size, capacity=capacity, synced_gpus=synced_gpus)
        self._layers = layers_of(model)
        self._held: list[_Held] = [[] for _ in range(batch_size)]
        self._reads: list[dict[int, set[int]]] = [{0: {0}} for _ in range(batch_size)]  # span -> what it reads
        self._pending: tuple[Tensor, Rows, int] | None = None

    @classmethod
    def check_model(cls, model: Any) -> None:
        """See ``Runner.check_model``."""
        refuse_encoder_decoders(model)
        refuse_states(model)
        layers_of(model)
        refuse_counted_positions(model)
        refuse_missing_arguments(model, cached=False)
        refuse_attention_without_masks(model)

    def relate(self, row: int, span: int, sees: Sequence[int]) -> None:
        """See ``Runner.relate``."""
        self._reads[row][span] = {span, *sees}

    @torch.no_grad()
    def run(self, tokens: Tensor, rows: Rows, keep: int, *, plain: bool = False, first: int = 0) -> Scores:
        """See ``Runner.run``."""
        rows = self._checked(tokens, rows, keep, first)
        held, reads = self._held[first : self.active], self._reads[first : self.active]
        past = max(map(len, held))
        filled = [[(0, 0, PADDING)] * (past - len(h)) + h for h in held]
        old = torch.tensor(filled, dtype=torch.int64).reshape(len(held), past, 3)
        before = Rows.clean(old[..., 1], old[..., 2])
        every = Rows(*(torch.cat([getattr(before, f.name), getattr(rows, f.name)], dim=1) for f in fields(Rows)))
        depends = torch.eye(self._num_spans(), dtype=torch.bool).repeat(len(held), 1, 1)
        for line, known in enumerate(reads):
            for span, sees in known.items():
                depends[line, span, list(sees)] = True
        # Every row sees itself; a padding row nothing else, but a softmax over no key at all would be NaN.
        sees = visible(every, every, depends) | torch.eye(past + tokens.shape[1], dtype=torch.bool)
        mask = self._layers.masks(
            self._mask(sees), lambda r: self._mask(sees & r.within(every.position, every.position))
        )
        ids = torch.cat([old[..., 0], tokens.cpu()], dim=1)
        self._pending = (tokens.cpu(), rows, first)
        positions = every.position.to(self.device)
        lines = slice(first, self.active)
        return self._forward(ids, rows, mask, keep, lines, position_ids=positions, use_cache=False)

    def _mask(self, sees: Tensor) -> Tensor:
        """What rows see, bool ``(active, rows, rows)``, as attention takes it."""
        dtype, mask = mask_dtype(self.model, self.device), sees
        if dtype != torch.bool:
            mask = torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)
        return mask.to(self.device).unsqueeze(1)

    def commit(
        self,
        kept: Tensor | Sequence[Sequence[bool]] | np.ndarray | None = None,
        spans: Sequence[tuple[int, int, int]] = (),
    ) -> None:
        """See ``Runner.commit``."""
        if self._pending is None:
            raise ValueError("there is no pass to commit; call run() first, and commit() once after it")
        (tokens, rows, first), self._pending = self._pending, None
        moved = {(line, column): span for line, column, span in spans}
        for line, column in np.argwhere(kept_rows(rows, kept)).tolist():
            span = moved.get((line, column), int(rows.span[line, column]))
            row = (int(tokens[line, column]), int(rows.position[line, column]), span)
            self._held[first + line].append(row)

    def rewind(self, row: int, position: int) -> None:
        """See ``Runner.rewind``."""
        self._expect_committed("a sequence is rewound")
        self._held[row] = [held for held in self._held[row] if held[1] < position]

    def committed(self, row: int) -> Rows:
        """See ``Runner.committed``; in the order in which they were committed."""
        held = torch.tensor([self._held[row]], dtype=torch.int64).reshape(1, -1, 3)
        return Rows.clean(held[..., 1], held[..., 2])

    def _swap(self, i: int, j: int) -> None:
        self._held[i], self._held[j] = self._held[j], self._held[i]
        self._reads[i], self._reads[j] = self._reads[j], self._reads[i]

    def _clear(self, row: int) -> None:
        self._held[row], self._reads[row] = [], {0: {0}}

    def _expect_committed(self, event: str) -> None:
        if self._pending is not None:
            raise ValueError(f"commit() the last pass before {event}")

    def _num_spans(self) -> int:
        return 1 + max(max(known) for known in self._reads)
