"""What a caller's criteria and ends meet here is what they meet in the host.

Bugs these tests catch: a criterion that reads the scores and gets None although the call asks for them, or those of
another sequence; a least length that bans the ids that end the answer instead of those that it was given.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, MinNewTokensLengthLogitsProcessor, StoppingCriteria
from transformers.generation.logits_process import MinLengthLogitsProcessor
from transformers.generation.stopping_criteria import EosTokenCriteria

import hf_hybrid
from tests.models_for_tests import tiny, writer

ROWS = torch.tensor([[5, 9, 5, 9, 5], [3, 7, 9, 2, 11], [1, 2, 3, 4, 5]])
EXACT: dict[str, dict[str, Any]] = {
    "autoregressive": {"strategy": "autoregressive"},
    "chain": {"strategy": "speculative", "adaptive": False},
}
every_exact = pytest.mark.parametrize("how", EXACT.values(), ids=EXACT)


def generate(model: Any, ids: Tensor = ROWS, **options: Any) -> Any:
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=14, do_sample=False, **options)


class Unsure(StoppingCriteria):
    """Ends a sequence whose last token led by little; notes how many steps it saw."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.steps.append(len(scores))
        best = scores[-1].topk(2).values
        return best[:, 0] - best[:, 1] < 0.1


@every_exact
def test_a_criterion_reads_the_scores_that_the_call_asks_for(how: dict[str, Any]) -> None:
    model = hf_hybrid.enable(tiny("llama"))
    asked = {"return_dict_in_generate": True, "output_scores": True}
    lengths = set()
    for row in ROWS:
        expected = generate(model, row[None], stopping_criteria=[Unsure()], **asked).sequences
        own = Unsure()
        assert torch.equal(generate(model, row[None], stopping_criteria=[own], **asked, **how).sequences, expected)
        assert own.steps == [*range(1, expected.shape[1] - 4)]
        lengths.add(expected.shape[1])
    assert len(lengths) > 1 and min(lengths) < 19
    # In a batch, each sequence by its own scores.
    together = generate(model, stopping_criteria=[Unsure()], pad_token_id=0, **asked, **how).sequences
    for row, ids in zip(ROWS, together, strict=True):
        alone = generate(model, row[None], stopping_criteria=[Unsure()], **asked).sequences[0]
        assert ids.tolist() == alone.tolist() + [0] * (len(ids) - len(alone))


def test_a_criterion_reads_the_scores_of_parts_in_text_order() -> None:
    seen: list[int] = []

    def criterion(ids: Tensor, scores: Any, **kwargs: Any) -> bool:
        seen.append(int(scores[-1].argmax()))
        assert seen[-1] == int(ids[0, -1]) and len(scores) == ids.shape[1] - 5
        return False

    asked = {"return_dict_in_generate": True, "output_scores": True, "stopping_criteria": [criterion]}
    output = writer(True).generate(ROWS[1:2], strategy="planned_diffusion", max_new_tokens=60, **asked)
    assert output.report[0].spans and seen == output.sequences[0, 5:].tolist()


@every_exact
def test_a_least_length_bans_the_ids_that_it_was_given(how: dict[str, Any]) -> None:
    model = hf_hybrid.enable(tiny("llama"))
    plain = generate(model)[:, 5:].tolist()
    first, later = plain[0][0], plain[0][6]
    end = [EosTokenCriteria(eos_token_id=torch.tensor([later]))]
    # The caller's end replaces the one of the config, which is what the least length is about.
    options = {"eos_token_id": first, "min_new_tokens": 3, "pad_token_id": 0, "stopping_criteria": end}
    expected = generate(model, **options)
    assert expected[0, 5] != first
    assert torch.equal(generate(model, **options, **how), expected)
    # A processor of the host with ids of its own.
    for processor in (
        MinNewTokensLengthLogitsProcessor(5, 4, first),
        MinLengthLogitsProcessor(9, [first, plain[1][1]]),
    ):
        options = {"eos_token_id": later, "pad_token_id": 0, "logits_processor": LogitsProcessorList([processor])}
        expected = generate(model, **options)
        assert expected[0, 5] != first
        assert torch.equal(generate(model, **options, **how), expected)


def counting(start: list[int]) -> Any:
    """A function that counts its calls in what it closes over."""
    calls, step = start, len(ROWS)

    def shift(input_ids: Tensor, scores: Tensor, every: list[int] = []) -> Tensor:  # noqa: B006  the fault in question
        calls[0] += step
        every.append(1)
        return scores + (torch.arange(61) * (calls[0] + 5 * len(every)) % 11).to(scores.dtype)

    return shift


class Wraps:
    """Holds a function with a state, and a model that is not copied."""

    def __init__(self, model: Any):
        self.model, self.inner = model, counting([0])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        assert self.model is KEPT[0]
        return self.inner(input_ids, scores)


KEPT: list[Any] = []


@every_exact
def test_functions_with_a_state_are_copied_for_each_sequence(how: dict[str, Any]) -> None:
    model = hf_hybrid.enable(tiny("llama"))
    KEPT[:] = [model]
    makers = (lambda: counting([0]), lambda: functools.partial(counting([5])), lambda: Wraps(model))
    for make in makers:
        expected = generate(model, logits_processor=[make()])
        assert not torch.equal(expected, generate(model))
        assert torch.equal(generate(model, logits_processor=[make()], **how), expected)

    def stopping(ids: Tensor, scores: Any, *, calls: list[int], **kwargs: Any) -> Tensor:
        calls[0] += 1
        return torch.full((len(ids),), calls[0] >= 6)

    expected = generate(model, stopping_criteria=[functools.partial(stopping, calls=[0])])
    assert expected.shape[1] == 11
    assert torch.equal(generate(model, stopping_criteria=[functools.partial(stopping, calls=[0])], **how), expected)
