"""``hf-hybrid check``: which strategies work with a model, and whether they are exact."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

from hf_hybrid.cli.command import ERROR, Threads, console, folder_of, load_network, loading, quiet
from hf_hybrid.cli.progress import waiting

if TYPE_CHECKING:
    from hf_hybrid.evaluation.self_test import CheckReport


def check(
    model: Annotated[str, typer.Argument(help="Folder, Hub id, or a bundled checkpoint.", show_default=False)],
    *,
    run: Annotated[bool, typer.Option("--run", help="Load the weights and run every strategy, a few seconds.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report to this file.")] = None,
    dtype: Annotated[
        Literal["auto", "float64", "float32", "bfloat16", "float16"], typer.Option(help="Of the weights, with --run.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")] = "cpu",
    threads: Threads = None,
) -> None:
    """Say of every strategy whether it works with MODEL: read its config alone, or --run its weights.

    With --run, a strategy is exact, refused (why, and what to do) or not exact here (what differed). The exit code is
    1 when something is not exact here.
    """
    with quiet():
        report = _run(model, dtype, device, threads) if run else _read(model)
    console().print(f"{report.model}, {'run' if run else 'its config alone; --run tries the weights'}")
    console().print(check_table(report))
    if json_file is not None:
        json_file.write_text(json.dumps({**asdict(report), "run": run, "ok": report.ok}, indent=1) + "\n", "utf-8")
    if not report.ok:
        raise typer.Exit(ERROR)


def check_table(report: CheckReport) -> Table:
    """One way to write per row."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("strategy", "result"):
        table.add_column(name, no_wrap=True)
    table.add_column("why", overflow="fold")
    for verdict in report.verdicts:
        table.add_row(verdict.name, verdict.result, Text(verdict.reason))
    return table


def _run(name: str, dtype: str, device: str, threads: int | None) -> CheckReport:
    with waiting(f"loading {name}"):
        import torch

        from hf_hybrid.evaluation.self_test import check as check_model

        if threads is not None:
            torch.set_num_threads(threads)
        network, _ = load_network(name, dtype)
        with loading(name, f"--device {device}"):
            network = network.to(device).eval()
    with waiting(f"running every strategy on {name}"):
        return check_model(network)


def _read(name: str) -> CheckReport:
    with waiting(f"reading the config of {name}"):
        from hf_hybrid.evaluation.self_test import expected

        with loading(name, "config.json"):
            return expected(_without_weights(name))


def _without_weights(name: str) -> Any:
    """The class of a model with its config, on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    source = str(folder_of(name)) if folder_of(name).is_dir() else name
    config = AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with suppress(OSError):  # there is none
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model.eval()
