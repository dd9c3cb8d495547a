"""The theorems on a device: on the CPU in every run, on CUDA with ``make test-gpu``.

In float64 each strategy writes what plain decoding does (which is the host's greedy text), and what it writes on the
CPU. In float32 and bfloat16 sums are added in another order and near ties flip: flips are counted, and a float64 pass
of the same weights over the text must find every written token as likely as the best, up to the drift of the precision.

Bugs these tests catch: masks, slots or positions on another device than the pass; a mask type that a kernel of the
device reads otherwise; noise that depends on the device; tokens that are wrong for another reason than rounding; a
model that ``device_map`` spreads over devices and that writes another text.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_for_tests import favour
from models_for_tests import CONTROL, PROMPTS, hybrid, left_padded, tiny
from transformers import AutoModelForCausalLM

import hf_hybrid

KINDS = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {},
    "cuda": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4},
}
LENGTH = {"cpu": 40, "cuda": 100}
"""New tokens: prompt and text stay within the positions of the tiny models."""
SAME = {
    "speculative, suffix": {"strategy": "speculative"},
    "speculative, self": {"strategy": "speculative", "drafter": "self"},
    "speculative, fixed": {"strategy": "speculative", "adaptive": False, "recheck_margin": 0.0},
}
"""What writes the text of plain decoding."""
OWN = {
    "block_diffusion": {"strategy": "block_diffusion"},
    "planned, verified": {"strategy": "planned_diffusion"},
    "planned, unverified": {"strategy": "planned_diffusion", "verify_spans": False, "confidence_threshold": 0.2},
    "planned, span by span": {"strategy": "planned_diffusion", "span_decoding": "autoregressive"},
}
"""What writes a text of its own, the same on every device."""
DRIFT = {torch.float32: 1e-4, torch.bfloat16: 0.15}
"""How far the logit of a written token may be below the best, in standard deviations of the logits: some dozens of
roundings of 6e-8 or 4e-3 each, on both sides. The first two tokens are 0.3 apart on average; TF32 would exceed 1e-4."""


@pytest.fixture(params=KINDS)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pair(device: str) -> tuple[Any, Any]:
    """A model that writes rounds of parts, on the CPU and on the device, in float64."""
    model = hybrid(seed=26, **SIZES[device])
    return model, copy.deepcopy(model).to(device)


@pytest.fixture
def plain(device: str) -> Any:
    """A model that writes plain text of many tokens, on the device."""
    return hybrid(seed=13, favours={CONTROL.noise.end: 1.0}, **SIZES[device]).to(device)


def written(model: Any, **options: Any) -> list[list[int]]:
    inputs = {name: tensor.to(model.device) for name, tensor in left_padded().items()}
    return model.generate(**inputs, **options).tolist()


def test_plain_decoding_is_the_hosts(device: str, plain: Any) -> None:
    ours = written(plain, strategy="autoregressive", max_new_tokens=LENGTH[device])
    assert ours == written(plain, do_sample=False, max_new_tokens=LENGTH[device])
    assert len(ours[0]) > 20


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("drawn", [{}, {"do_sample": True, "seed": 4, "top_p": 0.9}])
def test_drafts_change_nothing(device: str, plain: Any, name: str, drawn: dict[str, Any]) -> None:
    options = {"max_new_tokens": LENGTH[device], **drawn}
    assert written(plain, **SAME[name], **options) == written(plain, strategy="autoregressive", **options)


def test_a_model_drafts(device: str, plain: Any) -> None:
    small = tiny("llama", num_hidden_layers=1, seed=13, pad_token_id=0, eos_token_id=CONTROL.noise.end).to(device)
    options = {"max_new_tokens": LENGTH[device], "adaptive": False}
    ours = written(plain, strategy="speculative", assistant_model=small, **options)
    assert ours == written(plain, strategy="autoregressive", max_new_tokens=LENGTH[device])


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("drawn", [{}, {"do_sample": True, "seed": 4}])
def test_the_text_of_the_cpu(pair: tuple[Any, Any], name: str, drawn: dict[str, Any]) -> None:
    here, there = pair
    options = {**OWN[name], **drawn, "max_new_tokens": 40}
    texts = written(there, **options)
    assert texts == written(here, **options)
    assert len({tuple(text) for text in texts}) == len(PROMPTS)


def test_verified_spans_are_spans_by_themselves(pair: tuple[Any, Any]) -> None:
    there = pair[1]
    ours = written(there, **OWN["planned, verified"], max_new_tokens=40)
    assert ours == written(there, **OWN["planned, span by span"], max_new_tokens=40)


@torch.no_grad()
def deficits(exact: Any, text: list[int], prompt: int) -> list[float]:
    """By how many standard deviations of the logits each written token's is below the best, in a float64 pass over the
    text on the CPU."""
    ids = [token for token in text if token != 0]
    logits = exact(input_ids=torch.tensor([ids]), use_cache=False).logits[0]  # (length, vocab)
    rows = range(prompt - 1, len(ids) - 1)
    return [float((logits[row].max() - logits[row, ids[row + 1]]) / logits[row].std()) for row in rows]


@pytest.mark.parametrize("dtype", DRIFT)
def test_flips_are_near_ties(device: str, plain: Any, dtype: torch.dtype) -> None:
    with torch.no_grad():
        plain.get_output_embeddings().bias.mul_(0.1)  # more tokens that are nearly as likely
    rounded = plain.to(dtype)
    exact = copy.deepcopy(rounded).to("cpu", torch.float64)
    longest = max(map(len, PROMPTS))
    base = written(rounded, strategy="autoregressive", max_new_tokens=LENGTH[device])
    tokens = sum(token != 0 for text in base for token in text[longest:])
    for name, settings in {"host": {"do_sample": False}, **SAME}.items():
        texts = written(rounded, **settings, max_new_tokens=LENGTH[device])
        flips = sum(text != other for text, other in zip(texts, base, strict=True))
        worst = max(
            deficit
            for text, prompt in zip(texts, PROMPTS, strict=True)
            for deficit in deficits(exact, text, len(prompt))
        )
        assert worst <= DRIFT[dtype], name
        kind = str(dtype).removeprefix("torch.")
        print(f"{device}, {kind}, {name}: {flips} of {len(base)} texts ({tokens} tokens) flip, worst {worst:.1e}")


def test_device_map(device: str, tmp_path: Path) -> None:
    model = tiny("llama", seed=26, pad_token_id=0, eos_token_id=CONTROL.noise.end, **SIZES[device])
    favour(
        model,
        {CONTROL.tags.topic: 5.0, CONTROL.tags.async_: 4.5, CONTROL.tags.lengths[2][1]: 3.0, CONTROL.noise.filler: 1.3},
    )
    model.config.hf_hybrid = hybrid(seed=26).config.hf_hybrid
    model.save_pretrained(tmp_path)
    whole = hf_hybrid.enable(model)
    layers = {f"model.layers.{n}": device if n % 2 else "cpu" for n in range(model.config.num_hidden_layers)}
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), device)
    for spread in ("auto", {**layers, **rest}):
        found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, device_map=spread).eval()
        hf_hybrid.enable(found)
        for settings in ({"strategy": "autoregressive"}, *SAME.values(), *OWN.values()):
            options = {**settings, "max_new_tokens": 24}
            inputs = {name: tensor.to(device) for name, tensor in left_padded().items()}
            assert found.generate(**inputs, **options).tolist() == written(whole, **options), (spread, settings)
