"""A folder of every release is loaded by this code, and by a host that runs the code in the folder.

Catches: a record in ``config.json`` or ``generation_config.json`` that is no longer read, or read otherwise; an
exported copy that the host no longer runs; a text that another version writes otherwise; a version without its entry in
the change log, or a release whose folder was not stored.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import hf_hybrid
from tests.hub.release import CALLS, RELEASES, write_release
from tests.hub.stored_release import ARCHIVE, RECORD, answers

ROOT = Path(__file__).resolve().parents[2]
STORED = sorted(path.name for path in RELEASES.iterdir())
LARGEST = {"model.safetensors": 100_000, ARCHIVE: 220_000}  # bytes; every release stays in the repository


@pytest.fixture(scope="module", params=STORED)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a release as it was exported."""
    root = tmp_path_factory.mktemp("release") / "folder"
    shutil.copytree(RELEASES / request.param, root)
    with zipfile.ZipFile(root / ARCHIVE) as archive:
        archive.extractall(root)
    assert f"# Copied from hf_hybrid {request.param}: " in (root / "custom_generate" / "generate.py").read_text()
    return root


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RECORD).read_text(encoding="utf-8"))


def test_this_code_writes_what_the_release_wrote(folder: Path) -> None:
    wanted = record(folder)
    model = hf_hybrid.AutoHybridModelForCausalLM.from_pretrained(folder, dtype=wanted["dtype"]).eval()
    calls = [answer["arguments"] for answer in wanted["answers"]]
    assert answers(model, AutoTokenizer.from_pretrained(folder), wanted["prompt"], calls) == wanted["answers"]


def test_a_host_without_the_package_runs_the_code_of_the_release(folder: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, str(Path(__file__).with_name("stored_release.py")), str(folder), "found.json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "found.json").read_text()) == record(folder)["answers"]


def test_the_answers_tell_ways_of_writing_apart(folder: Path) -> None:
    found = {json.dumps(answer["arguments"]): answer["tokens"] for answer in record(folder)["answers"]}
    default, autoregressive = found["{}"], found['{"strategy": "autoregressive"}']
    assert default == found['{"strategy": "planned_diffusion"}'] != autoregressive
    assert autoregressive == found['{"strategy": "speculative"}'] != found['{"strategy": "block_diffusion"}']
    assert len({json.dumps(tokens) for tokens in found.values()}) >= 8


def test_a_new_release_can_be_stored(tmp_path: Path) -> None:
    root = tmp_path / "new"
    write_release(root)
    assert {path.name for path in root.iterdir()} >= {"config.json", "model.safetensors", RECORD, ARCHIVE}
    assert not (root / "custom_generate").exists()
    assert [answer["arguments"] for answer in record(root)["answers"]] == CALLS
    for name, most in LARGEST.items():
        assert (root / name).stat().st_size < most


def test_every_version_has_its_entry_and_every_release_its_folder() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", text, re.M)
    assert hf_hybrid.__version__ == released[0], "the newest entry is that of hf_hybrid.__version__"
    assert sorted(released) == STORED
    assert re.search(r"^## \[Unreleased\]$", text, re.M) and text.index("[Unreleased]") < text.index(released[0])
