"""Stopping criteria of a caller, for sequences that grow at their own time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import stopping_criteria
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from hf_hybrid.decoding.copies import own_copy
from hf_hybrid.models.host import token_ids


def own_criteria(criteria: Iterable[Any] | None) -> tuple[list[Any], int, frozenset[int]]:
    """Take apart what the host prepared: criteria that are to be asked, tokens of prompt and answer together at most,
    and the ids that end an answer. The caller's own limits and ends are in the list instead of the host's."""
    every = list(criteria or ())
    limits = [c.max_length for c in every if type(c) is MaxLengthCriteria]
    ends = [token_ids(c.eos_token_id) for c in every if type(c) is EosTokenCriteria]
    asked = [c for c in every if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
    return asked, int(min(limits, default=1 << 40)), frozenset[int]().union(*ends)


class Criteria:
    """Criteria that are asked about one sequence at a time.

    A criterion of the caller may keep a state for each sequence of the batch, so each sequence has a copy of it, which
    is called at the sequence's own index in a batch of full height (all of it that sequence); the first sequence has
    the object itself. The host's own read each sequence by itself.

    Args:
        criteria: in their order. height: sequences of the batch; None: of a queue, which has no such number.

    Raises:
        DecodingError: several sequences, and a criterion that cannot be copied.
    """

    def __init__(self, criteria: Sequence[Any], height: int | None):
        self._given, self._height = list(criteria), height or 1
        self._copied = height is None or height > 1
        self._untouched = [self._copy(criterion) for criterion in criteria]
        self._own: dict[int, list[Any]] = {}

    def __len__(self) -> int:
        return len(self._given)

    def stop(self, ids: Tensor, row: int, scores: tuple[Tensor, ...] | None = None) -> bool:
        """True: the sequence ``ids`` ``(1, length)``, number ``row`` of the call, ends here; ``scores`` ``(1, vocab)``
        of each of its new tokens where the call asks for them, as in the host."""
        if row not in self._own:
            self._own[row] = [self._copy(c) for c in self._untouched] if self._own else self._given
        index = row if row < self._height else 0
        wide = ids.expand(self._height, -1)  # (height, length)
        said = None if scores is None else tuple(step.expand(self._height, -1) for step in scores)  # (height, vocab)
        for criterion in self._own[row]:
            native = _is_native(criterion)
            found = criterion(ids, scores) if native else criterion(wide, said)
            found = torch.as_tensor(found).flatten()
            if bool(found[index if found.numel() > 1 else 0]):
                return True
        return False

    def forget(self, row: int) -> None:
        """The sequence is finished, and its number may be many of a queue."""
        if len(self._own) > 1:  # the object itself is handed out once
            self._own.pop(row, None)

    def _copy(self, criterion: Any) -> Any:
        return own_copy(criterion) if self._copied and not _is_native(criterion) else criterion


def _is_native(criterion: Any) -> bool:
    """True: exactly a class of the host."""
    return type(criterion) is getattr(stopping_criteria, type(criterion).__name__, None)
