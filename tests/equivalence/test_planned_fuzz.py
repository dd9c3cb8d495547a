"""Theorem 10 for calls that were put together by chance: plans that are given and written, and whatever else a call may
say, beside each part written alone by un-cached forwards (``tests.oracles.SlowPlanned``).

Bugs these tests catch: those that need two things at once, as a given text in a batch of unequal prompts, a part that
outgrows its plan beside one that reads it, a processor that reads the text in a second round, a random order of
unmasking in a part, or a budget that ends inside of a plan.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
from transformers import (
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_hybrid import Plan, Span, grammar_of
from tests.equivalence.test_planned import never_ends, writer
from tests.equivalence.test_planned_lengths import ending
from tests.equivalence.test_prefixes import Hashed
from tests.models_for_tests import CONTROL, TEXT, VOCAB, hybrid, left_padded
from tests.oracles import Answer, Denoising, Pick, SlowPlanned

NUMBERS = range(60)
GRAMMAR = grammar_of(CONTROL, VOCAB)


@cache
def sure(seed: int) -> Any:
    """A model that writes few different tokens, so that its windows are often right."""
    host = hybrid(seed=seed)
    host.get_output_embeddings().bias.data[list(TEXT)] *= 2.5
    return host


@dataclass
class Call:
    """A call by chance: what ``generate()`` gets, and what the oracle is told."""

    host: Any = field(repr=False)
    prompts: tuple[tuple[int, ...], ...]
    new: int
    said: dict[str, Any] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)
    pick: list[Any] = field(default_factory=list)
    how: dict[str, Any] | None = None

    def found(self) -> tuple[list[list[int]], list[Any]]:
        """New ids of every sequence, without the padding behind them, and the reports."""
        output = self.host.generate(
            **left_padded(self.prompts),
            strategy="planned_diffusion",
            max_new_tokens=self.new,
            return_dict_in_generate=True,
            return_control_tokens=True,
            suppress_tokens=[0],  # so that padding is nothing else
            **self.said,
        )
        rows = output.sequences[:, max(map(len, self.prompts)) :].tolist()
        return [row[: len(row) - row[::-1].index(next(t for t in row[::-1] if t))] for row in rows], output.report

    def expected(self, row: int) -> Answer:
        """What the oracle writes for one prompt alone."""
        prompt, width = self.prompts[row], max(map(len, self.prompts))
        seed = self.said.get("seed", 0) + row
        warpers = (SuppressTokensLogitsProcessor([0]), *self.pick)
        pick = Pick(seed if "do_sample" in self.said else None, warpers, (0,) * (width - len(prompt)))
        how = None if self.how is None else Denoising(**self.how, seed=seed)
        return SlowPlanned(self.host, CONTROL, pick=pick, how=how, **self.told).write(prompt, self.new)


def plan_by_chance(draw: random.Random) -> Plan:
    spans: list[Span] = []
    for number in range(draw.randint(1, 4)):
        label, text = (tuple(draw.choices(TEXT, k=draw.randint(least, 4))) for least in (1, 0))
        depends = tuple(part for part in range(number) if draw.random() < 0.4)
        spans.append(Span(label, draw.choice((1, 2, 2, 8)), depends, text if draw.random() < 0.25 else None))
    return Plan(tuple(spans), tuple(draw.choices(TEXT, k=draw.choice((0, 0, 3)))))


def call_by_chance(draw: random.Random) -> Call:
    prompts = tuple(tuple(draw.choices(TEXT, k=draw.randint(1, 9))) for _ in range(draw.choice((1, 1, 2, 3))))
    hosts = (writer(13), writer(26), writer(33), ending(9), ending(13), ending(27), never_ends(), sure(13), sure(26))
    call = Call(draw.choice(hosts), prompts, draw.choice((12, 30, 50, 70)))
    both = {"visibility": draw.choice(("dag", "dag", "sparse")), "max_parts": draw.choice((1, 2, 3, 4))}
    both["max_rounds"] = draw.choice((1, 2, 8))
    extension = draw.choice((1.0, 1.5, 4.0, 4.0))
    call.said |= both | {"max_span_extension": extension}
    call.told |= both | {"extension": extension}
    if draw.random() < 0.5:
        plans = [plan_by_chance(draw) for _ in range(draw.randint(1, 2))]
        call.said |= {"plan": plans, "max_parts": 4, "max_rounds": max(2, both["max_rounds"])}
        call.told |= {"plans": plans}
        own = [1 + len(p.lead) + len(GRAMMAR.render(p)) for p in plans]
        own += [1 + len(span.label) + len(span.text or ()) for plan in plans for span in plan.spans]
        call.new = max(call.new, sum(own) + draw.choice((0, 30, 60)))
    if draw.random() < 0.4:
        sampled(draw, call)
    if draw.random() < 0.35:
        unverified(draw, call)
    else:
        call.said |= {
            "span_decoding": draw.choice(("diffusion", "diffusion", "diffusion", "autoregressive")),
            "window_length": draw.choice((1, 4, 8, 8)),
            "draft_threshold": draw.choice((0.0, 0.0, 0.3)),
            "span_fallback_confidence": draw.choice((None, 0.2, 1.0)),
        }
        if draw.random() < 0.3:
            call.said["logits_processor"] = [Hashed()]
            call.pick.insert(0, Hashed())
    call.said["plan_window"] = draw.choice((0, 0, 5))
    return call


def sampled(draw: random.Random, call: Call) -> None:
    temperature, k, p = draw.choice((0.7, 1.3)), draw.choice((0, 6)), draw.choice((1.0, 0.8))
    call.said |= {"do_sample": True, "seed": draw.randrange(1 << 40)}
    call.said |= {"temperature": temperature, "top_k": k, "top_p": p}
    call.pick.append(TemperatureLogitsWarper(temperature))
    call.pick += [TopKLogitsWarper(k)] if k else []
    call.pick += [TopPLogitsWarper(p)] if p < 1 else []


def unverified(draw: random.Random, call: Call) -> None:
    call.how = {
        "window_length": draw.choice((1, 4, 7)),
        "commit": draw.choice(("prefix", "block")),
        "confidence_threshold": draw.choice((0.2, 0.95)),
        "selection": draw.choice(("confidence", "margin", "entropy", "random")),
        "max_denoising_steps": draw.choice((None, 1, 3)),
    }
    call.said |= {**call.how, "verify_spans": False, "span_fallback_confidence": None}
    call.said.setdefault("seed", draw.randrange(1 << 40))


@cache
def compared(number: int) -> tuple[Call, list[list[int]], list[Any], list[Answer]]:
    call = call_by_chance(random.Random(number))
    return call, *call.found(), [call.expected(row) for row in range(len(call.prompts))]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_call_by_chance_writes_every_part_as_if_it_were_alone(number: int) -> None:
    call, texts, reports, answers = compared(number)
    for text, report, answer in zip(texts, reports, answers, strict=True):
        assert text == answer.ids, call
        parts = [part for parts in answer.parts for part in parts]
        assert [span.tokens for span in report.spans] == parts[: len(report.spans)]
        assert not any(parts[len(report.spans) :])


def test_the_calls_are_of_every_kind() -> None:
    """Else they would prove little."""
    every = [compared(number) for number in NUMBERS]
    said = [call.said for call, *_ in every]
    for name, value in (("plan", None), ("logits_processor", None), ("do_sample", True), ("commit", "block")):
        assert sum(name in one and value in (None, one[name]) for one in said) > 5, name
    assert sum(one.get("selection") == "random" for one in said) > 1
    assert sum(len(call.prompts) > 1 for call, *_ in every) > 20
    spans = [span for _, _, reports, _ in every for report in reports for span in report.spans]
    assert sum(bool(span.depends) and span.passes > 0 for span in spans) > 20
    assert sum(span.extended for span in spans) > 20 and {span.round for span in spans} >= {1, 2, 3}
    assert sum(span.round > 1 and span.part > 0 and span.passes > 0 for span in spans) > 10
    assert {report.ended for _, _, reports, _ in every for report in reports} == {"eos", "length"}
    accepted = [count for _, _, reports, _ in every for report in reports for count in report.accepted_per_round]
    assert sum(count > 1 for count in accepted) > 10 and sum(count == 0 for count in accepted) > 30
