"""Copies of what a caller hands in for a whole batch, one for each sequence: here sequences are written one by one."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from hf_hybrid.decoding.output import DecodingError

T = TypeVar("T")
_SHARED = (torch.nn.Module, PreTrainedTokenizerBase)
"""Large, and not changed by being used."""
_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.Tensor, type)


def own_copy(thing: T) -> T:
    """A deep copy with a state of its own; models and tokenizers in it stay the same objects.

    Raises:
        DecodingError: it cannot be copied.
    """
    try:
        return copy.deepcopy(thing, _kept(thing))
    except Exception as error:  # a class may do anything here
        raise DecodingError(
            f"{name_of(thing)} cannot be copied, and every sequence of a batch needs its own, because sequences are "
            f"written one by one here; call generate() with one prompt at a time ({type(error).__name__}: {error})"
        ) from error


def name_of(thing: Any) -> str:
    """Class of an object, or the name of a function."""
    return getattr(thing, "__name__", type(thing).__name__)


def _kept(thing: Any) -> dict[int, Any]:
    """The memo of a deep copy that keeps what is not to be copied."""
    memo: dict[int, Any] = {}
    seen: set[int] = set()
    waiting = [thing]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, _PLAIN):
            continue
        seen.add(id(value))
        if isinstance(value, _SHARED):
            memo[id(value)] = value
        elif isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting += value
        else:
            waiting += getattr(value, "__dict__", {}).values()
    return memo
