"""What is saved or pushed keeps the strategies, whoever saves it.

Bugs these tests catch: ``custom_generate/`` lost by save_pretrained, by the host's push, by a plain Trainer, or written
by every process of a job; a foreign folder overwritten, or a training run lost to it; settings dropped by the host's
flag; weights that a shard or a subfolder hides.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_for_tests import read_checkpoint, write_checkpoint
from huggingface_hub import ModelCard
from models_for_tests import hybrid, left_padded, tiny
from transformers import AutoModelForCausalLM, GenerationConfig, Trainer, TrainingArguments
from transformers.utils import hub as host_hub

import hf_hybrid
from hf_hybrid import HybridCallback, PortableError
from hf_hybrid.hub import push
from hf_hybrid.portable import custom_generate_files

FILES = set(custom_generate_files())
PLANNED = {"strategy": "planned_diffusion", "window_length": 4}


def portable(folder: Path) -> bool:
    """True: the folder holds the whole of ``custom_generate/``."""
    where = folder / "custom_generate"
    return where.is_dir() and {path.name for path in where.iterdir()} == FILES


def foreign(folder: Path) -> Path:
    """A ``custom_generate/`` of somebody else in ``folder``."""
    (folder / "custom_generate").mkdir(parents=True)
    entry = folder / "custom_generate" / "generate.py"
    entry.write_text("def generate(*, model, **kwargs): ...\n")
    return entry


def test_an_enabled_model_saves_its_decoding(tmp_path: Path) -> None:
    model = hybrid()
    model.save_pretrained(tmp_path / "whole")
    assert portable(tmp_path / "whole") and (tmp_path / "whole" / "model.safetensors").is_file()
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "custom_generate").exists()


def test_a_foreign_folder_costs_no_weights(tmp_path: Path) -> None:
    entry = foreign(tmp_path)
    with pytest.warns(UserWarning, match="not hf_hybrid's"):
        hybrid().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file() and "def generate(*, model" in entry.read_text()
    (tmp_path / "empty").mkdir()
    foreign(tmp_path / "empty" / "b")
    with pytest.raises(PortableError, match="save into another folder"):
        hf_hybrid.save_pretrained(hybrid(), tmp_path / "empty" / "b")
    assert [path.name for path in (tmp_path / "empty" / "b").iterdir()] == ["custom_generate"]


def test_the_helper_saves_a_plain_model(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "made")
    _, tokenizer, _ = read_checkpoint(checkpoint, torch.float64)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint)
    plain.generation_config = GenerationConfig.from_model_config(plain.config)  # with the flag that drops fields
    plain.generation_config.hf_hybrid = PLANNED
    assert hf_hybrid.save_pretrained(plain, tmp_path / "out", tokenizer=tokenizer) == tmp_path / "out"
    assert portable(tmp_path / "out") and not isinstance(plain, hf_hybrid.HybridGenerationMixin)
    again = hf_hybrid.AutoHybridModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.generation_config.hf_hybrid == PLANNED and (tmp_path / "out" / "tokenizer.json").is_file()
    with pytest.raises(TypeError, match="no generate"):
        hf_hybrid.save_pretrained(torch.nn.Linear(2, 2), tmp_path / "linear")
    assert not (tmp_path / "linear").exists()


def trainer(model: Any, folder: Path, callbacks: list[Any]) -> Trainer:
    rows = [{"input_ids": list(range(1, 9)), "labels": list(range(1, 9))} for _ in range(4)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1e-3,
    )

    def collate(items: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([item[name] for item in items]) for name in items[0]}

    return Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=callbacks)


@pytest.mark.parametrize("enabled", [True, False])
def test_fine_tuning_keeps_the_strategies(tmp_path: Path, enabled: bool) -> None:
    model = hybrid().float()
    model.get_output_embeddings().bias = None  # a helper of the tests, and no part of the architecture
    model.generation_config.hf_hybrid = PLANNED
    model.save_pretrained(tmp_path / "base")
    loader = hf_hybrid.AutoHybridModelForCausalLM if enabled else AutoModelForCausalLM
    model = loader.from_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pin_memory, of the host
        run = trainer(model, tmp_path / "run", [] if enabled else [HybridCallback()])
        run.train()
    run.save_model()
    for folder in ("checkpoint-1", "checkpoint-2", "."):
        assert portable(tmp_path / "run" / folder), folder
        stored = json.loads((tmp_path / "run" / folder / "generation_config.json").read_text())
        assert stored["hf_hybrid"] == PLANNED
    loaded = hf_hybrid.AutoHybridModelForCausalLM.from_pretrained(tmp_path / "run")
    base = hf_hybrid.AutoHybridModelForCausalLM.from_pretrained(tmp_path / "base")
    assert not torch.equal(loaded.model.embed_tokens.weight, base.model.embed_tokens.weight)  # it was trained
    written = loaded.generate(**left_padded(), max_new_tokens=12, return_dict_in_generate=True)
    assert written.report[0].strategy == "planned_diffusion"


def test_a_trainer_says_at_once_what_stands_in_the_way(tmp_path: Path) -> None:
    foreign(tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = trainer(tiny("llama").float(), tmp_path / "run", [HybridCallback()])
        with pytest.raises(PortableError, match="not hf_hybrid's"):
            run.train()
    assert run.state.global_step == 0


class Hub:
    """Stands for the Hub: keeps what a commit would hold."""

    def __init__(self) -> None:
        self.commits: list[dict[str, Any]] = []

    def create_repo(self, repo_id: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, operations: list[Any], **kwargs: Any) -> None:
        names = {str(o.path_in_repo).replace("\\", "/"): Path(o.path_or_fileobj).read_bytes() for o in operations}
        self.commits.append({**kwargs, "files": names})


@pytest.mark.parametrize("while_saving", [True, False])
@pytest.mark.parametrize("again", [True, False])
def test_the_hosts_push_takes_it_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, while_saving: bool, again: bool
) -> None:
    hub = Hub()
    monkeypatch.setattr(host_hub, "hf_api", lambda: hub)
    monkeypatch.setattr("transformers.modeling_utils.hf_api", lambda: hub, raising=False)
    card = ModelCard("---\nlibrary_name: transformers\n---\n")
    for where in (host_hub, __import__("transformers.modeling_utils", fromlist=["x"])):
        monkeypatch.setattr(where, "create_and_tag_model_card", lambda *a, **k: card)
    model = hybrid()
    if again:  # the folder is not new: only what changed would go up
        model.save_pretrained(tmp_path / "model")
        later = time.time() + 3600  # clocks differ, and some keep whole seconds: no time stamp says what is new
        os.utime(tmp_path / "model" / "custom_generate", (later, later))
    if while_saving:
        model.save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="me/model")
    else:
        model.push_to_hub("me/model")
    (commit,) = hub.commits
    sent = {name.removeprefix("custom_generate/") for name in commit["files"] if name.startswith("custom_generate/")}
    assert sent == FILES and commit["repo_id"] == "me/model" and "model.safetensors" in commit["files"]


@pytest.mark.parametrize("known", [True, False])
def test_push_to_hub_is_one_commit_with_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    calls: list[tuple[Any, ...]] = []

    class Api(Hub):
        def __init__(self, token: Any) -> None:
            calls.append(("token", token))

        def create_repo(self, repo_id: str, **kwargs: Any) -> SimpleNamespace:
            calls.append(("repo", kwargs))
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def create_branch(self, repo_id: str, **kwargs: Any) -> None:
            calls.append(("branch", repo_id, kwargs["branch"]))

        def file_exists(self, repo_id: str, name: str, **kwargs: Any) -> bool:
            return known

        def upload_folder(self, folder_path: str, **kwargs: Any) -> Any:
            files = {p.relative_to(folder_path).as_posix(): p.read_bytes() for p in Path(folder_path).rglob("*.*")}
            calls.append(("upload", kwargs, files))
            return "the commit"

    monkeypatch.setattr(push, "HfApi", Api)
    checkpoint = write_checkpoint(tmp_path / "made")
    model, tokenizer, _ = read_checkpoint(checkpoint, torch.float32)
    given = {"private": True, "token": "secret", "revision": "tuned", "commit_message": "Better"}
    assert hf_hybrid.push_to_hub(model, "pocket", tokenizer=tokenizer, **given) == "the commit"
    assert [call[0] for call in calls] == ["token", "repo", "branch", "upload"]
    assert calls[0][1] == "secret" and calls[1][1]["private"] is True and calls[2][1:] == ("me/pocket", "tuned")
    _, kwargs, files = calls[3]
    assert kwargs["revision"] == "tuned" and kwargs["commit_message"] == "Better" and kwargs["repo_id"] == "me/pocket"
    wanted = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"}
    assert wanted | {f"custom_generate/{name}" for name in FILES} <= set(files)
    assert ("README.md" in files) is not known  # a card that is there already stays
    if not known:
        card = ModelCard(files["README.md"].decode())
        assert card.data.library_name == "transformers" and set(card.data.tags) == {"hf_hybrid", "custom_generate"}
        assert 'from_pretrained("me/pocket", trust_remote_code=True)' in card.text and "planned_diffusion" in card.text


def test_shards_and_subfolders(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "made")
    model, tokenizer, items = read_checkpoint(checkpoint, torch.float32)
    model.save_pretrained(tmp_path / "repo" / "inner", max_shard_size="60KB")
    tokenizer.save_pretrained(tmp_path / "repo" / "inner")
    assert len(list((tmp_path / "repo" / "inner").glob("model-*.safetensors"))) > 1
    for name, kwargs in ((tmp_path / "repo" / "inner", {}), (tmp_path / "repo", {"subfolder": "inner"})):
        loaded = hf_hybrid.AutoHybridModelForCausalLM.from_pretrained(name, **kwargs)
        encoded = tokenizer([items[0].sheet.prompt], return_tensors="pt")
        arguments = {"strategy": "planned_diffusion", "max_new_tokens": 24}
        assert torch.equal(loaded.generate(**encoded, **arguments), model.generate(**encoded, **arguments))
