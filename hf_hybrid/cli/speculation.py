"""``hf-hybrid bench --task speculative``: speculative decoding beside plain decoding, and other packages."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hf_hybrid.cli.command import (
    DEFAULT_MODEL,
    INTERRUPTED,
    SMOLLM2,
    LoadingError,
    UsageError,
    console,
    load,
    quiet,
    read_items,
)

if TYPE_CHECKING:
    from hf_hybrid.evaluation.speculation import BatchResult, Bench, FlipResult, SpeculationResult

PROMPTS, MAX_NEW_TOKENS, REPEATS = 20, 96, 3
HELD_OUT, WHOLE_ANSWER = 26, 512
"""Prompts and tokens with a trained draft: two prompts of every group that hybrid-pocket keeps back."""
JOURNAL = Path("speculative.jsonl")


AGREEMENT = 0.7
"""Of the random pair: share of the tokens that the draft would write too."""


def bench_speculation(
    part: str,
    model: str | None,
    prompts: int | None,
    repeats: int | None,
    journal_file: Path | None,
    json_file: Path | None,
    max_new_tokens: int | None,
    machine: tuple[str, str, int | None],
    draft: str | None = None,
    categories: Sequence[str] = (),
) -> None:
    """Measure, print and write what ``bench`` was asked for.

    Args:
        part: ``texts`` or ``model``. prompts: of each category. machine: dtype, device, and threads of torch.
        draft: for ``model``: a trained model that drafts, None: a random pair.
        categories: for ``texts``: names of those to answer; none: all.
    """
    path = journal_file or JOURNAL
    if not path.resolve().parent.is_dir():
        raise UsageError(f"--journal {path}: there is no such folder")
    interrupted = False
    name = (model or SMOLLM2) if part == "texts" else (model or DEFAULT_MODEL) if draft else "random pair"
    with quiet():
        from hf_hybrid.evaluation import environment
        from hf_hybrid.evaluation import speculation as task

        few, short = (HELD_OUT, WHOLE_ANSWER) if draft else (PROMPTS, MAX_NEW_TOKENS)
        amount = (prompts or few, max_new_tokens or short, repeats or REPEATS)
        if draft is not None:
            bench, missing, facts = _trained(name, draft, *amount, machine)
        elif part == "texts":
            bench, missing, facts = _texts(name, *amount, machine, categories)
        else:
            bench, missing, facts = _pair(*amount, machine)
        settings = {
            "model": name,
            "max_new_tokens": bench.max_new_tokens,
            "prompts": {category: [prompt.name for prompt in chosen] for category, chosen in bench.prompts.items()},
            "methods": [method.name for method in bench.methods],
            **facts,
            **environment(bench.model),
        }
        journal = task.Journal(path, settings)
        try:
            _run(bench, journal)
        except KeyboardInterrupt:
            interrupted = True
        content = task.speculation_json(
            bench, journal, missing, name, shlex.join(["hf-hybrid", *sys.argv[1:]]), **facts
        )
        results, batches = task.speculation_results(journal), task.batch_results(journal)
        flips = task.flip_results(journal)
    _print(content, results, batches, flips)
    if json_file is not None:
        json_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if interrupted:
        Console(stderr=True).print(f"interrupted; the same command goes on from {path}", markup=False)
        raise typer.Exit(INTERRUPTED)


def _texts(
    name: str,
    prompts: int,
    max_new_tokens: int,
    repeats: int,
    machine: tuple[str, str, int | None],
    categories: Sequence[str],
) -> tuple[Bench, list[dict[str, Any]], dict[str, Any]]:
    """A model on real texts, what is absent, and more facts."""
    from hf_hybrid.evaluation import speculation as task

    known = [c.name for c in task.CATEGORIES]
    unknown = [asked for asked in categories if asked not in known]
    if unknown:
        raise UsageError(f"--category {', '.join(unknown)}: there are {', '.join(known)}")
    wanted = [c for c in task.CATEGORIES if not categories or c.name in categories]
    found = {c.name: task.prompts_of(c, prompts) for c in wanted}
    missing = task.absent(task.METHODS, wanted, found)
    if not any(found.values()):
        needed = "; ".join(line["install"] for line in missing if "category" in line)
        raise UsageError(f"--category {', '.join(categories)}: its prompts are not installed; {needed}")
    network, tokenizer, _ = load(name, *machine)
    bench = task.Bench(
        network,
        tokenizer,
        {category: chosen for category, chosen in found.items() if chosen},
        task.copying(wanted),
        tuple(method for method in task.METHODS if method.install is None),
        max_new_tokens,
        repeats,
    )
    return bench, missing, {}


def _pair(
    prompts: int, max_new_tokens: int, repeats: int, machine: tuple[str, str, int | None]
) -> tuple[Bench, list[dict[str, Any]], dict[str, Any]]:
    """A random pair on random prompts, what is absent, and how the two are related."""
    import torch

    from hf_hybrid.evaluation import speculation as task

    dtype, device, threads = machine
    if threads is not None:
        torch.set_num_threads(threads)
    pair = task.random_pair(agreement=AGREEMENT, dtype=getattr(torch, dtype))
    for model in (pair.target, pair.draft):
        model.to(device)
    chosen = task.random_prompts(prompts, pair.target.config.vocab_size)
    bench = task.Bench(pair.target, task.Numbers(), {"random": chosen}, set(), pair.methods(), max_new_tokens, repeats)
    return bench, pair.absent(), {"pair": {"agreement": round(pair.agreement, 4), "cost": round(pair.cost, 4)}}


def _trained(
    name: str, draft: str, prompts: int, max_new_tokens: int, repeats: int, machine: tuple[str, str, int | None]
) -> tuple[Bench, list[dict[str, Any]], dict[str, Any]]:
    """A checkpoint on its held-out prompts with a trained draft, what is absent, and how the two are related."""
    from hf_hybrid.evaluation import speculation as task

    network, tokenizer, folder = load(name, *machine)
    chosen = task.held_out_prompts(read_items(folder, None, "test"), prompts)
    try:
        drafting, its_tokenizer, _ = load(draft, *machine)
    except LoadingError as error:
        raise LoadingError(f"--draft: {error}; train one with: hf-hybrid train recipes/pocket-draft.yaml") from error
    pair = task.trained_pair(network, tokenizer, drafting, its_tokenizer, chosen, max_new_tokens)
    bench = task.Bench(network, tokenizer, {"held-out": chosen}, set(), pair.methods(), max_new_tokens, repeats)
    related = {"draft": draft, "agreement": round(pair.agreement, 4), "cost": round(pair.cost, 4)}
    return bench, pair.absent(), {"pair": related}


def _run(bench: Any, journal: Any) -> None:
    from hf_hybrid.evaluation.speculation import run

    errors = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(f"{len(bench.methods)} methods", total=bench.steps)
        run(bench, journal, lambda: bar.advance(task))


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
    for line in content["absent"]:
        out.print(f"absent: {line.get('method') or line.get('category')} ({line['install']})")
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
            f"plain, {result.tokens_per_second:.1f} tokens/s; {result.equal} of {result.rows} rows equal to their own "
            f"batch of one, {result.right} right"
        )

    for result in flips:
        out.print(
            f"{result.method}, batches of {result.batch_size} against one at a time: {_number(result.per_10000, 1)} "
            f"flips per 10,000 tokens ({result.flips} in {result.tokens}), {result.wrong} of them wrong"
        )


def _table(results: Sequence[SpeculationResult]) -> Table:
    """One line per method; fits into 80 columns."""
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
