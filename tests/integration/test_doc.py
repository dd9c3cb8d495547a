"""The second snippet of docs/integrations.md runs behind the first, with PEFT."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"


def test_the_snippets_run(capsys: Any) -> None:
    scope: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "integrations.md", "exec"), scope)
    assert "Port Amel" in capsys.readouterr().out and scope["model"].peft_config
