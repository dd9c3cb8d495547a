"""Theorem 4 for trees: whatever tree is drafted, the text is that of plain decoding; a tree of width one is the chain.

Bugs these tests catch: a branch that sees its sibling, or another branch; keys of a rejected branch, or of the wrong
one, that stay; an accepted branch that is not seen as text by what follows; noise or bans of the wrong position; a tree
that runs over the end; a parent behind its child; a model without the mask that is trusted.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import hf_hybrid
from hf_hybrid import DecodingError, DiffusionDrafter, Draft, Drafter, DrafterError, ModelDrafter, Text, TreeDrafter
from hf_hybrid.decoding.branches import first_branch, pruned
from hf_hybrid.decoding.draft_length import experience_of
from tests.equivalence.test_speculative import BASE, CASES, answers_of, model, plain, smaller, speculative
from tests.models_for_tests import CONTROL, MODELS, PROMPTS, VOCAB, hybrid, left_padded, tiny


class Forest(Drafter):
    """Random trees that hold the answer, or the beginning of it, somewhere."""

    name = "forest"

    def __init__(self, answers: dict[tuple[int, ...], list[int]], right: float = 0.8, size: int = 12):
        self.answers, self.right, self.size, self.draws = answers, right, size, random.Random(1)

    def propose(self, texts: Sequence[Text], length: int, sampler: Any) -> list[Draft]:
        return [self.tree(text) for text in texts]

    def tree(self, text: Text) -> Draft:
        draw = self.draws
        answer = self.answers[tuple(text.tokens[: text.prompt_length])][len(text.tokens) - text.prompt_length :]
        tokens: list[int] = []
        parents: list[int] = []
        path, ranks = [-1], list[int]()
        for _ in range(draw.randint(0, self.size)):
            follows = draw.random() < 0.5 and len(path) <= len(answer)
            parent = path[-1] if follows else draw.randint(-1, len(tokens) - 1)
            good = follows and draw.random() < self.right
            tokens.append(answer[len(path) - 1] if good else draw.randrange(VOCAB))
            if good:
                path.append(len(tokens) - 1)
            ranks.append(parents.count(parent))
            parents.append(parent)
        return Draft(tokens, parents=tuple(parents), ranks=tuple(ranks))


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_any_tree_gives_the_text_of_plain_decoding(case: str, adaptive: bool) -> None:
    expected = plain(**CASES[case])
    found = speculative(Forest(answers_of(expected)), adaptive=adaptive, **CASES[case])
    assert torch.equal(found.sequences, expected)
    if not adaptive:
        drafting = [report.drafting for report in found.report]
        assert sum(d.trees for d in drafting) > 5
        assert 4 * sum(sum(d.accepted) for d in drafting) > sum(r.num_tokens for r in found.report), (
            "branches are accepted"
        )
        for report in found.report:
            assert sum(report.drafting.accepted) == sum(report.accepted_per_round)
            assert sum(written for *_, written in report.drafting.passes) >= report.num_tokens
            assert len(report.drafting.passes) == report.num_forwards


@pytest.mark.parametrize("name", MODELS)
def test_every_model_class(name: str) -> None:
    expected = plain(name)
    found = speculative(Forest(answers_of(expected)), name)
    assert torch.equal(found.sequences, expected)
    assert sum(report.drafting.trees for report in found.report) > 5


WIDENED = {
    "model": lambda: ModelDrafter(smaller(), least_chance=0.0),
    "same model": lambda: ModelDrafter(model(), least_chance=0.0),
    "diffusion": lambda: DiffusionDrafter(model(), window=4, least_chance=0.0),
}


@pytest.mark.parametrize("kind", WIDENED)
@pytest.mark.parametrize("case", ["plain", "repetition_penalty", "sampled", "sampled with penalty"])
def test_a_widened_drafter_gives_the_text_and_seldom_falls(kind: str, case: str) -> None:
    expected = plain(**CASES[case])
    chain = speculative(WIDENED[kind](), draft_length=4, **CASES[case])
    tree = speculative(TreeDrafter(WIDENED[kind](), width=4, size=40), draft_length=4, **CASES[case])
    assert torch.equal(tree.sequences, expected) and torch.equal(chain.sequences, expected)
    passes = [sum(report.num_forwards for report in found.report) for found in (tree, chain)]
    assert passes[0] <= passes[1] - (kind == "model"), "second guesses are accepted"
    assert all(report.drafting.drafter.startswith("tree of ") for report in tree.report)


@pytest.mark.parametrize("kind", WIDENED)
def test_a_tree_of_width_one_is_the_chain(kind: str) -> None:
    for arguments in ({}, CASES["sampled"]):
        chain = speculative(WIDENED[kind](), draft_length=5, **arguments)
        tree = speculative(TreeDrafter(WIDENED[kind](), width=1), draft_length=5, **arguments)
        assert torch.equal(tree.sequences, chain.sequences)
        for one, other in zip(tree.report, chain.report, strict=True):
            assert one.accepted_per_round == other.accepted_per_round and one.num_rows == other.num_rows
            assert one.drafting.passes == other.drafting.passes and one.drafting.trees == 0


def test_a_row_equals_its_own_batch_of_one() -> None:
    answers = answers_of(plain())
    together = speculative(Forest(answers)).sequences
    for row, prompt in enumerate(PROMPTS):
        alone = speculative(Forest(answers), **left_padded((prompt,))).sequences[0, len(prompt) :].tolist()
        batch = together[row, BASE["input_ids"].shape[1] :].tolist()
        assert batch[: len(alone)] == alone and set(batch[len(alone) :]) <= {0}


def test_a_minimum_counts_tokens_of_the_branch_not_nodes() -> None:
    host = hybrid(seed=13, favours={CONTROL.noise.end: 99.0})  # ends as soon as it may
    ids = torch.tensor([PROMPTS[0]])
    options = {"min_new_tokens": 6, "max_new_tokens": 12, "do_sample": False}
    expected = host.generate(ids, strategy="autoregressive", **options)
    answer = expected[0, ids.shape[1] :].tolist()
    assert answer.index(CONTROL.noise.end) == len(answer) - 1 == 6

    class Bushy(Drafter):
        """The answer, each of its tokens behind three that are wrong."""

        name = "bushy"
        costly = True  # what is known of such a drafter outlives a call

        def propose(self, texts: Sequence[Text], length: int, sampler: Any) -> list[Draft]:
            tokens, parents = list[int](), list[int]()
            behind = -1
            for right in answer[len(texts[0].tokens) - texts[0].prompt_length :][:3]:
                tokens += [*[token for token in range(10, 14) if token != right][:3], right]
                parents += [behind] * 4
                behind = len(tokens) - 1
            return [Draft(tokens, parents=tuple(parents))]

    options |= {"strategy": "speculative", "adaptive": False, "return_dict_in_generate": True}
    drafter = Bushy()
    found = host.generate(ids, drafter=drafter, **options)
    assert torch.equal(found.sequences, expected)
    drafting = found.report[0].drafting
    assert drafting.trees > 0 and max(found.report[0].accepted_per_round) > 1
    # What was counted: the right token always accepted, one of four behind the same token (at the end, none of three).
    assert (drafting.tried, drafting.accepted) == ([2, 2, 2], [2, 2, 1])
    counts = experience_of(drafter, host, (str(host.device), host.dtype, True)).acceptance.counts
    shares = {depth: accepted / tried for (_, depth), (accepted, tried) in counts.items()}
    assert set(shares) == {0, 1, 2} and shares[0] == pytest.approx(0.25, abs=0.03)
    assert shares[1] == pytest.approx(0.25, abs=0.03) and 0 < shares[2] < 0.25


def test_with_rejection_a_tree_is_its_first_branch() -> None:
    """Its probabilities are those of a chain."""
    options = {**CASES["sampled"], "acceptance": "rejection", "draft_length": 3}
    tree = speculative(TreeDrafter(ModelDrafter(smaller(), least_chance=0.0), width=3), **options)
    chain = speculative(ModelDrafter(smaller(), least_chance=0.0), **options)
    assert torch.equal(tree.sequences, chain.sequences)
    assert all(report.drafting.trees == 0 for report in tree.report)


def test_a_model_that_does_not_honour_the_mask_gets_chains_and_the_report_says_so() -> None:
    deaf = hf_hybrid.enable(tiny("llama", seed=26))
    deaf.generation_config.pad_token_id = 0
    forward = deaf.forward

    def without(*arguments: Any, attention_mask: Any = None, **options: Any) -> Any:
        return forward(*arguments, **options)

    ids = torch.tensor([PROMPTS[0]])
    expected = deaf.generate(ids, strategy="autoregressive", max_new_tokens=12)
    deaf.forward = without
    options = {"strategy": "speculative", "max_new_tokens": 12, "adaptive": False, "return_dict_in_generate": True}
    drafter = TreeDrafter(ModelDrafter(tiny("llama", seed=26), least_chance=0.0))
    found = deaf.generate(ids, drafter=drafter, **options)
    assert found.report[0].drafting.trees == 0
    assert found.report[0].fallbacks == ["drafts are chains: the model does not honour the mask of a tree"]
    assert found.sequences.shape == expected.shape


def test_a_tree_is_cut_and_cleaned() -> None:
    #        -1 -> 0 -> 1 -> 3, 0 -> 2 -> 4 (the same as 3 is not), -1 -> 5 is the same as 0
    draft = Draft([7, 8, 9, 5, 6, 7, 4], parents=(-1, 0, 0, 1, 2, -1, 5), ranks=(0, 0, 1, 0, 0, 1, 0))
    whole = pruned(draft, 100, 100, ())
    assert (list(whole.tokens), whole.parents) == ([7, 8, 9, 5, 6, 4], (-1, 0, 0, 1, 2, 0))
    assert pruned(draft, 3, 100, ()).parents == (-1, 0, 0)
    assert list(pruned(draft, 100, 2, ()).tokens) == [7, 8, 9, 4]
    ended = pruned(draft, 100, 100, {8})
    assert (list(ended.tokens), ended.parents) == ([7, 9, 6, 4], (-1, 0, 1, 0))
    chain = pruned(draft, 2, 100, ())
    assert chain.parents is None and list(chain.tokens) == [7, 8]
    assert list(first_branch(draft).tokens) == [7, 8, 5]


@pytest.mark.parametrize("parents", [(0, -1), (-1, 5), (-1,), (-2, 0)])
def test_what_is_no_tree_is_refused(parents: tuple[int, ...]) -> None:
    class Wrong(Drafter):
        name = "wrong"

        def propose(self, texts: Sequence[Text], length: int, sampler: Any) -> list[Draft]:
            return [Draft([3, 4], parents=parents)] * len(texts)

    with pytest.raises(DecodingError, match="wrong: parents"):
        speculative(Wrong())
    assert torch.equal(speculative("suffix").sequences, plain()), "the model is usable"


def test_wrong_trees_are_refused() -> None:
    with pytest.raises(ValueError, match="width=0"):
        TreeDrafter(smaller(), width=0)
    with pytest.raises(ValueError, match="size=1000"):
        TreeDrafter(smaller(), size=1000)
    with pytest.raises(DrafterError, match="str is no drafter"):
        TreeDrafter("suffix")
