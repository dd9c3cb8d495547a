"""Verify: which drafted tokens stand.

The clean rows of a pass give, for the last settled token and for each drafted one, the token that plain decoding
writes next (greedy, or sampled with noise keyed by seed and position). A draft stands as far as it equals them, and
the first token that does not is replaced: every pass adds at least one token, and the text is the one that plain
decoding writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def check_lane(draft: Sequence[int], checked: Sequence[int]) -> tuple[list[int], int]:
    """Tokens that a pass adds to a lane, and how many of them were drafted.

    Args:
        draft: drafted tokens. checked: the token behind the last settled one and behind each drafted one, one more than
            ``draft`` (or fewer, when the check ended at the first mismatch); empty when the pass fed no clean row.
    """
    if not checked:
        return [], 0
    stand = 0
    while stand < len(draft) and stand < len(checked) - 1 and draft[stand] == checked[stand]:
        stand += 1
    return list(checked[: stand + 1]), stand


def check_in_order(
    logits: Tensor,
    noise: Tensor | None,
    prefix: Sequence[int],
    draft: Sequence[int],
    process: Callable[[Tensor, Tensor], Tensor],
) -> list[int]:
    """The checked tokens when logits processors need a true prefix: one call per emitted token, in order.

    Args:
        logits: ``(1 + draft, vocab)``, constrained but not processed. noise: alike, Gumbel noise, None when greedy.
        prefix: ids up to the last settled token. draft: drafted ids behind it.
        process: history ``(1, length)`` and scores ``(1, vocab)`` to processed scores.
    """
    ids = list(prefix)
    checked: list[int] = []
    for row in range(len(logits)):
        history = torch.tensor([ids], device=logits.device)  # (1, length)
        scores = process(history, logits[row : row + 1].clone())  # (1, vocab)
        token = int((scores if noise is None else scores + noise[row : row + 1]).argmax(dim=-1))
        checked.append(token)
        if row >= len(draft) or token != draft[row]:
            break
        ids.append(token)
    return checked
