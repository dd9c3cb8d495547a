"""The second snippet of docs/integrations.md runs behind the first, with PEFT."""

from __future__ import annotations

from typing import Any

from tests.snippets import run_snippets


def test_the_snippets_run(capsys: Any) -> None:
    scope = run_snippets("docs/integrations.md", 2)
    assert "Port Amel" in capsys.readouterr().out and scope["model"].peft_config
