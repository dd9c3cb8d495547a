"""Reads the prompt of a command from an argument, standard input or a file, and encodes it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hf_hybrid.cli.command import InputError, UsageError


def read_prompt(prompt: str | None, source: Path | None) -> str:
    """Read the prompt from the argument, standard input or a file."""
    if (prompt is None) == (source is None):
        raise UsageError("give one prompt: PROMPT, - for standard input, or --input FILE")
    given = sys.stdin.read() if prompt == "-" else prompt
    text = (text_of(source) if source is not None else str(given)).rstrip("\n")
    if not text.strip():
        raise UsageError("the prompt is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # bytes of a shell or a pipe that are no text
        raise InputError(f"the prompt is no text in UTF-8: {error}") from error
    return text


def text_of(source: Path) -> str:
    """The text of a file; InputError if it is no text."""
    try:
        return source.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is no text in UTF-8: {error}") from error


def needs_template(tokenizer: Any) -> None:
    """Raise for a tokenizer that cannot read a chat."""
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError("a chat was asked for, and the tokenizer of this model has no chat template")


def encode(tokenizer: Any, text: str | list[dict[str, Any]], chat: bool, continues: bool = False) -> dict[str, Any]:
    """Encode a text or a chat: ``input_ids`` and ``attention_mask``, each ``(1, prompt)``.

    Args:
        continues: True: the last turn of a chat is not closed, the answer goes on with it.
    """
    try:
        if chat or not isinstance(text, str):
            needs_template(tokenizer)
            messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
            encoded = tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=not continues,
                continue_final_message=continues,
                return_tensors="pt",
                return_dict=True,
            )
        else:
            encoded = tokenizer(text, return_tensors="pt")
    except UsageError:
        raise
    except Exception as error:  # a template is a program, and may raise anything
        reader = "tokenizer" if isinstance(text, str) and not chat else "chat template"
        raise InputError(f"the {reader} of this model cannot read {text!r:.200}: {error}") from error
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}
