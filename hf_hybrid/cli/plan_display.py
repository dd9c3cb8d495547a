"""Plans and parts as text for people: read from the trunk while the plan is written, or from the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from hf_hybrid.core.grammars import Entry, Grammar


def read_trunk(tokens: Sequence[int], grammar: Grammar | None) -> tuple[list[int], list[Entry]]:
    """Split a trunk segment into its text (without control tokens) and the entries of its plan, which may end anywhere.

    Args:
        tokens: of the segment, without the prompt. grammar: of the model; None: every token is text.
    """
    return (list(tokens), []) if grammar is None else grammar.read(tokens)


def readable(text: str) -> str:
    """``text`` without characters that would steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else " " if c.isspace() else "" for c in text)


def plan_table(report: Any, decode: Any) -> Table:
    """Table of the planned parts: label, planned and written tokens, and what each reads."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name, justify in (("part", "right"), ("label", "left"), ("planned", "right"), ("written", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("reads parts")
    for span in report.spans:
        number = f"{span.round}.{span.part + 1}" if len(report.plans) > 1 else str(span.part + 1)
        reads = ", ".join(str(d + 1) for d in span.depends)
        label = decode(list(span.label)).strip()
        table.add_row(number, label, str(span.planned), str(len(span.tokens)), reads or "-")
    return table
