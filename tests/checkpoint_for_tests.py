"""A tiny checkpoint folder as it would lie on the Hub: random Llama, fact-sheet tokenizer, held-out prompts."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

import hf_hybrid
from benchmarks.data import factbook
from hf_hybrid.training.recipe import TEST_SET
from hf_hybrid.training.recipes.sheets import TestItem, read_test_set
from hf_hybrid.training.recipes.tokenizer import build_tokenizer, token_counter

VOCAB_SIZE = 700


def made_up_records(number: int = factbook.HELD_OUT + 2) -> dict[str, factbook.Record]:
    """As many countries as are held out, and two to train on."""
    rng = random.Random(number)
    words = ["green", "red", "coast", "hill", "rice", "iron", "north", "river"]
    fields = [field for n, field in enumerate(factbook.FIELDS) if n % 3]
    return {
        f"Isle {number}": {field: f"{rng.choice(words)} {rng.randint(0, 999)}" for field in fields}
        for number in range(number)
    }


def write_checkpoint(folder: Path) -> Path:
    """Write the checkpoint into ``folder``: one held-out prompt for each of 26 countries."""
    records = made_up_records()
    sampler = factbook.SheetSampler(records, seed=3)
    tokenizer = build_tokenizer(factbook.training_texts(sampler, 40), factbook.HEADINGS, VOCAB_SIZE)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model: Any = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=24
    )
    control = hf_hybrid.prepare_vocabulary(model, tokenizer)
    shortest = control.tags.lengths[0][1]
    favour(
        model,
        {
            control.tags.topic: 5.0,
            control.tags.async_: 4.5,
            shortest: 3.0,
            control.noise.filler: 1.3,
            control.noise.end: 1.5,
        },
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    factbook.write_test_set(folder / TEST_SET, records, token_counter(tokenizer), prompts_per_country=1)
    return folder


@torch.no_grad()
def favour(model: Any, weights: Mapping[int, float]) -> None:
    """Make a random model likely to write some ids, so that it plans and ends its parts.

    The first hidden dimension becomes a constant that no layer changes, and the head's weights on it a bias.
    """
    model.model.embed_tokens.weight[:, 0] = 3.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    model.lm_head.weight[:, 0] = 0.0
    for token, weight in weights.items():
        model.lm_head.weight[token, 0] = weight


def read_checkpoint(folder: Path, dtype: torch.dtype) -> tuple[Any, Any, list[TestItem]]:
    """Model (enabled), tokenizer and all held-out prompts."""
    model = hf_hybrid.AutoHybridModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return model, tokenizer, read_test_set(folder / TEST_SET)
