"""Writes docs/settings.md from the settings of the package; with --check, only says whether it is up to date."""

from __future__ import annotations

import sys
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hf_hybrid.config import SETTINGS, Settings

PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
HEAD = """# Settings

Given to `generate()` with `strategy=`, or stored in `generation_config.json` under `hf_hybrid`, for every strategy or
for one: `{"strategy": "planned_diffusion", "seed": 1, "block_diffusion": {"window_length": 16}}`. A call comes before
its generation config, that before the checkpoint's, and that before the defaults below. On the command line
`window_length` is `--window-length`. An unknown name, a value out of its range, and in a call a setting of another
strategy are errors. This page is written by `make settings`.
"""


def render() -> str:
    """The page: a table of what every strategy takes, and one for each strategy."""
    shared = {field.name for field in fields(Settings)}
    blocks = [HEAD, "## Every strategy\n", _table(Settings, shared)]
    for strategy, cls in SETTINGS.items():
        own = {field.name for field in fields(cls)} - shared
        about = " ".join((cls.__doc__ or "").replace("``", "`").split())
        table = _table(cls, own) if own else "No settings of its own."
        blocks += [f"## `{strategy}`\n", f"{about}\n", table]
    return "\n".join(block.rstrip("\n") + "\n" for block in blocks)


def _table(cls: type, names: set[str]) -> str:
    lines = ["| setting | default | values | meaning |", "|---|---|---|---|"]
    hints = get_type_hints(cls)
    for field in fields(cls):
        if field.name in names:
            default = "unset" if field.default is None else f"`{field.default}`"
            values = _values(field, hints[field.name])
            lines.append(f"| `{field.name}` | {default} | {values} | {field.metadata['help']} |")
    return "\n".join(lines)


def _values(field: Field[Any], hint: Any) -> str:
    """What a setting takes."""
    options = [option for option in get_args(hint) or (hint,) if option is not type(None)]
    if all(isinstance(option, str) for option in options):
        return ", ".join(f"`{option}`" for option in options)
    if bool in options:
        return "`True`, `False`"
    low, high = field.metadata["low"], field.metadata["high"]
    return f"{low} to {high}"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(f"{PAGE} is out of date: make settings" if PAGE.read_text(encoding="utf-8") != render() else 0)
    PAGE.write_text(render(), encoding="utf-8")
