"""The mask token and the control tags in a vocabulary: add them once, record their ids in ``config.json``, read them.

The record is a plain dict in ``model.config.hf_hybrid``, so it travels with ``save_pretrained`` and needs no tokenizer:

    {"mask_token_id": 7, "par": 8, "topic": 9, "async": 10, "sync": 11, "spad": 12,
     "lengths": [[8, 13], ...], "depends": [29, ...]}

What stands in ``generation_config.hf_hybrid`` (how to decode) is another dict, see ``hf_hybrid.config``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_hybrid.core.plan import ControlTokens
from hf_hybrid.models.host import first_end, text_config, unwrapped

LENGTHS = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Lengths in tokens that a plan can name: steps of at most a third, so that rounding up wastes little."""

MAX_DEPENDS = 8
"""How many parts of a round a plan can name as dependencies, by default."""

_TAGS = {"par": "<par>", "topic": "<topic>", "async": "<async>", "sync": "<sync/>", "spad": "<spad>"}
_REPAIR = "run hf_hybrid.prepare_vocabulary(model, tokenizer) to write it anew"


class VocabularyError(ValueError):
    """Control tokens that cannot be added, or a record of them that cannot be used; the message names the fix."""


def prepare_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    lengths: Sequence[int] = LENGTHS,
    max_depends: int = MAX_DEPENDS,
) -> ControlTokens:
    """Add the mask token and the control tags as special tokens, and record their ids in ``model.config.hf_hybrid``.

    Tokens that exist are reused (``tokenizer.mask_token`` too), and so are rows that the embedding matrix has beyond
    the tokenizer: it is resized only when it is too small, never shrunk. New rows are drawn around the mean of the old
    ones with torch's generator (Hewitt, "Initializing new word embeddings for pretrained language models", 2021);
    reused spare rows keep their weights. Tied embeddings stay tied. A second call changes nothing.

    Args:
        model: a causal language model; its embeddings and its config change in place.
        tokenizer: its tokenizer; changes in place, save it with the model.
        lengths: N of every ``<len:N>``, in tokens, rising.
        max_depends: how many earlier parts a part can name: ``<dep:1>`` to ``<dep:max_depends>``.

    Raises:
        VocabularyError: the lengths do not rise, or neither model nor tokenizer has an end-of-sequence token.
    """
    lengths = tuple(lengths)
    if not lengths or lengths[0] < 1 or any(a >= b for a, b in pairwise(lengths)):
        raise VocabularyError(f"lengths={lengths}: give at least one length, all of them positive and rising")
    if max_depends < 0:
        raise VocabularyError(f"max_depends={max_depends}: must be 0 or more")
    _settle_end_token(model, tokenizer)

    mask = _mask_text(tokenizer)
    length_tags = [f"<len:{n}>" for n in lengths]
    depend_tags = [f"<dep:{i}>" for i in range(1, max_depends + 1)]
    tokenizer.add_special_tokens(
        {
            "mask_token": mask,
            "extra_special_tokens": [*_TAGS.values(), *length_tags, *depend_tags],
        },
        replace_extra_special_tokens=False,
    )
    ids = {text: int(i) for text, i in tokenizer.get_vocab().items()}
    # The highest id counts, not the number of tokens: a vocabulary may have holes.
    needed = 1 + max(ids[text] for text in (mask, *_TAGS.values(), *length_tags, *depend_tags))
    if needed > _rows(model):
        model.resize_token_embeddings(needed, mean_resizing=True)

    model.config.hf_hybrid = {
        **(getattr(model.config, "hf_hybrid", None) or {}),
        "mask_token_id": ids[mask],
        **{name: ids[text] for name, text in _TAGS.items()},
        "lengths": [[n, ids[tag]] for n, tag in zip(lengths, length_tags, strict=True)],
        "depends": [ids[tag] for tag in depend_tags],
    }
    tokens = control_tokens(model)
    assert tokens is not None  # the record was just written
    return tokens


@dataclass(frozen=True)
class WindowTokens:
    """What a noisy window needs of a vocabulary: ``mask`` stands at open positions, ``spad`` behind the end (None: the
    model has none), and no id of ``banned`` is ever part of a text. ``ControlTokens`` have all of it."""

    mask: int
    spad: int | None
    banned: tuple[int, ...]


def window_tokens(model: PreTrainedModel) -> WindowTokens | None:
    """The mask token recorded in ``model.config.hf_hybrid``, and what else of the record is no text; None when it names
    no mask token. Tags may be missing: only plans need them.

    Raises:
        VocabularyError: the record is no dict, or its mask token is no id of the vocabulary.
    """
    record = _record(model)
    if record is None or record.get("mask_token_id") is None:
        return None
    size = model.config.get_text_config().vocab_size
    mask = _token("mask_token_id", record["mask_token_id"], size)
    if mask == first_end(model):
        raise VocabularyError(f"config.hf_hybrid gives token {mask} two meanings (mask and eos); {_REPAIR}")
    lengths, depends = ([*v] if isinstance(v := record.get(n), list | tuple) else [] for n in ("lengths", "depends"))
    tags = [record.get(n) for n in _TAGS] + [p[1] for p in lengths if isinstance(p, list | tuple) and len(p) == 2]
    known = [i for i in (*tags, *depends) if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < size]
    spad = record.get("spad")
    return WindowTokens(mask, spad if spad in known else None, tuple(dict.fromkeys((mask, *known))))


