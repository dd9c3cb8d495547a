"""``hf-hybrid card``: the model card of a checkpoint, and the table of a README."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_hybrid.checkpoints import BUNDLED, bundled
from hf_hybrid.cli.command import UsageError


def card(
    checkpoint: Annotated[
        str,
        typer.Argument(help=f"Folder of the checkpoint, or a bundled one ({', '.join(BUNDLED)}).", show_default=False),
    ],
    *,
    results: Annotated[
        list[Path] | None,
        typer.Option("--results", help="JSON of `hf-hybrid bench --json`; may be given more than once."),
    ] = None,
    about: Annotated[
        Path | None, typer.Option(help="Text on the checkpoint: YAML metadata, introduction, data, limits.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Picture of `bench --plot`; it is copied beside the card.")
    ] = None,
    draw: Annotated[
        Path | None, typer.Option(help="JSON of `bench --sweep --json`; the --picture is drawn anew from it first.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Card to write. Default: README.md in the folder.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Name or Hub id of the model. Default: of its recipe or folder.")
    ] = None,
    licence: Annotated[str | None, typer.Option("--licence", "--license", help="Licence, such as apache-2.0.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the model that it was made from.")] = None,
    relation: Annotated[str | None, typer.Option(help="How: finetune, adapter, quantized or merge.")] = None,
    portable: Annotated[
        bool | None,
        typer.Option(
            "--portable/--no-portable",
            help="The repository brings custom_generate/, as `hf-hybrid export` writes it. Default: as the folder.",
        ),
    ] = None,
    readme: Annotated[
        Path | None, typer.Option(help="A README whose table is replaced by that of the first results, too.")
    ] = None,
) -> None:
    """Write the model card of CHECKPOINT from its files, measured results and a text about it.

    Every number in the card comes from a file; what was not measured is not in it.
    """
    from hf_hybrid.hub.card import write_card
    from hf_hybrid.hub.tables import update_readme

    folder = bundled(checkpoint) if checkpoint in BUNDLED and not Path(checkpoint).is_dir() else Path(checkpoint)
    measured = results or []
    if readme is not None and not measured:
        raise UsageError("--readme needs --results")
    if draw is not None:
        _draw(draw, picture)
    written = write_card(
        folder,
        measured,
        out,
        about=about,
        picture=picture,
        name=name,
        licence=licence,
        base_model=base_model,
        relation=relation,
        portable=portable,
    )
    typer.echo(written)
    if readme is not None:
        update_readme(readme, measured[0])
        typer.echo(readme)


def _draw(sweep: Path, picture: Path | None) -> None:
    """Draw the results of a sweep to ``picture``."""
    if picture is None or picture.suffix not in (".png", ".svg"):
        raise UsageError("--draw needs --picture, a .png or .svg file")
    from hf_hybrid.evaluation import draw_frontier
    from hf_hybrid.hub.tables import read_results

    draw_frontier(read_results(sweep), picture)
