"""What ``generate()`` gives back when it is asked for more than ids."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

from hf_hybrid.core.plan import Plan


@dataclass
class SpanReport:
    """How one part was written: planned and written tokens of its text (label left out), its token ids, passes it took
    part in, whether it was ``extended`` beyond its planned length, and how it ``ended``: ``end``, ``limit``,
    ``stop``, or ``given`` when the plan brought its text."""

    round: int
    part: int
    label: tuple[int, ...]
    depends: tuple[int, ...]
    planned: int
    tokens: list[int]
    passes: int
    extended: bool
    ended: str


@dataclass
class GenerationReport:
    """How one row of the batch was written.

    Attributes:
        strategy: its name. num_tokens: new tokens of the text. num_forwards: passes the row took part in. num_rows:
            rows that these passes carried for it. tokens_per_forward: the quotient of the first two.
        seconds: per stage (``prefill``, ``plan``, ``spans``, ``text``) and ``total``; a pass that several rows shared
        counts for each.
        seconds_to_first_text: until the first token of the text was confirmed, None if there was none.
        plans: the plan of every round. spans: every part, in text order.
        accepted_per_round: drafted tokens that stood, for every pass that checked some.
        fallbacks: what was extended, cut, switched off or finished otherwise, and why.
    """

    strategy: str
    num_tokens: int = 0
    num_forwards: int = 0
    num_rows: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    seconds_to_first_text: float | None = None
    plans: list[Plan] = field(default_factory=list)
    spans: list[SpanReport] = field(default_factory=list)
    accepted_per_round: list[int] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)

    @property
    def tokens_per_forward(self) -> float:
        """New tokens of the text per pass."""
        return self.num_tokens / max(self.num_forwards, 1)

    @property
    def plan(self) -> Plan | None:
        """The plan of the first round, None if there was none."""
        return self.plans[0] if self.plans else None


@dataclass(frozen=True)
class Answer:
    """One answer of ``generate_many``.

    Attributes:
        index: place of its prompt. tokens: new ones, as behind the prompt in ``sequences``. report: how they came.
    """

    index: int
    tokens: list[int]
    report: GenerationReport


@dataclass
class HybridGenerateOutput(ModelOutput):
    """The host's output with a report.

    Attributes:
        sequences: int64 ``(batch, length)``, prompt and text in text order, padded on the right.
        past_key_values: with ``return_past_key_values=True``, a cache of ``sequences`` at consecutive positions.
        report: one ``GenerationReport`` per row.
    """

    sequences: torch.Tensor | None = None
    past_key_values: Cache | None = None
    report: list[GenerationReport] | None = None
