"""Images: the host reads the prompt, the strategies write behind it what the host writes.

Catches: images that are dropped; keys adopted in the wrong columns of a padded batch; images of Gemma 3 that are read
causally; positions behind an image that are counted in tokens where the model counts fewer (M-RoPE); images that
reach a strategy which would ignore them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

import hf_hybrid
from hf_hybrid import Draft, Drafter, Text, generate_many
from tests.models_for_tests import SHARED, TEXT

_CONFIGS: Any = CONFIG_MAPPING
NEW = 20
IMAGE, START, END = 50, 51, 52
_TEXT = {**SHARED, "num_hidden_layers": 3, "tie_word_embeddings": False}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "initializer_range": 0.2,
}


def _llava() -> Any:
    vision = _CONFIGS["clip_vision_model"](**_VISION, projection_dim=16)
    text = _CONFIGS["llama"](**_TEXT)
    return _CONFIGS["llava"](
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        tie_word_embeddings=False,
        vision_feature_layer=-1,
    )


def _gemma3() -> Any:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    text = {**_TEXT, "head_dim": 8, "query_pre_attn_scalar": 8, "layer_types": kinds, "sliding_window": 6}
    vision = _CONFIGS["siglip_vision_model"](**_VISION, vision_use_head=False)
    return _CONFIGS["gemma3"](
        text_config=_CONFIGS["gemma3_text"](**text),
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


def _smolvlm() -> Any:
    vision, text = _CONFIGS["smolvlm_vision"](**_VISION), _CONFIGS["llama"](**_TEXT)
    return _CONFIGS["smolvlm"](
        vision_config=vision, text_config=text, image_token_id=IMAGE, scale_factor=1, tie_word_embeddings=False
    )


def _qwen() -> Any:
    text = {**_TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "fullatt_block_indexes": [0], "window_size": 16, "initializer_range": 0.2}
    ids = {"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END, "video_token_id": 53}
    return _CONFIGS["qwen2_5_vl"](text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)


CONFIGS = {"llava": _llava, "gemma3": _gemma3, "smolvlm": _smolvlm, "qwen2.5-vl": _qwen}


@cache
def model(name: str) -> Any:
    torch.manual_seed(7)
    config = CONFIGS[name]()
    made = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").double().eval()
    made.generation_config.eos_token_id = None
    for key, weight in made.named_parameters():
        if key.endswith("mm_input_projection_weight"):  # zero in a fresh Gemma 3: it would not see
            torch.nn.init.normal_(weight)
    return hf_hybrid.enable(made)


def inputs(name: str, texts: Sequence[tuple[list[int], list[int]]], seed: int = 0) -> dict[str, Any]:
    """Prompts ``text, image, text``, left-padded, and their random images."""
    draws = torch.Generator().manual_seed(seed)
    image = [IMAGE] * 4
    rows = [[*before, START, *image, END, *behind] for before, behind in texts]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    types = (ids == IMAGE).long()
    made: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if name == "qwen2.5-vl":
        made["pixel_values"] = torch.randn(len(rows) * 16, 3 * 2 * 4 * 4, generator=draws, dtype=torch.float64)
        made["image_grid_thw"] = torch.tensor([[1, 4, 4]] * len(rows))
        made["mm_token_type_ids"] = types
    else:
        made["pixel_values"] = torch.randn(len(rows), 3, 8, 8, generator=draws, dtype=torch.float64)
    if name == "smolvlm":
        made["pixel_values"] = made["pixel_values"][:, None]  # (batch, images, channels, height, width)
    if name == "gemma3":
        made["token_type_ids"] = types
    return made


ONE = [([5, 9, 12], [7, 8])]
PAIR = [([5], [7, 8]), ([3, 14, 15, 9, 26], [11, 17, 30, 2, 4])]


def written(name: str, given: dict[str, Any], **options: Any) -> tuple[tuple[int, ...], ...]:
    ids = model(name).generate(**given, max_new_tokens=NEW, do_sample=False, **options)
    return tuple(tuple(row) for row in ids[:, given["input_ids"].shape[1] :].tolist())


class Oracle(Drafter):
    """Drafts the host's text, every fifth token wrong."""

    name = "oracle"

    def __init__(self, answers: Sequence[Sequence[int]], texts: Sequence[tuple[list[int], list[int]]]):
        self.answers = {tuple(behind): answer for (_, behind), answer in zip(texts, answers, strict=True)}
        self.draws = random.Random(0)

    def propose(self, texts: Sequence[Text], length: int, sampler: Any) -> list[Draft]:
        return [self.draft(text, self.draws.randint(0, length)) for text in texts]

    def draft(self, text: Text, length: int) -> Draft:
        prompt = list(text.tokens[: text.prompt_length])
        answer = self.answers[tuple(prompt[prompt.index(END) + 1 :])]
        done = len(text.tokens) - text.prompt_length
        return Draft(
            [self.draws.choice(TEXT) if self.draws.random() < 0.2 else t for t in answer[done : done + length]]
        )


@pytest.mark.parametrize("texts", [ONE, PAIR], ids=["one", "pair"])
@pytest.mark.parametrize("name", CONFIGS)
def test_texts_behind_images_are_those_of_the_host(name: str, texts: Any) -> None:
    given = inputs(name, texts)
    wanted = written(name, given)
    assert max(len(set(text)) for text in wanted) > 4, "texts that repeat themselves would hide a wrong mask"
    assert written(name, given, strategy="autoregressive") == wanted
    drafted = {"strategy": "speculative", "adaptive": False, "draft_length": 5}
    assert written(name, given, **drafted) == wanted
    assert written(name, given, **drafted, drafter=Oracle(wanted, texts)) == wanted


@pytest.mark.parametrize("name", CONFIGS)
def test_other_images_give_other_texts(name: str) -> None:
    one, other = (written(name, inputs(name, ONE, seed), strategy="autoregressive") for seed in (1, 2))
    assert one != other


def test_what_would_ignore_images_refuses_them() -> None:
    given = inputs("llava", ONE)
    with pytest.raises(ValueError, match="reads token ids, no images; use strategy='autoregressive'"):
        written("llava", given, strategy="block_diffusion")
    with pytest.raises(ValueError, match="takes token ids, and no images"):
        list(
            generate_many(
                model("llava"),
                [[1, 2]],
                strategy="autoregressive",
                max_new_tokens=4,
                pixel_values=given["pixel_values"],
            )
        )


def test_the_auto_class_loads_enabled_models(tmp_path: Any) -> None:
    model("llava").save_pretrained(tmp_path)
    loaded = hf_hybrid.AutoHybridModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float64)
    given = inputs("llava", ONE)
    ids = loaded.generate(**given, max_new_tokens=NEW, do_sample=False, strategy="speculative")
    assert (tuple(ids[0, given["input_ids"].shape[1] :].tolist()),) == written("llava", given)
