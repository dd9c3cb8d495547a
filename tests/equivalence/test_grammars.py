"""A second grammar, with other tags in another order, through everything that plans.

Bugs these tests catch: a tag, its number or its order that is taken for granted outside of a grammar: a switch or a
resumption of one token, an opening of one, a plan whose end opens a part, a part that ends with the filler, an entry
that ends with its length, positions and hidden tokens counted by hand; a record of another grammar that is read as the
native one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch

import hf_hybrid
from hf_hybrid import Plan, PlanError, Span, VocabularyError, control_tokens, grammar_of
from hf_hybrid.core.grammars import GRAMMARS, Entry, Grammar, PlanState
from hf_hybrid.core.plan import PlanLimits
from hf_hybrid.core.tokens import ControlTokens, Record, Tags
from hf_hybrid.models.vocabulary import noise_tokens
from hf_hybrid.training.examples import Example, Part
from hf_hybrid.training.layout import IGNORE, lay_out
from tests.models_for_tests import TEXT, VOCAB, hybrid
from tests.oracles import SlowPlanned

PROMPT = (3, 7, 9, 2, 11)
NEW, PARTS = 70, 3
WRITERS = (1, 4, 6)
GIVEN = (
    Plan((Span((5,), 3), Span((6, 8), 4), Span((9,), 6, text=(4, 4)))),
    Plan((Span((21, 4), 3), Span((6,), 9)), lead=(2, 3)),
)


@dataclass(frozen=True)
class FramedTags(Tags):
    """``frame``: opens and closes an entry, ends the plan, opens a part (two tokens), ends it; ``switch`` and
    ``resume``: two tokens each. ``sizes``: length and id."""

    frame: tuple[int, ...]
    switch: tuple[int, ...]
    resume: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]

    @property
    def ids(self) -> tuple[int, ...]:
        return (*self.frame, *self.switch, *self.resume, *(token for _, token in self.sizes))


class Framed(Grammar):
    """entry := open size label close; round := entry+ go (part colon label text stop)+ resume resume."""

    entries_of_record = ("frame", "switch", "resume", "sizes")
    marks = ()

    def __init__(self, control: ControlTokens, vocab_size: int | None = None, limits: PlanLimits | None = None):
        super().__init__(control, vocab_size, limits)
        tags = control.tags
        assert isinstance(tags, FramedTags)
        self.open, self.shut, self.plan_end, self.part, self.colon, self.part_end = tags.frame
        self.switch, self.resume = tags.switch, tags.resume
        self.sizes = {token: length for length, token in tags.sizes}
        self.lengths, self.guesses = tuple(self.sizes.values()), frozenset(self.sizes)
        self.max_depends, self.never_in_window = 0, (control.noise.mask, *tags.switch, *tags.resume)

    @classmethod
    def tags_of(cls, record: Record) -> FramedTags:
        record.require(cls.entries_of_record)
        frame, switch, resume = (record.tokens(name) for name in ("frame", "switch", "resume"))
        return FramedTags(frame, switch, resume, record.lengths("sizes"))

    def opens(self, token: int) -> bool:
        return token == self.open

    def advance(self, state: PlanState, token: int) -> PlanState:
        text, control = self.choices(state)
        if token not in control and (not text or token in self.banned or token == self.end):
            raise PlanError(f"token {token} is not allowed in stage {state.stage!r} of a plan")
        if token == self.open:
            return PlanState("label", state.parts)
        if token == self.shut:
            size, *label = state.label
            return PlanState("length", (*state.parts, Span(tuple(label), self.sizes[size])))
        if token == self.plan_end:
            return replace(state, stage="written")
        return state if state.stage == "text" else replace(state, label=(*state.label, token))

    def choices(
        self, state: PlanState, rounds_left: bool = True, room: int | None = None
    ) -> tuple[bool, tuple[int, ...]]:
        if state.stage == "text":
            return True, (self.end, self.open) if rounds_left else (self.end,)
        if state.stage == "label" and not state.label:
            return False, tuple(self.sizes)
        if state.stage == "label":
            written = len(state.label) - 1
            return written < self.limits.max_label_length, (self.shut,) if written else ()
        more = (self.open,) if len(state.parts) < self.limits.max_parts else ()
        return False, (*more, self.plan_end) if state.stage == "length" else ()

    def complete(self, state: PlanState) -> int:
        return len(state.parts)

    def entry(self, span: Span) -> tuple[int, ...]:
        size = next(token for token, length in self.sizes.items() if length == self.rounded(span.length))
        return (self.open, size, *span.label, self.shut)

    def opening(self, span: Span) -> tuple[int, ...]:
        return (self.part, self.colon, *span.label)

    def closed(self, fills: Sequence[int | None]) -> list[int | None]:
        closed: list[int | None] = []
        for token in fills:
            ended = bool(closed) and closed[-1] == self.part_end and token != self.part
            closed.append(self.part_end if ended else token)
        return closed

    def read(self, tokens: Sequence[int]) -> tuple[list[int], list[Entry]]:
        return [token for token in tokens if token not in self.banned], []


RECORD: dict[str, Any] = {
    "grammar": "framed",
    "mask_token_id": 60,
    "frame": [55, 54, 53, 52, 51, 50],
    "switch": [49, 48],
    "resume": [47, 46],
    "sizes": [[3, 45], [6, 44], [9, 43]],
}
FAVOURS = {55: 7.5, 54: 7.0, 53: 4.0, 50: 3.5, 40: 4.5, 45: 5.0, 44: 5.0, 43: 5.0}


@pytest.fixture(autouse=True)
def framed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The line in the table that a second grammar needs."""
    monkeypatch.setitem(GRAMMARS, "framed", Framed)
    yield


