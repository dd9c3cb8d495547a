"""Images: the host reads a prompt that holds some, and the Runner takes over its keys.

Whatever ``generate()`` got beside ids acts in the first pass alone: behind the prompt the model reads text. That is
checked on the last token of the prompt, which the host and the Runner both read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from hf_hybrid.core.rows import Rows
from hf_hybrid.decoding.output import DecodingError
from hf_hybrid.decoding.prompts import Prompt
from hf_hybrid.models.host import CACHE, rope_switch, taken_cache, unwrapped, without_extras
from hf_hybrid.models.probe import apart
from hf_hybrid.models.runner import Runner


def reads_images(model: Any) -> bool:
    """True: an image-text model of the host."""
    return type(unwrapped(model).config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def read_images(
    model: Any, runner: Runner, input_ids: Tensor, arguments: Mapping[str, Any], prompts: Sequence[Prompt]
) -> list[int]:
    """Let the host read the prompts, and ``runner`` take over the keys of all their tokens but the last.

    Args:
        arguments: of the decoding callable, with whatever the host hands to the model's first pass.

    Returns:
        how many tokens of each prompt the runner holds.

    Raises:
        DecodingError: the prompts cannot be read so, or what is behind them depends on more than keys.
    """
    mask, past = arguments.get("attention_mask"), taken_cache(arguments)
    mask = torch.ones_like(input_ids) if mask is None else mask
    if past is not None and past.get_seq_length() > 0:
        raise DecodingError("images behind a cache are not available with a strategy; pass the whole prompt, no cache")
    if arguments.get("inputs_embeds") is not None:
        raise DecodingError("images and inputs_embeds are not available together; pass input_ids")
    if not bool(mask[:, -1].all()):
        raise DecodingError("prompts with images are padded on the left alone; set padding_side='left'")
    if not runner.abilities.keys or rope_switch(model) is not None:
        raise DecodingError("this model cannot go on behind images with a strategy; leave out strategy=")
    cache = DynamicCache()  # without a config: its layers keep everything, whatever they see
    options = {**arguments, CACHE: cache, "use_cache": True, "next_sequence_length": None}
    inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **options)
    runner.ranks.others_go_on(True)
    output = model(**{**inputs, **without_extras(model)}, return_dict=True)
    counts = [len(prompt.tokens) for prompt in prompts]
    runner.shifts[:] = _shifts(inputs.get("position_ids"), counts)
    if input_ids.shape[1] > 1:
        cache.crop(-1)
        runner.adopt(cache, mask)
    _check_last(model, runner, input_ids, counts, output.logits[:, -1])
    runner.num_passes += 1
    runner.num_rows += np.asarray(counts)
    return [count - 1 for count in counts]


def _shifts(positions: Tensor | None, counts: Sequence[int]) -> np.ndarray:
    """How far the positions of each text lie from their index behind the prompt: images take fewer, in M-RoPE."""
    if positions is None:
        return np.zeros(len(counts), dtype=np.int64)
    last = positions[..., -1].cpu()  # (batch,) or (axes, batch), of which the first of four is the index itself
    axes = last[-3:] if last.ndim == 2 else last[None]
    if not bool((axes == axes[0]).all()):
        raise DecodingError("a prompt ends in an image; let text follow it")
    return (axes[0].expand(len(counts)) - torch.tensor(counts) + 1).numpy()


def _check_last(model: Any, runner: Runner, input_ids: Tensor, counts: Sequence[int], wanted: Tensor) -> None:
    """The last token of a prompt, read from keys, ids and positions alone, says what it said in the host's pass."""
    position = torch.tensor(counts)[:, None] - 1
    rows = Rows.clean(position, torch.zeros_like(position))
    passes, done = runner.num_passes.copy(), runner.num_rows.copy()
    found = runner.run(input_ids[:, -1:].cpu(), rows, 1).logits[:, -1]  # (batch, vocab)
    runner.num_passes[:], runner.num_rows[:] = passes, done  # it is not committed, and nobody asked for it
    if apart(wanted.to(found), found):
        raise DecodingError(
            f"behind images {type(model).__name__} reads more than the keys of its prompt, and a strategy hands over "
            "token ids alone; leave out strategy="
        )
