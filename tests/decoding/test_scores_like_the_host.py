"""Scores, criteria and processors meet what they meet in the host.

Bugs these tests catch: scores of another token; a criterion or processor that sees the state or the parameters of
another sequence; a limit or an end of the caller that does not replace the host's.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    StoppingCriteria,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from tests.hosts_for_tests import EXACT, PROMPT, ROWS, every_exact, generate, refused, tiny
from tests.models_for_tests import writer

# Scores and logits.


class Offset(LogitsProcessor):
    """Depends on the whole prefix."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + (input_ids.sum(dim=1, keepdim=True) % 7 * torch.arange(scores.shape[1]) % 5).to(scores.dtype)


@every_exact
@pytest.mark.parametrize("processed", [{}, {"repetition_penalty": 1.3, "min_new_tokens": 9}, {"own": True}], ids=str)
def test_scores_and_logits_are_the_hosts(how: dict[str, Any], processed: dict[str, Any]) -> None:
    model = tiny(eos_token_id=[26, 4])
    processed = {"logits_processor": [Offset()]} if processed.get("own") else processed
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, **processed}
    expected, found = generate(model, ROWS, **asked), generate(model, ROWS, **asked, **how)
    assert torch.equal(found.sequences, expected.sequences)
    written = [next((i for i, t in enumerate(r) if t in (26, 4)), 15) for r in expected.sequences[:, 5:].tolist()]
    for name in ("scores", "logits"):
        assert len(found[name]) == len(expected[name]) == expected.sequences.shape[1] - 5
        for step, (one, other) in enumerate(zip(found[name], expected[name], strict=True)):
            rows = [row for row, last in enumerate(written) if step <= last]  # behind an end there is padding
            torch.testing.assert_close(one[rows], other[rows], rtol=1e-5, atol=1e-5)  # the host's are float32
    likely = [model.compute_transition_scores(o.sequences, o.scores, normalize_logits=True) for o in (found, expected)]
    for row, last in enumerate(written):
        torch.testing.assert_close(likely[0][row, : last + 1], likely[1][row, : last + 1], rtol=1e-5, atol=1e-5)
        assert not likely[0][row, last + 1 :].any()  # padding was certain


def test_fields_that_nobody_asked_for_are_none() -> None:
    output = generate(tiny(), return_dict_in_generate=True, **EXACT["chain"])
    for name in ("scores", "logits", "attentions", "hidden_states"):
        assert getattr(output, name) is None
    assert generate(tiny(), return_dict_in_generate=True, output_scores=True, **EXACT["chain"]).logits is None


@pytest.mark.parametrize("how", [{"draft_threshold": 0.0}, {"span_decoding": "autoregressive"}], ids=str)
def test_scores_of_parts_stand_in_text_order(how: dict[str, Any]) -> None:
    model, ids = writer(True), torch.tensor([[3, 7, 9, 2, 11]])
    asked = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 60}
    output = model.generate(ids, strategy="planned_diffusion", **asked, **how)
    assert output.report[0].spans and len(output.scores) == output.sequences.shape[1] - 5
    forced = 0
    for token, scores in zip(output.sequences[0, 5:].tolist(), output.scores, strict=True):
        assert int(scores[0].argmax()) == token  # greedy: every token is the best of its own scores
        forced += int((scores[0] > -torch.inf).sum()) == 1
    assert forced < len(output.scores)
    assert forced >= sum(len(span.label) for span in output.report[0].spans)  # labels were certain


# Criteria and processors.


class Done(StoppingCriteria):
    """Keeps a note for each sequence of the batch."""

    def __init__(self, token: int):
        self.token, self.done = token, dict[int, bool]()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for row, ids in enumerate(input_ids):
            self.done[row] = self.done.get(row, False) or int(ids[-1]) == self.token
        return torch.tensor([self.done[row] for row in range(len(input_ids))])


class Limits(StoppingCriteria):
    """Has a limit for each sequence of the batch."""

    def __init__(self, limits: list[int]):
        self.limits = torch.tensor(limits)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] >= self.limits


