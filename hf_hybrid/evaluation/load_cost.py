"""Measures what ``AutoHybridModelForCausalLM.from_pretrained`` costs beside the host's own.

Time is measured in this process, where both load by turns with the host's own threads. Memory is read in a process per
load (``one_load.py``), where no load can reuse memory that an earlier one freed. There the host reads weights one after
another, because the peak of threads depends on their timing.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from transformers import AutoModelForCausalLM

from hf_hybrid.evaluation.statistics import bootstrap_interval
from hf_hybrid.mixin import AutoHybridModelForCausalLM

LOADERS = ("transformers:AutoModelForCausalLM", "hf_hybrid:AutoHybridModelForCausalLM")
"""The host's and ours, as ``one_load.py`` finds them."""
MOST_PROCESSES = 10
"""Most pairs of processes. Memory hardly differs between them, so more would say nothing new."""

ReadingT = TypeVar("ReadingT")


class ProcessError(ValueError):
    """A process that should load the checkpoint failed; the message holds its last line."""


@dataclass(frozen=True)
class Compared:
    """One quantity, of the host and of the plugin.

    Attributes:
        host, plugin: medians. ratio: median over the pairs of plugin by host. interval: of the ratio, 95 %, by a
            bootstrap over the pairs; None with fewer than two.
    """

    host: float
    plugin: float
    ratio: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class LoadingCost:
    """What was measured.

    Attributes:
        rounds: pairs of timed loads. processes: pairs of processes. seconds: of a timed load.
        readings: those of ``one_load.measure`` that this system can read and that are above zero.
    """

    rounds: int
    processes: int
    seconds: Compared
    readings: Mapping[str, Compared]


def loading_cost(
    name: str,
    rounds: int = 100,
    progress: Callable[[str, str, int, int], None] | None = None,
    **kwargs: Any,
) -> LoadingCost:
    """Load a checkpoint by both in pairs, with either first by turns.

    Args:
        name: folder or Hub id (in the cache: a download would be measured with the first).
        rounds: pairs of timed loads that count; two more before them do not. As many pairs of processes, but at
            most ``MOST_PROCESSES``.
        progress: called before every load with its kind, its loader, the number of loads done and of all loads.
        **kwargs: of ``from_pretrained``: what JSON can hold, such as ``dtype="bfloat16"``.

    Raises:
        ProcessError: a process could not load it.
    """
    classes = (AutoModelForCausalLM, AutoHybridModelForCausalLM)
    processes = min(rounds, MOST_PROCESSES)
    total = 2 * (rounds + 2 + processes)
    done = itertools.count()

    def tell(stage: str, loader: int) -> None:
        if progress is not None:
            progress(stage, LOADERS[loader].partition(":")[0], next(done), total)

    def load_here(loader: int) -> float:
        tell("loading", loader)
        return _seconds(classes[loader], name, kwargs)

    def load_apart(loader: int) -> dict[str, float | None]:
        tell("loading in a process of its own", loader)
        return _process(LOADERS[loader], name, kwargs)

    timed = _by_turns(rounds + 2, load_here)[2:]
    read = _by_turns(processes, load_apart)
    told = [key for key in read[0][0] if all((host[key] or 0) > 0 for host, _ in read)]
    readings = {key: compared([(host[key] or 0, plugin[key] or 0) for host, plugin in read]) for key in told}
    return LoadingCost(rounds, processes, compared(timed), readings)


def compared(pairs: Sequence[tuple[float, float]]) -> Compared:
    """Medians and the ratio of pairs ``(host, plugin)`` of one quantity."""
    host, plugin = zip(*pairs, strict=True)
    ratios = [ours / theirs for theirs, ours in pairs]
    interval = bootstrap_interval({str(i): [ratio] for i, ratio in enumerate(ratios)}, lambda v: float(np.median(v)))
    return Compared(statistics.median(host), statistics.median(plugin), statistics.median(ratios), interval)


def _by_turns(rounds: int, sample: Callable[[int], ReadingT]) -> list[tuple[ReadingT, ReadingT]]:
    """Pairs of ``sample(0)`` and ``sample(1)``, with either first by turns."""
    pairs: list[tuple[ReadingT, ReadingT]] = []
    for number in range(rounds):
        if number % 2:
            first = sample(0)
            pairs.append((first, sample(1)))
        else:
            last = sample(1)
            pairs.append((sample(0), last))
    return pairs


def _seconds(loader: Any, name: str, kwargs: dict[str, Any]) -> float:
    """Seconds of one load."""
    gc.collect()
    started = time.perf_counter()
    model = loader.from_pretrained(name, **kwargs)
    seconds = time.perf_counter() - started
    del model
    return seconds


def _process(loader: str, name: str, kwargs: dict[str, Any]) -> dict[str, float | None]:
    """The readings of one process, which can import the same modules as this one."""
    order = json.dumps({"loader": loader, "name": name, "kwargs": kwargs})
    command = [sys.executable, "-P", str(Path(__file__).with_name("one_load.py")), order]
    paths = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ProcessError(f"a process that loads {name} by {loader.partition(':')[2]} failed: {last}")
    return json.loads(done.stdout.splitlines()[-1])
