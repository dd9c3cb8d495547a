"""Shows on standard error what a command is doing: a spinner while it loads, a bar while it measures.

Standard output is never touched. Where standard error is no terminal, loading is silent and a measurement writes one
plain line per stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

Told = Callable[[str, str, int, int], None]
"""Called when a step begins, with its stage, its name, the number of steps done and of all steps."""


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show ``text`` and a spinner on a terminal; nothing elsewhere, so that an error is the only line there."""
    errors = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False))
    # Redirected, standard output would end up in standard error.
    shown = Progress(*columns, console=errors, transient=True, disable=not errors.is_interactive, redirect_stdout=False)
    with shown as bar:
        bar.add_task(text, total=None)
        yield


@contextmanager
def counting() -> Iterator[Told]:
    """Show a bar that moves with every step.

    It is drawn only when a step begins: a drawing thread would be measured too.
    """
    errors = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    stages: list[str] = []

    with Progress(
        *columns,
        console=errors,
        transient=True,
        auto_refresh=False,
        disable=not errors.is_interactive,
        redirect_stdout=False,
    ) as bar:
        counted = bar.add_task("", total=None)

        def told(stage: str, name: str, done: int, total: int) -> None:
            if not errors.is_interactive and stage not in stages:
                errors.print(f"{stage} ({total - done} steps to go)", markup=False, highlight=False, soft_wrap=True)
            stages.append(stage)
            bar.update(counted, description=f"{stage}: {name}", completed=done, total=total, refresh=True)

        yield told
