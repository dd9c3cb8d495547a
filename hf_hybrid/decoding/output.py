"""What ``generate()`` gives back when it is asked for more than ids, and the error when it can give nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers.generation.utils import GenerateDecoderOnlyOutput

from hf_hybrid.core.plan import Plan, Span

Decode = Callable[[Sequence[int]], str]
"""Text of token ids, such as ``tokenizer.decode``."""


class DecodingError(ValueError):
    """A call that cannot be decoded; the message says what to change."""


@dataclass
class SpanReport:
    """How one part was written: planned and written tokens of its text (label left out), its token ids, passes it took
    part in, whether it was ``extended`` beyond its planned length, and how it ``ended``: ``end``, ``limit`` (its own),
    ``length`` or ``stop`` (of the answer, in it or before), or ``given`` when the plan brought its text."""

    round: int
    part: int
    label: tuple[int, ...]
    depends: tuple[int, ...]
    planned: int
    tokens: list[int]
    passes: int
    extended: bool
    ended: str

    def as_data(self, decode: Decode) -> dict[str, Any]:
        """For JSON: parts count from 1, ``tokens`` is their number, ``label`` and ``text`` are texts."""
        names = {"label": decode(self.label), "part": self.part + 1, "depends": [d + 1 for d in self.depends]}
        return asdict(self) | names | {"tokens": len(self.tokens), "text": decode(self.tokens)}


@dataclass
class DraftingReport:
    """How drafting went in one sequence. A round is a pass that checked a draft.

    Attributes:
        drafter: its name. rounds: passes that checked a draft. off: passes without one, because none would have paid.
            empty: passes without one, because the drafter had none or there was no room. probes: rounds that were made
            only to see whether drafting pays again. rechecked: passes without one, because the token to come had been
            too close to another to trust a pass of several rows. trees: rounds whose draft had branches.
        passes: of every pass the numbers of tokens drafted, accepted and written.
        tried: per depth of a draft, how often it was checked behind accepted tokens. accepted: how often it was
        accepted.
    """

    drafter: str
    rounds: int = 0
    off: int = 0
    empty: int = 0
    probes: int = 0
    rechecked: int = 0
    trees: int = 0
    tried: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    passes: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def acceptance(self) -> list[float]:
        """Per depth of a draft, the share that was accepted of those behind accepted tokens."""
        return [good / all_ for good, all_ in zip(self.accepted, self.tried, strict=True)]

    @property
    def share_off(self) -> float:
        """Share of the passes in which drafting was switched off, 0 to 1."""
        return self.off / max(self.rounds + self.off + self.empty + self.rechecked, 1)

    def note(self, length: int, accepted: int) -> None:
        """A draft of ``length`` tokens was checked and ``accepted`` of them were accepted."""
        self.rounds += 1
        reached = min(accepted + 1, length)
        more = reached - len(self.tried)
        self.tried += [0] * more
        self.accepted += [0] * more
        for depth in range(reached):
            self.tried[depth] += 1
            self.accepted[depth] += depth < accepted


@dataclass
class GenerationReport:
    """How one sequence was written.

    Attributes:
        strategy: its name. num_tokens: new tokens of the text. num_forwards: passes the sequence took part in.
            num_rows: rows that these passes carried for it. tokens_per_forward: the quotient of the first two.
        seconds: per stage (``prefill``, ``plan``, ``spans``, ``text``, ``draft``, ``verify``) and ``total``; a pass
        that several sequences shared counts for each.
        seconds_to_first_text: until the first token of the text was confirmed, None if there was none.
        plans: the plan of every round. spans: every part, in text order.
        accepted_per_round: drafted tokens that were accepted, for every pass that checked some.
        fallbacks: what was extended, cut, switched off or finished otherwise, and why.
        drafting: of ``speculative``, None for the others.
        ended: ``eos``, ``stop`` (a stop string or another criterion), or ``length``: the answer was cut, at
            ``max_new_tokens`` or because the model has no further positions.
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
    drafting: DraftingReport | None = None
    ended: str = ""

    @property
    def tokens_per_forward(self) -> float:
        """New tokens of the text per pass."""
        return self.num_tokens / max(self.num_forwards, 1)

    @property
    def plan(self) -> Plan | None:
        """The plan of the first round, None if there was none."""
        return self.plans[0] if self.plans else None

    def as_data(self) -> dict[str, Any]:
        """The numbers for JSON; ``plans_as_data`` has the plans, ``SpanReport.as_data`` a part."""
        numbers = asdict(self) | {"tokens_per_forward": self.tokens_per_forward}
        return {name: value for name, value in numbers.items() if name not in ("plans", "spans")}


def plans_as_data(plans: Sequence[Plan], decode: Decode) -> dict[str, Any]:
    """Plans for JSON, one per round, as ``hf-hybrid plan`` prints them; parts count from 1."""

    def part(span: Span) -> dict[str, Any]:
        shown = {"label": decode(span.label), "length": span.length, "depends": [d + 1 for d in span.depends]}
        return shown if span.text is None else {**shown, "text": decode(span.text)}

    return {"rounds": [{"lead": decode(p.lead), "parts": [part(span) for span in p.spans]} for p in plans]}


@dataclass(frozen=True)
class Answer:
    """One answer of ``generate_many``.

    Attributes:
        index: number of its prompt, from 0. tokens: new ones, as behind the prompt in ``sequences``; empty with an
        error. report: how they came. error: why this prompt has no answer, None: it has one.
    """

    index: int
    tokens: list[int]
    report: GenerationReport
    error: str | None = None


@dataclass
class HybridGenerateOutput(GenerateDecoderOnlyOutput):
    """The host's output with a report.

    Attributes:
        sequences: int64 ``(batch, length)``, prompt and text in text order, padded on the right.
        cache: with ``return_past_key_values=True``, a cache of ``sequences`` at consecutive positions
            (``past_key_values`` before transformers 5.24; there the old name reads it too).
        report: one ``GenerationReport`` per sequence.
    """

    report: list[GenerationReport] | None = None
