"""The page on pipelines and serving tells the truth: its Python runs, its requests say what the server reads.

Catches: snippets that rot; a field of the documented request that would mean something else.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers.pipelines import PIPELINE_REGISTRY

from hf_hybrid import uninstall
from hf_hybrid.cli.served import check_body
from hf_hybrid.config import settings_for, stored_strategy
from hf_hybrid.pipeline import TASK
from tests.snippets import run_snippets

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def test_the_snippets_run(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        run_snippets("docs/serving.md", 5)
    finally:
        uninstall()
        PIPELINE_REGISTRY.supported_tasks.pop(TASK, None)
    shown = capsys.readouterr().out
    assert (
        "answers of 4 parts or more" in shown
        and "Port Amel" in shown
        and "planned," in shown
        and shown.count("## ") > 10
    )


def test_the_documented_requests_name_modes() -> None:
    (curl,) = re.findall(r"-d '(\{.*?\})'\n```", PAGE, re.S)
    body = json.loads(curl)
    check_body(body)
    assert stored_strategy(json.loads(body["generation_config"])["hf_hybrid"]) == "planned_diffusion"
    fields = [json.loads(text) for text in re.findall(r"\| `(\{\"hf_hybrid.*?\})` ", PAGE)]
    assert len(fields) == 4
    for field in fields:
        hybrid = {name: value for name, value in field["hf_hybrid"].items() if value != "..."}
        settings_for(hybrid.pop("strategy", None) or "block_diffusion", hybrid)
