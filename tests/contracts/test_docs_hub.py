"""``docs/hub.md`` tells the truth: its Python runs, in the order of the page, and does what it says.

Catches: snippets that rot, and a page that promises a file, a strategy or a text that does not come.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
import torch

from hf_hybrid import AutoHybridModelForCausalLM, HybridGenerationMixin
from hf_hybrid.config import SETTINGS
from hf_hybrid.hub.exporting import export_speculative
from tests.snippets import run_snippets

PAGE = Path(__file__).resolve().parents[2] / "docs" / "hub.md"


def test_the_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    export_speculative(Path("speculative"))  # the command above the last snippet
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the host's Trainer
        scope = run_snippets("docs/hub.md", 4)
    assert "planned_diffusion" in capsys.readouterr().out
    stored = json.loads(Path("tuned/generation_config.json").read_text())["hf_hybrid"]
    assert stored["strategy"] == "planned_diffusion" and Path("tuned/custom_generate/generate.py").is_file()
    with_plugin = AutoHybridModelForCausalLM.from_pretrained("my-model")
    assert torch.equal(scope["planned"], with_plugin.generate(**scope["record"], max_new_tokens=64))
    wanted = with_plugin.generate(**scope["record"], max_new_tokens=64, strategy="autoregressive")
    assert torch.equal(scope["single"], wanted) and scope["text"].startswith("Capital: Port Amel")
    plain = scope["plain"]
    assert not isinstance(plain, HybridGenerationMixin)
    wanted = plain.generate(**scope["record"], max_new_tokens=64, do_sample=False)
    assert torch.equal(scope["faster"], wanted)


def test_the_matrix_names_every_strategy() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [row for row in re.findall(r"^\| `(\w+)` \|", text, re.M) if row in SETTINGS] and all(
        f"| `{strategy}` | greedy, sampled | greedy |" in text for strategy in SETTINGS
    )
