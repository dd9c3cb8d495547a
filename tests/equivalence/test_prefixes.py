"""What logits processors read: for a part what the row rule lets it see, for the trunk all that was written.

Bugs these tests catch: a part whose processors read entries of the plan behind its own, or parts that it does not
depend on; one whose processors miss its own entry, a part that it reads, or an earlier round; a call too many, too few
or for a drafted token that was rejected; padding that is dropped.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor

from hf_hybrid import Plan, grammar_of
from tests.equivalence.test_planned import GIVEN, PROMPT, new_ids, planned, slow, writer
from tests.models_for_tests import CONTROL, VOCAB, left_padded
from tests.oracles import Pick

Prefix = tuple[int, ...]
GRAMMAR = grammar_of(CONTROL, VOCAB)
HOW: dict[str, dict[str, Any]] = {
    "token by token": {"span_decoding": "autoregressive"},
    "verified": {"draft_threshold": 0.0, "plan_window": 4},
}


def read_by_processors(host: Any, prompts: tuple[Prefix, ...], **settings: Any) -> tuple[list[Counter[Prefix]], Any]:
    """How often a processor was called with which prefix, for each sequence, and the output."""
    seen: list[Counter[Prefix]] = [Counter() for _ in prompts]

    class Recorder(LogitsProcessor):
        """Changes nothing. In a batch it is called with one sequence, expanded: its prompt says which."""

        def __deepcopy__(self, memo: Any) -> Recorder:
            return self

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            ids = tuple(input_ids[0].tolist())
            seen[padded.index(ids[:width])][ids] += 1
            return scores

    batch = left_padded(prompts)
    padded, width = [tuple(row) for row in batch["input_ids"].tolist()], batch["input_ids"].shape[1]
    output = host.generate(
        **batch,
        strategy="planned_diffusion",
        logits_processor=[Recorder()],
        return_dict_in_generate=True,
        return_control_tokens=True,
        **settings,
    )
    return seen, output


def expected_of_parts(prompt: Prefix, report: Any, visibility: str) -> tuple[Counter[Prefix], Counter[Prefix], Prefix]:
    """From what was written: the prefixes of every token of the parts; those that may be asked for once more, because a
    part is full behind them; and the whole text up to the last ``<sync/>``."""
    text = (*prompt, CONTROL.tags.par)
    asked: Counter[Prefix] = Counter()
    full: Counter[Prefix] = Counter()
    for number, plan in enumerate(report.plans, 1):
        text += plan.lead
        parts = [span for span in report.spans if span.round == number]
        reads = plan.depends(visibility).tolist()  # type: ignore[arg-type]
        openings = [(CONTROL.tags.async_, *part.label) for part in parts]
        for k, part in enumerate(parts):
            before = text + GRAMMAR.render(Plan(plan.spans[: k + 1]))
            for j in range(k):
                before += (*openings[j], *parts[j].tokens) if reads[k][j] else ()
            before += openings[k]
            if part.ended != "given":
                asked.update(before + tuple(part.tokens[:i]) for i in range(len(part.tokens)))
                (asked if part.ended == "end" else full)[before + tuple(part.tokens)] += 1
        text += GRAMMAR.render(plan)
        for opening, part in zip(openings, parts, strict=True):
            text += (*opening, *part.tokens)
        text += (CONTROL.tags.sync,)
    return asked, full, text


def check(seen: Counter[Prefix], prompt: Prefix, ids: Prefix, report: Any, visibility: str) -> None:
    """``ids``: prompt and answer, tags included."""
    asked, full, text = expected_of_parts(prompt, report, visibility)
    assert ids[: len(text)] == text, "all parts are in the answer"
    assert asked <= seen
    rest = seen - asked - full
    assert rest and all(count == 1 for count in rest.values())
    # What is left are the trunk's: each reads a beginning of the whole text, which ends outside of every part.
    for prefix in rest:
        assert prefix[: len(ids)] == ids[: len(prefix)]
        tags = [token for token in prefix[len(prompt) :] if token in (CONTROL.tags.async_, CONTROL.tags.sync)]
        assert not tags or tags[-1] == CONTROL.tags.sync


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("visibility", ["sparse", "dag"])
@pytest.mark.parametrize("given", [True, False], ids=["given plans", "written plans"])
def test_a_part_reads_the_plan_up_to_its_entry_and_what_it_depends_on(
    given: bool, visibility: str, how: dict[str, Any]
) -> None:
    prompts, padded = (PROMPT, (8, 1)), (PROMPT, (0, 0, 0, 8, 1))
    kept = replace(GIVEN[1], spans=(replace(GIVEN[1].spans[0], text=(9, 3)), *GIVEN[1].spans[1:]), lead=(33, 7))
    plans = {"plan": [GIVEN[0], kept]} if given else {"max_parts": 4, "max_rounds": 2}
    settings = {"visibility": visibility, "max_new_tokens": 200, **plans, **how}
    written: set[tuple[int, int, bool]] = set()
    for host in (writer(13),) if given else (writer(13), writer(33)):
        seen, output = read_by_processors(host, prompts, **settings)
        for found, prompt, ids, report in zip(seen, padded, output.sequences.tolist(), output.report, strict=True):
            check(found, prompt, tuple(ids), report, visibility)
            written |= {(span.round, span.part, bool(span.depends)) for span in report.spans if span.tokens}
    assert {(1, 1, False), (1, 3, True), (2, 1, True) if given else (2, 2, False)} <= written, written


class Hashed(LogitsProcessor):
    """Whatever is different in what it reads, order and padding included, moves the scores of a few tokens."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        number = 0
        for token in input_ids[0].tolist():
            number = (31 * number + token + 1) % 1009
        return scores + ((number * torch.arange(3, 3 + scores.shape[1])) % 11 == 0).to(scores.dtype) * 3


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_a_processor_that_reads_everything_writes_the_text_of_each_part_alone(how: dict[str, Any]) -> None:
    for changes in ({}, {"visibility": "sparse"}, {"plans": GIVEN}):
        expected = slow(13, pick=Pick(warpers=(Hashed(),)), **changes)
        assert expected.ids != slow(13, **changes).ids and len(expected.plans) > 1
        given = {"plan": list(GIVEN)} if "plans" in changes else {}
        output = planned(
            writer(13), logits_processor=[Hashed()], visibility=changes.get("visibility", "dag"), **given, **how
        )
        assert new_ids(output) == expected.ids
