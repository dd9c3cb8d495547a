"""LoRA adapters on an enabled model: every strategy writes, before and after saving, loading and merging.

Bugs these tests catch: a wrapper that hides ``strategy=``; an adapter that is left out of the passes of a strategy; a
loaded adapter that writes another text than the saved one; a merged model that lost the switch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_for_tests import write_checkpoint
from peft import LoraConfig, PeftModel, get_peft_model

import hf_hybrid
from hf_hybrid import AutoHybridModelForCausalLM, HybridGenerationMixin
from hf_hybrid.config import SETTINGS

NEW = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base"))


def base(folder: Path) -> Any:
    return AutoHybridModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def adapted(folder: Path) -> Any:
    torch.manual_seed(3)
    # Weights that are not zero, as after training: an adapter that changes nothing would pass every test.
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(base(folder), config).eval()


def texts(model: Any) -> dict[str, list[list[int]]]:
    prompt = torch.tensor([[3, 77, 120, 9, 300, 4]])
    return {
        strategy: model.generate(input_ids=prompt, strategy=strategy, max_new_tokens=NEW, seed=1).tolist()
        for strategy in SETTINGS
    }


def test_every_strategy_writes_with_the_adapter_saved_loaded_and_merged(folder: Path, tmp_path: Path) -> None:
    model = adapted(folder)
    written = texts(model)
    plain = texts(base(folder))
    assert all(len(text[0]) > 6 for text in written.values())
    assert any(written[strategy] != plain[strategy] for strategy in SETTINGS)
    prompt = torch.tensor([[3, 77, 120, 9, 300, 4]])
    host = model.generate(input_ids=prompt, max_new_tokens=NEW)
    assert written["autoregressive"] == written["speculative"] == host.tolist()

    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base(folder), tmp_path / "adapter").eval()
    assert texts(loaded) == written
    direct = AutoHybridModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float64).eval()
    assert isinstance(direct, HybridGenerationMixin) and texts(direct) == written  # the host finds the base model

    merged: Any = loaded.merge_and_unload()
    assert isinstance(merged, HybridGenerationMixin) and texts(merged) == written  # float64: rounding moves no argmax
    merged.save_pretrained(tmp_path / "merged")
    again = AutoHybridModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64).eval()
    assert texts(again) == written


def test_a_wrapped_model_is_enabled_through_its_wrapper(folder: Path) -> None:
    model = adapted(folder)
    hf_hybrid.disable(model)
    assert not isinstance(model.get_base_model(), HybridGenerationMixin)
    assert hf_hybrid.enable(model) is model
    with model.disable_adapter():
        assert texts(model) == texts(base(folder))


def test_an_adapter_for_each_sequence(folder: Path) -> None:
    model = adapted(folder)
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    prompts = torch.tensor([[3, 77, 120, 9, 300, 4], [9, 9, 120, 3, 77, 120]])

    def write(rows: int, **options: Any) -> Any:
        ids = prompts[:rows]
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False, **options}
        return model.generate(input_ids=ids, **options).tolist()

    for strategy in ("autoregressive", "speculative"):
        for names in (["default"], ["other"]):
            assert write(1, adapter_names=names, strategy=strategy) == write(1, adapter_names=names)
        with pytest.raises(ValueError, match="adapter_names= gives each sequence"):
            write(2, adapter_names=["default", "other"], strategy=strategy)
        assert write(2, strategy=strategy) == write(2)  # the hooks of a call that failed are gone
