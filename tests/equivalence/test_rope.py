"""Rotary factors that depend on the largest position of a pass: the text is the host's on both sides and across.

Bugs these tests catch: a draft that reaches across the switch, so that the whole pass has other factors than plain
decoding has; drafts beyond it where the factors go on changing; a text that keeps the keys of short texts where the
host reads it anew; a batch whose longest sequence changes the text of the others, in silence.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

import hf_hybrid
from hf_hybrid.models.host import RopeSwitch, rope_switch
from tests.hosts_for_tests import PROMPT, SIZES
from tests.models_for_tests import hybrid

SWITCH, NEW = 20, 28
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "factor": 4.0}
MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "longrope": (
        LlamaForCausalLM,
        LlamaConfig,
        {"max_position_embeddings": 80, "rope_parameters": {**LONG, "original_max_position_embeddings": SWITCH}},
    ),
    "longrope, read anew": (
        Phi3ForCausalLM,
        Phi3Config,
        {
            "max_position_embeddings": 80,
            "sliding_window": None,
            "original_max_position_embeddings": SWITCH,
            "rope_parameters": {k: v for k, v in LONG.items() if k != "factor"},
        },
    ),
    "dynamic": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "max_position_embeddings": SWITCH,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        },
    ),
}
HOW: dict[str, dict[str, Any]] = {
    "autoregressive": {"strategy": "autoregressive"},
    "suffix": {"strategy": "speculative", "adaptive": False},
    "tree": {"strategy": "speculative", "adaptive": False, "drafter": "tree"},
}
# Older hosts dropped the cache there and went on to read the last token alone.
SOUND = "next_sequence_length" in inspect.getsource(Phi3ForCausalLM.prepare_inputs_for_generation)


def made(name: str) -> Any:
    kind, config, more = MODELS[name]
    torch.manual_seed(1)
    return hf_hybrid.enable(kind(config(**{**SIZES, **more})).double().eval())


def generate(model: Any, ids: torch.Tensor, new: int, **options: Any) -> torch.Tensor:
    if options.get("drafter") == "tree":
        options["drafter"] = hf_hybrid.TreeDrafter(made("longrope"))
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, **options)


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [12, SWITCH - 1, SWITCH, SWITCH + 1, 26])
def test_the_text_across_the_switch_is_the_hosts(name: str, how: dict[str, Any], length: int) -> None:
    model = made(name)
    ids = PROMPT.repeat(1, 3)[:, :length]
    plain = generate(made(name), ids, NEW, **HOW["autoregressive"])
    assert torch.equal(generate(model, ids, NEW, **how), plain)
    if SOUND or name != "longrope, read anew":
        assert torch.equal(generate(made(name), ids, NEW), plain)


def test_the_host_reads_anew_where_it_says_so_and_nowhere_else() -> None:
    assert rope_switch(made("longrope")) == RopeSwitch(SWITCH, grows=False, rereads=False)
    assert rope_switch(made("longrope, read anew")) == RopeSwitch(SWITCH, grows=False, rereads=True)
    assert rope_switch(made("dynamic")) == RopeSwitch(SWITCH, grows=True, rereads=False)
    assert rope_switch(hybrid()) is None


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_that_may_cross_is_refused_and_one_that_stays_is_served(name: str) -> None:
    ids = PROMPT[:, :8].repeat(2, 1)
    ids[1] += 1
    with pytest.raises(ValueError, match=r"changes its rotary factors behind 20 positions.*one prompt at a time"):
        generate(made(name), ids, SWITCH - 7, **HOW["suffix"])
    stays = generate(made(name), ids, SWITCH - 8, **HOW["suffix"])
    assert torch.equal(stays, generate(made(name), ids, SWITCH - 8))
    beyond = PROMPT.repeat(2, 2)
    if name == "longrope":  # all of it lies beyond: one set of factors
        assert torch.equal(generate(made(name), beyond, 8, **HOW["suffix"]), generate(made(name), beyond, 8))


def test_windows_and_parts_that_may_cross_are_refused() -> None:
    model = hybrid(max_position_embeddings=SWITCH, rope_parameters=MODELS["dynamic"][2]["rope_parameters"])
    for strategy in ("block_diffusion", "planned_diffusion"):
        with pytest.raises(ValueError, match=r"changes its rotary factors.*'autoregressive'"):
            model.generate(PROMPT, strategy=strategy, max_new_tokens=8)
