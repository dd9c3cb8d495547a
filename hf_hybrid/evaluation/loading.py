"""What ``AutoHybridModelForCausalLM.from_pretrained`` costs beside the host's own."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hf_hybrid.evaluation.memory import peak_mb, reset_peak
from hf_hybrid.mixin import AutoHybridModelForCausalLM

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class LoadingCost:
    """Medians over ``rounds``. Memory is what the peak of the process rose by, in 2**20 bytes; None: cannot be read."""

    rounds: int
    host_seconds: float
    plugin_seconds: float
    host_mb: float | None
    plugin_mb: float | None

    @property
    def time_ratio(self) -> float:
        """Plugin over host."""
        return self.plugin_seconds / self.host_seconds

    @property
    def memory_ratio(self) -> float | None:
        """Plugin over host; None where it cannot be read."""
        return None if not self.host_mb or self.plugin_mb is None else self.plugin_mb / self.host_mb


def loading_cost(name: str, rounds: int = 40, **kwargs: Any) -> LoadingCost:
    """Load a checkpoint by both, one after the other, the first of a round by turns.

    Args:
        name: folder or Hub id (in the cache: a download would be measured with the first).
        rounds: pairs that count; two more before them do not.
        **kwargs: of ``from_pretrained``.
    """
    classes = (AutoModelForCausalLM, AutoHybridModelForCausalLM)
    found: tuple[list[tuple[float, float | None]], ...] = ([], [])
    for number in range(rounds + 2):
        for place in (0, 1) if number % 2 else (1, 0):
            found[place].append(_load(classes[place], name, kwargs))
    host, plugin = (lines[2:] for lines in found)
    return LoadingCost(
        rounds,
        statistics.median(seconds for seconds, _ in host),
        statistics.median(seconds for seconds, _ in plugin),
        _median([grown for _, grown in host]),
        _median([grown for _, grown in plugin]),
    )


def _load(loader: Any, name: str, kwargs: dict[str, Any]) -> tuple[float, float | None]:
    """Seconds, and how far the peak rose above what was resident before."""
    gc.collect()
    reset_peak(_CPU)
    before = peak_mb(_CPU)
    started = time.perf_counter()
    model = loader.from_pretrained(name, **kwargs)
    seconds = time.perf_counter() - started
    after = peak_mb(_CPU)
    del model
    return seconds, None if before is None or after is None else after - before


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
