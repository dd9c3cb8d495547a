"""The parts of an answer as people read them: from the trunk while the plan is still written, and from the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from hf_hybrid.core.plan import ControlTokens


@dataclass
class Entry:
    """A part in a plan that is being written: token ids of its label, its planned tokens (None: not written yet), and
    the parts that it reads (from 1)."""

    label: list[int] = field(default_factory=list[int])
    length: int | None = None
    reads: list[int] = field(default_factory=list[int])


def read_trunk(tokens: Sequence[int], control: ControlTokens | None) -> tuple[list[int], list[Entry]]:
    """The text of a trunk segment without plan and control tokens, and the entries of its plan.

    Unlike ``PlanGrammar.parse`` it also takes a plan that ends anywhere, and never fails.

    Args:
        tokens: settled ones, the prompt left out. control: of the model; None: every token is text.
    """
    if control is None:
        return list(tokens), []
    text: list[int] = []
    entries: list[Entry] = []
    for token in tokens:
        length = control.length_of(token)
        if token == control.topic:
            entries.append(Entry())
        elif length is not None and entries:
            entries[-1].length = length
        elif token in control.depends and entries:
            entries[-1].reads.append(control.depends.index(token) + 1)
        elif token in control.banned or token == control.eos:
            continue
        elif entries and entries[-1].length is None:
            entries[-1].label.append(token)
        else:
            text.append(token)
    return text, entries


def readable(text: str) -> str:
    """``text`` without characters that would steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else " " if c.isspace() else "" for c in text)


def plan_table(report: Any, decode: Any) -> Table:
    """Every part that was planned: its label, its planned and its written tokens, and what it reads."""
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
