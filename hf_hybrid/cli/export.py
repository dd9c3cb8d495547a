"""``hf-hybrid export``: a folder that is a whole repository and writes without this package too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_hybrid.cli.command import UsageError, load, quiet
from hf_hybrid.config import SETTINGS


def export(
    names: Annotated[
        list[str], typer.Argument(metavar="[MODEL] FOLDER", help="Model, as of generate --model; folder to write.")
    ],
    *,
    speculative: Annotated[
        bool, typer.Option("--speculative", help="No weights: speculative decoding for any causal model. FOLDER alone.")
    ] = False,
    strategy: Annotated[
        str | None, typer.Option("--strategy", "-s", help=f"Of calls that name none: {', '.join(SETTINGS)}.")
    ] = None,
) -> None:
    """Write a repository for the Hub: weights, tokenizer, custom_generate/ and a card.

    With trust_remote_code=True it writes by every strategy where hf_hybrid is not installed. With --speculative it is
    decoding alone: model.generate(..., custom_generate=FOLDER, trust_remote_code=True).

    Upload it with: hf upload OWNER/NAME FOLDER
    """
    if len(names) != (1 if speculative else 2):
        raise UsageError("give `MODEL FOLDER`, or `--speculative FOLDER`")
    if speculative and strategy is not None:
        raise UsageError("--speculative and --strategy are two answers to one question: give one of them")
    if strategy is not None and strategy not in SETTINGS:
        raise UsageError(f"--strategy {strategy}: choose one of {', '.join(SETTINGS)}")
    folder = Path(names[-1])
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; name a folder")
    if speculative:
        from hf_hybrid.hub.exporting import export_speculative

        export_speculative(folder)
    else:
        with quiet():
            from hf_hybrid.hub.exporting import export_model

            model, tokenizer, source = load(names[0], "auto")
            if source.is_dir() and folder.is_dir() and source.samefile(folder):
                raise UsageError(f"{folder} is the model itself; name another folder")
            export_model(model, folder, tokenizer=tokenizer, source=source, strategy=strategy)
    typer.echo(f"written to {folder}")
