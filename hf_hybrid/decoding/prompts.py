"""Prompts: what the host hands to the decoding loop, read once and checked before the first pass.

A prompt is a list of ids. Two kinds of tokens have no id: those that only the caller's cache knows (``UNKNOWN``), and
those that are given as vectors, whose "ids" are places in a table (``Runner.vectors``). Both are negative.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.utils import logging

from hf_hybrid.decoding.output import DecodingError
from hf_hybrid.models.host import CACHES, empty_cache, taken_cache
from hf_hybrid.models.release import release_note
from hf_hybrid.models.states import tokens_in
from hf_hybrid.models.vocabulary import readable

UNKNOWN = -1
"""Stands for a token that only the caller's cache knows."""
FIRST_VECTOR = -2
"""Means the first row of the table of vectors, -3 the second, and so on."""

_INERT = frozenset({"attention_mask", "position_ids", "inputs_embeds", "logits_to_keep", "use_cache", *CACHES})
"""What the host hands over that is acted on here, or changes nothing. Positions are compared in the router."""

_Host: Any = GenerationMixin
logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        tokens: what the model reads, padding and masked positions left out. given: the ids as the host holds them,
        which is what processors and criteria read. columns: for each of ``tokens`` its column in a cache of the host.
        cached: how many of ``tokens`` the caller's cache holds.
    """

    tokens: list[int]
    given: list[int]
    columns: list[int]
    cached: int = 0


@dataclass(frozen=True)
class Prompts:
    """The prompts of a call.

    Attributes:
        every: one per sequence. input_ids: int64 ``(batch, width)``, what ``sequences`` begin with. vectors: table
        ``(rows, hidden)`` of prompts given as vectors, or None. width: columns that they take in a cache of the host.
    """

    every: list[Prompt]
    input_ids: Tensor
    vectors: Tensor | None
    width: int


def read_prompts(input_ids: Tensor, arguments: Mapping[str, Any], mask_length: int | None) -> Prompts:
    """The prompts of a call.

    Args:
        input_ids: int64 ``(batch, length)``. With a filled cache the whole text, or the new tokens alone, which the
            host tells apart by the length of the attention mask; with ``inputs_embeds`` it may be empty.
        arguments: of the decoding callable: ``attention_mask``, a cache, ``inputs_embeds``.
        mask_length: columns of a mask that the host dropped because nothing is masked, None: it dropped none.

    Raises:
        DecodingError: no prompt, a mask of another length, or a cache that does not go together with the prompt.
    """
    vectors, mask = arguments.get("inputs_embeds"), arguments.get("attention_mask")
    cache = taken_cache(arguments)
    held = tokens_in(cache)
    shown = input_ids if vectors is None else vectors
    if shown.ndim != (2 if vectors is None else 3) or shown.shape[1] == 0 or shown.shape[0] == 0:
        name = "input_ids" if vectors is None else "inputs_embeds"
        raise DecodingError(f"{name} {tuple(shown.shape)}: an answer needs a prompt of at least one token")
    batch, length = shown.shape[:2]
    width = mask.shape[1] if mask is not None else mask_length or length
    new_alone = held > 0 and width > length
    if new_alone and width != held + length:
        raise DecodingError(
            f"attention_mask covers {width} tokens, the cache {held} and input_ids {length}; "
            "the mask must cover the cache and the new tokens"
        )
    if new_alone and vectors is not None:
        raise DecodingError(
            f"the cache holds {held} tokens and inputs_embeds {length} more; vectors of new tokens alone are read by "
            "nobody, so pass those of the whole text"
        )
    if not new_alone and width != length:
        raise DecodingError(f"attention_mask covers {width} tokens, and the prompt has {length}; make them equal")
    if held >= width:
        raise DecodingError(
            f"the cache holds {held} tokens and input_ids {length}; pass the whole text so far as input_ids, at least "
            "one token longer than the cache, or the new tokens alone with an attention_mask over all"
        )
    real = [[1] * width] * batch if mask is None else mask.tolist()
    ids = input_ids.tolist()
    if vectors is not None:
        table = torch.arange(batch * length).view(batch, length)
        rows: list[list[int]] = (FIRST_VECTOR - table).tolist()
        vectors = vectors.reshape(batch * length, -1)
    elif new_alone:
        rows = [[UNKNOWN] * held + row for row in ids]
    else:
        rows = ids
        if mask is not None and not held:
            rows, real, input_ids = _moved(rows, real, input_ids)
            ids = rows
    every = [_prompt(number, *entry, held) for number, entry in enumerate(zip(rows, real, ids, strict=True))]
    return Prompts(every, input_ids, vectors, width)


def _prompt(number: int, row: list[int], real: list[int], given: list[int], held: int) -> Prompt:
    columns = [column for column, keep in enumerate(real) if keep]
    if not columns:
        raise DecodingError(f"sequence {number} of the batch is all padding; give it a prompt of at least one token")
    if not real[-1]:
        raise DecodingError(
            f"sequence {number} of the batch is padded on the right, behind a cache or as vectors; pad it on the left"
        )
    return Prompt([row[c] for c in columns], given, columns, sum(column < held for column in columns))


def _moved(
    rows: list[list[int]], real: list[list[int]], input_ids: Tensor
) -> tuple[list[list[int]], list[list[int]], Tensor]:
    """Padding on the right moved to the left: an answer follows the last token of its prompt."""
    behind = [next((i for i, keep in enumerate(reversed(mask)) if keep), 0) for mask in real]
    if not any(behind):
        return rows, real, input_ids
    logger.warning(
        "A decoder-only architecture is being used, but right-padding was detected! It was moved to the left; set "
        "`padding_side='left'` when initializing the tokenizer."
    )
    rows, real = ([v[len(v) - n :] + v[: len(v) - n] for v, n in zip(one, behind, strict=True)] for one in (rows, real))
    return rows, real, torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device)


def foreign_keywords(arguments: Mapping[str, Any]) -> list[str]:
    """Names of what was given for the model's forward beside ids, mask, positions and a cache."""
    return sorted(name for name, value in arguments.items() if _holds(value) and name not in _INERT)


