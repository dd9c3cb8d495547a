"""Every ``hf-hybrid`` and ``python -m benchmarks`` line of the pages is one that the command line takes.

Catches: a page that names a command or an option which is gone or was renamed, or leaves a required one out.
"""

from __future__ import annotations

import re
import shlex
from contextlib import suppress

import pytest
import typer

from benchmarks.smollm2 import save
from benchmarks.speculative import bench
from benchmarks.train import train
from hf_hybrid.cli import app
from tests.snippets import PAGES, read


def commands(page: str) -> list[list[str]]:
    """The arguments of every ``hf-hybrid`` in the blocks of a Markdown text, and of those in a line that have any."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.M | re.S)  # every fence, so that none is taken for another
    plain = [line for language, text in blocks if not language for line in text.splitlines()]
    lines = [*plain, *re.findall(r"`(hf-hybrid [a-z-]+ [^`]+)`", page)]
    found: list[list[str]] = []
    for line in lines:
        commands = [part.strip() for part in re.split(r"&&|\||>", line)]
        found += [shlex.split(text, comments=True)[1:] for text in commands if text.startswith("hf-hybrid ")]
    return found


def benchmarks(page: str) -> list[list[str]]:
    """Name and arguments of every ``python -m benchmarks.NAME`` of a page, in a line of its own or in backticks."""
    lines = re.findall(r"^python -m benchmarks\.([^\n&|>]+)|`python -m benchmarks\.([^`]+)`", page, re.M)
    return [shlex.split(block or marked, comments=True) for block, marked in lines]


def parse(arguments: list[str]) -> str:
    """Read ``arguments`` as the command line does, without carrying them out; the name of the command."""
    group = typer.main.get_command(app)
    with group.make_context("hf-hybrid", list(arguments)) as context:  # type: ignore[attr-defined]
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])  # type: ignore
        with suppress(typer.Exit):  # --help
            command.make_context(name, rest, parent=context).close()
    return name


def test_the_command_line_takes_what_the_pages_say() -> None:
    said = [arguments for page in PAGES for arguments in commands(read(page))]
    assert len(said) > 20
    for arguments in said:
        assert parse(arguments) == arguments[0]


def test_the_commands_of_the_checkout_take_what_the_pages_say() -> None:
    said = [line for page in PAGES for line in benchmarks(read(page))]
    assert {line[0] for line in said} == {"smollm2", "speculative", "train"}
    for name, *arguments in said:
        app = typer.Typer()
        app.command()({"smollm2": save, "speculative": bench, "train": train}[name])
        typer.main.get_command(app).make_context(name, arguments).close()


def test_the_index_shows_every_command() -> None:
    text = read("docs/index.md")
    names = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert {arguments[0] for arguments in commands(text)} == names
    listed = text[text.index("There are `hf-hybrid") : text.index("each has `--help`")]
    assert {name.removeprefix("hf-hybrid ") for name in re.findall(r"`([a-z- ]+)`", listed)} == names


def test_a_wrong_option_is_found() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse(["generate", "--picturesque", "x"])
    page = "```python\n1\n```\nprose\n```\nhf-hybrid plan --texts > p.json  # then\n```\n`hf-hybrid tune A b`"
    assert commands(page) == [["plan", "--texts"], ["tune", "A", "b"]]
