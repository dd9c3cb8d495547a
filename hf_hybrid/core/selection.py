"""Which open positions settle: a score for every position, and the rule that picks from the scores.

Confidence-ranked unmasking is MaskGIT's (Chang et al., "MaskGIT: Masked Generative Image Transformer", 2022, section
3.2); the threshold rule, which settles as many positions as the model is sure of, is that of Wu et al., "Fast-dLLM",
2025; the margin is that of Kim et al., "Train for the Worst, Plan for the Best", 2025. All functions are batched.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Score = Literal["confidence", "margin", "entropy", "random"]


def scores(
    logits: Tensor, kind: Score = "confidence", token: Tensor | None = None, uniform: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """How sure the model is of every position, and the token that would be there.

    Args:
        logits: ``(..., vocab)``, any float type, already warped and banned (``-inf``) by the caller; vocab >= 2.
        kind: ``confidence``: the probability of the token, in [0, 1]. ``margin``: that minus the largest probability of
            any other token, in [-1, 1]. ``entropy``: 1 - H / log(vocab), in [0, 1], whatever the token. ``random``:
            ``uniform``.
        token: int64 ``(...)``, tokens that the caller sampled; None: the argmax of ``logits``.
        uniform: ``(...)``, numbers in [0, 1), needed by ``random`` alone.

    Returns:
        The score ``(...)``, float32 (float64 for float64 logits), higher is surer; and the token ``(...)``, int64.
    """
    if kind not in get_args(Score):
        raise ValueError(f"unknown score {kind!r}; choose one of {', '.join(get_args(Score))}")
    if token is None:
        token = logits.argmax(dim=-1)  # (...)
    if kind == "random":
        if uniform is None:
            raise ValueError("the score 'random' needs the argument `uniform`: one number in [0, 1) per position")
        return uniform, token
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if kind == "entropy":
        p = logits.softmax(dim=-1)  # (..., vocab)
        # xlogy, unlike p * log(p), is 0 for a banned token.
        return 1.0 + torch.xlogy(p, p).sum(dim=-1) / math.log(p.shape[-1]), token
    chosen = (logits.gather(-1, token.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)).exp()  # (...)
    if kind == "confidence":
        return chosen, token
    best = logits.softmax(dim=-1).topk(2, dim=-1)  # (..., 2)
    # The strongest rival is the runner-up when the token is the best one, and the best one otherwise.
    rival = torch.where(token == best.indices[..., 0], best.values[..., 1], best.values[..., 0])  # (...)
    return chosen - rival, token


def settle(
    score: Tensor, open: Tensor, threshold: float, count: Tensor | None = None, prefix: bool = False, least: int = 1
) -> Tensor:
    """Which open positions settle now.

    The union of three rules: the open positions whose score reaches ``threshold``, the ``count`` best open ones, and
    the ``least`` best open ones. With ``prefix`` positions settle from the left only: the leading open positions as
    long as each reaches the threshold, but no fewer than ``count`` and ``least``. Closed positions neither settle nor
    interrupt the run.

    Args:
        score: float ``(lanes, window)``, from ``scores``; free of NaN.
        open: bool ``(lanes, window)``, True: the position is not settled yet.
        threshold: a score; above 1 it settles nothing by itself.
        count: int64 ``(lanes,)``, positions to settle even below the threshold (see ``schedules.unmask_counts``); ties
            go left.
        prefix: True: settle a run from the left, False: settle in any order.
        least: positions that settle in every lane that has so many open ones; 1 keeps every lane moving.

    Returns:
        bool ``(lanes, window)``, True: the position settles now.
    """
    wanted = torch.full_like(score[:, :1], least, dtype=torch.long)  # (lanes, 1)
    if count is not None:
        wanted = wanted.maximum(count.unsqueeze(-1))
    sure = open & (score >= threshold)  # (lanes, window)
    if prefix:
        rank = open.long().cumsum(dim=-1) - 1  # (lanes, window), place among the open positions from the left
        sure = (sure | ~open).long().cumprod(dim=-1).bool()
    else:
        # Sorted twice, both times stably: first by score, then open before closed, so that no closed score can take a
        # place.
        order = score.argsort(dim=-1, descending=True, stable=True)  # (lanes, window)
        order = order.gather(-1, open.gather(-1, order).long().argsort(dim=-1, descending=True, stable=True))
        place = torch.arange(score.shape[-1], device=score.device).expand_as(order)
        rank = torch.empty_like(order).scatter(-1, order, place)  # (lanes, window), place among open ones by score
    return open & (sure | (rank < wanted))
