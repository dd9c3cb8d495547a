"""``hf-hybrid bench``: the strategies against autoregression, on held-out prompts."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from hf_hybrid.cli.bench_loading import ROUNDS, bench_loading
from hf_hybrid.cli.command import (
    DEFAULT_MODEL,
    INTERRUPTED,
    Model,
    TestSet,
    Threads,
    UsageError,
    console,
    load,
    quiet,
    read_items,
)
from hf_hybrid.cli.progress import counting, waiting

if TYPE_CHECKING:
    from hf_hybrid.evaluation import Result, Run

DTYPES = ("float32", "bfloat16", "float16")
SWEEP_PROMPTS = 39
"""Prompts of a sweep: three of each development country."""
LONGEST = 512
"""Tokens of an answer."""


def bench(
    *,
    model: Model = DEFAULT_MODEL,
    split: Annotated[
        Literal["test", "dev"] | None,
        typer.Option(help="Prompts to report on; settings are chosen on dev. Default: test, with --sweep dev."),
    ] = None,
    num_prompts: Annotated[
        int | None,
        typer.Option(
            "--num-prompts",
            "--prompts",
            min=1,
            help=f"An even subset over the groups. Default: all, with --sweep {SWEEP_PROMPTS}.",
        ),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(min=1, help=f"Pairs of loads. For: --loading. Default: {ROUNDS}."),
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Every strategy over its settings. hf-hybrid tune takes the best over.")
    ] = False,
    feedback: Annotated[
        bool, typer.Option("--feedback", help="Extension, fallback and verification of parts, on and off.")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option("--plot", help="Draw exact match against speed to this file (.png or .svg).")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
    dtype: Annotated[
        str,
        typer.Option(help=f"Of the weights: {', '.join(DTYPES)}; several, with commas, give one table."),
    ] = "float32",
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")] = "cpu",
    threads: Threads = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per call; times are divided by it.")] = 1,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help=f"Longest answer, in tokens. Default: the checkpoint's, or {LONGEST}."),
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sample at this temperature, with seed 0. Default: 0, greedy.")
    ] = 0.0,
    test_set: TestSet = None,
    coherence: Annotated[
        bool, typer.Option("--coherence", help="Also read every answer back: nats per token at seams and elsewhere.")
    ] = False,
    passes: Annotated[bool, typer.Option("--passes", help="Also time single passes against bare forwards.")] = False,
    loading: Annotated[
        bool, typer.Option("--loading", help="Only loading, by the host and by us: seconds and memory.")
    ] = False,
    task: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure the strategies on held-out prompts: speed, exact match, and whether equal texts are equal.

    All candidates use the same weights and prompts in one process, in an order that rotates from prompt to prompt.
    The speedup is the median over prompts of the baseline's seconds divided by the candidate's, where both answers are
    right; the baseline is the faster of generate() of transformers and our own autoregression. Intervals are 95 %, by
    a bootstrap over countries (or whatever groups the prompts have). Ctrl-C prints what was measured.

    Speculative decoding beside that of other packages is measured in a checkout: python -m benchmarks.speculative.
    """
    if task is not None:
        raise UsageError("--task has moved: run `python -m benchmarks.speculative` in a checkout of the repository")
    if json_file is not None and not json_file.resolve().parent.is_dir():
        raise UsageError(f"--json {json_file}: there is no such folder")
    if loading:
        bench_loading(model, dtype, threads, repeats, json_file)
        return
    if repeats is not None:
        raise UsageError("--repeats goes with --loading alone: a prompt is answered once by every candidate")
    if picture is not None and (picture.suffix not in (".png", ".svg") or not picture.resolve().parent.is_dir()):
        raise UsageError(f"--plot {picture}: give a .png or .svg file in a folder that exists")
    dtypes = [name.strip() for name in dtype.split(",")]
    if not set(dtypes) <= set(DTYPES) or len(set(dtypes)) < len(dtypes):
        raise UsageError(f"--dtype {dtype}: give one or more of {', '.join(DTYPES)}, each once")
    if feedback and sweep:
        raise UsageError("--feedback and --sweep are two comparisons: give one of them")
    with quiet():
        network, tokenizer, folder = load(model, dtypes[0], device, threads)
        from hf_hybrid.evaluation import (
            CANDIDATES,
            FEEDBACK,
            SWEEP,
            check_plots,
            draw_frontier,
            environment,
            even_subset,
            in_types,
            measure,
            pass_costs,
            results_of,
            shape_of,
            to_json,
        )

        if picture is not None:
            check_plots()
        items = read_items(folder, test_set, split or ("dev" if sweep else "test"))
        if num_prompts is not None and num_prompts > len(items):
            raise UsageError(f"--num-prompts {num_prompts}: the split has {len(items)}")
        wanted = min(SWEEP_PROMPTS, len(items)) if sweep and num_prompts is None else num_prompts
        items = even_subset(items, wanted)
        candidates = in_types(SWEEP if sweep else FEEDBACK if feedback else CANDIDATES, dtypes)
        others = {name: load(model, name, device, threads)[0] for name in dtypes[1:]}
        with counting() as told:
            run = measure(
                network,
                tokenizer,
                items,
                candidates,
                max_new_tokens=max_new_tokens or network.generation_config.max_new_tokens or LONGEST,
                batch_size=batch_size,
                read_back=coherence,
                temperature=temperature,
                others=others,
                progress=told,
            )
        results = results_of(run, getattr(network.generation_config, "hf_hybrid", None))
        with waiting("timing single passes"):
            costs = pass_costs(network) if passes and not run.interrupted else []
        facts, shape = environment(network), shape_of(run.items, tokenizer)
    _print(run, results, shape, facts)
    for result in results:
        if result.seam_nll is not None and result.middle_nll is not None:
            nats = f"{result.seam_nll:.3f} nats per token at seams, {result.middle_nll:.3f} elsewhere"
            console().print(f"{result.name}: {nats}")
    for result in results:
        if result.contradictions:
            console().print(
                f"{result.name}: {result.contradictions} of {result.restated} facts that a part states again "
                "are stated otherwise"
            )
    for cost in costs:
        console().print(
            f"a pass of {cost.rows} rows behind {cost.written} tokens: {cost.runner_ms:.2f} ms, "
            f"{cost.ratio:.2f} times a bare forward"
        )
    content: dict[str, Any] = to_json(run, results, shape, facts, shlex.join(["hf-hybrid", *sys.argv[1:]]))
    if len(content["groups"]) > 1:
        console().print(group_table(content["groups"]))
    if any(item.sheet.open for item in run.items):
        console().print(kind_table(content["kinds"]))
    if json_file is not None:
        content["pass_costs"] = [asdict(cost) for cost in costs]
        json_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if picture is not None and results:
        draw_frontier(content, picture)
    if run.interrupted:
        raise typer.Exit(INTERRUPTED)


