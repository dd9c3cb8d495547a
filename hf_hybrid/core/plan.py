"""Plans: the parts of an answer, their lengths and dependencies. How they are written as tokens is the business of a
grammar (`hf_hybrid.core.grammars`)."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from hf_hybrid.core.given import PlanError, numbers, whole
from hf_hybrid.core.rows import transitive_closure


@dataclass(frozen=True)
class Span:
    """One part of a plan. Lists, arrays and tensors of whole numbers become tuples.

    Attributes:
        label: token ids, at least one. length: planned length of the text behind the label, in tokens.
        depends: rising 0-based indices of earlier parts. text: ids of a text that is given and not to be written (the
        planned length still decides where the next part begins); None: it is to be written.
    """

    label: tuple[int, ...]
    length: int
    depends: tuple[int, ...] = ()
    text: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        given = None if self.text is None else numbers(self.text, "the text of a part")
        values = {
            "label": numbers(self.label, "the label of a part"),
            "length": whole(self.length, "the length of a part"),
            "depends": numbers(self.depends, "the dependencies of a part"),
            "text": given,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class PlanLimits:
    """Caps on a plan. Lengths are in tokens; ``max_plan_length`` bounds the sum of openings and planned lengths."""

    max_parts: int = 16
    max_part_length: int = 256
    max_plan_length: int = 2048
    max_label_length: int = 16


@dataclass(frozen=True)
class Plan:
    """The parts of one round, in text order, and the text right before them (``lead``, token ids)."""

    spans: tuple[Span, ...]
    lead: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        spans: tuple[Any, ...] = self.spans if type(self.spans) is tuple else tuple(self.spans)
        if not all(isinstance(span, Span) for span in spans):
            raise PlanError("the parts of a plan must be Spans: Plan((Span(label, length), ...))")
        object.__setattr__(self, "spans", spans)
        object.__setattr__(self, "lead", numbers(self.lead, "the text before the parts"))

    def sorted(self) -> Plan:
        """The same parts in a topological order (stable: a part moves only behind what it depends on); a cycle is a
        ``PlanError``."""
        count = len(self.spans)
        for number, span in enumerate(self.spans, 1):
            if any(not 0 <= d < count for d in span.depends):
                raise PlanError(f"part {number} depends on a part that does not exist; there are {count} parts")
        waiting = [set(span.depends) for span in self.spans]
        readers: list[list[int]] = [[] for _ in range(count)]
        for i, needed in enumerate(waiting):
            for d in needed:
                readers[d].append(i)
        ready = [i for i in range(count) if not waiting[i]]  # rising, so already a heap
        order: list[int] = []
        while ready:
            order.append(heapq.heappop(ready))
            for i in readers[order[-1]]:
                waiting[i].discard(order[-1])
                if not waiting[i]:
                    heapq.heappush(ready, i)
        if len(order) < count:
            cycle = [i + 1 for i in range(count) if waiting[i]]
            raise PlanError(f"the dependencies of parts {cycle} form a cycle; remove one of them")
        place = {old: new for new, old in enumerate(order)}
        depends = (tuple(sorted({place[d] for d in self.spans[i].depends})) for i in order)
        spans = (replace(self.spans[i], depends=d) for i, d in zip(order, depends, strict=True))
        return replace(self, spans=tuple(spans))

    def reopen(self, part: int) -> Plan:
        """The plan with ``part`` (0-based) and what depends on it to be written again; other given texts stay."""
        if not 0 <= part < len(self.spans):
            raise PlanError(f"there is no part {part + 1}; the plan has {len(self.spans)} parts")
        reads = self.depends("dag")  # (parts, parts)
        spans = (replace(span, text=None) if reads[i, part] else span for i, span in enumerate(self.spans))
        return replace(self, spans=tuple(spans))

    def depends(self, visibility: Literal["sparse", "dag"]) -> Tensor:
        """bool ``(parts, parts)``, reflexive and transitively closed: part s reads part t. ``sparse`` ignores the
        dependencies."""
        matrix = torch.eye(len(self.spans), dtype=torch.bool)
        if visibility == "dag":
            for s, span in enumerate(self.spans):
                matrix[s, list(span.depends)] = True
        return transitive_closure(matrix)
