"""Plans that bring text: given text stays, and text that is written anew is what it was.

Catches: a given part that its dependents cannot see, that misses the end of a written one which it reads, or whose
length moves the parts behind it; a round in which nothing is left to write and that never closes; a lead that is hidden
with the plan; parts that depend on a reopened one and are kept.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hf_hybrid import DecodingError, Plan, PlanError, Span
from tests.equivalence.test_planned import GIVEN, PROMPT, WRITERS, never_ends, new_ids, planned, slow, writer
from tests.equivalence.test_planned_lengths import ending
from tests.models_for_tests import CONTROL
from tests.oracles import SlowPlanned

MODES: dict[str, dict[str, Any]] = {
    "token by token": {"span_decoding": "autoregressive"},
    "verified": {"draft_threshold": 0.0, "plan_window": 4},
}
TEXTS = {0: (9, 9, 6, 4, 2), 2: ()}  # longer than planned, and empty
KEPT = (
    Plan(tuple(replace(s, text=TEXTS.get(i)) for i, s in enumerate(GIVEN[0].spans)), lead=(33, 7)),
    Plan(tuple(replace(s, text=(4, 4)) for s in GIVEN[1].spans), lead=()),
)


def filled(output: Any) -> list[Plan]:
    """The plans of an answer with the texts of all parts."""
    report = output.report[0]
    texts = {(span.round, span.part): tuple(span.tokens) for span in report.spans}
    return [
        replace(plan, spans=tuple(replace(s, text=texts[number, i]) for i, s in enumerate(plan.spans)))
        for number, plan in enumerate(report.plans, 1)
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("plans", [KEPT, KEPT[:1], (KEPT[1], KEPT[0])], ids=["two", "one", "all given first"])
def test_given_texts_stand_and_the_rest_is_written_behind_them(plans: tuple[Plan, ...], mode: str) -> None:
    expected = slow(13, plans=plans)
    output = planned(writer(13), plan=list(plans), **MODES[mode])
    assert new_ids(output) == expected.ids
    assert output.report[0].plans == list(plans)
    for span in output.report[0].spans:
        given = plans[span.round - 1].spans[span.part].text
        assert given is None or (span.tokens, span.ended, span.passes) == (list(given), "given", 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("host", [writer(13), never_ends()], ids=["ends early", "fills its length"])
def test_a_given_text_reads_the_written_part_that_it_depends_on(host: Any, mode: str) -> None:
    """All of it, so that its keys, and all that reads them, wait for the end of that part."""
    middle = Plan((Span((5,), 6), Span((6, 8), 4, (0,), text=(9, 9, 4)), Span((5,), 4, (1,)), Span((9,), 2)))
    last = Plan((Span((21, 4), 5), Span((6,), 3, (0,), text=(4, 4, 7, 1))))
    for plans in ([middle], [last], [middle, last]):
        expected = SlowPlanned(host, CONTROL, plans=plans, max_parts=4).write(PROMPT, 80)
        assert new_ids(planned(host, plan=plans, **MODES[mode])) == expected.ids


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", (13, 27))  # their answers end by themselves
def test_a_reopened_part_is_written_as_before(seed: int, mode: str) -> None:
    settings = {"max_new_tokens": 300, **MODES[mode]}
    whole = planned(ending(seed), **settings)
    plans = filled(whole)
    assert len(plans) > 1
    kept = planned(ending(seed), plan=plans, **settings)
    assert new_ids(kept) == new_ids(whole) and kept.report[0].num_forwards < whole.report[0].num_forwards
    for number, plan in enumerate(plans):
        for part in range(len(plan.spans)):
            again = [*plans[:number], plan.reopen(part), *plans[number + 1 :]]
            output = planned(ending(seed), plan=again, **settings)
            assert new_ids(output) == new_ids(whole), (number, part)
            assert sum(span.passes > 0 for span in output.report[0].spans) == sum(
                span.text is None for span in again[number].spans
            )


def test_some_answers_have_text_before_a_plan() -> None:
    assert {bool(plan.lead) for seed in WRITERS for plan in slow(seed).plans} == {True, False}


def test_reopening_reaches_what_depends_on_the_part() -> None:
    plan = replace(GIVEN[0], spans=tuple(replace(span, text=(1,)) for span in GIVEN[0].spans))
    opened = [[span.text is None for span in plan.reopen(part).spans] for part in range(4)]
    assert opened == [
        [True, False, True, True],
        [False, True, False, True],
        [False, False, True, True],
        [False, False, False, True],
    ]
    with pytest.raises(PlanError, match="no part 5"):
        plan.reopen(4)


def test_the_lead_is_text_and_the_plan_is_not() -> None:
    hidden = writer(13).generate(
        torch.tensor([[3, 7, 9, 2, 11]]),
        strategy="planned_diffusion",
        plan=[Plan((Span((5,), 3, text=(9, 8)),), lead=(33, 7))],
        max_new_tokens=40,
    )
    assert hidden[0, 5 : 5 + 5].tolist() == [33, 7, 5, 9, 8]


@pytest.mark.parametrize(
    ("plan", "error", "match"),
    [
        (Plan((Span((5,), 3, text=(CONTROL.tags.topic,)),)), PlanError, "text of part 1 holds a control token"),
        (Plan((Span((5,), 3),), lead=(CONTROL.noise.end,)), PlanError, "before the parts holds a control token"),
        (Plan((Span((5,), 3, text=(9,) * 9999),)), PlanError, "a given text has 9999 tokens"),
        (Plan((Span((5,), 3, text=(9,) * 90),)), DecodingError, "alone holds 96 tokens, and max_new_tokens leaves 80"),
    ],
)
def test_texts_that_cannot_stand_are_refused(plan: Plan, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        planned(writer(13), plan=plan)


def test_a_dense_round_takes_no_texts() -> None:
    with pytest.raises(DecodingError, match="dense"):
        planned(writer(13), plan=KEPT[0], visibility="dense")
