"""What every command shares: errors in one line, quiet libraries, the model, the test set."""

from __future__ import annotations

import functools
import inspect
import os
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hf_hybrid.checkpoints import BUNDLED, bundled
from hf_hybrid.cli.folder import LoadingError, check_folder
from hf_hybrid.cli.progress import waiting

DEFAULT_MODEL = "hybrid-pocket"
ERROR, USAGE, INTERRUPTED = 1, 2, 130
WRITTEN_FIRST = {"smollm2": "`python -m benchmarks.smollm2 smollm2` writes it, in a checkout of the repository"}
"""Model that used to be a name -> how its folder is written."""
_DEBUG = "; --debug shows where"

Model = Annotated[
    str,
    typer.Option("--model", "-m", help=f"Bundled checkpoint ({', '.join(BUNDLED)}), folder, or Hub id."),
]
TestSet = Annotated[
    Path | None, typer.Option("--test-set", help="Held-out prompts. Default: test_set.jsonl beside the weights.")
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads of torch. Default: torch's own.")]


class UsageError(ValueError):
    """Options that do not go together; exit code 2."""


class InputError(ValueError):
    """Some of the input could not be used; the rest was; exit code 1."""


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Add ``--debug`` to ``command``; without it an error is one line on stderr and an exit code."""
    signature = inspect.signature(command, eval_str=True)
    option = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    debugging = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=option)

    @functools.wraps(command)
    def run(*, debug: bool, **options: Any) -> None:
        try:
            command(**options)
        except typer.Exit:  # a RuntimeError too
            raise
        except KeyboardInterrupt:
            _say("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BaseException as error:  # a panic of a library in Rust is no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            if isinstance(error, BrokenPipeError):  # the reader, such as `head`, has gone
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                raise typer.Exit(ERROR) from None
            if hasattr(error, "format_message"):  # of the parser, which prints it
                raise
            if debug:
                traceback.print_exc()
            else:
                _say(f"error: {_line_of(error)}")
            raise typer.Exit(USAGE if _is_usage(error) else ERROR) from None

    run.__signature__ = signature.replace(parameters=[*parameters, debugging])  # type: ignore[attr-defined]
    return run


def _line_of(error: BaseException) -> str:
    """The message of an exception in one line; with its class, if it is an error that only programmers understand."""
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError, RuntimeError, ImportError)):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text}{_DEBUG}"


def _is_usage(error: BaseException) -> bool:
    from hf_hybrid.config import SettingsError

    return isinstance(error, (UsageError, SettingsError))


def _say(line: str) -> None:
    typer.echo(line, err=True)


def console() -> Console:
    """Standard output; plain text when it is no terminal."""
    return Console(highlight=False, soft_wrap=False)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars and warnings of the libraries, and load them if they are not."""
    with waiting("loading torch and transformers"):
        from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load(name: str, dtype: str = "float32", device: str = "cpu", threads: int | None = None) -> tuple[Any, Any, Path]:
    """Load a model (enabled, in eval mode) and its tokenizer; the path is its folder, or names a Hub id.

    ``dtype="auto"`` is that of the checkpoint.
    """
    with waiting(f"loading {name}"):
        return _load(name, dtype, device, threads)


def _load(name: str, dtype: str, device: str, threads: int | None) -> tuple[Any, Any, Path]:
    import torch

    from hf_hybrid import AutoHybridTokenizer

    if threads is not None:
        torch.set_num_threads(threads)
    model, source = load_network(name, dtype)
    with loading(name, "the tokenizer"):
        tokenizer = AutoHybridTokenizer.from_pretrained(source, padding_side="left")
    with loading(name, f"--device {device}"):
        return model.to(device).eval(), tokenizer, folder_of(name)


def load_network(name: str, dtype: str) -> tuple[Any, str]:
    """Load the model (enabled) of a folder, a bundled checkpoint or a Hub id; with its name for the host."""
    import torch

    from hf_hybrid import AutoHybridModelForCausalLM

    folder = folder_of(name)
    source = str(folder) if folder.is_dir() else name
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    with loading(name, "the model"):
        if folder.is_dir():
            check_folder(folder)
        model, told = AutoHybridModelForCausalLM.from_pretrained(
            source, dtype=wanted, use_safetensors=True, output_loading_info=True
        )
        missing = sorted(told["missing_keys"])
        if missing:  # the host would draw them at random
            raise LoadingError(f"{len(missing)} tensors of the model are not there, such as {missing[0]}")
    return model, source


@contextmanager
def loading(name: str, part: str) -> Iterator[None]:
    """Turn whatever loading ``part`` raises into one line; a broken file may raise anything."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # also a panic of a library in Rust, which is no Exception
        choices = f"a bundled checkpoint ({', '.join(BUNDLED)}), a folder with config.json and weights"
        hint = "" if (folder_of(name) / "config.json").exists() else f"give {choices}, or a Hub id; "
        hint = f"{WRITTEN_FIRST[name]}; " if hint and name in WRITTEN_FIRST else hint
        raise LoadingError(f"cannot load {name!r}: {hint}{part}: {_cause(error):.500}") from error


def _cause(error: BaseException) -> str:
    """Say what is wrong with a model, and what to do where the host does not say it."""
    said = _line_of(error).removesuffix(_DEBUG)
    if "ignore_mismatched_sizes" in said:  # points at a report that is not shown here
        return "the weights have other shapes than config.json says"
    if type(error).__name__ == "SafetensorError":
        return f"a .safetensors file is truncated or broken, download or save it again; {said}"
    if re.search(r"attn_implementation|flash.?att|`kernels`", said, re.IGNORECASE):
        return f'set "attn_implementation": "sdpa" in config.json; {said}'
    return said


def folder_of(name: str) -> Path:
    """The folder of a bundled checkpoint, or of that name."""
    return bundled(name) if name in BUNDLED and not Path(name).is_dir() else Path(name)


def read_items(folder: Path, test_set: Path | None, split: str) -> list[Any]:
    """The held-out prompts of ``split`` of a checkpoint."""
    from hf_hybrid.training.recipe import TEST_SET
    from hf_hybrid.training.recipes.sheets import read_test_set

    path = test_set if test_set is not None else folder / TEST_SET
    if not path.is_file():
        raise UsageError(f"there are no held-out prompts at {path}; name a file with --test-set")
    items = [item for item in read_test_set(path) if item.split == split]
    if not items:
        raise UsageError(f"{path} has no prompts of the split {split!r}")
    return items
