"""What a pass of the Runner costs beside a bare forward of the same rows: mask, slots and commit included."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from hf_hybrid.core.rows import Rows
from hf_hybrid.models.host import cache_argument
from hf_hybrid.models.opening import open_runner
from hf_hybrid.models.runner import Runner


@dataclass(frozen=True)
class PassCost:
    """Medians, for ``written`` tokens in the cache and ``rows`` in the pass; ``ratio``: Runner over bare forward."""

    written: int
    rows: int
    runner_ms: float
    forward_ms: float
    ratio: float


@torch.no_grad()
def pass_costs(model: Any, written: tuple[int, ...] = (256, 2048), rows: tuple[int, ...] = (1, 32)) -> list[PassCost]:
    """Measure, interleaved, medians of 60 pairs. One row is clean, more are a noisy window behind one clean row.

    Args:
        model: any causal model that the Runner serves; its weights do not matter.
    """
    costs: list[PassCost] = []
    for length in written:
        prompt = torch.randint(model.config.vocab_size, (1, length), device=model.device)  # (1, written)
        runner = open_runner(model, 1, capacity=length + 64)
        positions = torch.arange(length, device=model.device).unsqueeze(0)  # (1, written)
        runner.run(prompt, Rows.clean(positions, torch.zeros_like(positions)), 1, plain=True)
        runner.commit()
        cache = DynamicCache()
        model(input_ids=prompt, use_cache=True, logits_to_keep=1, **{cache_argument(model): cache})
        for count in rows:
            tokens = torch.randint(model.config.vocab_size, (1, count), device=model.device)  # (1, rows)
            ours: list[float] = []
            bare: list[float] = []
            for _ in range(66):
                ours.append(_timed_pass(runner, tokens, length))
                bare.append(_timed_forward(model, cache, tokens, length))
            first, second = statistics.median(ours[6:]), statistics.median(bare[6:])
            costs.append(PassCost(length, count, 1e3 * first, 1e3 * second, first / second))
    return costs


def _timed_pass(runner: Runner, tokens: Tensor, length: int) -> float:
    count = tokens.shape[1]
    started = time.perf_counter()
    position = torch.arange(length, length + count, device=tokens.device).unsqueeze(0)  # (1, rows)
    noisy = torch.ones_like(position, dtype=torch.bool)
    noisy[:, 0] = False
    span, anchor = torch.zeros_like(position), torch.full_like(position, length + 1)
    runner.run(tokens, Rows(position, span, noisy, anchor, span), count, plain=count == 1)
    runner.commit([[False] * count])
    return time.perf_counter() - started


def _timed_forward(model: Any, cache: DynamicCache, tokens: Tensor, length: int) -> float:
    started = time.perf_counter()
    model(input_ids=tokens, use_cache=True, **{cache_argument(model): cache})
    seconds = time.perf_counter() - started
    cache.crop(length - cache.get_seq_length())  # not timed: a bare forward forgets nothing
    return seconds
