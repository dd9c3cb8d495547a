"""``generate_many``: an answer equals its own call, whatever the batch size and whatever used its slot before.

Catches: keys, spans or masks of a finished answer that the next one in its slot can see; counters that go on; seeds
keyed by the index in the batch; answers that are lost, doubled or given the wrong index when several finish in one
pass, at once with their prompt, or when the queue is shorter than the batch; one bad prompt that takes the others with
it, or their seeds; lengths that are counted from the longest prompt of the first batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hf_hybrid import (
    Answer,
    DecodingError,
    Plan,
    SettingsError,
    Span,
    UnsupportedCallError,
    disable,
    generate_many,
)
from tests.equivalence.test_batches import MODES, answers, model
from tests.models_for_tests import PROMPTS, hybrid

LINE = [(*PROMPTS[i % len(PROMPTS)], 13 + i) for i in range(9)]
SEED = 11  # answers of very different numbers of passes
QUEUED = {name: mode for name, mode in MODES.items() if "repetition_penalty" not in mode}
SETTINGS = {"max_new_tokens": 90, "suppress_tokens": [0], "return_control_tokens": True}


def many(prompts: list[list[int]], batch_size: int, **settings: Any) -> list[Answer]:
    return list(generate_many(model(), prompts, batch_size=batch_size, **SETTINGS, **settings))


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("mode", QUEUED)
def test_an_answer_equals_its_own_call(mode: str, sampled: bool) -> None:
    sampling = {"do_sample": True, "temperature": 1.2, "top_k": 20} if sampled else {"do_sample": False}
    alone = [answers(sampled, MODES[mode], (list(p),), [SEED + i])[0] for i, p in enumerate(LINE)]
    for batch_size in (1, 2, 4):
        found = many([list(p) for p in LINE], batch_size, seed=SEED, **sampling, **MODES[mode])
        assert sorted(answer.index for answer in found) == list(range(len(LINE)))
        for answer in found:
            report, (ids, facts) = answer.report, alone[answer.index]
            assert answer.tokens == ids
            counts = (report.plans, report.spans, report.num_tokens, report.num_forwards, report.num_rows)
            assert counts == facts[:5]


def test_the_cases_overlap() -> None:
    passes = [answers(True, MODES["verified"], (list(p),), [SEED + i])[0][1][3] for i, p in enumerate(LINE)]
    assert len(set(passes)) > 4
    order = [a.index for a in many(LINE, 3, seed=SEED, do_sample=True, temperature=1.2, top_k=20, **MODES["verified"])]
    assert order != sorted(order), "some overtake others"


def test_answers_that_end_with_their_prompt_free_their_place_at_once() -> None:
    found = list(
        generate_many(model(), LINE, batch_size=2, strategy="autoregressive", max_new_tokens=1, do_sample=False)
    )
    assert sorted(answer.index for answer in found) == list(range(len(LINE)))
    assert all(len(answer.tokens) == answer.report.num_forwards == 1 for answer in found)


def test_prompts_are_read_as_they_are_needed_and_nothing_is_kept() -> None:
    read = []

    def queue() -> Any:
        for number, prompt in enumerate(LINE):
            read.append(number)
            yield torch.tensor(prompt)

    stream = generate_many(model(), queue(), batch_size=2, strategy="block_diffusion", **SETTINGS, do_sample=False)
    next(stream)
    assert 2 <= len(read) <= 4
    assert len(list(stream)) == len(LINE) - 1 and read == list(range(len(LINE)))


def test_gradients_are_on_while_the_caller_works_with_an_answer() -> None:
    for _ in generate_many(
        model(), LINE[:3], batch_size=2, strategy="autoregressive", max_new_tokens=3, do_sample=False
    ):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_nothing_to_do_is_no_answer() -> None:
    assert many([], 4, strategy="autoregressive") == []


def test_a_model_that_is_not_enabled_answers_too() -> None:
    plain = disable(hybrid(seed=26))
    found = list(generate_many(plain, LINE[:2], strategy="autoregressive", max_new_tokens=4, do_sample=False))
    assert [len(answer.tokens) for answer in found] == [4, 4]


@pytest.mark.parametrize(
    ("prompts", "arguments", "match"),
    [
        ([[1]], {}, "needs a strategy"),
        ([[1]], {"batch_size": 0}, "batch_size=0"),
        ([[1]], {"strategy": "autoregressive", "num_return_sequences": 2, "do_sample": True}, "one answer per prompt"),
        ([[1]], {"strategy": "autoregressive", "streamer": object()}, "no streamer"),
        ([[1]], {"strategy": "autoregressive", "custom_generate": print}, "no custom_generate"),
        ([], {}, "needs a strategy"),
        ([[]], {}, "needs a strategy"),
    ],
)
def test_misuse_is_a_clear_error(prompts: Any, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedCallError, match=match):
        generate_many(model(), prompts, **arguments)


def test_processors_of_one_batch_are_refused() -> None:
    with pytest.raises(DecodingError, match="batch by batch"):
        many(LINE[:2], 2, strategy="autoregressive", repetition_penalty=1.3)


@pytest.mark.parametrize("setting", [{"window_length": 0}, {"temperature": "warm"}, {"max_length": "long"}])
def test_a_wrong_setting_is_an_error_at_once_whatever_the_prompts_are(setting: dict[str, Any]) -> None:
    for prompts in ([[1]], [[]], []):
        with pytest.raises(SettingsError, match=next(iter(setting))):
            generate_many(model(), prompts, strategy="planned_diffusion", **setting)


BAD = {
    "empty": ([], "must hold token ids"),
    "two dimensions": (torch.ones(1, 3, dtype=torch.long), "must hold token ids"),
    "a text": ("hello", "must hold token ids"),
    "a number": (5, "must hold token ids"),
    "numbers": ([1.5, 2.0], "must hold token ids"),
    "a mask": (torch.ones(3, dtype=torch.bool), "must hold token ids"),
    "beyond the vocabulary": ([3, 10**6], "outside the vocabulary"),
    "negative": ([3, -1], "outside the vocabulary"),
}


@pytest.mark.parametrize("strategy", ["autoregressive", "speculative", "planned_diffusion"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_prompt_that_fails_leaves_the_others_as_they_are(batch_size: int, strategy: str) -> None:
    """Seeds too: an answer keeps the seed of its own number."""
    options = {"strategy": strategy, "seed": SEED, "do_sample": True, "max_new_tokens": 12}
    bad = [prompt for prompt, _ in BAD.values()]
    prompts: list[Any] = [bad[0], LINE[0], *bad[1:5], LINE[1], bad[5], LINE[2], LINE[3], *bad[6:]]
    good = [number for number, prompt in enumerate(prompts) if any(prompt is one for one in LINE)]
    alone = {
        n: next(generate_many(model(), [LINE[i]], **{**options, "seed": SEED + n})).tokens for i, n in enumerate(good)
    }
    found = {answer.index: answer for answer in generate_many(model(), prompts, batch_size=batch_size, **options)}
    assert sorted(found) == list(range(len(prompts)))
    assert {n: found[n].tokens for n in good} == alone and all(found[n].error is None for n in good)
    faults = [found[n] for n in range(len(prompts)) if n not in good]
    for answer, (_, message) in zip(faults, BAD.values(), strict=True):
        assert answer.tokens == [] and message in str(answer.error)
        assert answer.report.strategy == strategy and answer.report.num_tokens == 0


def test_a_prompt_that_fills_a_table_of_positions_is_an_error_of_its_own() -> None:
    """Learned positions end; rotary ones go on, as in the host."""
    table = hybrid("gpt2")
    held = table.config.max_position_embeddings
    options = {"strategy": "autoregressive", "max_new_tokens": 3, "do_sample": False}
    found = {a.index: a for a in generate_many(table, [[3] * held, [3, 4], [3] * (held + 5)], batch_size=2, **options)}
    assert [found[n].error is None for n in range(3)] == [False, True, False]
    assert f"a prompt of {held} tokens fills the {held} positions" in str(found[0].error) and found[1].tokens
    turning = {a.index: a for a in generate_many(model(), [[3] * 200, [3, 4]], batch_size=2, **options)}
    assert len(turning[0].tokens) == 3 and turning[1].tokens


def test_a_stream_of_bad_prompts_is_a_stream_of_errors() -> None:
    found = many([[], [], []], 2, strategy="autoregressive")
    assert [answer.index for answer in found] == [0, 1, 2] and all(answer.error for answer in found)


def test_a_given_plan_that_one_prompt_leaves_no_room_for_is_an_error_of_that_prompt() -> None:
    plan = Plan((Span((5,), 8, text=(6,) * 5),))
    prompts = [[3] * 40, [3, 4], [3] * 41, [5, 6]]
    for batch_size in (1, 2, 4):
        found = {
            a.index: a
            for a in generate_many(
                model(), prompts, batch_size=batch_size, strategy="planned_diffusion", plan=plan, max_length=45
            )
        }
        assert [bool(found[n].error) for n in range(4)] == [True, False, True, False]
        assert "the given plan alone holds 6 tokens" in str(found[0].error) and found[0].tokens == []
        assert found[1].report.plans and found[1].tokens


@pytest.mark.parametrize("strategy", ["autoregressive", "block_diffusion"])
def test_lengths_count_each_prompt_with_its_own_answer(strategy: str) -> None:
    """Whatever is beside it: once the first batch decided for all."""
    prompts = [[3, 4, 5], [7] * 14, [9] * 30, [6] * 6]
    bounds = {"max_length": 24, "min_length": 20, "do_sample": False, "strategy": strategy}
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        row = model().generate(ids, attention_mask=torch.ones_like(ids), **bounds) if len(prompt) < 24 else ids
        expected.append(row[0, len(prompt) :].tolist())
    for batch_size in (1, 2, 4):
        found = {a.index: a for a in generate_many(model(), prompts, batch_size=batch_size, **bounds)}
        assert [found[n].tokens for n in range(4)] == expected
        assert "max_length=24 leaves no room behind a prompt of 30" in str(found[2].error)
    assert len(expected[0]) > len(expected[1])


def test_new_tokens_are_preferred_to_lengths_as_in_the_host() -> None:
    found = list(
        generate_many(
            model(), [[3] * 30, [4]], strategy="autoregressive", max_new_tokens=3, max_length=10, do_sample=False
        )
    )
    assert [len(answer.tokens) for answer in found] == [3, 3] and not any(answer.error for answer in found)


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple])
def test_ids_of_any_kind_are_prompts(kind: Any) -> None:
    options = {"strategy": "autoregressive", "max_new_tokens": 3, "do_sample": False}
    (answer,) = generate_many(model(), [kind([3, 4, 5])], **options)
    assert answer.error is None and len(answer.tokens) == 3
