"""What an answer of the bench of drafting is held against, and its journal.

Bugs these tests catch: a method timed on a loop; a wrong token forgiven, or a tie blamed; an answer that stops early
taken for right; a file of other settings continued, or one of somebody else overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_for_tests import tiny_llama
from speculation_for_tests import SETTINGS, greedy

import hf_hybrid
from benchmarks import speculation as task
from benchmarks.speculation import Journal, JournalError
from benchmarks.speculation.checks import DRIFT

# What an answer is held against.


def slow_length(tokens: Sequence[int], gram: int, repeats: int) -> int:
    for end in range(len(tokens) + 1):
        pieces = [tuple(tokens[start : start + gram]) for start in range(end - gram + 1)]
        if any(pieces.count(piece) >= repeats for piece in pieces):
            return end
    return len(tokens)


def test_an_answer_is_cut_behind_the_third_repeat_of_eight_tokens() -> None:
    loop = [*range(100, 105), *list(range(10)) * 6]
    assert task.loop_free_length(loop) == 5 + 8 + 2 * 10
    assert task.loop_free_length([7] * 50) == 8 + 2  # occurrences may overlap
    assert task.loop_free_length(range(50)) == 50 and task.loop_free_length([]) == 0
    draw = torch.Generator().manual_seed(0)
    for _ in range(30):
        tokens = torch.randint(0, 2, (40,), generator=draw).tolist()
        assert task.loop_free_length(tokens, 4, 3) == slow_length(tokens, 4, 3)


def test_a_wrong_token_is_found_and_measured(model: Any) -> None:
    prompt, reference = [5, 9, 8], greedy(model, [5, 9, 8], 6)
    assert task.difference(model, prompt, reference, reference) is None
    wrong = (reference[3] + 1) % 200
    answer = [*reference[:3], wrong, *greedy(model, [*prompt, *reference[:3], wrong], 2)]
    found = task.difference(model, prompt, answer, reference)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *reference[:3]]])).logits[0, -1]  # (vocab,)
    assert found is not None and found.position == 3 and not found.right
    # float64: sums in another order, and logits of order ten.
    assert found.token_deficit == pytest.approx(float(logits.max() - logits[wrong]), abs=1e-9)
    assert found.largest_deficit == found.token_deficit > DRIFT[torch.float64]
    assert found.reference_deficit == pytest.approx(0.0, abs=1e-9)


def test_of_two_equally_likely_tokens_either_is_right() -> None:
    model = hf_hybrid.enable(tiny_llama().double())
    prompt = [5, 9, 8]
    reference = greedy(model, prompt, 1)
    other = 77
    with torch.no_grad():
        weight = model.lm_head.weight.clone()
        weight[other] = weight[reference[0]]
        model.lm_head.weight = torch.nn.Parameter(weight)  # untied: the other token is read as before
    found = task.difference(model, prompt, [other], reference)
    assert found is not None and found.right and found.token_deficit == found.reference_deficit


def test_an_answer_that_stops_early_or_writes_on_is_judged(model: Any) -> None:
    reference = greedy(model, [5, 9], 5)
    early = task.difference(model, [5, 9], reference[:3], reference)
    assert early is not None and early.position == 3 and early.token_deficit is None and not early.right
    longer = task.difference(model, [5, 9], reference, reference[:3])
    assert longer is not None and longer.position == 3 and longer.reference_deficit is None and longer.right
    nothing = task.difference(model, [5, 9], [], reference)
    assert nothing is not None and not nothing.right


# The journal.


def test_the_journal_goes_on_and_takes_off_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, SETTINGS)
    journal.append({"kind": "answers", "repeat": 0, "prompt": "a", "value": 1})
    journal.append({"kind": "answers", "repeat": 0, "prompt": "a", "value": 2})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "answers", "rep')
    again = Journal(path, SETTINGS)
    assert path.read_bytes() == whole
    found = again.get(kind="answers", repeat=0, prompt="a")
    assert found is not None and found["value"] == 2 and len(again.of_kind("answers")) == 1
    assert again.get(kind="answers", repeat=1, prompt="a") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"kind": "settings", "model": "other", "repeats": 1}\n', "model: other there, tiny now"),
        ('{"kind": "answers"}\n', "no file of answers"),
        ('{"prompt": "a"}\n', "line 1, is no line of this bench"),
        ("text\n", "line 1, is not JSON"),
    ],
)
def test_a_file_of_something_else_is_refused_and_stays(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(content)
    with pytest.raises(JournalError, match=message):
        Journal(path, SETTINGS)
    assert path.read_text() == content
