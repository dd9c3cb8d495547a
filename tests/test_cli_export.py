"""``hf-hybrid export``: whole repositories and clear errors.

Bugs these tests catch: an export that changes weights or their type, forgets the card or a strategy, or overwrites its
own source; broken files and full disks that end in a traceback.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_for_tests import write_checkpoint
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hf_hybrid.cli import app
from hf_hybrid.portable import custom_generate_files


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def call(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_a_whole_model(checkpoint: Path, tmp_path: Path) -> None:
    half = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "half")
    (tmp_path / "half" / "training.json").write_text("{}")
    out = tmp_path / "repo"
    assert f"written to {out}" in call("export", tmp_path / "half", out, "--strategy", "block_diffusion")
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "half", out))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert next(iter(after.values())).dtype == torch.bfloat16
    assert json.loads((out / "generation_config.json").read_text())["hf_hybrid"]["strategy"] == "block_diffusion"
    assert {p.name for p in (out / "custom_generate").iterdir()} == set(custom_generate_files())
    assert (out / "training.json").read_text() == "{}" and (out / "tokenizer.json").is_file()
    card = ModelCard.load(out / "README.md")
    assert set(card.data.tags) == {"hf_hybrid", "custom_generate"} and "by `block_diffusion`" in card.text
    (out / "README.md").write_text("mine")
    call("export", tmp_path / "half", out)
    assert (out / "README.md").read_text() == "mine"


def test_decoding_alone(tmp_path: Path) -> None:
    call("export", "--speculative", tmp_path / "speculative")
    assert {p.name for p in (tmp_path / "speculative").iterdir()} == {"README.md", "custom_generate"}
    card = ModelCard.load(tmp_path / "speculative" / "README.md")
    assert card.data.library_name == "transformers" and "custom_generate" in card.data.tags
    assert 'custom_generate="speculative"' in card.text
    entry = (tmp_path / "speculative" / "custom_generate" / "generate.py").read_text()
    assert 'STRATEGY: str | None = "speculative"' in entry


def test_wrong_usage(checkpoint: Path, tmp_path: Path) -> None:
    assert "MODEL FOLDER" in call("export", tmp_path / "alone", code=2)
    assert "MODEL FOLDER" in call("export", "--speculative", "a", "b", code=2)
    assert "one of them" in call("export", "--speculative", "-s", "speculative", tmp_path / "x", code=2)
    assert "choose one of autoregressive" in call("export", checkpoint, tmp_path / "x", "-s", "fast", code=2)
    assert "is the model itself" in call("export", checkpoint, checkpoint, code=2)
    (tmp_path / "file").write_text("")
    assert "is a file" in call("export", checkpoint, tmp_path / "file", code=2)
    foreign = tmp_path / "foreign" / "custom_generate"
    foreign.mkdir(parents=True)
    (foreign / "generate.py").write_text("")
    assert "not hf_hybrid's" in call("export", checkpoint, tmp_path / "foreign", code=1)
    assert not (tmp_path / "x").exists() and [p.name for p in (tmp_path / "foreign").iterdir()] == ["custom_generate"]


def test_a_full_disk_and_broken_files_are_one_line(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", full)
        told = call("export", checkpoint, tmp_path / "out", code=1)
    assert "the weights cannot be written" in told and "No space left" in told and len(told.splitlines()) == 1
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    (broken / "test_set.jsonl").write_text("[1]\n")
    assert "no file of held-out prompts" in call("card", broken, "--licence", "mit", code=1)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-9])
    told = call("card", broken, "--licence", "mit", code=1)
    assert "model.safetensors is broken" in told and len(told.splitlines()) == 1
