"""Every page tells the truth: its Python runs, its links lead somewhere, and the index knows all of them.

Catches: snippets that rot, a page that no test runs, a link to a file or a heading that moved, a page that nobody
finds, a first page that grows beyond a screen or two.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers.pipelines import PIPELINE_REGISTRY

from hf_hybrid import uninstall
from hf_hybrid.pipeline import TASK
from tests.models_for_tests import hybrid
from tests.snippets import PAGES, ROOT, read, run_snippets, snippets

ELSEWHERE = {"docs/hub.md": "test_docs_hub.py", "docs/integrations.md": "test_integrations_doc.py"}
"""Pages whose Python needs more than to be run -> the test that runs it."""
SHOWN = {
    "README.md": ("Correct the spelling", "## ", "Port Amel"),
    "docs/batches.md": ("0 ", "1 ", "2 ", "Port Este", "Lima"),
    "docs/generate.md": ("## ", "Port Amel", "'role': 'assistant'"),
    "docs/pipelines.md": ("answers of 4 parts or more", "Port Amel", "planned,", "## People"),
    "docs/plans.md": ("## Geography", "## People", "'given'"),
    "docs/speculative.md": (),
}
"""What the Python of every other page prints."""


def test_every_page_with_python_is_run() -> None:
    assert {page for page in PAGES if snippets(read(page))} == ELSEWHERE.keys() | SHOWN.keys()
    for page, test in ELSEWHERE.items():
        assert Path(page).name in Path(__file__).with_name(test).read_text()


@pytest.mark.parametrize("page", SHOWN)
def test_the_python_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        run_snippets(page)
    finally:
        uninstall()
        PIPELINE_REGISTRY.supported_tasks.pop(TASK, None)
    shown = capsys.readouterr().out
    assert all(text in shown for text in SHOWN[page]), shown


def test_the_drafter_of_the_speculative_page_changes_no_text() -> None:
    scope = run_snippets("docs/speculative.md", 1)
    model, ids = hybrid(seed=26), torch.tensor([[3, 7, 9, 2, 11]])
    options = {"max_new_tokens": 20, "adaptive": False, "return_dict_in_generate": True}
    found = model.generate(ids, strategy="speculative", drafter=scope["Again"](), **options)
    plain = model.generate(ids, strategy="autoregressive", max_new_tokens=20)
    assert torch.equal(found.sequences, plain) and found.report[0].drafting.trees > 3


@pytest.mark.parametrize("page", PAGES)
def test_python_that_needs_more_is_python(page: str) -> None:
    for block in snippets(read(page), "py"):  # a server, a token, weights that are not here
        compile(block, page, "exec")
    assert not re.search(r"^```\w*\n(?:import|from) \w+(?: import|$)", re.sub(r"```py(thon)?\n", "", read(page)), re.M)


def headings(page: Path) -> set[str]:
    """The anchors of a Markdown page, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, "model_cards/hybrid-pocket/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    source = ROOT / page
    text = re.sub(r"^```.*?^```$", "", source.read_text(encoding="utf-8"), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        found = source.parent / file if file else source
        assert found.exists(), f"{page}: {target}"
        assert not anchor or anchor in headings(found), f"{page}: {target}"


def test_the_index_names_every_page() -> None:
    named = set(re.findall(r"\]\((\w+\.md)\)", read("docs/index.md")))
    assert named == {Path(page).name for page in PAGES if page.startswith("docs/")} - {"index.md"}
    linked = set(re.findall(r"\]\((docs/\w+\.md)", read("README.md")))
    assert linked == {page for page in PAGES if page.startswith("docs/")}


def test_the_readme_stays_short() -> None:
    assert len(read("README.md").splitlines()) <= 150
