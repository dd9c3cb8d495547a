"""Reads ``about.md``, which says of a checkpoint what cannot be measured: its licence, its data, what it is for.

``about.md`` is Markdown with YAML in front::

    ---
    license: apache-2.0
    language: en
    data: [{name: the CIA World Factbook, licence: public domain, source: https://example.org}]
    ---
    An introduction.

    ## What it does
    ...

Words such as ``$$steps`` in the text are replaced by facts of the checkpoint, so that no number is typed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

import yaml

from hf_hybrid.hub.tables import CardError

RELATIONS = ("finetune", "adapter", "quantized", "merge")
"""How a model may come from its base model, in the words of the Hub."""

_TEXT, _TEXTS = (str,), (str, list)
KEYS: dict[str, tuple[type, ...]] = {
    "license": _TEXT,
    "license_name": _TEXT,
    "license_link": _TEXT,
    "language": _TEXTS,
    "base_model": _TEXTS,
    "base_model_relation": _TEXT,
    "datasets": _TEXTS,
    "tags": _TEXTS,
    "widget": (list,),
    "data": (list,),
}
"""Key of the YAML -> its types. All are metadata of the Hub, except ``data``: data that are no data set of the Hub."""


@dataclass(frozen=True)
class About:
    """What ``about.md`` says.

    Attributes:
        metadata: keys of the Hub. data: name, licence and source of what it was trained on.
        introduction: the text before the first heading. sections: heading -> text, in order.
    """

    metadata: Mapping[str, Any] = field(default_factory=dict)
    data: tuple[Mapping[str, str], ...] = ()
    introduction: str = ""
    sections: Mapping[str, str] = field(default_factory=dict)


def read_about(path: Path | None, facts: Mapping[str, str]) -> About:
    """Read the file and put ``facts`` in for their names; an empty one for no path.

    Raises:
        CardError: no such file, unknown metadata or an unknown name behind a ``$``; the message lists the choices.
    """
    if path is None:
        return About()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CardError(f"there is no text on the checkpoint at {path}: {error}") from error
    front = re.match(r"---\s*\n(.*?)^---\s*\n", text, re.S | re.M)
    metadata = _metadata(path, front[1]) if front is not None else {}
    data = metadata.pop("data", [])
    body = _filled(path, text[front.end() :] if front is not None else text, facts)
    introduction, *rest = re.split(r"^## ", body, flags=re.M)
    sections: dict[str, str] = {}
    for section in rest:
        heading, _, content = section.partition("\n")
        sections[heading.strip()] = content.strip()
    return About(metadata, tuple(data), introduction.strip(), sections)


def _metadata(path: Path, text: str) -> dict[str, Any]:
    try:
        read = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise CardError(f"{path}: the YAML between the lines of --- cannot be read: {error}") from error
    if not isinstance(read, dict):
        raise CardError(f"{path}: the YAML between the lines of --- must be `key: value` lines")
    for key, value in read.items():
        if key not in KEYS:
            raise CardError(f"{path}: unknown metadata {key!r}; choose from {', '.join(KEYS)}")
        if not isinstance(value, KEYS[key]):
            raise CardError(f"{path}: {key} must be {' or '.join(t.__name__ for t in KEYS[key])}, got {value!r}")
    for item in read.get("data", []):
        if not isinstance(item, dict) or not {"name", "licence"} <= item.keys() <= {"name", "licence", "source"}:
            raise CardError(f"{path}: an entry of data has a name, a licence and perhaps a source, not {item!r}")
    return read


def _filled(path: Path, text: str, facts: Mapping[str, str]) -> str:
    try:
        return Template(text).substitute(facts)
    except KeyError as error:
        raise CardError(
            f"{path}: ${error.args[0]} is not known of this checkpoint; known: {', '.join(facts)}"
        ) from error
    except ValueError as error:
        raise CardError(f"{path}: {error}; a dollar sign is written $$") from error
