"""``docs/settings.md`` is what ``make settings`` writes from the settings of the package.

Catches: a setting that the page leaves out, or whose default, range or meaning changed.
"""

from __future__ import annotations

import runpy
from dataclasses import fields

from hf_hybrid.config import SETTINGS
from tests.snippets import ROOT, read


def test_the_page_is_up_to_date() -> None:
    written = runpy.run_path(str(ROOT / ".ci" / "settings_page.py"))["render"]()
    assert written == read("docs/settings.md"), "make settings"


def test_it_names_every_setting_under_its_strategy() -> None:
    sections = dict(part.split("\n", 1) for part in read("docs/settings.md").split("\n## ")[1:])
    for strategy, cls in SETTINGS.items():
        for field in fields(cls):
            assert f"| `{field.name}` |" in sections["Every strategy"] + sections[f"`{strategy}`"]