@cache
def writer(seed: int) -> Any:
    model = hybrid(seed=seed, favours=FAVOURS)
    model.config.hf_hybrid = dict(RECORD)
    return model


def control_of(seed: int) -> ControlTokens:
    control = control_tokens(writer(seed))
    assert control is not None and control.grammar == "framed"
    return control


@cache
def slow(seed: int, plans: tuple[Plan, ...] = ()) -> Any:
    return SlowPlanned(writer(seed), control_of(seed), plans=plans, max_parts=PARTS).write(PROMPT, NEW)


def planned(seed: int, **settings: Any) -> Any:
    return writer(seed).generate(
        torch.tensor([PROMPT]),
        strategy="planned_diffusion",
        return_dict_in_generate=True,
        max_parts=PARTS,
        **{"max_new_tokens": NEW, **settings},
    )


def new_ids(output: Any) -> list[int]:
    return output.sequences[0, len(PROMPT) :].tolist()


def test_the_cases_have_what_they_claim() -> None:
    answers = [slow(seed) for seed in WRITERS]
    assert sum(len(answer.plans) for answer in answers) >= 5 and max(len(answer.plans) for answer in answers) >= 2
    assert max(len(plan.spans) for answer in answers for plan in answer.plans) >= 2
    assert any({47, 50} & set(answer.ids) == {47} for answer in answers), "what ends a part is not kept"


@pytest.mark.parametrize("plans", [(), GIVEN], ids=["written", "given"])
@pytest.mark.parametrize("how", [{"span_decoding": "autoregressive"}, {}, {"plan_window": 4}], ids=repr)
@pytest.mark.parametrize("seed", WRITERS)
def test_every_token_is_that_of_plain_decoding(seed: int, how: dict[str, Any], plans: tuple[Plan, ...]) -> None:
    output = planned(seed, return_control_tokens=True, **how, **({"plan": plans} if plans else {}))
    assert new_ids(output) == slow(seed, plans).ids
    report = output.report[0]
    assert [plan.spans for plan in report.plans] == [plan.spans for plan in slow(seed, plans).plans]
    assert [span.tokens for span in report.spans] == [part for parts in slow(seed, plans).parts for part in parts]


@pytest.mark.parametrize("seed", WRITERS)
def test_a_written_plan_obeys_its_grammar_and_is_no_text(seed: int) -> None:
    full, output = planned(seed, return_control_tokens=True), planned(seed)
    ids, report = new_ids(full), full.report[0]
    grammar = grammar_of(control_of(seed), VOCAB, PlanLimits(max_parts=PARTS))
    assert tuple(ids[:2]) == grammar.switch and report.plans
    first = report.plans[0].spans[0]
    stop = next(i for i in range(len(ids)) if tuple(ids[i : i + 2 + len(first.label)]) == grammar.opening(first))
    state, count = grammar.parse(ids[2:stop])
    assert state.stage == "length" and count == stop - 2, "what ends a plan is not kept"
    assert grammar.advance(state, grammar.plan_end).plan.spans == report.plans[0].spans
    assert set(new_ids(output)) <= {*TEXT, grammar.end}
    written = output.report[0].spans[0]
    begin = len(output.report[0].plans[0].lead)
    shown = [*written.label, *written.tokens]
    assert new_ids(output)[begin : begin + len(shown)] == shown, "a label is the beginning of its part"


