"""``hf-hybrid`` in this process."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from hf_hybrid.cli import app


def call(*arguments: object, code: int = 0, stdin: str | None = None) -> Any:
    """The result of ``hf-hybrid`` with these arguments; it must exit with ``code`` and write no colour codes."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)
    assert result.exit_code == code, (result.output, result.exception)
    assert "\x1b" not in result.output
    return result