def control_tokens(model: PreTrainedModel) -> ControlTokens | None:
    """The ids recorded in ``model.config.hf_hybrid``, checked; None when the model has no tags (a mask token alone is
    no plan: ``window_tokens``).

    ``eos`` comes from ``generation_config.eos_token_id``, else from the config; the first one of a list.

    Raises:
        VocabularyError: a missing entry, a wrong type, an id outside the vocabulary, or one id with two meanings.
    """
    record = _record(model)
    if record is None or not any(name in record for name in (*_TAGS.keys() - {"spad"}, "lengths", "depends")):
        return None
    missing = [n for n in ("mask_token_id", *_TAGS, "lengths", "depends") if n not in record]
    if missing:
        raise VocabularyError(f"config.hf_hybrid has no {', '.join(missing)}; {_REPAIR}")
    size = model.config.get_text_config().vocab_size
    lengths, depends = _pairs(record["lengths"], size), record["depends"]
    if not isinstance(depends, (list, tuple)):
        raise VocabularyError(f"config.hf_hybrid['depends'] must be a list of token ids, got {depends!r}; {_REPAIR}")
    eos = first_end(model)
    if eos is None:
        raise VocabularyError("the model has no end-of-sequence token; set model.generation_config.eos_token_id")
    tokens = ControlTokens(
        mask=_token("mask_token_id", record["mask_token_id"], size),
        eos=_token("eos_token_id", eos, size, "config"),
        par=_token("par", record["par"], size),
        topic=_token("topic", record["topic"], size),
        async_=_token("async", record["async"], size),
        sync=_token("sync", record["sync"], size),
        spad=_token("spad", record["spad"], size),
        lengths=lengths,
        depends=tuple(_token(f"depends[{i}]", value, size) for i, value in enumerate(depends)),
    )
    every = [*tokens.banned, tokens.eos]
    twice = sorted({i for i in every if every.count(i) > 1})
    if twice:
        raise VocabularyError(f"config.hf_hybrid gives token {twice[0]} two meanings (eos counts too); {_REPAIR}")
    return tokens


def width_of(model: Any) -> int:
    """Width of the logits: token ids that the model has a row for, padding of the vocabulary included."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    # Quantised layers have a method of that name, or keep the weight in another shape and say their width beside it.
    return _whole(model, int(getattr(head, "out_features", None) or weight.shape[0]))  # type: ignore[union-attr]


def readable(model: Any) -> int:
    """Token ids that the model can read: rows of its embeddings. They may be more than it can write (``width_of``):
    with placeholders of images, for example."""
    embeddings = model.get_input_embeddings()
    weight = getattr(embeddings, "weight", None)
    rows = getattr(embeddings, "num_embeddings", None) or (weight.shape[0] if weight is not None else 0)
    return _whole(model, int(rows)) or width_of(model)


def _whole(model: Any, rows: int) -> int:
    """``rows`` of a layer, or of all its parts: in older releases each process of a tensor-parallel model has its
    part alone."""
    shared = (getattr(unwrapped(model), "_tp_size", None) or 1) > 1
    return max(rows, text_config(model).vocab_size) if shared and rows else rows


def knows_tags(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True: every tag of a plan is a token of its own; lengths and dependencies differ between checkpoints."""
    unknown = tokenizer.unk_token_id if tokenizer.unk_token is not None else None
    return all(tokenizer.convert_tokens_to_ids(tag) not in (None, unknown) for tag in _TAGS.values())


def _pairs(value: object, size: int) -> tuple[tuple[int, int], ...]:
    """``lengths`` of the record as ``((tokens, id), ...)``, rising."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in value):
        raise VocabularyError(f"config.hf_hybrid['lengths'] must be a list of [tokens, id], got {value!r}; {_REPAIR}")
    pairs: list[tuple[int, int]] = []
    for tokens, token in value:
        previous = pairs[-1][0] if pairs else 0
        if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens <= previous:
            raise VocabularyError(
                f"config.hf_hybrid['lengths']: {tokens!r} must be a whole number above {previous}; {_REPAIR}"
            )
        pairs.append((tokens, _token(f"lengths[{len(pairs)}]", token, size)))
    if not pairs:
        raise VocabularyError(f"config.hf_hybrid['lengths'] is empty; a plan needs at least one length; {_REPAIR}")
    return tuple(pairs)


def _record(model: PreTrainedModel) -> Mapping[str, Any] | None:
    record: Any = getattr(model.config, "hf_hybrid", None)
    if record is not None and not isinstance(record, Mapping):
        raise VocabularyError(f"config.hf_hybrid must be a dict, got {type(record).__name__}; {_REPAIR}")
    return record


def _token(name: str, value: object, size: int, place: str = "config.hf_hybrid") -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise VocabularyError(f"{place}: {name} must be a token id, got {value!r}; {_REPAIR}")
    if not 0 <= value < size:
        raise VocabularyError(f"{place}: {name}={value} is outside the vocabulary of {size} tokens; {_REPAIR}")
    return value


def _mask_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's own mask token, unless it is an alias of a token with another job."""
    own = tokenizer.mask_token
    others = (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token)
    return str(own) if own is not None and own not in others else "<mask>"


def _rows(model: PreTrainedModel) -> int:
    """Tokens that both ends of the model have a row for."""
    ends: tuple[Any, ...] = (model.get_input_embeddings(), model.get_output_embeddings())
    return min(end.weight.shape[0] for end in ends if end is not None)


def _settle_end_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Take the tokenizer's end token when the model names none."""
    if first_end(model) is not None:
        return
    if tokenizer.eos_token_id is None:
        raise VocabularyError(
            "neither the model nor the tokenizer has an end-of-sequence token; set tokenizer.eos_token before"
        )
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    else:
        model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
