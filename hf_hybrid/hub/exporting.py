"""Writes repositories into a folder, ready for ``hf upload``: a model with its decoding, or decoding alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from string import Template
from typing import Any

from safetensors import SafetensorError

from hf_hybrid.config import settings_for
from hf_hybrid.hub.links import check_no_link, check_source, check_target
from hf_hybrid.hub.push import CARD, write_repository_card
from hf_hybrid.hub.saving import save_pretrained
from hf_hybrid.mixin import causal_model
from hf_hybrid.portable import write_custom_generate

KEPT = ("README.md", "LICENSE", "training.json", "test_set.jsonl")
"""Files that a checkpoint folder may hold besides those of the host; fixed names, never read from a repository."""


class ExportError(ValueError):
    """A repository that could not be written completely; the message says where."""


def export_model(
    model: Any, folder: Path, *, tokenizer: Any = None, source: Path | None = None, strategy: str | None = None
) -> None:
    """Write a model repository: weights, tokenizer, ``custom_generate/`` and a card.

    Args:
        folder: made when it is not there.
        source: the folder that the model came from; its card, licence and training record go with it.
        strategy: of calls that name none, stored in ``generation_config.json``; None: what is stored there already.

    Raises:
        hf_hybrid.SettingsError: no such strategy.
        hf_hybrid.PortableError: the folder has a ``custom_generate/`` that is not hf_hybrid's. Nothing was written.
        ExportError: the weights cannot be written, as on a full disk.
        LinkError: a link leads out of ``source`` or ``folder``, or ``folder`` is one. Nothing was written.
    """
    check_no_link(folder)
    if source is not None:
        check_source(source)
    config = causal_model(model).generation_config
    if strategy is not None:
        stored = dict(getattr(config, "hf_hybrid", None) or {})
        settings_for(strategy, {}, stored)
        config.hf_hybrid = {**stored, "strategy": strategy}
    try:
        save_pretrained(model, folder, tokenizer=tokenizer)
    except SafetensorError as error:  # such as a full disk
        raise ExportError(
            f"{folder}: the weights cannot be written ({error}); the files there are incomplete"
        ) from error
    for name in KEPT:
        if source is not None and (source / name).is_file() and not (folder / name).exists():
            shutil.copyfile(source / name, folder / name)
    if not (folder / CARD).exists():
        write_repository_card(model, folder, folder.resolve().name)


def export_speculative(folder: Path) -> None:
    """Write a ``custom_generate`` repository without weights: speculative decoding for any causal model.

    Raises:
        hf_hybrid.PortableError: the folder has a ``custom_generate/`` that is not hf_hybrid's. Nothing was written.
        LinkError: ``folder`` is a link, or a link leads out of it. Nothing was written.
    """
    check_no_link(folder)
    check_target(folder)
    write_custom_generate(folder, strategy="speculative")
    if not (folder / CARD).exists():
        card = Template(Path(__file__).with_name("speculative_card.md").read_text(encoding="utf-8"))
        (folder / CARD).write_text(card.substitute(name=folder.resolve().name), encoding="utf-8")
