"""A sequence of a batch equals its own batch of one, in every strategy and mode, whatever its neighbours do.

Bugs these tests catch: a sequence that sees a neighbour's slot; a mask that survives when a sequence leaves and another
takes its slot; noise, selection or schedules keyed by the index in the batch; padding rows of a pass that are counted;
rounds, plans or reports that change sequences when one finishes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from hf_hybrid import Plan, Span
from tests.models_for_tests import CONTROL, PROMPTS, hybrid, left_padded

PLAN = Plan((Span((5,), 3), Span((6, 8), 4), Span((5,), 2, (0,))))
UNVERIFIED = {"strategy": "planned_diffusion", "verify_spans": False, "confidence_threshold": 0.3, "window_length": 4}
MODES: dict[str, dict[str, Any]] = {
    "autoregressive": {"strategy": "autoregressive"},
    "penalty": {"strategy": "autoregressive", "repetition_penalty": 1.5},
    "blocks": {"strategy": "block_diffusion", "window_length": 6, "confidence_threshold": 0.3, "commit": "block"},
    "sliding": {"strategy": "block_diffusion", "window_length": 6, "confidence_threshold": 0.3},
    "random": {
        "strategy": "block_diffusion",
        "window_length": 6,
        "commit": "block",
        "selection": "random",
        "max_denoising_steps": 3,
    },
    "verified": {"strategy": "planned_diffusion", "draft_threshold": 0.0},
    "plan window": {"strategy": "planned_diffusion", "draft_threshold": 0.2, "plan_window": 4},
    "span by span": {"strategy": "planned_diffusion", "span_decoding": "autoregressive", "repetition_penalty": 1.3},
    "unverified": UNVERIFIED,
    "unverified blocks": {**UNVERIFIED, "commit": "block"},
    "given": {"strategy": "planned_diffusion", "plan": PLAN, "draft_threshold": 0.0},
    "dense": {"strategy": "planned_diffusion", "visibility": "dense", "max_denoising_steps": 4},
}


@cache
def model() -> Any:
    return hybrid(seed=26)


def answers(sampled: bool, mode: dict[str, Any], prompts: Any, seeds: list[int]) -> list[tuple[list[int], Any]]:
    """New ids without padding, and what the report says, of every prompt."""
    batch = left_padded(prompts)
    sampling = {"do_sample": True, "temperature": 1.2, "top_k": 20} if sampled else {"do_sample": False}
    output = model().generate(
        **batch,
        max_new_tokens=90,
        suppress_tokens=[0],
        seed=seeds,
        return_dict_in_generate=True,
        return_control_tokens=True,
        **sampling,
        **mode,
    )
    width, found = batch["input_ids"].shape[1], []
    for row, report in zip(output.sequences[:, width:].tolist(), output.report, strict=True):
        while row and row[-1] == 0:  # padding; as a token of a text it is suppressed
            row.pop()
        facts = (report.plans, report.spans, report.num_tokens, report.num_forwards, report.num_rows, report.fallbacks)
        found.append((row, facts))
    return found


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("mode", MODES)
def test_a_row_equals_its_own_batch_of_one(mode: str, sampled: bool) -> None:
    seeds = [5, 7, 7, 1000]
    batch = answers(sampled, MODES[mode], PROMPTS, seeds)
    alone = [answers(sampled, MODES[mode], (p,), [s])[0] for p, s in zip(PROMPTS, seeds, strict=True)]
    assert batch == alone
    assert not sampled or len({facts[3] for _, facts in batch}) > 1, "rows finish at different times"


def test_the_order_of_a_batch_does_not_matter() -> None:
    order = [2, 0, 3, 1]
    batch = answers(True, MODES["verified"], PROMPTS, [1, 2, 3, 4])
    turned = answers(True, MODES["verified"], tuple(PROMPTS[i] for i in order), [1 + i for i in order])
    assert turned == [batch[i] for i in order]
    assert any(CONTROL.tags.sync in ids for ids, _ in batch), "plans are carried out"
