"""The table of the README is the measured one.

Catches: numbers that were measured with other code than the ones published, or typed by hand.
"""

from __future__ import annotations

from hf_hybrid.hub.tables import BEGIN, END, read_results, render_summary
from tests.snippets import ROOT, read


def test_the_table_is_the_measured_one() -> None:
    text = read("README.md")
    shown = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()
    results = ROOT / "model_cards" / "results" / "hybrid-pocket.json"
    assert shown == render_summary(read_results(results)).strip()
