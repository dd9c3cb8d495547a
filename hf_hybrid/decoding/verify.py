"""Verify: which drafted tokens are accepted.

The clean rows of a pass give, for the last settled token and for each drafted one, the token that plain decoding
writes next (greedy, or sampled with noise keyed by seed and position). A draft is accepted as far as it equals
them, and the first token that does not is replaced: every pass adds at least one token, and the text is the one that
plain decoding writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_hybrid.decoding.output import DecodingError
from hf_hybrid.decoding.scoring import to_host


def check_lane(draft: Sequence[int], checked: Sequence[int]) -> tuple[list[int], int]:
    """Tokens that a pass adds to a lane, and how many drafted ones it accepts.

    Args:
        draft: drafted tokens. checked: the token behind the last settled one and behind each drafted one, one more than
            ``draft`` (or fewer, when the check ended at the first mismatch); empty when the pass fed no clean row.
    """
    if not checked:
        return [], 0
    accepted = 0
    while accepted < len(draft) and accepted < len(checked) - 1 and draft[accepted] == checked[accepted]:
        accepted += 1
    return list(checked[: accepted + 1]), accepted


def branch(parents: Sequence[int], draft: Sequence[int], behind: int, token: int) -> int | None:
    """Index of the drafted token that follows ``behind`` (-1: the text) and is ``token``; None: there is none.

    Args:
        parents: for each drafted token the index of the one that it follows.
    """
    return next((i for i, (p, t) in enumerate(zip(parents, draft, strict=True)) if p == behind and t == token), None)


def path_of(parents: Sequence[int], draft: Sequence[int], checked: Sequence[int]) -> list[int]:
    """Indices of the accepted tokens of a tree.

    Args:
        checked: the token behind the last settled one, and behind each accepted one, from left to right.
    """
    path: list[int] = []
    for token in checked[:-1]:
        node = branch(parents, draft, path[-1] if path else -1, token)
        if node is None:
            break
        path.append(node)
    return path


def walk(parents: Sequence[int], draft: Sequence[int], choose: Callable[[int], int]) -> list[int]:
    """The tokens along the accepted branch of a tree: behind the last settled one, and behind each accepted one.

    Args:
        choose: index of a drafted token, -1: the last settled one, to the token that follows it.
    """
    at: int | None = -1
    checked: list[int] = []
    while at is not None:
        checked.append(choose(at))
        at = branch(parents, draft, at, checked[-1])
    return checked


def along(parents: Sequence[int], draft: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """Of ``tokens``, which follow the last settled one and every drafted one, those along the accepted branch."""
    return walk(parents, draft, lambda node: tokens[node + 1])


def check_best(value: float) -> None:
    """Refuse processed scores of which ``value`` is the best.

    Raises:
        DecodingError: NaN, or no token is left.
    """
    if not value > -torch.inf:
        raise DecodingError(
            "the logits processors give NaN; correct the one that does"
            if value != value
            else "the logits processors ban every token that may follow; allow one (in a plan: its tags too)"
        )


def check_in_order(
    logits: Tensor,
    noise: Tensor | None,
    prefix: Sequence[int],
    draft: Sequence[int],
    process: Callable[[Tensor, Tensor], Tensor],
    parents: Sequence[int] = (),
    kept: list[Tensor] | None = None,
) -> list[int]:
    """The checked tokens when logits processors need a true prefix: one call per emitted token, in order.

    Args:
        logits: ``(1 + draft, vocab)``, constrained but not processed. noise: alike, Gumbel noise, None when greedy.
        prefix: ids up to the last settled token. draft: drafted ids behind it.
        process: history ``(1, length)`` and scores ``(1, vocab)`` to processed scores. parents: of a tree (``branch``);
            empty: a chain. kept: gets the processed scores ``(vocab,)`` of every emitted token.

    Raises:
        DecodingError: the processors make a NaN, or leave no token.
    """
    ids = list(prefix)

    def choose(node: int) -> int:
        if node >= 0:
            ids.append(draft[node])
        row = slice(node + 1, node + 2)
        scores = process(torch.tensor([ids], device=logits.device), logits[row].clone())  # (1, vocab)
        best, token = (scores if noise is None else scores + noise[row]).max(dim=-1)  # (1,)
        (value,), (chosen,) = to_host(best, token)
        check_best(value)
        if kept is not None:
            kept.append(scores[0])
        return chosen

    return walk(parents or range(-1, len(draft) - 1), draft, choose)
