"""``hf-hybrid``: write, watch, measure, train and describe from the command line."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from hf_hybrid.cli import bench, card, check, demo, export, generate, lm_eval, plan, serve, train, tune
from hf_hybrid.cli.command import ERROR, guarded

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its columns cut the names of long options
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 error, 2 wrong usage, 130 interrupted.",
)


def _version(asked: bool) -> None:
    if asked:
        from hf_hybrid import __version__

        typer.echo(f"hf-hybrid {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Text in more ways than one: planned diffusion, block diffusion and autoregression with the same weights.

    Begin with: hf-hybrid demo
    """


_COMMANDS = (
    demo.demo,
    generate.generate,
    plan.plan,
    check.check,
    bench.bench,
    tune.tune,
    train.train,
    export.export,
    card.card,
)
for _command in _COMMANDS:
    app.command()(guarded(_command))
# Options that these do not know go to the program that they start.
app.command(context_settings=serve.PASS_ON)(guarded(serve.serve))
_passed_on = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
app.command("lm-eval", context_settings=_passed_on)(guarded(lm_eval.lm_eval))


def main() -> None:
    """The console script."""
    try:
        app(prog_name="hf-hybrid")
    except OSError as error:  # help and version that cannot be written; commands have their own guard
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the interpreter closes it
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(ERROR) from None