@every_exact
def test_criteria_with_a_state_or_parameters_for_each_sequence(how: dict[str, Any]) -> None:
    model = tiny(seed=5)
    options = {"pad_token_id": 0, "new": 20}
    texts = generate(model, ROWS, **options)[:, 5:].tolist()
    token = texts[1][3]  # it ends the second text early
    for make in (lambda: Done(token), lambda: Limits([7, 20, 11])):
        expected = ended(generate(model, ROWS, stopping_criteria=[make()], **options), make())
        assert ended(generate(model, ROWS, stopping_criteria=[make()], **options, **how), make()) == expected


def ended(sequences: Tensor, criterion: Any) -> list[list[int]]:
    """Each text up to where the criterion ends it: without end tokens the host writes on behind it."""
    stops: list[list[int]] = []
    for row, ids in enumerate(sequences.tolist()):
        for count in range(6, len(ids) + 1):
            wide = torch.tensor([ids[:count]] * len(sequences))
            if bool(criterion(wide, None)[row]):
                break
        stops.append(ids[:count])
    return stops


@every_exact
def test_the_callers_own_limit_and_end_replace_the_hosts(how: dict[str, Any]) -> None:
    model = tiny(eos_token_id=26)
    ids = generate(model, new=16)
    own = [MaxLengthCriteria(max_length=PROMPT.shape[1] + 20)]  # longer than max_new_tokens
    expected = generate(model, new=3, stopping_criteria=own, eos_token_id=None)
    assert expected.shape[1] == PROMPT.shape[1] + 20
    assert torch.equal(generate(model, new=3, stopping_criteria=own, eos_token_id=None, **how), expected)
    end = EosTokenCriteria(eos_token_id=torch.tensor([int(ids[0, PROMPT.shape[1] + 2])]))
    expected = generate(model, stopping_criteria=[end])
    assert expected.shape[1] <= PROMPT.shape[1] + 3
    assert torch.equal(generate(model, stopping_criteria=[end], **how), expected)


class Bans(LogitsProcessor):
    """Has a list for each sequence of the batch, and writes into what it gets."""

    def __init__(self, bans: list[list[int]]):
        self.bans = bans

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for row, ids in enumerate(self.bans):
            scores[row, ids] = -torch.inf
        return scores


class Scaled(LogitsProcessor):
    """Has a number for each sequence of the batch."""

    def __init__(self, factors: list[float]):
        self.factors = torch.tensor(factors)[:, None]  # (batch, 1)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + self.factors * (torch.arange(scores.shape[1]) % 3)


class Notes(LogitsProcessor):
    """Keeps a list for each sequence of the batch, inside of a list."""

    def __init__(self, rows: int):
        self.seen: list[list[int]] = [[] for _ in range(rows)]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for row, ids in enumerate(input_ids):
            self.seen[row].append(int(ids[-1]))
            scores[row, self.seen[row][-4:]] -= 3
        return scores


@every_exact
def test_processors_with_a_state_or_parameters_for_each_sequence(how: dict[str, Any]) -> None:
    model = tiny()
    for make in (lambda: Bans([[26], [29], [47]]), lambda: Scaled([1.0, -2.0, 0.5]), lambda: Notes(3)):
        expected = generate(model, ROWS, logits_processor=[make()])
        assert torch.equal(generate(model, ROWS, logits_processor=[make()], **how), expected)


def test_what_cannot_be_copied_is_refused_for_a_batch_and_serves_one() -> None:
    class Locked(LogitsProcessor):
        def __init__(self) -> None:
            self.numbers = iter(range(1000)).__iter__()
            self.generator = (i for i in range(1000))

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores + next(self.generator) * 0

    options = {"logits_processor": [Locked()], **EXACT["chain"]}
    refused("Locked cannot be copied.*one prompt at a time", tiny(), ROWS, **options)
    expected = generate(tiny())
    assert torch.equal(generate(tiny(), **options), expected)
