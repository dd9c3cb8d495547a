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
        from lm_eval._cli import HarnessCLI  # type: ignore[import-not-found]
        from lm_eval.utils import setup_logging  # type: ignore[import-not-found]
    except ImportError as error:
        raise UsageError(
            f'lm-eval is not there, or too old ({error}); pip install "lm-eval[hf]>=0.4.13" beside hf-hybrid'
        ) from error
    from hf_hybrid import install, uninstall
    from hf_hybrid.evaluation.likelihoods import no_pretended_likelihoods, strategy_in

    before, sys.argv = sys.argv, ["lm-eval", *context.args, *(arguments or ())]
    install()
    try:
        setup_logging()
        command = HarnessCLI()
        parsed = command.parse_args()
        with no_pretended_likelihoods(strategy_in(parsed)):
            command.execute(parsed)
    finally:
        sys.argv = before
        uninstall()
