"""``hf-hybrid serve``: the host's ``transformers serve`` in a process in which every model understands strategies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hf_hybrid.checkpoints import BUNDLED, bundled
from hf_hybrid.cli.command import DEFAULT_MODEL, WRITTEN_FIRST, UsageError
from hf_hybrid.cli.folder import check_folder
from hf_hybrid.config import SETTINGS

Strategy = Literal[*SETTINGS]  # type: ignore[valid-type]

PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True}
"""Context settings of the command: options that it does not know go to the host."""


class ServingError(ValueError):
    """The server cannot be started."""


def serve(
    context: typer.Context,
    *,
    strategy: Annotated[
        Strategy | None,  # type: ignore[valid-type]
        typer.Option("--strategy", "-s", help="For requests that name none. Default: what the checkpoint names."),
    ] = None,
) -> None:
    """Serve MODEL with the API of OpenAI: hf-hybrid serve [MODEL] [options of transformers serve].

    MODEL is a bundled checkpoint (default: hybrid-pocket), a folder or a Hub id; clients name it alike, a folder also
    by its last part. Further options are passed on: --host (default: localhost, this machine alone), --port (8000),
    --device, --dtype (default: auto; float32 for bundled checkpoints), --log-level and the others of transformers serve
    --help. A request names its mode in the field generation_config, a string that holds JSON: {"hf_hybrid":
    {"strategy": "planned_diffusion"}}. Needs pip install "hf-hybrid[serving]".
    """
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ServingError('serving needs a web server: pip install "hf-hybrid[serving]"')
    from transformers.cli.serve import Serve

    from hf_hybrid import install
    from hf_hybrid.cli.served import hybrid_server

    host = typer.Typer(add_completion=False)
    host.command(name="serve")(Serve)
    command = typer.main.get_command(host)
    try:
        inner = command.make_context("hf-hybrid serve", list(context.args))
    except Exception as error:  # a usage error of typer, whose class has no public name
        if not hasattr(error, "format_message"):
            raise
        raise UsageError(f"{error.format_message()} (see transformers serve --help)") from None  # type: ignore
    with inner:
        name = model_and_type(inner.params, any(word.split("=")[0] == "--dtype" for word in context.args))
        install()
        with hybrid_server(name, inner.params["force_model"], strategy):
            command.invoke(inner)


def model_and_type(options: dict[str, Any], typed: bool) -> str:
    """Put the model and its type into the host's ``options``; returns the name by which clients may call it.

    Args:
        typed: True: the type of the weights was named.

    Raises:
        UsageError: options that would bypass the strategies, or a model that the host cannot load.
        LoadingError: a folder that must not be read.
    """
    if options.get("continuous_batching"):
        raise UsageError(
            "--continuous-batching decodes in a loop of its own, which knows no strategy; leave it out, or use "
            "transformers serve"
        )
    given = options.get("force_model") or DEFAULT_MODEL
    options["force_model"] = given
    if Path(given).is_dir():
        check_folder(Path(given))
        return Path(given).resolve().name
    if given in WRITTEN_FIRST:
        raise UsageError(f"there is no folder {given}; {WRITTEN_FIRST[given]}")
    if given in BUNDLED:
        options["force_model"] = str(bundled(given))
        if not typed:
            options["dtype"] = "float32"  # measured in it; bfloat16 is slow on processors that lack it
    return given
