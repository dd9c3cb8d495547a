"""``generate_many``: an answer equals its own call, whatever the batch size and whoever had its place before.

Catches: keys, spans or masks of a finished answer that the next one in its place can see; counters that go on; seeds
keyed by the place in the batch; answers that are lost, doubled or given the wrong index when several finish in one
pass, at once with their prompt, or when the queue is shorter than the batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hf_hybrid import Answer, DecodingError, UnsupportedCallError, disable, generate_many
from tests.equivalence.test_batches import MODES, answers, model
from tests.models_for_tests import PROMPTS, hybrid

LINE = [(*PROMPTS[i % len(PROMPTS)], 13 + i) for i in range(9)]
SEED = 11  # answers of very different lengths
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
    lengths = [len(answers(True, MODES["verified"], (list(p),), [SEED + i])[0][0]) for i, p in enumerate(LINE)]
    assert len(set(lengths)) > 4
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
        ([[]], {"strategy": "autoregressive"}, "prompt 0 must hold"),
        ([torch.ones(1, 3, dtype=torch.long)], {"strategy": "autoregressive"}, "prompt 0 must hold"),
    ],
)
def test_misuse_is_a_clear_error(prompts: Any, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedCallError, match=match):
        generate_many(model(), prompts, **arguments)


def test_processors_of_one_batch_are_refused() -> None:
    with pytest.raises(DecodingError, match="batch by batch"):
        many(LINE[:2], 2, strategy="autoregressive", repetition_penalty=1.3)


def test_a_prompt_that_cannot_be_read_loses_no_finished_answer() -> None:
    found = []
    with pytest.raises(UnsupportedCallError, match="prompt 2 must hold"):
        for answer in generate_many(
            model(), [[3], [7], []], batch_size=1, strategy="autoregressive", max_new_tokens=3, do_sample=False
        ):
            found.append(answer.index)
    assert found == [0, 1]


@pytest.mark.parametrize("made", [torch.tensor, np.array, tuple], ids=["torch", "numpy", "tuple"])
def test_prompts_of_every_kind(made: Any) -> None:
    options: dict[str, Any] = {"strategy": "autoregressive", "max_new_tokens": 3, "do_sample": False}
    found = [list(generate_many(model(), prompts, **options)) for prompts in (LINE, [made(list(p)) for p in LINE])]
    assert [answer.tokens for answer in found[0]] == [answer.tokens for answer in found[1]]
