"""``hf-hybrid bench --loading``: from_pretrained of this package beside the host's."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from hf_hybrid.cli.command import UsageError, console, load_network, quiet
from hf_hybrid.cli.progress import counting, waiting

if TYPE_CHECKING:
    from hf_hybrid.evaluation import Compared, LoadingCost

ROUNDS = 100
_NAMES = {
    "stays_mb": "MB that stay resident",
    "peak_mb": "MB at the peak",
    "tensors_mb": "MB of tensors",
    "python_mb": "MB of Python objects",
    "python_peak_mb": "the same at the peak",
    "process_mb": "MB of the whole process",
    "start_seconds": "seconds, imports included",
}
"""Readings of ``evaluation.one_load`` -> their names in the table."""


def bench_loading(name: str, dtype: str, threads: int | None, rounds: int | None, json_file: Path | None) -> None:
    """Run ``bench --loading``: measure, print, and write the JSON."""
    if "," in dtype:
        raise UsageError(f"--dtype {dtype}: give one type with --loading")
    with quiet():
        with waiting(f"loading {name}"):
            import torch

            from hf_hybrid.evaluation import loading_cost

            if threads is not None:
                torch.set_num_threads(threads)
            _, source = load_network(name, dtype)  # reports a broken file once, before the processes start
        with counting() as told:
            cost = loading_cost(source, rounds or ROUNDS, told, dtype=dtype)
    console().print(f"loading {name}, medians; pairs of loads: {cost.rounds}, of processes: {cost.processes}")
    console().print(cost_table(cost))
    if json_file is not None:
        content = {"command": shlex.join(["hf-hybrid", *sys.argv[1:]]), **asdict(cost)}
        json_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def cost_table(cost: LoadingCost) -> Table:
    """Table of plugin, host and their ratio, one quantity per row."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("")
    for name in ("plugin", "host", "ratio", "95 %"):
        table.add_column(name, justify="right")
    table.add_row("seconds of a load", *_cells(cost.seconds, 4))
    for key, name in _NAMES.items():
        if key in cost.readings:
            table.add_row(name, *_cells(cost.readings[key], 2))
    return table


def _cells(of: Compared, digits: int) -> tuple[str, str, str, str]:
    interval = "-" if of.interval is None else f"{of.interval[0]:.3f}-{of.interval[1]:.3f}"
    return f"{of.plugin:.{digits}f}", f"{of.host:.{digits}f}", f"{of.ratio:.3f}", interval