def check_keywords(model: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse keywords that the host would hand to the model's forward, such as images.

    Raises:
        DecodingError: with their names.
    """
    foreign = foreign_keywords(arguments)
    if foreign:
        raise DecodingError(
            f"{', '.join(foreign)}: the host hands this to {type(model).__name__}.forward, and a strategy hands over "
            "token ids alone; leave it out, or leave out strategy="
        )


def check_inputs(model: Any, input_ids: Tensor, arguments: Mapping[str, Any], *, images: bool = False) -> None:
    """Refuse what the host would hand to the model's forward and the loop does not.

    Args:
        arguments: of the decoding callable. images: True: the host reads the prompt (``decoding.images``).

    Raises:
        DecodingError: a keyword of ``forward``, a ``prepare_inputs_for_generation`` that changes what is read, ids that
            the model does not know, or a cache that is not to be used.
    """
    if not images:
        check_keywords(model, arguments)
    cache = taken_cache(arguments)
    if cache is not None and arguments.get("use_cache") is False:
        raise DecodingError("use_cache=False and a cache exclude one another; leave one of them out")
    if arguments.get("inputs_embeds") is None:
        _check_ids(model, input_ids, arguments.get("attention_mask"))
    own = getattr(model.prepare_inputs_for_generation, "__func__", None)
    if own is _Host.prepare_inputs_for_generation:
        return
    fault = _difference(model, input_ids, arguments)
    if fault:
        raise DecodingError(
            f"prepare_inputs_for_generation of this {type(model).__name__} (its own, or of a PEFT adapter with soft "
            f"prompts) {fault}, and a strategy hands over token ids alone; leave out strategy={release_note()}"
        )


def _check_ids(model: Any, input_ids: Tensor, mask: Tensor | None) -> None:
    """Refuse ids that the model has no embedding of; what is masked is not read."""
    outside = (input_ids < 0) | (input_ids >= readable(model))  # (batch, length)
    if mask is not None and mask.shape[1] >= input_ids.shape[1]:
        outside &= mask[:, mask.shape[1] - input_ids.shape[1] :] != 0
    if bool(outside.any()):
        raise DecodingError(outside_vocabulary(model))


def outside_vocabulary(model: Any) -> str:
    """What is wrong with a prompt that holds other ids than the model's."""
    return (
        f"the prompt holds ids outside the vocabulary of {readable(model)} tokens; use the tokenizer of this model, "
        "and an attention_mask that is 0 at padding"
    )


def _holds(value: Any) -> bool:
    """True: something was given. Encoders of images that had nothing to read give a dict of None."""
    return any(_holds(v) for v in value.values()) if isinstance(value, Mapping) else value is not None


def _difference(model: Any, input_ids: Tensor, arguments: Mapping[str, Any]) -> str:
    """What the model's own ``prepare_inputs_for_generation`` makes otherwise than the host's, for the prompt and for a
    token behind it; empty: nothing."""
    if arguments.get("inputs_embeds") is not None:
        return ""  # its ids are no prompt
    mask = arguments.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None or mask.shape != input_ids.shape else mask
    for more in (0, 1):
        ids = torch.cat([input_ids, input_ids[:, :more]], dim=1)
        real = torch.cat([mask, torch.ones_like(mask[:, :more])], dim=1)
        positions = (real.cumsum(dim=1) - 1).clamp(min=0)
        options: dict[str, Any] = {
            "attention_mask": real,
            "position_ids": positions,
            "use_cache": True,
            "next_sequence_length": 1 if more else None,
            "is_first_iteration": not more,
            **empty_cache(),
        }
        usual = _Host.prepare_inputs_for_generation(model, ids.clone(), **options)
        try:
            own = model.prepare_inputs_for_generation(ids.clone(), **options)
        except Exception as error:  # anybody may have written it
            return f"fails ({type(error).__name__}: {error})"
        for name in sorted(own.keys() | usual.keys()):
            one, other = own.get(name), usual.get(name)
            if name == "attention_mask" and one is None:
                continue  # behind a state: of padding in front of it a strategy reads nothing either
            if isinstance(one, Tensor) and isinstance(other, Tensor):
                if one.shape != other.shape or not torch.equal(one, other):
                    return f"changes {name}"
            elif one is not other and one != other and name not in ("use_cache", "logits_to_keep"):
                return f"{'changes' if other is not None else 'adds'} {name}"
    return ""