def _print(run: Run, results: Sequence[Result], shape: dict[str, Any], facts: dict[str, Any]) -> None:
    out = console()
    ended = " (interrupted)" if run.interrupted else ""
    if not results:
        out.print(f"no prompt was finished{ended}")
        return
    device = facts["device"]
    out.print(
        f"{len(run.items)} prompts{ended}, {_groups(shape)} ({', '.join(shape['splits'])}); "
        f"{device['processor']}, {device['threads']} threads, {device['dtype']}"
    )
    out.print(
        f"medians: {shape['prompt_tokens']:.0f} tokens of prompt, {shape['answer_tokens']:.0f} of answer, "
        f"{shape['parts'] or 0:.0f} parts, the longest {shape['longest_part'] or 0:.0f} tokens, "
        f"{shape['longest_to_mean_part'] or 0:.2f} times the mean"
    )
    out.print(result_table(results))
    for result in results:
        if result.equal_to is not None and result.equal_share is not None:
            out.print(f"{result.name}: same text as {result.equal_to} on {result.equal_share:.1%} of the prompts")
        if result.extended or result.cut or result.fallen_back:
            out.print(
                f"{result.name}: {result.extended} parts extended, {result.cut} cut, "
                f"{result.fallen_back} finished token by token"
            )


def _groups(shape: dict[str, Any]) -> str:
    """Number of groups of prompts that the intervals are over."""
    return f"{shape['countries']} countries" if "countries" in shape else f"{shape['groups']} groups"


def result_table(results: Sequence[Result]) -> Table:
    """Table of the candidates, one type of weights below the other; fits into 80 columns."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("candidate", no_wrap=True)
    for name in ("seconds", "speedup", "95 %", "t/pass", "passes", "lines", "right", "95 %"):
        table.add_column(name, justify="right", no_wrap=True)
    for before, result in zip((None, *results), results, strict=False):
        if result.dtype is not None and (before is None or before.dtype != result.dtype):
            table.add_row(f"{result.dtype}:")
        name = result.name if result.dtype is None else result.name.rpartition(" ")[0]
        table.add_row(
            name + ("*" if result.baseline else ""),
            _number(result.seconds_per_answer, 3),
            _number(result.speedup, 2),
            _interval(result.speedup_interval, 1, 2),
            f"{result.tokens_per_forward:.2f}",
            f"{result.num_forwards:.0f}",
            f"{100 * result.field_exact_match:.1f}",
            f"{100 * result.answer_exact_match:.1f}",
            _interval(result.answer_exact_match_interval, 100, 0),
        )
    table.caption = "* baseline; t/pass: tokens per pass; lines, right: exact match of lines, answers"
    table.caption_justify = "left"
    return table


def group_table(groups: Sequence[Mapping[str, Any]]) -> Table:
    """Speedup and exact match of every candidate by the number of parts that depend on others."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, title="by parts that read other parts")
    table.title_justify = "left"
    table.add_column("candidate", no_wrap=True)
    for group in groups:
        table.add_column(f"{group['dependent_parts']} ({group['num_prompts']} prompts)", justify="right")
        table.add_column("right", justify="right")
    for row in zip(*(group["results"] for group in groups), strict=True):
        cells = [(_number(r["speedup"], 2), f"{100 * r['answer_exact_match']:.1f}") for r in row]
        table.add_row(row[0]["name"], *(cell for pair in cells for cell in pair))
    table.caption = "speedup where both answers are right; parts that read others must wait for them"
    table.caption_justify = "left"
    return table


def kind_table(kinds: Sequence[Mapping[str, Any]]) -> Table:
    """Tokens per second of every candidate by how many parts there are, and what they wait for."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, title="tokens per second")
    table.title_justify = "left"
    table.add_column("candidate", no_wrap=True)
    for kind in kinds:
        name = "{}-{} parts".format(*kind["parts"]) if kind["parts"] else kind["kind"]
        table.add_column(f"{name} ({kind['num_prompts']} prompts)", justify="right")
    for row in zip(*(kind["results"] for kind in kinds), strict=True):
        table.add_row(row[0]["name"], *(f"{r['tokens_per_second']:.0f}" for r in row))
    return table


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _interval(value: tuple[float, float] | None, factor: float, digits: int) -> str:
    return "-" if value is None else f"{value[0] * factor:.{digits}f}-{value[1] * factor:.{digits}f}"
