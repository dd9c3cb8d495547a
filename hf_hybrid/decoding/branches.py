"""Trees of drafts: cut to what may be checked, what each token is worth, and whose text it is in the row rule.

A token with a sibling begins a span of its own, which reads the spans of those before it and nothing beside it; an only
child goes on in the span of its parent, so that a tree of width one is the chain. What is accepted becomes rows of the
text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from hf_hybrid.core.canvas import Canvas
from hf_hybrid.core.lane import Lane
from hf_hybrid.decoding.drafters.drafter import Draft
from hf_hybrid.models.runner import Runner

MOST = 1024
"""Most tokens of a tree that are checked."""


class BranchError(ValueError):
    """A draft that is no tree; the message says why."""


def pruned(draft: Draft, count: int, room: int, ends: Collection[int], width: int = 1 << 62) -> Draft:
    """The first ``count`` tokens of a tree, at most ``room`` deep, without ``ends``, ids from ``width`` on and what
    follows them; a chain when no token has a sibling.

    Raises:
        BranchError: ``parents`` do not name a token each, in front of their own.
    """
    parents = draft.parents or ()
    if len(parents) != len(draft.tokens) or any(not -1 <= parent < i for i, parent in enumerate(parents)):
        raise BranchError(
            f"parents {list(parents)} of {len(draft.tokens)} drafted tokens: give for each the index of an earlier "
            "token, or -1"
        )
    place: dict[int, int] = {-1: -1}  # index -> index among what is kept
    depth = {-1: 0}
    seen: dict[tuple[int, int], int] = {}
    tokens: list[int] = []
    kept: list[int] = []
    ranks: list[int] = []
    for i, (token, parent) in enumerate(zip(draft.tokens, parents, strict=True)):
        if parent not in place or token in ends or depth[parent] >= room or token >= width:
            continue
        if (twin := seen.get((place[parent], token))) is not None:  # the same text twice: one row will do
            place[i], depth[i] = twin, depth[parent] + 1
            continue
        if len(tokens) >= min(count, MOST):
            break
        place[i], depth[i] = len(tokens), depth[parent] + 1
        seen[place[parent], token] = len(tokens)
        tokens.append(token)
        kept.append(place[parent])
        ranks.append(draft.ranks[i] if i < len(draft.ranks) else 0)
    chain = kept == list(range(-1, len(kept) - 1))
    if chain:
        return Draft(tokens, None, draft.bucket, draft.chance)
    return Draft(tokens, None, draft.bucket, draft.chance, tuple(kept), tuple(ranks))


def depth(draft: Draft) -> int:
    """Tokens of the longest branch. ``parents`` need not be checked; it is never more than there are of them."""
    if draft.parents is None:
        return len(draft.tokens)
    depths: list[int] = []
    for parent in draft.parents:
        depths.append(1 + (depths[parent] if 0 <= parent < len(depths) else 0))
    return max(depths, default=0)


def as_tree(draft: Draft) -> Draft:
    """A chain as a tree of width one; a tree as it is."""
    if draft.parents is not None:
        return draft
    size = len(draft.tokens)
    return replace(draft, parents=tuple(range(-1, size - 1)), ranks=(0,) * size)


def first_branch(draft: Draft, width: int = 1 << 62) -> Draft:
    """The chain of first children, of ids below ``width``."""
    at, tokens = -1, list[int]()
    for i, (token, parent) in enumerate(zip(draft.tokens, draft.parents or (), strict=True)):
        if parent == at and token < width:
            at = i
            tokens.append(token)
    return Draft(tokens, None, draft.bucket, draft.chance)


def rank_of(draft: Draft, rank: int) -> Draft:
    """Of what bucket and chance a token of ``rank`` is; the first guess is like a token of a chain."""
    if rank == 0:
        return Draft((), None, draft.bucket, draft.chance)
    return Draft((), None, (draft.bucket, rank), (1 - draft.chance) / 2**rank)


def standing(draft: Draft, chances: Callable[[Draft, int], list[float]]) -> list[float]:
    """How likely each token of a tree is accepted.

    Args:
        chances: of a bucket (``rank_of``), for so many depths: how likely a token is accepted if those before it are.
    """
    parents = draft.parents or ()
    depths: list[int] = []
    for parent in parents:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    deepest = max(depths, default=-1) + 1
    known = {rank: chances(rank_of(draft, rank), deepest) for rank in set(draft.ranks)}
    out: list[float] = []
    for parent, depth, rank in zip(parents, depths, draft.ranks, strict=True):
        out.append((out[parent] if parent >= 0 else 1.0) * known[rank][depth])
    return out


def plant(runner: Runner, canvas: Canvas, lane: Lane, parents: Sequence[int], pool: list[int]) -> None:
    """Give the drafted tokens of ``lane`` their spans.

    Args:
        parents: of a tree. pool: spans of the canvas that branches may use; grows.
    """
    children = [0] * (len(parents) + 1)
    for parent in parents:
        children[parent + 1] += 1
    spans = [lane.span]
    reads: dict[int, tuple[int, ...]] = {lane.span: (lane.span,)}
    used = 0
    for parent in parents:
        above = spans[parent + 1]
        if children[parent + 1] == 1:
            spans.append(above)
            continue
        if used == len(pool):
            pool.append(canvas.new_span())
        span = pool[used]
        used += 1
        runner.relate(canvas.line, span, reads[above])
        reads[span] = (*reads[above], span)
        spans.append(span)
    lane.drafted.parents, lane.drafted.spans = tuple(parents), tuple(spans[1:])
