"""Drafting with a model: a pair of random models, and a trained one.

Bugs these tests catch: a pair that agrees otherwise than it says, or on other texts; a cost that counts the embedding;
a draft of another tokenizer; the host's way timed where it fails.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_for_tests import read_checkpoint
from gguf_for_tests import tiny_llama
from speculation_for_tests import SETTINGS, SMALL, Letters, greedy

from benchmarks import speculation as task
from benchmarks.speculation import Bench, Journal, Prompt
from benchmarks.speculation.pair import weights_read
from benchmarks.speculation.prompts import token_ids
from hf_hybrid import DrafterError

# A pair of random models.


@pytest.mark.parametrize("agreement", [0.5, 0.7])
def test_a_random_pair_agrees_as_often_as_asked(agreement: float) -> None:
    pair = task.random_pair(SMALL, agreement)
    prompts = task.random_prompts(6, SMALL.vocab, seed=7)
    equal = compared = 0
    for prompt in prompts:
        ids = task.Numbers()(prompt.text)["input_ids"]
        text = pair.target.generate(torch.tensor([ids]), hf_hybrid={}, max_new_tokens=40, do_sample=False)
        with torch.no_grad():
            choices = pair.draft(text).logits[0, len(ids) - 1 : -1].argmax(-1)  # (new,)
        equal, compared = equal + int((choices == text[0, len(ids) :]).sum()), compared + len(choices)
    # Of other texts than it was set on: 240 tokens, three standard deviations, and a bisection of few tokens.
    assert abs(equal / compared - agreement) < 0.15 and abs(pair.agreement - agreement) < 0.02
    assert pair.cost < 0.6
    again = task.random_pair(SMALL, agreement)
    assert all(torch.equal(a, b) for a, b in zip(pair.draft.parameters(), again.draft.parameters(), strict=True))


def test_the_ways_of_drafting_with_a_model_write_the_same_text(tmp_path: Path) -> None:
    pair = task.random_pair(SMALL, dtype=torch.float64)
    prompts = {"random": task.random_prompts(2, SMALL.vocab)}
    journal = Journal(tmp_path / "j", SETTINGS)
    task.run(Bench(pair.target, task.Numbers(), prompts, set(), pair.methods(), 24, 1), journal)
    results = {result.method: result for result in task.speculation_results(journal)}
    rivals = [] if pair.absent() else ["assisted", "assisted_five"]  # the oldest host's own fails
    assert list(results) == ["plain", *rivals, "speculative_model", "speculative_tree"]
    assert all(result.equal == result.prompts == 2 for result in results.values())
    for name in ("speculative_model", "speculative_tree"):
        assert (results[name].ratio_to_stock is not None) == bool(rivals)
    for name in rivals:
        assert (results[name].tokens_per_pass or 0) > 1, "drafts are accepted"


@pytest.mark.parametrize(("version", "named"), [("5.15.2", ["assisted"]), ("5.16.0", []), ("5.23.0", [])])
def test_a_rival_that_fails_is_absent(monkeypatch: pytest.MonkeyPatch, version: str, named: list[str]) -> None:
    monkeypatch.setattr("transformers.__version__", version)
    pair = task.Pair(None, None, 0.7, 0.2)
    assert [line["method"] for line in pair.absent()] == named
    assert ("assisted_five" in [method.name for method in pair.methods()]) == (not named)


# A trained pair.


class Known(Letters):
    """A tokenizer that says what it knows."""

    def get_vocab(self) -> dict[str, int]:
        return {chr(i): i for i in range(128)}


def test_a_trained_pair_is_compared_on_what_the_target_writes(model: Any) -> None:
    """The draft never writes an even token, so that the two agree on the odd ones."""
    draft = tiny_llama().double()
    odd = draft.lm_head.weight.detach().clone()
    odd[::2] = 0.0  # beside hundreds of logits around zero, zero is never the largest
    draft.lm_head.weight = torch.nn.Parameter(odd)
    chosen = [Prompt("held-out", word, word) for word in ("abcde", "zyx", "kkkkb", "mnop", "qrtvw", "ab")]
    pair = task.trained_pair(model, Known(), draft, Known(), chosen, 12)
    answers = [greedy(model, Known()(prompt.text)["input_ids"], 12) for prompt in chosen]
    answers = [answer[: answer.index(2) + 1] if 2 in answer else answer for answer in answers]  # 2: the end
    tokens = [token for answer in answers for token in answer]
    assert 0 < sum(token % 2 for token in tokens) < len(tokens), "both kinds are written"
    assert pair.agreement == sum(token % 2 for token in tokens) / len(tokens)
    assert task.trained_pair(model, Known(), model, Known(), chosen, 12).agreement == 1.0
    ends = task.trained_pair(model, Known(), draft, Known(), chosen, 1)
    assert ends.agreement == sum(answer[0] % 2 for answer in answers) / len(answers)


def test_held_out_prompts_are_those_that_the_strategies_answer(checkpoint: Path) -> None:
    _, tokenizer, items = read_checkpoint(checkpoint, torch.float32)
    chosen = task.held_out_prompts([item for item in items if item.split == "test"], 3)
    assert len({prompt.name for prompt in chosen}) == 3 and {prompt.category for prompt in chosen} == {"held-out"}
    for prompt in chosen:
        assert token_ids(tokenizer, prompt) == list(tokenizer(prompt.text)["input_ids"])
    assert len(task.held_out_prompts(items[:2], 5)) == 2


def test_the_cost_of_a_pair_is_what_a_pass_reads() -> None:
    for tied, read in ((True, 0), (False, 1)):
        model = tiny_llama().double() if tied else read_untied()
        rows = model.get_input_embeddings().weight.numel()
        assert weights_read(model) == sum(p.numel() for p in model.parameters()) - read * rows


def read_untied() -> Any:
    model = tiny_llama()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    return model


def test_a_draft_of_another_tokenizer_is_refused(checkpoint: Path) -> None:
    target, tokenizer, _ = read_checkpoint(checkpoint, torch.float32)
    other = SimpleNamespace(get_vocab=lambda: {"a": 0})
    with pytest.raises(DrafterError, match="has another tokenizer than the model"):
        task.trained_pair(target, tokenizer, target, other, [], 4)
