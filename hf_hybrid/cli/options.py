"""Command-line options made from the settings dataclasses: names, types, ranges and help come from ``config``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import Field, fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from hf_hybrid.config import SETTINGS, SettingsError


def setting_parameters() -> list[inspect.Parameter]:
    """One keyword-only parameter per setting, unset by default; its help names the strategies that know it."""
    found: dict[str, tuple[Field[Any], Any, list[str]]] = {}
    for strategy, cls in SETTINGS.items():
        hints = get_type_hints(cls)
        for field in fields(cls):
            found.setdefault(field.name, (field, hints[field.name], []))[2].append(strategy)
    return [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(field, hint, strategies)
        )
        for name, (field, hint, strategies) in found.items()
    ]


def given_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings given on the command line; the word ``none`` switches a setting off."""
    settings: dict[str, Any] = {}
    for name, value in options.items():
        if value is None:
            continue
        if isinstance(value, str) and _takes_none(name):
            settings[name] = None if value.lower() == "none" else _number(name, value)
        else:
            settings[name] = value
    return settings


def _annotation(field: Field[Any], hint: Any, strategies: list[str]) -> Any:
    """``Annotated`` type of the option of one setting."""
    flag = f"--{field.name.replace('_', '-')}"
    known = "every strategy" if len(strategies) == len(SETTINGS) else ", ".join(strategies)
    meta: dict[str, Any] = {"help": f"{field.metadata['help']}. Default: {_shown(field.default)}. For: {known}."}
    if get_origin(hint) is Literal:
        return Annotated[hint | None, typer.Option(flag, **meta)]
    kinds = get_args(hint) or (hint,)
    if bool in kinds:
        return Annotated[bool | None, typer.Option(f"{flag}/--no-{flag[2:]}", **meta)]
    if type(None) in kinds and field.default is not None:
        return Annotated[str | None, typer.Option(flag, metavar="NUMBER|none", **meta)]
    kind = int if int in kinds else float
    limits = {"min": field.metadata["low"], "max": field.metadata["high"]}
    return Annotated[kind | None, typer.Option(flag, **meta, **limits)]


def _takes_none(name: str) -> bool:
    """True: None is one of the values of the setting, and not its default."""
    for cls in SETTINGS.values():
        for field in fields(cls):
            if field.name == name:
                return field.default is not None and type(None) in get_args(get_type_hints(cls)[name])
    return False


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise SettingsError(f"{name}={value!r}: must be a number, or none") from None


def _shown(default: Any) -> str:
    if default is None:
        return "unset"
    if isinstance(default, bool):
        return "on" if default else "off"
    return str(default)
