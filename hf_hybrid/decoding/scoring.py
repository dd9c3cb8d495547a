"""Scoring: what a pass says. Bans, noise, and the token of every row, batched over all lanes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_hybrid.core.acceptance import keyed_noise
from hf_hybrid.core.precision import has_double
from hf_hybrid.decoding.denoise import Proposal, propose_all
from hf_hybrid.decoding.output import DecodingError
from hf_hybrid.decoding.passes import LaneRows, Pass


@dataclass(frozen=True)
class Scored:
    """What a pass says.

    Attributes:
        raw: logits ``(active * keep, vocab)``, constrained but not processed. processed: alike, behind the processors
            that need no prefix. noise: alike, None when greedy.
        tokens: the choice of every row. proposals: of the windows. unbiased: logits before any constraint,
        None: nobody asked.
    """

    raw: Tensor
    processed: Tensor
    noise: Tensor | None
    tokens: list[int]
    proposals: dict[LaneRows, Proposal]
    unbiased: Tensor | None = None


class Bans:
    """Sets of ids that rows may not write, as lines of one table that grows; line 0 bans nothing."""

    def __init__(self) -> None:
        self._lines: dict[tuple[int, ...], int] = {(): 0}
        self._table: Tensor | None = None

    def line(self, ids: tuple[int, ...]) -> int:
        """Line of the table that bans ``ids``."""
        return self._lines.setdefault(ids, len(self._lines))

    def apply(self, flat: Tensor, lines: Sequence[int]) -> None:
        """Ban in place.

        Args:
            flat: logits ``(rows, vocab)``. lines: the line of every row, -1: nobody reads the row.
        """
        needed = {*lines} - {-1}
        if needed - {0}:
            table = self._banned(flat)
            flat.masked_fill_(table[needed.pop() if len(needed) == 1 else [max(n, 0) for n in lines]], float("-inf"))

    def _banned(self, flat: Tensor) -> Tensor:
        """bool ``(lines, vocab)``, True: banned; as wide as the logits."""
        if self._table is None or len(self._table) < len(self._lines):
            banned = torch.zeros(len(self._lines), flat.shape[1], dtype=torch.bool)
            for ids, line in self._lines.items():
                banned[line, [i for i in ids if 0 <= i < flat.shape[1]]] = True  # the rest cannot be written at all
            self._table = banned.to(flat.device)
        return self._table


def noise_of(flat: Tensor, batch: Pass) -> Tensor:
    """Gumbel noise ``(active * keep, vocab)`` keyed by seed, span and the position that a row predicts."""
    noise = torch.zeros(flat.shape, dtype=torch.float32, device=flat.device)
    columns: list[int] = []
    seeds: list[int] = []
    keys: list[int] = []
    for rows in batch.lanes:
        if rows.lane.done:
            continue
        lane = rows.lane
        # A clean row predicts the position behind it, a noisy row its own: checks and window line up.
        at = [lane.end + depth for depth in lane.drafted.depths()[: len(rows.checks)]]
        at += [lane.anchor + i for i in range(len(rows.opens))]
        columns += [batch.flat(rows.line, c) for c in (*rows.checks, *rows.opens)]
        seeds += [rows.canvas.seed] * len(at)
        keys += [(lane.span << 32) + position for position in at]
    if columns:
        noise[columns] = keyed_noise(seeds, keys, flat.shape[-1], flat.device)
    return noise


def choose(flat: Tensor, batch: Pass, noise: Tensor | None) -> tuple[list[int], dict[LaneRows, Proposal]]:
    """The token of every row, and what the windows propose; one transfer to the host.

    Args:
        flat: logits ``(active * keep, vocab)``. noise: alike, None when greedy.

    Raises:
        DecodingError: a NaN among the logits.
    """
    value, chosen = (flat if noise is None else flat + noise).max(dim=-1)  # (active * keep,)
    every = propose_all(flat, chosen, batch)
    tokens, values, *rest = to_host(chosen, value, *(tensor for p in every for tensor in (p.score, p.settled)))
    if any(number != number for number in values):
        raise DecodingError(
            "the model gave NaN logits; check the weights and the dtype "
            "(float16 overflows easily: try bfloat16 or float32)"
        )
    found: dict[LaneRows, Proposal] = {}
    for proposals, score, settled in zip(every, rest[::2], rest[1::2], strict=True):
        for rows, own_score, own_settled in zip(proposals.lanes, score, settled, strict=True):
            size = len(rows.opens)
            own = [tokens[batch.flat(rows.line, c)] for c in rows.opens]
            found[rows] = Proposal(own, own_score[:size], own_settled[:size])
    return tokens, found


def to_host(*tensors: Tensor) -> list[Any]:
    """The tensors as nested lists. From an accelerator they come in one transfer, as doubles, or as floats where it has
    no others: a token id is below 2^24, so that nothing is rounded."""
    device = tensors[0].device
    if device.type == "cpu":
        return [tensor.tolist() for tensor in tensors]
    wide = torch.float64 if has_double(device) else torch.float32
    numbers = torch.cat([tensor.flatten().to(wide) for tensor in tensors]).cpu()
    pieces = numbers.split([tensor.numel() for tensor in tensors])
    pairs = zip(pieces, tensors, strict=True)
    return [piece.to(tensor.dtype).view(tensor.shape).tolist() for piece, tensor in pairs]
