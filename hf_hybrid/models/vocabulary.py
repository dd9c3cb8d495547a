"""The mask token and the control tags in a vocabulary: add them once, record their ids in ``config.json``, read them.

The record is a plain dict in ``model.config.hf_hybrid``, so it travels with ``save_pretrained`` and needs no tokenizer:

    {"mask_token_id": 7, "par": 8, "topic": 9, "async": 10, "sync": 11, "spad": 12,
     "lengths": [[8, 13], ...], "depends": [29, ...]}

``spad`` is the filler of noisy windows; ``grammar`` names the grammar that reads the rest (absent: ``native``).
What is in ``generation_config.hf_hybrid`` (how to decode) is another dict, see ``hf_hybrid.config``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_hybrid.core.grammars import GRAMMARS, Grammar, grammar_class
from hf_hybrid.core.grammars.native import NativeGrammar
from hf_hybrid.core.tokens import ControlTokens, NoiseTokens, Record, VocabularyError
from hf_hybrid.models.host import first_end, text_config, unwrapped

LENGTHS = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Lengths in tokens that a plan can name: steps of at most a third, so that rounding up wastes little."""

MAX_DEPENDS = 8
"""How many parts of a round a plan can name as dependencies, by default."""


def prepare_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    lengths: Sequence[int] = LENGTHS,
    max_depends: int = MAX_DEPENDS,
) -> ControlTokens:
    """Add the mask token and the native tags as special tokens, and record their ids in ``model.config.hf_hybrid``.

    Tokens that exist are reused (``tokenizer.mask_token`` too), and so are rows that the embedding matrix has beyond
    the tokenizer: it is resized only when it is too small, never shrunk. New rows are drawn around the mean of the old
    ones with torch's generator (Hewitt, "Initializing new word embeddings for pretrained language models", 2021);
    reused spare rows keep their weights. Tied embeddings stay tied. A second call changes nothing.

    Args:
        model: a causal language model; its embeddings and its config change in place.
        tokenizer: its tokenizer; changes in place, save it with the model.
        lengths: that a plan can name, in tokens, rising; each is a tag.
        max_depends: how many parts of a round can be named as dependencies; each number is a tag.

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
    texts = NativeGrammar.texts(lengths, max_depends)
    tokenizer.add_special_tokens(
        {
            "mask_token": mask,
            "extra_special_tokens": list(texts),
        },
        replace_extra_special_tokens=False,
    )
    ids = {text: int(i) for text, i in tokenizer.get_vocab().items()}
    # The highest id counts, not the number of tokens: a vocabulary may have holes.
    needed = 1 + max(ids[text] for text in (mask, *texts))
    if needed > _rows(model):
        model.resize_token_embeddings(needed, mean_resizing=True)

    model.config.hf_hybrid = {
        **{k: v for k, v in (getattr(model.config, "hf_hybrid", None) or {}).items() if k != "grammar"},
        "mask_token_id": ids[mask],
        **NativeGrammar.record_of(ids, lengths, max_depends),
    }
    tokens = control_tokens(model)
    assert tokens is not None  # the record was just written
    return tokens


def noise_tokens(model: PreTrainedModel) -> NoiseTokens | None:
    """The mask token recorded in ``model.config.hf_hybrid``, and what else of the record is no text; None when it names
    no mask token. Tags may be missing: only plans need them.

    Raises:
        VocabularyError: the record is no dict, its mask token is no id of the vocabulary, or its grammar is unknown.
    """
    record = _record(model)
    if record is None or record.values.get("mask_token_id") is None:
        return None
    mask, first = record.token("mask_token_id"), first_end(model)
    end = first if isinstance(first, int) else None
    record.check_meanings(ControlTokens.of(mask=mask, end=end, filler=None))
    fillers = record.known(["spad"])
    banned = (mask, *fillers, *record.known(_grammar(record).entries_of_record))
    return NoiseTokens(mask, end, fillers[0] if fillers else None, tuple(dict.fromkeys(banned)))


def control_tokens(model: PreTrainedModel) -> ControlTokens | None:
    """The control tokens recorded in ``model.config.hf_hybrid``, checked; ``tags`` is None when the record names none
    of them (a mask token alone is no plan), and there are no control tokens when it does not name a mask token either.

    ``noise.end`` comes from ``generation_config.eos_token_id``, else from the config; the first one of a list.

    Raises:
        VocabularyError: a missing entry, a wrong type, an id outside the vocabulary, one id with two meanings, or an
            unknown grammar.
    """
    record = _record(model)
    if record is None:
        return None
    grammar = _grammar(record)
    if not any(name in record.values for name in grammar.entries_of_record):
        noise = noise_tokens(model)
        return None if noise is None else ControlTokens(noise)
    record.require(["mask_token_id"])
    tags, end = grammar.tags_of(record), first_end(model)
    if end is None:
        raise VocabularyError("the model has no end-of-sequence token; set model.generation_config.eos_token_id")
    tokens = ControlTokens.of(
        mask=record.token("mask_token_id"),
        end=record.checked("eos_token_id", end, "config"),
        filler=record.token("spad") if "spad" in record.values else None,
        tags=tags,
        grammar=str(record.values.get("grammar", "native")),
    )
    record.check_meanings(tokens)
    return tokens


def _grammar(record: Record) -> type[Grammar]:
    return grammar_class(record.values.get("grammar", "native"))


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
    """True: every tag of a plan in some grammar is a token of its own; lengths and dependencies differ between
    checkpoints."""
    lacking = (None, tokenizer.unk_token_id if tokenizer.unk_token is not None else None)
    marks = [grammar.marks for grammar in GRAMMARS.values() if grammar.marks]
    return any(all(tokenizer.convert_tokens_to_ids(mark) not in lacking for mark in known) for known in marks)


def _record(model: PreTrainedModel) -> Record | None:
    record: Any = getattr(model.config, "hf_hybrid", None)
    if record is None:
        return None
    if not isinstance(record, Mapping):
        raise VocabularyError(
            f"config.hf_hybrid must be a dict, got {type(record).__name__}; "
            "run hf_hybrid.prepare_vocabulary(model, tokenizer) to write it anew"
        )
    return Record(record, model.config.get_text_config().vocab_size)


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
