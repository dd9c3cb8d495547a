"""Plans at the edge of their room: the last position of a table, the last token of ``max_new_tokens``.

The answer of a model with a short table of positions is told from that of one with a long table, whose rows the oracle
knows with their positions: it is the same text, cut where a row would have no position.

Bugs these tests catch: a given plan that is refused though it fits, or begun though it does not; tags that count where
they are not returned; a plan that is begun without room for a part; a part or ``<sync/>`` one position too early or too
late; a part that is dropped, or written, where the plan that names it is cut.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from hf_hybrid import DecodingError, Plan, Span, grammar_of
from tests.equivalence.test_planned import writer
from tests.models_for_tests import CONTROL, FAVOURS, VOCAB, hybrid
from tests.oracles import Answer, SlowPlanned

PROMPT = (3, 7, 9, 2, 11)
LONG = 256
MODES: dict[str, dict[str, Any]] = {
    "in windows": {"draft_threshold": 0.0, "plan_window": 4},
    "token by token": {"span_decoding": "autoregressive"},
}
TEXTS = (
    Plan((Span((5,), 3, (), (9, 9, 6, 4, 2)), Span((6, 8), 4, (), ())), lead=(33, 7)),
    Plan((Span((21, 4), 2, (), (4,)), Span((6,), 6, (0,), (4, 4))), lead=(8,)),
)
"""Nothing to write: texts that are longer and shorter than planned, and an empty one."""
OUTGROWN = (Plan((Span((5,), 2, (), (9,) * 20), Span((6, 8), 2, (), (4, 3)))),)
"""Its first part ends behind the last."""

GRAMMAR = grammar_of(CONTROL, VOCAB)


@cache
def table(kind: str, positions: int = LONG) -> Any:
    """A model with so many learned positions, always the same weights: parts fill every length, or end by chance."""
    favours = {**FAVOURS, CONTROL.noise.end: -9.0, **({CONTROL.noise.filler: -99.0} if kind == "full" else {})}
    made = hybrid("gpt2", seed=26, favours=favours, n_positions=LONG)
    if positions == LONG:
        return made
    short = hybrid("gpt2", seed=26, favours=favours, n_positions=positions)
    weights = made.state_dict()
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:positions]
    short.load_state_dict(weights)
    return short


def write(host: Any, new: int, **settings: Any) -> tuple[list[int], Any]:
    """New ids and the report."""
    options = {"strategy": "planned_diffusion", "max_new_tokens": new, "return_dict_in_generate": True, **settings}
    output = host.generate(torch.tensor([PROMPT]), **options)
    return output.sequences[0, len(PROMPT) :].tolist(), output.report[0]


# Given plans whose texts are given too.


@pytest.mark.parametrize("control", [False, True], ids=["text alone", "tags too"])
@pytest.mark.parametrize("plans", [TEXTS[:1], TEXTS, OUTGROWN], ids=["one", "two", "outgrown"])
def test_a_given_plan_fits_into_exactly_its_own_tokens(plans: tuple[Plan, ...], control: bool) -> None:
    ids: list[int] = []
    for plan in plans:
        tags = [CONTROL.tags.sync if ids else CONTROL.tags.par] if control else []
        ids += [*tags, *plan.lead, *(GRAMMAR.render(plan) if control else ())]
        for span in plan.spans:
            ids += [*[CONTROL.tags.async_] * control, *span.label, *(span.text or ())]
    settings = {"plan": list(plans), "return_control_tokens": control}
    text, report = write(writer(13), len(ids), **settings)
    assert (
        text == ids
        and report.ended == "length"
        and [span.ended for span in report.spans] == ["given"] * len(report.spans)
    )
    with pytest.raises(DecodingError, match=f"alone holds {len(ids)} tokens, and max_new_tokens leaves {len(ids) - 1}"):
        write(writer(13), len(ids) - 1, **settings)


@pytest.mark.parametrize("plans", [TEXTS[:1], TEXTS, OUTGROWN], ids=["one", "two", "outgrown"])
def test_a_given_plan_fits_into_exactly_its_own_positions(plans: tuple[Plan, ...]) -> None:
    rows = SlowPlanned(table("full"), CONTROL, plans=plans).write(PROMPT, 80).rows
    last = max(i for i, row in enumerate(rows) if row.token == CONTROL.tags.async_)
    closed = next(i for i, row in enumerate(rows) if i > last and row.token == CONTROL.tags.sync)
    needed = max(row.position for row in rows[:closed]) + 1
    whole, _ = write(table("full"), 80, plan=list(plans))
    text, report = write(table("full", needed), 80, plan=list(plans))
    own = [token for p in plans for token in (*p.lead, *(t for s in p.spans for t in (*s.label, *(s.text or ()))))]
    assert text == own == whole[: len(own)] and report.ended == "length"
    with pytest.raises(DecodingError, match=f"needs {needed} positions and the model has {needed - 1}; shorten"):
        write(table("full", needed - 1), 80, plan=list(plans))


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_dense_plan_needs_all_its_planned_positions(rounds: int) -> None:
    plans = [replace(plan, spans=tuple(replace(span, text=None) for span in plan.spans)) for plan in TEXTS[:rounds]]
    needed = len(PROMPT)
    for plan in plans:  # behind <par> or <sync/>
        needed += 1 + len(plan.lead) + len(GRAMMAR.render(plan)) + GRAMMAR.total(plan.spans)
    settings = {"plan": plans, "visibility": "dense", "max_denoising_steps": 3}
    short, report = write(table("full", needed), 80, **settings)
    assert len(report.spans) == 2 * rounds and report.ended == "length"
    assert short == write(table("full"), 80, **settings)[0][: len(short)]
    with pytest.raises(DecodingError, match=f"needs {needed} positions and the model has {needed - 1}"):
        write(table("full", needed - 1), 80, **settings)


# Written plans.


@pytest.mark.parametrize("label", [1, 3, 16])
def test_a_plan_is_begun_where_a_part_with_the_longest_label_fits(label: int) -> None:
    shortest = CONTROL.tags.lengths[0][0]
    needed = (
        len((CONTROL.tags.par, CONTROL.tags.topic, CONTROL.tags.lengths[0][1], CONTROL.tags.async_))
        + 2 * label
        + shortest
    )
    for positions in (needed - 1, needed):
        _, report = write(table("full", len(PROMPT) + positions), 80, max_label_length=label)
        notes = [note for note in report.fallbacks if note.startswith("no plan")]
        expected = f"no plan: the model has {positions} positions left, and a part may need {needed}"
        assert notes == ([expected] if positions < needed else [])
        assert label > 1 or bool(report.plans) == (positions == needed)
    given = Plan((Span((5,), 2),))  # smaller than what may be needed
    _, report = write(table("full", len(PROMPT) + 12), 80, plan=given, max_label_length=16)
    assert report.plans == [given]


def cut(answer: Answer, positions: int, extension: float, given: int) -> list[int]:
    """The text of ``answer``, without tags, that a table of so many positions has room for; ``given``: rounds of it
    whose plans were."""
    text: list[int] = []
    stage, rounds, part, written = "text", -1, -1, 0
    for row in answer.rows[1:]:
        if row.token == CONTROL.tags.sync:
            stage = "text"
        elif stage == "text" and row.token == CONTROL.tags.topic:
            stage, rounds, part = "plan", rounds + 1, -1
        elif row.token == CONTROL.tags.async_:
            stage, part, written = "part", part + 1, 0
        if stage == "plan":  # a given one is carried out if all of it fits, a written one as far as it does
            if rounds < given and row.position >= positions:
                return text
            continue
        if row.position >= positions:
            return text
        text += [row.token] if row.token not in CONTROL.noise.banned else []
        if stage == "part" and (span := answer.plans[rounds].spans[part]).text is None:
            written += 1  # nobody can tell whether it would have ended behind the last position
            if row.position == positions - 1 and written < 1 + len(span.label) + math.ceil(span.length * extension):
                return text
    raise AssertionError("the answer is to be longer than the table")


TO_WRITE = (
    Plan((Span((5,), 3), Span((6, 8), 4, (0,), (9,)), Span((9,), 5, (0,))), lead=(33, 7)),
    Plan((Span((21, 4), 3), Span((6,), 2, (0,)), Span((7,), 2)), lead=(8,)),
)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("plans", [(), TO_WRITE], ids=["written", "given"])
@pytest.mark.parametrize("kind", ["full", "chance"])
def test_a_table_holds_all_that_it_has_positions_for(kind: str, plans: tuple[Plan, ...], mode: str) -> None:
    answer = long_answer(kind, plans)
    last = max(row.position for row in answer.rows if row.token == CONTROL.tags.sync)
    settings = {**MODES[mode], "max_parts": 4, "max_label_length": 2, "max_span_extension": 3.0}
    lengths: list[int] = []
    for positions in range(len(PROMPT) + 10, last):
        try:
            text, report = write(table(kind, positions), 400, **settings, plan=list(plans) or None)
        except DecodingError as error:  # what is given does not fit
            assert plans and "the given plan" in str(error) and not lengths
            continue
        assert text == cut(answer, positions, 3.0, len(plans)), positions
        assert report.ended == "length"
        lengths.append(len(text))
    assert len(set(lengths)) > (5 if plans else 20)


@cache
def long_answer(kind: str, plans: tuple[Plan, ...]) -> Answer:
    how = {"max_parts": 4, "max_label_length": 2, "extension": 3.0}
    answer = SlowPlanned(table(kind), CONTROL, plans=plans, **how).write(PROMPT, 110)
    assert len(answer.plans) > 1
    return answer
