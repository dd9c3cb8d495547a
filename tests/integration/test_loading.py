"""Weights that accelerate distributes, and weights that were quantised: loading is the host's, the strategies follow.

Bugs these tests catch: hooks of accelerate that a pass does not go through; a device that the loop takes from the wrong
parameter; linear layers of another class that the Runner reads itself instead of calling them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from checkpoint_for_tests import write_checkpoint
from torch import nn

from hf_hybrid import AutoHybridModelForCausalLM
from hf_hybrid.config import SETTINGS

PROMPT = torch.tensor([[3, 77, 120, 9, 300, 4]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base"))


def load(folder: Path, **arguments: Any) -> Any:
    return AutoHybridModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **arguments).eval()


def texts(model: Any) -> dict[str, list[list[int]]]:
    return {s: model.generate(PROMPT, strategy=s, max_new_tokens=24, seed=1).tolist() for s in SETTINGS}


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_map(folder: Path, device_map: Any) -> None:
    assert texts(load(folder, device_map=device_map)) == texts(load(folder))


@pytest.mark.parametrize("offload", [False, True], ids=["dispatched", "offloaded"])
def test_hooks(folder: Path, offload: bool) -> None:
    """Every module behind a hook; offloaded ones hold no weights between two calls."""
    model = load(folder)
    written = texts(model)
    devices = {name: "cpu" for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    if offload:
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert next(model.parameters()).device.type == "meta"
    else:
        devices |= {name: "cpu" for name, _ in model.named_modules() if name.endswith("norm") or "rotary" in name}
        dispatch_model(model, devices, main_device="cpu", force_hooks=True)
    assert any(hasattr(module, "_hf_hook") for module in model.modules())
    assert texts(model) == written


def test_weights_in_eight_bits(folder: Path) -> None:
    """torch's dynamic quantisation of all linear layers, the one that needs no other package: the strategies that are
    equal stay equal on the quantised weights."""
    model = AutoHybridModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.model.layers = torch.ao.quantization.quantize_dynamic(model.model.layers, {nn.Linear}, dtype=torch.qint8)
    assert not isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)
    out = texts(model)
    assert all(len(rows[0]) > 6 for rows in out.values())
    assert out["autoregressive"] == model.generate(PROMPT, max_new_tokens=24).tolist()
