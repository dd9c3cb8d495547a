"""``hf-hybrid bench --loading``: from_pretrained of this package beside the host's."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from hf_hybrid.cli.command import UsageError, console, folder_of, quiet

ROUNDS = 40


def bench_loading(name: str, dtype: str, threads: int | None, rounds: int | None, json_file: Path | None) -> None:
    """Measure, print and write what ``bench --loading`` was asked for."""
    if "," in dtype:
        raise UsageError(f"--dtype {dtype}: give one type with --loading")
    with quiet():
        import torch

        from hf_hybrid.evaluation import loading_cost

        if threads is not None:
            torch.set_num_threads(threads)
        folder = folder_of(name)
        place = str(folder) if folder.is_dir() else name
        cost = loading_cost(place, rounds or ROUNDS, dtype=getattr(torch, dtype))
    memory = "memory unknown"
    if cost.memory_ratio is not None:
        memory = f"memory {cost.plugin_mb:.1f} and {cost.host_mb:.1f} MB, {cost.memory_ratio:.3f} times"
    console().print(
        f"loading {name}, {cost.rounds} pairs, medians: {cost.plugin_seconds:.4f} s and the host "
        f"{cost.host_seconds:.4f} s, {cost.time_ratio:.3f} times; {memory}"
    )
    if json_file is not None:
        ratios = {"time_ratio": cost.time_ratio, "memory_ratio": cost.memory_ratio}
        content = {"command": shlex.join(["hf-hybrid", *sys.argv[1:]]), **asdict(cost), **ratios}
        json_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
