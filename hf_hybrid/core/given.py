"""Numbers that a caller gives, in whatever holds numbers, as plain ints: what is compared with tags must compare."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import cast


class PlanError(ValueError):
    """A plan that cannot be carried out; the message says what to change."""


def whole(value: object, what: str) -> int:
    """``value`` as an int.

    Raises:
        PlanError: it is no whole number.
    """
    try:
        if isinstance(value, bool) or getattr(value, "ndim", 0):  # a tensor of one number is one of one dimension
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise PlanError(f"{what} must be a whole number, not {value!r:.40}") from None


def numbers(value: Iterable[object], what: str) -> tuple[int, ...]:
    """Whole numbers in one dimension (a list, a tensor, an array) as a tuple of ints, which compare and hash as such.

    Raises:
        PlanError: they are not; the message names ``what``.
    """
    if isinstance(value, tuple) and all(type(number) is int for number in value):
        return cast("tuple[int, ...]", value)  # as it is: a plan may be huge
    if isinstance(value, str | bytes):
        raise PlanError(f"{what} must be token ids, not a text: tokenizer(text, add_special_tokens=False).input_ids")
    try:
        return tuple(whole(number, f"every number in {what}") for number in value)
    except TypeError:
        raise PlanError(f"{what} must be whole numbers in one dimension, not {value!r:.40}") from None
