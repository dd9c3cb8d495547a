"""Fields of settings (default, meaning with unit, range), and the check of a value."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import field, fields
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


class SettingsError(ValueError):
    """An unknown strategy or setting, or a value outside its range; the message lists the choices."""


REQUIRED: Any = "required"
"""Default of a setting that must be given."""


def setting(default: Any, help: str, low: float | None = None, high: float | None = None) -> Any:
    """A settings field: its default, its meaning with unit, and its closed range."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})


def checked(cls: type[T], values: Mapping[str, Any]) -> T:
    """Make a settings dataclass (fields made by ``setting``) from plain values, such as a section of a recipe.

    Raises:
        SettingsError: an unknown or missing name, or a value outside its range.
    """
    own = {f.name for f in fields(cls)}
    for name in values:
        if name not in own:
            raise SettingsError(unknown(name, own))
    plain = {name: coerced(cls, name, value) for name, value in values.items()}
    missing = next((f.name for f in fields(cls) if f.default is REQUIRED and f.name not in values), None)
    if missing is not None:
        raise SettingsError(f"{missing} is missing: {cls.__dataclass_fields__[missing].metadata['help']}")
    return cls(**plain)


def shown(value: object, most: int = 80) -> str:
    """Text of a value for a message, cut to ``most`` characters: anybody may have written it."""
    try:
        text = str(value) if isinstance(value, Exception) else repr(value)
    except (ValueError, RecursionError):  # Python refuses to print thousands of digits
        return f"a huge {type(value).__name__}"
    return text if len(text) <= most else f"{text[: most - 20]}... ({len(text)} characters)"


def unknown(name: object, choices: frozenset[str] | set[str]) -> str:
    """Message about an unknown setting, with the choices."""
    near = difflib.get_close_matches(str(name)[:80], choices, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"unknown setting {shown(name)}{hint}; choose from {', '.join(sorted(choices))}"


def coerced(cls: type, name: str, value: Any) -> Any:
    """Check ``value`` of a field of ``cls`` against its range and its annotation, the one source of its type."""
    value = _plain(value)
    hint = get_type_hints(cls)[name]
    meta = next(f for f in fields(cls) if f.name == name).metadata
    options = get_args(hint) or (hint,)
    if all(isinstance(o, str) for o in options):
        if not isinstance(value, str) or value not in options:
            raise SettingsError(f"{name}={shown(value)}: choose one of {', '.join(options)}")
        return value
    if value is None and type(None) in options:
        return None
    if options == (str,):
        if not isinstance(value, str) or not value:
            raise SettingsError(f"{name}={shown(value)}: must be a text")
        return value
    kinds = tuple(o for o in options if o in (int, float, bool))
    inner = next((get_args(option)[0] for option in options if get_origin(option) is list), None)
    if isinstance(value, (list, tuple)) and inner is not None:
        return [_number(name, _plain(v), (inner,), meta) for v in value]
    return _number(name, value, kinds, meta)


def _plain(value: Any) -> Any:
    """Turn scalars and arrays of numpy or torch into numbers and lists of Python; the rest stays."""
    return value.tolist() if hasattr(value, "ndim") and hasattr(value, "tolist") else value


def _number(name: str, value: Any, kinds: tuple[type, ...], meta: Mapping[str, Any]) -> Any:
    if bool in kinds:
        if not isinstance(value, bool):
            raise SettingsError(f"{name}={shown(value)}: must be True or False")
        return value
    wanted = "a whole number" if kinds == (int,) else "a number"
    # NaN and infinity are not whole either: their remainder is NaN, which differs from 0.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or (kinds == (int,) and value % 1 != 0):
        raise SettingsError(f"{name}={shown(value)}: must be {wanted}")
    low, high = meta["low"], meta["high"]
    if value != value or (low is not None and value < low) or (high is not None and value > high):
        raise SettingsError(f"{name}={shown(value)} is out of range: {low} to {high}")
    return int(value) if kinds == (int,) else float(value)
