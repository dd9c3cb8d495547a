"""Whole calls with models whose passes cannot be masked row by row: what the host writes, each strategy writes.

Bugs these tests catch: a rejected draft that stays in a state; a batch in which a sequence is padded, or takes the
state of one that ended; a model that would be wrong with several tokens a pass and is not read one by one; a
strategy that needs what such a model cannot do and is not refused; a cache that is taken for keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hf_hybrid import Draft, Drafter, ModelDrafter, Text, TreeDrafter, generate_many
from hf_hybrid.models.host import CACHE
from tests.models_for_tests import PROMPTS, hybrid, left_padded
from tests.state_models import EVERY, STATEFUL, STEPS, stateful

NEW = 24


@cache
def model_of(name: str) -> Any:
    return stateful(name)


@cache
def expected(name: str) -> list[list[int]]:
    """The host's own greedy texts behind each prompt, alone: the new tokens."""
    return [
        model_of(name).generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]


class Knows(Drafter):
    """Drafts the texts that it was given, with every third token wrong; says whether it can also branch."""

    name = "knows"

    def __init__(self, texts: list[list[int]], branches: bool = False):
        self.texts, self.branches = [[*p, *t] for p, t in zip(PROMPTS, texts, strict=True)], branches

    def propose(self, texts: Sequence[Text], length: int, sampler: Any) -> list[Draft]:
        drafts: list[Draft] = []
        for text in texts:
            whole = next(t for t in self.texts if t[: text.prompt_length] == list(text.tokens[: text.prompt_length]))
            begin = len(text.tokens)
            tokens = [(t + (i % 3 == 2)) % 61 for i, t in enumerate(whole[begin : begin + length], begin)]
            parents = tuple(range(-1, len(tokens) - 1)) if self.branches else None
            drafts.append(Draft(tokens, parents=parents, ranks=(0,) * len(tokens)) if parents else Draft(tokens))
        return drafts


def written(name: str, **options: Any) -> Any:
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, **options}
    return model_of(name).generate(**left_padded(), **options)


def modes(name: str) -> dict[str, dict[str, Any]]:
    fixed = {"strategy": "speculative", "adaptive": False, "draft_length": 5}
    return {
        "autoregressive": {"strategy": "autoregressive"},
        "suffix": fixed,
        "with errors": {**fixed, "drafter": Knows(expected(name))},
    }


@pytest.mark.parametrize("name", EVERY)
def test_the_text_is_that_of_the_host_alone(name: str) -> None:
    """In a batch of unequal prompts, and alone."""
    assert len({token for text in expected(name) for token in text}) > 5, "a text, not one token"
    for mode, options in modes(name).items():
        output = written(name, **options)
        assert output.sequences[:, -NEW:].tolist() == expected(name), mode
        assert getattr(output, CACHE) is None
        alone = model_of(name).generate(torch.tensor([PROMPTS[2]]), max_new_tokens=NEW, do_sample=False, **options)
        assert alone[0, -NEW:].tolist() == expected(name)[2], mode
        for report in output.report:
            if mode != "with errors":
                continue
            if name in STEPS:
                assert report.num_forwards == NEW and "one token a pass" in report.fallbacks[0]
            else:
                assert report.num_forwards < NEW * 0.7 and not report.fallbacks
                drafted, accepted, _ = (sum(numbers) for numbers in zip(*report.drafting.passes, strict=True))
                assert 0 < accepted < drafted


@pytest.mark.parametrize("name", sorted({"qwen3.5", "mamba-2", "falcon-mamba", "bart"} & set(EVERY)))
def test_sampling_does_not_depend_on_the_drafter(name: str) -> None:
    sampling: dict[str, Any] = {"do_sample": True, "temperature": 1.3, "seed": 7}
    plain = written(name, strategy="autoregressive", **sampling).sequences
    for options in modes(name).values():
        assert torch.equal(written(name, **options, **sampling).sequences, plain)
    assert plain[:, -NEW:].tolist() != expected(name)


@pytest.mark.parametrize("name", ["lfm2", "granite-4", "bloom"])
def test_sequences_that_come_and_go(name: str) -> None:
    options = {**modes(name)["with errors"], "batch_size": 2, "max_new_tokens": NEW, "do_sample": False}
    answers = {a.index: a.tokens for a in generate_many(model_of(name), [list(p) for p in PROMPTS], **options)}
    assert [answers[i] for i in range(len(PROMPTS))] == expected(name)


def test_a_tree_is_its_first_branch() -> None:
    options = {"strategy": "speculative", "adaptive": False, "draft_length": 5}
    output = written("qwen3.5", **options, drafter=Knows(expected("qwen3.5"), branches=True))
    assert output.sequences[:, -NEW:].tolist() == expected("qwen3.5")
    assert all("one branch alone" in report.fallbacks[0] for report in output.report)
    wide = written("qwen3.5", **options, drafter=TreeDrafter(ModelDrafter(stateful("lfm2"))))
    assert wide.sequences[:, -NEW:].tolist() == expected("qwen3.5") and wide.report[0].fallbacks


def test_it_may_draft_for_another_model() -> None:
    """A drafter is rewound by what was not accepted."""
    target = hybrid(seed=26)
    ids = torch.tensor([PROMPTS[0]])
    want = target.generate(ids, max_new_tokens=NEW, do_sample=False)
    for name in ("lfm2", "bart"):
        options = {"strategy": "speculative", "adaptive": False, "draft_length": 3, "drafter": stateful(name)}
        assert torch.equal(target.generate(ids, max_new_tokens=NEW, do_sample=False, **options), want)


def test_what_it_cannot_do_is_refused_before_a_pass() -> None:
    ids = torch.tensor([[3, 7, 9]])
    for name in ("lfm2", "bart"):
        model = hybrid_of(name)
        for options in (
            {"strategy": "block_diffusion"},
            {"strategy": "planned_diffusion"},
            {"strategy": "speculative", "drafter": "self"},
        ):
            with pytest.raises(ValueError, match=r"StateRunner, which runs this model.*drafter='suffix'"):
                model.generate(ids, max_new_tokens=40, **options)
        with pytest.raises(ValueError, match=r"takes and returns no cache for .*pass the whole text as input_ids"):
            model.generate(ids, max_new_tokens=4, strategy="autoregressive", **{CACHE: DynamicCache()})
        with pytest.raises(ValueError, match=r"takes and returns no cache for"):
            model.generate(
                ids,
                max_new_tokens=4,
                strategy="autoregressive",
                return_dict_in_generate=True,
                return_past_key_values=True,
            )
    assert set(STATEFUL) < set(EVERY)


def hybrid_of(name: str) -> Any:
    """A model with control tokens, so that nothing but its passes is in the way."""
    model = stateful(name)
    model.generation_config.eos_token_id = 40
    model.config.hf_hybrid = hybrid("llama").config.hf_hybrid
    return model
