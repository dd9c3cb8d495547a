"""``hf-hybrid demo``: one held-out record, its plan, and its parts growing side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text as RichText

from hf_hybrid.cli.command import DEFAULT_MODEL, Model, TestSet, Threads, UsageError, console, load, quiet, read_items
from hf_hybrid.cli.picture import Film, animated_svg
from hf_hybrid.cli.plan_display import plan_table
from hf_hybrid.cli.progress import counting
from hf_hybrid.cli.prompts import text_of
from hf_hybrid.cli.view import CanvasView, Playback, watchable

SHOWN, TWIN = "planned_verified", "autoregressive"
TITLE, TWIN_TITLE = "planned diffusion", "the same prompt, token by token"


def demo(
    *,
    model: Model = DEFAULT_MODEL,
    number: Annotated[int, typer.Option("--number", "-n", min=1, help="Which held-out record, from 1.")] = 1,
    prompt: Annotated[Path | None, typer.Option("--prompt", help="Read your own record from this file.")] = None,
    slower: Annotated[float, typer.Option(min=0, help="How many times slower the writing is shown.")] = 6.0,
    svg: Annotated[Path | None, typer.Option("--svg", help="Also draw both races to this file, animated.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    threads: Threads = None,
    test_set: TestSet = None,
) -> None:
    """Write one answer in every way, and show planned diffusion at work.

    The times in the table are measured without drawing; what is shown on the terminal is slowed down, both races alike.
    """
    if svg is not None and not svg.resolve().parent.is_dir():
        raise UsageError(f"--svg {svg}: there is no such folder")
    with quiet():
        out = console()
        own = _own_prompt(prompt) if prompt is not None else None
        network, tokenizer, folder = load(model, threads=threads)
        item = own or _item(read_items(folder, test_set, "test"), number)
        from hf_hybrid import control_tokens
        from hf_hybrid.evaluation import CANDIDATES, measure, results_of

        out.print(RichText(f"The record{_about(item)}:", style="bold"))
        out.print(RichText(item.sheet.prompt + "\n"))
        with counting() as told:
            run = measure(network, tokenizer, [item], CANDIDATES, max_new_tokens=max_new_tokens, progress=told)
        if run.interrupted:
            raise KeyboardInterrupt
        by_name = {candidate.name: candidate for candidate in run.candidates}

        def write(name: str, streamer: Any) -> Any:
            candidate = by_name[name]
            return _write(network, tokenizer, item, candidate.strategy, candidate.settings, max_new_tokens, streamer)

        def about(name: str, title: str) -> tuple[Any, ...]:
            before = run.measurements[name][0]
            playback = Playback(before.seconds, before.num_forwards, slower)
            return tokenizer.decode, title, control_tokens(network), playback

        def show(name: str, title: str) -> Any:
            view = CanvasView(out, *about(name, title)) if watchable(out) else None
            if view is None:
                return write(name, None)
            with view:
                report = write(name, view)
            if view.last is not None and report.spans:
                out.print(view.frame(view.last))
            return report

        report = show(SHOWN, TITLE)
        if report.spans:
            out.print(RichText("The plan:", style="bold"))
            out.print(plan_table(report, tokenizer.decode))
        out.print(RichText("\nThe answer:", style="bold"))
        out.print(RichText(run.measurements[SHOWN][0].text.rstrip("\n") + "\n"))
        if watchable(out):
            show(TWIN, TWIN_TITLE)
        results = results_of(run, getattr(network.generation_config, "hf_hybrid", None))
        out.print(race_table(run, results, item))
        if svg is not None:
            films = [Film(*about(SHOWN, TITLE)), Film(*about(TWIN, TWIN_TITLE), height=8)]
            for name, film in zip((SHOWN, TWIN), films, strict=True):
                write(name, film)
            svg.write_text(animated_svg(films), encoding="utf-8")
            out.print(f"drawn to {svg}")
        out.print("one warm answer each, on this machine, without drawing; hf-hybrid bench measures many")


def _write(
    network: Any, tokenizer: Any, item: Any, strategy: str | None, settings: Any, max_new_tokens: int, streamer: Any
) -> Any:
    """Write one answer, which ``streamer`` follows pass by pass, and return its report."""
    encoded = tokenizer(item.sheet.prompt, return_tensors="pt")
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}  # (1, prompt)
    call = {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "return_dict_in_generate": True,
        "tokenizer": tokenizer,
    }
    return network.generate(**inputs, **call, strategy=strategy, streamer=streamer, **settings).report[0]


def race_table(run: Any, results: list[Any], item: Any) -> Table:
    """Table of every candidate on this one prompt."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("strategy", no_wrap=True)
    for name in ("seconds", "speedup", "passes", "tokens/pass", "same text?", "right?"):
        table.add_column(name, justify="right", no_wrap=True)
    twin = run.measurements[TWIN][0].text
    for result in results:
        one = run.measurements[result.name][0]
        right = "-" if not item.sheet.pieces else "yes" if one.right else f"{one.fields_right}/{one.fields_total}"
        table.add_row(
            result.name,
            f"{one.seconds:.3f}",
            f"{result.speedup_all:.2f}",
            str(one.num_forwards),
            f"{result.tokens_per_forward:.2f}",
            "yes" if one.text == twin else "no",
            right,
        )
    table.caption = "same text: as autoregressive; right: the expected answer, or how many of its lines"
    table.caption_justify = "left"
    return table


def _own_prompt(path: Path) -> Any:
    from hf_hybrid.training.recipes.sheets import Sheet, TestItem

    text = text_of(path).strip()
    if not text:
        raise UsageError(f"{path} is empty; give a record, one `Field: value` a line")
    return TestItem(str(path), "test", Sheet(text, (), ()))


def _item(items: list[Any], number: int) -> Any:
    if number > len(items):
        raise UsageError(f"--number {number}: there are {len(items)} held-out records")
    return items[number - 1]


def _about(item: Any) -> str:
    return f" ({item.id}, {' and '.join(item.sheet.groups)}, held out)" if item.sheet.groups else ""
