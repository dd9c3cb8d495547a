"""``hf-hybrid lm-eval``: lm-eval's own command line in a process in which models understand strategies."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from hf_hybrid.cli.command import UsageError


def lm_eval(
    context: typer.Context,
    arguments: Annotated[list[str] | None, typer.Argument(help="Arguments of lm-eval, such as --model hf.")] = None,
) -> None:
    """Run lm-eval with strategies: hf-hybrid lm-eval --model hf ... --gen_kwargs strategy=planned_diffusion

    Everything behind lm-eval goes to it unchanged. Likelihood tasks under a diffusion strategy are refused: what the
    model's forward gives is the likelihood of autoregressive writing. Needs: pip install "lm-eval[hf]"
    """
    try:
        from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError(f'lm-eval is not there ({error}); pip install "lm-eval[hf]" beside hf-hybrid') from error
    from hf_hybrid import install, uninstall
    from hf_hybrid.evaluation.likelihoods import no_pretended_likelihoods, strategy_in

    given = [*context.args, *(arguments or ())]
    before, sys.argv = sys.argv, ["lm-eval", *given]
    install()
    try:
        with no_pretended_likelihoods(strategy_in(given)):
            cli_evaluate()
    finally:
        sys.argv = before
        uninstall()
