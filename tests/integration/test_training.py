"""Fine-tuning with trainers that know nothing of strategies: the host's, and TRL's.

Bugs these tests catch: a trainer that takes an enabled model for another class; a save that loses the record of the
control tokens or the stored settings; strategies that do not run on trained weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from checkpoint_for_tests import write_checkpoint
from datasets import Dataset
from transformers import AutoTokenizer, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.models.utils import unwrap_model_for_generation

import hf_hybrid
from hf_hybrid import AutoHybridModelForCausalLM, AutoHybridTokenizer, control_tokens
from hf_hybrid.config import SETTINGS

TEXTS = ["Exports: rice and iron", "Colors: red <topic> green", "Terrain: hills, a coast", "Symbol: river"]
COMMON: dict[str, Any] = {
    **{"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1},
    **{"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base"))


def start(folder: Path) -> Any:
    model = AutoHybridModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.hf_hybrid = {"strategy": "planned_diffusion", "window_length": 4}
    return model


def check(trainer: Any, before: dict[str, torch.Tensor], saved: Path) -> None:
    """The weights moved, and what was saved loads, keeps its settings and writes in every way."""
    steps = trainer.train()
    assert steps.global_step == 3 and steps.training_loss > 0
    trainer.save_model(str(saved))
    loaded = AutoHybridModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()
    assert any(not torch.equal(before[name], tensor) for name, tensor in loaded.state_dict().items())
    assert json.loads((saved / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert control_tokens(loaded) is not None
    assert loaded.generation_config.hf_hybrid == {"strategy": "planned_diffusion", "window_length": 4}
    prompt = torch.tensor([[3, 77, 120, 9, 300, 4]])
    for strategy in (*SETTINGS, None):
        out = loaded.generate(prompt, strategy=strategy, max_new_tokens=12, return_dict_in_generate=True)
        assert out.sequences.shape[1] > 6
        assert out.report[0].strategy == (strategy or "planned_diffusion")


def test_the_hosts_trainer(folder: Path, tmp_path: Path) -> None:
    model = start(folder)
    tokenizer = AutoHybridTokenizer.from_pretrained(folder)
    rows = [tokenizer(text, padding="max_length", max_length=32, truncation=True) for text in TEXTS]
    data = Dataset.from_list([{**row, "labels": row["input_ids"]} for row in map(dict, rows)])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments = TrainingArguments(output_dir=str(tmp_path / "runs"), **COMMON)
    check(Trainer(model, arguments, train_dataset=data, processing_class=tokenizer), before, tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")  # saved beside the model, as it was
    assert again("<topic>").input_ids == AutoTokenizer.from_pretrained(folder)("<topic>").input_ids


@pytest.mark.parametrize("chats", [False, True], ids=["texts", "chats"])
def test_sft_trainer(folder: Path, tmp_path: Path, chats: bool) -> None:
    model, tokenizer = start(folder), AutoHybridTokenizer.from_pretrained(folder)
    messages = [[{"role": "user", "content": "Write."}, {"role": "assistant", "content": text}] for text in TEXTS]
    data = Dataset.from_list([{"messages": m} for m in messages] if chats else [{"text": text} for text in TEXTS])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments = SFTConfig(output_dir=str(tmp_path / "runs"), max_length=64, **COMMON)
    trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
    assert trainer.model is model and isinstance(model, hf_hybrid.HybridGenerationMixin)
    seen = [token for row in trainer.train_dataset for token in row["input_ids"]]
    tokens = control_tokens(model)
    assert tokens is not None and not set(seen) & set(tokens.noise.banned)  # a typed <topic> is text in training too
    check(trainer, before, tmp_path / "saved")


def test_trl_samples_with_checkpointing_off(folder: Path) -> None:
    """Its context switches checkpointing off for a call; without it the call is refused."""
    model = AutoHybridModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    ids = torch.tensor([[3, 77, 120, 9, 300, 4]])
    options: dict[str, Any] = {"strategy": "speculative", "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **options).tolist()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()
    with unwrap_model_for_generation(model, Accelerator(cpu=True)) as sampled:
        assert sampled.generate(ids, **options).tolist() == expected
    assert model.is_gradient_checkpointing
    with pytest.raises(ValueError, match=r"call model\.eval\(\) before generate"):
        model.generate(ids, **options)