def test_a_dense_round_is_carried_out() -> None:
    settings = {"visibility": "dense", "verify_spans": False}
    output = planned(1, plan=GIVEN[1], return_control_tokens=True, **settings)
    grammar = grammar_of(control_of(1))
    spans = output.report[0].spans
    assert [(span.label, span.planned) for span in spans] == [(span.label, span.length) for span in GIVEN[1].spans]
    head = [*grammar.switch, *GIVEN[1].lead, *grammar.render(GIVEN[1])]
    bodies = [[*grammar.opening(part), *span.tokens] for part, span in zip(GIVEN[1].spans, spans, strict=True)]
    body = [token for tokens in bodies for token in tokens]
    ids = new_ids(output)
    assert ids[: len(head) + len(body)] == [*head, *body]
    assert all(span.tokens and set(span.tokens) <= set(TEXT) for span in spans)


def test_a_given_plan_needs_the_room_of_its_own_tags() -> None:
    """Switch, entries, openings, and the given texts; without them it says by how many tokens."""
    plan = Plan((Span((5,), 3, text=(4,)),))
    needed = len((49, 48, 55, 45, 5, 54, 52, 51, 5, 4))
    with pytest.raises(hf_hybrid.DecodingError, match=f"holds {needed} tokens"):
        planned(1, plan=plan, max_new_tokens=needed - 1, return_control_tokens=True)
    assert len(new_ids(planned(1, plan=plan, max_new_tokens=needed, return_control_tokens=True))) == needed
    with pytest.raises(hf_hybrid.DecodingError, match="holds 2 tokens"):
        planned(1, plan=plan, max_new_tokens=1)


def test_training_lays_out_what_decoding_writes() -> None:
    """The tokens of a planned example, at the positions at which decoding carries its plan out."""
    text, parts = (4, 5), (Part((6,), (7, 8, 9)), Part((10, 11), (12,)))
    example = Example(PROMPT, (text, parts, (13,)))
    grammar = grammar_of(control_of(1), VOCAB)
    layout = lay_out(example, "sparse", grammar, random.Random(0), longer_plan=0.0)
    spans = tuple(Span(part.label, grammar.rounded(len(part.text)), text=part.text) for part in parts)
    output = planned(1, plan=Plan(spans, lead=text), return_control_tokens=True)
    starts = grammar.starts(Plan(spans), len(PROMPT) + 2 + len(text))
    rows = list(zip(layout.tokens, layout.position, layout.span, layout.target, strict=True))
    for number, (span, start) in enumerate(zip(spans, starts, strict=True)):
        text = [*(span.text or ())]
        body = [*grammar.opening(span), *text]
        laid = [(token, position) for token, position, of, _ in rows if of == 1 + 2 * number]
        assert laid == [(token, start + i) for i, token in enumerate(body)]
        learned = [target for _, _, of, target in rows if of == 1 + 2 * number]
        assert learned == [*[IGNORE] * (len(body) - len(text) - 1), *text, grammar.part_end]
    assert [target for token, *_, target in rows if token in grammar.resume] == [IGNORE, 13]
    ids = [*PROMPT, *new_ids(output)]
    known = len(layout.tokens) - 1  # up to the text behind the round
    assert ids[:known] == layout.tokens[:known]
    assert layout.target.count(grammar.plan_end) == 1
    dense = lay_out(example, "dense", grammar, random.Random(0), longer_plan=0.0)
    rows = list(zip(dense.tokens, dense.span, dense.target, strict=True))
    end = grammar.part_end
    assert [target for _, of, target in rows if of == 1] == [IGNORE] * 2 + [7, 8, 9, end] + [IGNORE] * 3 + [12, end]


def test_a_record_says_which_grammar_reads_it() -> None:
    host = hybrid(favours=FAVOURS)
    host.config.hf_hybrid = {**RECORD, "grammar": "runes"}
    for read in (control_tokens, noise_tokens):
        with pytest.raises(VocabularyError, match="unknown grammar 'runes'; choose from native, framed"):
            read(host)
    host.config.hf_hybrid = {name: value for name, value in RECORD.items() if name != "sizes"}
    with pytest.raises(VocabularyError, match="no sizes"):
        control_tokens(host)
    noise = noise_tokens(host)
    assert noise is not None and noise.filler is None
    assert set(noise.banned) == {60, 55, 54, 53, 52, 51, 50, 49, 48, 47, 46}, "noise bans what tags there are"
    host.config.hf_hybrid = {"mask_token_id": 60}
    masked = control_tokens(host)
    assert masked is not None and masked.tags is None and masked.noise.mask == 60
    with pytest.raises(hf_hybrid.DecodingError, match="needs control tokens, and the model has none"):
        host.generate(torch.tensor([PROMPT]), strategy="planned_diffusion", max_new_tokens=3)
