"""Values of a checkpoint that somebody wrote to harm are refused in words, before anything is made of them.

Bugs these tests catch: a traceback of the host where a sentence is due; a number that becomes rows or memory; a name
that is imported; a field that hides a method; a model that does not work any more after a refusal; weights that run
code when they are read.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_configs import FILES, hostile_configs
from models_for_tests import CONTROL, hybrid, tiny
from transformers import GenerationConfig

import hf_hybrid
from hf_hybrid import AutoHybridModelForCausalLM, SettingsError
from hf_hybrid.config import SETTINGS
from hf_hybrid.stored import check_call, check_fields, check_file

PROMPT = torch.tensor([[3, 7, 9, 2, 11]])
HOSTILE = hostile_configs()
ROOT = Path(hf_hybrid.__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("checkpoint")
    model = hybrid()
    model.get_output_embeddings().bias = None  # the class has none, and loading would miss it
    model.save_pretrained(made)
    return made


def harmless() -> GenerationConfig:
    return GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=CONTROL.noise.end, pad_token_id=0)


def use(folder: Path, strategy: str | None) -> tuple[str, Any]:
    """What a user does with a checkpoint: load it, and write. Returns the refusal and the model that refused."""
    passes: list[int] = []
    try:
        model = AutoHybridModelForCausalLM.from_pretrained(folder)
    except ValueError as error:
        return str(error), None
    hook = model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    with pytest.raises(ValueError) as caught:
        model.generate(PROMPT, strategy=strategy)
    hook.remove()
    assert not passes
    return str(caught.value), model


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_configs_are_refused(number: int, folder: Path) -> None:
    (folder / "generation_config.json").write_bytes(HOSTILE[number])
    config = json.loads(HOSTILE[number]) if number >= len(FILES) else {}
    own = config.get("hf_hybrid")
    named = isinstance(own, dict) and "strategy" not in own
    message, model = use(folder, "planned_diffusion" if named else None)
    assert 10 < len(message) < 2000
    if config:  # the message names the field, or the setting in it
        wanted = [name for name in config if name != "hf_hybrid"]
        if not wanted:
            keys = list(own) if isinstance(own, dict) else []
            inner = [key for value in keys if isinstance(own[value], dict) for key in own[value]]
            wanted = [
                "generation_config.hf_hybrid",
                "'hf_hybrid' is nested",
                *(repr(key)[:50] for key in [*keys, *inner]),
                *keys,
                *inner,
            ]
            wanted = [name for name in wanted if name not in ("", "strategy", *SETTINGS)]
        assert any(name in message for name in wanted), message
    if model is None:
        model = AutoHybridModelForCausalLM.from_pretrained(folder, generation_config=harmless())
    model.generation_config = harmless()
    assert model.generate(PROMPT, strategy="autoregressive").shape == (1, 7)


def test_there_are_two_hundred_different_ones() -> None:
    assert len(HOSTILE) == len(set(HOSTILE)) == 200
    assert hostile_configs() == HOSTILE


@pytest.mark.parametrize(
    "harmless",
    [
        {"max_new_tokens": 10**12},
        {"max_length": 2**50},
        {
            "hf_hybrid": {
                "planned_diffusion": {"max_plan_length": 1048576, "max_part_length": 65536, "max_rounds": 1024}
            }
        },
        {"top_k": 10**9, "temperature": 1.5, "do_sample": True},
        {"chat_format": "chatml", "\u0436": {"a": [1]}, "max_window_size": 24000},
    ],
    ids=str,
)
def test_what_is_legal_is_clamped(harmless: dict[str, Any], folder: Path) -> None:
    """An answer ends with its end token, whatever a file asks for, and nothing is allocated for what it asks."""
    base = {"eos_token_id": CONTROL.noise.end, "pad_token_id": 0, "max_new_tokens": 9}
    (folder / "generation_config.json").write_text(json.dumps(base | harmless))
    model = AutoHybridModelForCausalLM.from_pretrained(folder)
    for strategy in SETTINGS:
        out = model.generate(PROMPT, strategy=strategy, seed=1)
        assert 5 < out.shape[1] <= 1024  # it writes its end token long before


def test_values_of_a_loaded_model_are_checked_too(folder: Path) -> None:
    """``enable()`` and assignments do not pass through the file."""
    model = hybrid()
    model.generation_config.temperature = "hot"
    with pytest.raises(SettingsError, match="generation_config: temperature='hot': must be a number"):
        model.generate(PROMPT, strategy="autoregressive", max_new_tokens=2)
    assert model.generate(PROMPT, strategy="autoregressive", max_new_tokens=2, temperature=1.0).shape == (1, 7)
    with pytest.raises(SettingsError, match=r"generate\(\): num_return_sequences=1000000000: is out of range"):
        model.generate(PROMPT, strategy="autoregressive", do_sample=True, num_return_sequences=10**9)


def test_what_no_file_can_hold_passes() -> None:
    check_fields({"eos_token_id": torch.tensor([1]), "temperature": torch.tensor(0.5), "anything": object()}, "here")
    model = tiny("llama")
    check_call(model, {"generation_config": GenerationConfig(eos_token_id=[1, 60]), "pad_token_id": -1})
    check_call(model, {"generation_config": GenerationConfig(eos_token_id=[61, -1], pad_token_id=61)})
    with pytest.raises(SettingsError, match="61 is outside the vocabulary of 61 tokens"):
        check_call(model, {"generation_config": GenerationConfig(suppress_tokens=[1, 61])})


def test_a_folder_without_the_file_is_none_of_its_business(tmp_path: Path) -> None:
    check_file(tmp_path)
    check_file(tmp_path / "missing")
    with pytest.raises(OSError, match="missing"):
        AutoHybridModelForCausalLM.from_pretrained(tmp_path / "missing")


def test_files_in_a_subfolder_are_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "generation_config.json").write_text("[]")
    check_file(tmp_path)
    with pytest.raises(SettingsError, match="must be an object with fields, got list"):
        check_file(tmp_path, subfolder="inner")


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, (str(Path(sys.argv[0]).name) + ".bomb",)


def test_weights_that_are_pickled_code_are_not_run(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A checkpoint with nothing but a ``.bin``: weights are read without code, and code among them not at all."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save({"model.embed_tokens.weight": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises((OSError, ValueError, pickle.UnpicklingError)):
        AutoHybridModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises((OSError, ValueError, RuntimeError, pickle.UnpicklingError)):
        AutoHybridModelForCausalLM.from_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "pytorch_model.bin"]
    assert Bomb().__reduce__()[0] is os.mkdir  # the bomb is live


def test_nothing_is_ever_unpickled() -> None:
    """No file of the package calls a loader of pickles; ``torch.load`` only with ``weights_only=True``."""
    loaders = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    found, read = [], 0
    for path in ROOT.rglob("*.py"):
        read += 1
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import) and loaders & {alias.name.split(".")[0] for alias in node.names}:
                found.append((path.name, node.lineno))
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in loaders:
                found.append((path.name, node.lineno))
            if isinstance(node, ast.Call):
                text = ast.unparse(node.func)
                safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
                pickled = any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords)
                if (
                    (text in ("torch.load", "eval", "exec") and not safe)
                    or pickled
                    or text == "importlib.import_module"
                ):
                    found.append((path.name, node.lineno))
    assert read > 50 and found == []
