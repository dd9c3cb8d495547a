"""The README tells the truth: its table is the measured one, its Python runs.

Catches: numbers that were measured with other code than the ones published, and snippets that rot.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_hybrid import uninstall
from hf_hybrid.hub.tables import BEGIN, END, read_results, render_table
from tests.models_for_tests import hybrid
from tests.snippets import run_snippets

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "model_cards" / "results" / "hybrid-pocket.json"


def test_the_table_is_the_measured_one() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()
    assert shown == render_table(read_results(RESULTS)).strip()


def test_the_snippets_run(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        run_snippets("README.md", 5)
    finally:
        uninstall()
    shown = capsys.readouterr().out
    assert "## " in shown and "Port Amel" in shown


def test_the_snippet_of_the_speculative_page_runs() -> None:
    scope = run_snippets("docs/speculative.md", 1)
    model, ids = hybrid(seed=26), torch.tensor([[3, 7, 9, 2, 11]])
    options = {"max_new_tokens": 20, "adaptive": False, "return_dict_in_generate": True}
    found = model.generate(ids, strategy="speculative", drafter=scope["Again"](), **options)
    plain = model.generate(ids, strategy="autoregressive", max_new_tokens=20)
    assert torch.equal(found.sequences, plain) and found.report[0].drafting.trees > 3
