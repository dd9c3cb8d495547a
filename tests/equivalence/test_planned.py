"""Planned diffusion against plain decoding of every part alone, one un-cached forward per token.

Bugs these tests catch: a draft that is accepted although plain decoding writes something else; a rejected draft whose
keys stay in the cache; a part that sees an independent part, or misses the end of one that it reads; positions that
shift when a part outgrows its plan; ``<sync/>`` that does not see everything; noise that depends on the window or on
the number of passes; a part of one span that differs from a block; a schedule that is not kept.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_hybrid import Plan, Span
from tests.models_for_tests import CONTROL, TEXT, hybrid
from tests.oracles import Answer, Denoising, Pick, SlowPlanned, clean, write_noisy

PROMPT = (3, 7, 9, 2, 11)
NEW, PARTS = 80, 4
WRITERS = (2, 26, 33)
"""Seeds of models that write what ``test_the_cases_have_what_they_claim`` says."""
GIVEN = (
    Plan((Span((5,), 3), Span((6, 8), 4), Span((5,), 2, (0,)), Span((9,), 6, (1, 2)))),
    Plan((Span((21, 4), 3), Span((6,), 2, (0,)))),
)


@cache
def writer(seed: int) -> Any:
    return hybrid(seed=seed)


@cache
def slow(seed: int, **changes: Any) -> Answer:
    """What plain decoding writes."""
    return SlowPlanned(writer(seed), CONTROL, max_parts=PARTS, **changes).write(PROMPT, NEW)


def planned(model: Any, **settings: Any) -> Any:
    return model.generate(
        torch.tensor([PROMPT]),
        strategy="planned_diffusion",
        return_dict_in_generate=True,
        return_control_tokens=True,
        **{"max_new_tokens": NEW, "max_parts": PARTS, **settings},
    )


def new_ids(output: Any) -> list[int]:
    return output.sequences[0, len(PROMPT) :].tolist()


def test_the_cases_have_what_they_claim() -> None:
    answers = [slow(seed) for seed in WRITERS]
    for answer in answers:
        spans = [span for plan in answer.plans for span in plan.spans]
        assert len(answer.plans) >= 2, "two rounds"
        assert any(span.depends for span in spans) and any(not span.depends for span in spans)
        written = [part for parts in answer.parts for part in parts]
        overrun = [len(part) > span.length for part, span in zip(written, spans, strict=True)]
        assert any(overrun) and not all(overrun)
        assert len({tuple(part) for part in written}) >= 3, "parts differ"
    ids = [answer.ids for answer in answers]
    behind_sync = {row[i + 1] for row in ids for i in range(len(row) - 1) if row[i] == CONTROL.tags.sync}
    assert CONTROL.tags.topic in behind_sync and behind_sync & set(TEXT), "rounds with and without text between"


def test_drafts_are_really_accepted_and_rejected() -> None:
    plain = [planned(writer(seed), span_decoding="autoregressive").report[0] for seed in WRITERS]
    drafting = [planned(writer(seed), draft_threshold=0.0).report[0] for seed in WRITERS]
    assert sum(r.num_forwards for r in drafting) < sum(r.num_forwards for r in plain)
    accepted = [accepted for report in drafting for accepted in report.accepted_per_round]
    assert max(accepted) > 2, "more than the optimistic <topic>"
    assert min(accepted) == 0


@pytest.mark.parametrize("seed", WRITERS)
@pytest.mark.parametrize(
    "settings",
    [
        {"span_decoding": "autoregressive"},
        {},
        *({"draft_threshold": t, "window_length": w} for t, w in ((0.0, 16), (0.0, 1), (0.3, 8), (0.9, 2))),
        *({"plan_window": p, "draft_threshold": t} for p, t in ((4, 0.0), (8, 0.5))),
        {"span_decoding": "autoregressive", "plan_window": 8, "draft_threshold": 0.0},
        {"span_fallback_confidence": 1.0, "draft_threshold": 0.0},
    ],
    ids=str,
)
def test_verified_spans_equal_each_part_written_alone(seed: int, settings: dict[str, Any]) -> None:
    output = planned(writer(seed), **settings)
    assert new_ids(output) == slow(seed).ids
    report = output.report[0]
    assert report.plans == slow(seed).plans
    assert [span.tokens for span in report.spans] == [part for parts in slow(seed).parts for part in parts]


@pytest.mark.parametrize("seed", WRITERS[:2])
@pytest.mark.parametrize(
    ("host", "warpers"),
    [
        ({"temperature": 0.7}, (TemperatureLogitsWarper(0.7),)),
        ({"top_k": 5}, (TopKLogitsWarper(5),)),
        ({"top_p": 0.8, "temperature": 1.5}, (TemperatureLogitsWarper(1.5), TopPLogitsWarper(0.8))),
    ],
    ids=["temperature", "top-k", "top-p"],
)
def test_sampled_spans_equal_each_part_sampled_alone(seed: int, host: dict[str, Any], warpers: Any) -> None:
    host = {"do_sample": True, "top_k": 0, "top_p": 1.0, **host, "seed": 17 + seed}
    expected = slow(seed, pick=Pick(17 + seed, warpers))
    assert expected.plans and expected.ids != slow(seed).ids
    for settings in ({"span_decoding": "autoregressive"}, {"draft_threshold": 0.0, "plan_window": 4}, {}):
        assert new_ids(planned(writer(seed), **host, **settings)) == expected.ids


def test_a_tight_budget_cuts_every_mode_at_the_same_token() -> None:
    cut = 0
    for new in (13, 22, 31, 40):
        expected = SlowPlanned(writer(13), CONTROL, max_parts=PARTS).write(PROMPT, new)
        for settings in ({"span_decoding": "autoregressive"}, {"draft_threshold": 0.0, "plan_window": 4}):
            output = planned(writer(13), max_new_tokens=new, **settings)
            assert new_ids(output) == expected.ids
            cut += any("the answer was cut" in line for line in output.report[0].fallbacks)
    assert cut > 0


@pytest.mark.parametrize("visibility", ["sparse", "dag"])
def test_a_given_plan_is_carried_out_round_by_round(visibility: str) -> None:
    expected = slow(13, plans=GIVEN, visibility=visibility)
    assert expected.plans == list(GIVEN)
    for settings in ({"span_decoding": "autoregressive"}, {"draft_threshold": 0.0}):
        output = planned(writer(13), plan=list(GIVEN), visibility=visibility, **settings)
        assert new_ids(output) == expected.ids and output.report[0].plans == list(GIVEN)


def test_sparse_and_dag_differ_in_parts_with_dependencies_alone() -> None:
    reports = [planned(writer(13), plan=list(GIVEN), visibility=v).report[0] for v in ("sparse", "dag")]
    sparse, dag = ([span.tokens for span in report.spans[:4]] for report in reports)
    assert sparse[:2] == dag[:2] and sparse[2:] != dag[2:]


def test_an_overrun_reaches_what_depends_on_it_and_nothing_else() -> None:
    plan = Plan((Span((6, 8), 4), Span((5,), 4), Span((9,), 4, (1,))))

    def parts(extension: float, **settings: Any) -> list[list[int]]:
        output = planned(never_ends(), plan=plan, max_span_extension=extension, **settings)
        return [span.tokens for span in output.report[0].spans]

    for settings in ({"span_decoding": "autoregressive"}, {"draft_threshold": 0.0}):
        short, long = parts(1.0, **settings), parts(2.0, **settings)
        assert [len(part) for part in short] == [4, 4, 4] and [len(part) for part in long] == [8, 8, 8]
        assert [part[:4] for part in long[:2]] == short[:2]
        # The overrun ends at positions behind the start of the part that reads it: a test of positions would hide it.
        assert long[2][:4] != short[2]
        assert long == SlowPlanned(never_ends(), CONTROL, plans=(plan,), extension=2.0).write(PROMPT, NEW).parts[0]


@cache
def never_ends() -> Any:
    """A model whose parts fill every length."""
    return hybrid(seed=1, favours={CONTROL.noise.filler: -99.0, CONTROL.noise.end: 3.0})


UNVERIFIED = {"verify_spans": False, "span_fallback_confidence": None}


@pytest.mark.parametrize("commit", ["prefix", "block"])
@pytest.mark.parametrize("threshold", [0.2, 0.95])
def test_unverified_parts_equal_uncached_windows(commit: str, threshold: float) -> None:
    how = Denoising(4, commit, threshold)
    expected = SlowPlanned(writer(13), CONTROL, plans=GIVEN, how=how).write(PROMPT, NEW)
    settings = {"commit": commit, "confidence_threshold": threshold, "window_length": 4, **UNVERIFIED}
    assert new_ids(planned(writer(13), plan=list(GIVEN), **settings)) == expected.ids


@pytest.mark.parametrize("steps", [None, 2])
def test_a_plan_of_one_part_is_one_block_behind_the_same_prefix(steps: int | None) -> None:
    plan = Plan((Span((5, 6), 6),))
    settings = {"commit": "block", "window_length": 16, "max_span_extension": 1.0, **UNVERIFIED}
    output = planned(writer(31), plan=plan, confidence_threshold=0.4, max_denoising_steps=steps, **settings)
    trunk = clean([*PROMPT, CONTROL.tags.par, CONTROL.tags.topic, 5, 6, dict(CONTROL.tags.lengths)[6]])
    opening = clean([CONTROL.tags.async_, 5, 6], len(trunk), span=1)
    allowed = torch.ones(writer(31).config.vocab_size, dtype=torch.bool)
    allowed[[i for i in (*CONTROL.noise.banned, CONTROL.noise.end) if i != CONTROL.noise.filler]] = False
    how = Denoising(16, "block", 0.4, max_denoising_steps=steps)
    ends = {CONTROL.noise.filler: False}
    rows = write_noisy(writer(31), trunk, opening, {1: {0}}, allowed, ends, 6, Pick(), how, CONTROL.noise.mask)
    assert output.report[0].spans[0].tokens == [row.token for row in rows[3:]]


def test_processors_that_need_the_text_read_the_true_prefix_of_every_part() -> None:
    pick = Pick(warpers=(RepetitionPenaltyLogitsProcessor(1.8),))
    expected = slow(26, pick=pick)
    assert expected.ids != slow(26).ids and expected.plans
    for settings in ({"span_decoding": "autoregressive"}, {"draft_threshold": 0.0}):
        assert new_ids(planned(writer(26), repetition_penalty=1.8, **settings)) == expected.ids
