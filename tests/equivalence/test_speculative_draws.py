"""Theorem 4 for sampling, with 100,000 draws for every drafter and rule: what the pipeline writes follows the law of
the model.

A text is a function of its seed, so the claim has two halves. A slow-motion oracle of each rule (``slow_motion.py``: a
vocabulary of six, four tokens, temperature, top-p and a repetition penalty) draws 100,000 texts at once, which a
chi-square test compares with the exact law. And the pipeline writes, seed for seed, what the oracle says: with shared
noise that is plain sampling, whoever drafts.

False alarms: 16 chi-square tests here and 8 in ``test_speculative_law.py``, at 1e-4 each, so 2.4e-3 for all together
(and the seeds are fixed: they fail always or never).

Bugs these tests catch: those of ``test_speculative_law.py``, at effects ten times smaller; noise that is not the one
that the rule names; a drafter whose probabilities are not those it drew from, or that depend on other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_hybrid import DiffusionDrafter, Draft, Drafter, ModelDrafter, SuffixDrafter, SuffixMemory, Text, TreeDrafter
from tests.equivalence import slow_motion
from tests.equivalence.slow_motion import LENGTH, MODELS, table, written
from tests.equivalence.test_speculative_law import HORIZON, PENALISED, PROMPT, VOCAB, WARPED, Stubborn, exact, excess

DRAWS, SHARED, REJECTED = 100_000, 500, 300
"""Texts of an oracle, and of the pipeline by either rule."""
SETTINGS = {"warped": WARPED, "penalised": PENALISED}
THRESHOLD = 0.25  # of drafts of the model's own window: low enough for some, high enough for some that are cut


def copying() -> SuffixDrafter:
    """With texts of earlier calls."""
    memory = SuffixMemory()
    for text in ([3, 1, 4, 2, 5, 0, 3], [1, 4, 1, 1, 2], [0, 5, 3, 2, 2, 4, 4]):
        memory.add(text)
    return SuffixDrafter(memory)


class Apart(Drafter):
    """A drafter of its own for every text, so that a text does not depend on those beside it."""

    def __init__(self, make: Callable[[], Drafter]):
        self.make, self.own = make, dict[Text, Drafter]()

    def prepare(self, model: Any, vocab_size: int, batch_size: int) -> None:
        self.ready = (model, vocab_size)

    def begin(self, text: Text) -> None:
        self.own[text] = self.make()
        self.own[text].prepare(*self.ready, 1)
        self.own[text].begin(text)

    def propose(self, texts: Sequence[Text], length: int, sampler: Any) -> list[Draft]:
        return [self.own[text].propose([text], length, sampler)[0] for text in texts]

    def learn(self, text: Text, draft: Draft, accepted: int, chosen: Sequence[int]) -> None:
        self.own[text].learn(text, draft, accepted, chosen)

    def end(self, text: Text) -> None:
        self.own.pop(text).end(text)


class Forked(Drafter):
    """Drafts the same tree always; its first branch is the draft of ``Stubborn``."""

    name = "forked"

    def propose(self, texts: Sequence[Text], length: int, sampler: Any) -> list[Draft]:
        return [Draft([2, 4, 5, 3, 0, 1], parents=(-1, -1, 0, 1, 2, 1), ranks=(0, 1, 0, 0, 0, 1))] * len(texts)


def small() -> ModelDrafter:
    return ModelDrafter(MODELS["smaller"](), least_chance=0.0)


def window() -> DiffusionDrafter:
    return DiffusionDrafter(MODELS["window"](), window=LENGTH - 1, least_chance=0.0)


def code_of(ids: Tensor) -> Tensor:
    """Codes ``(n,)`` of prompts with answers ``(n, 3 + HORIZON)``."""
    return (ids[:, 3:] * VOCAB ** torch.arange(HORIZON - 1, -1, -1)).sum(dim=1)


def drafted(name: str, target: str, drafter: Any, count: int, **options: Any) -> Any:
    """What the pipeline writes for the seeds 0 to ``count``."""
    return MODELS[target]().generate(
        PROMPT,
        strategy="speculative",
        drafter=drafter,
        draft_length=LENGTH,
        window_length=LENGTH,
        draft_threshold=THRESHOLD,
        adaptive=False,
        max_new_tokens=HORIZON,
        num_return_sequences=count,
        seed=0,
        return_dict_in_generate=True,
        **options,
        **SETTINGS[name],
    )


@cache
def plain(name: str, target: str) -> Tensor:
    """Plain sampling, ``(SHARED, 3 + HORIZON)``."""
    options = {"max_new_tokens": HORIZON, "num_return_sequences": SHARED, "seed": 0, **SETTINGS[name]}
    return MODELS[target]().generate(PROMPT, strategy="autoregressive", **options)


def follows(code: Tensor, name: str, target: str) -> float:
    """Below 1: the texts follow the law of the model (``excess``)."""
    counts = torch.bincount(code, minlength=VOCAB**HORIZON).double()
    return excess(counts, exact(SETTINGS[name], MODELS[target]()))


def tables(name: str, target: str) -> list[Tensor]:
    return table(target, SETTINGS[name].get("repetition_penalty", 1.0))


def share(found: Any) -> float:
    """Of drafted tokens that were tried, those that accepted."""
    drafting = [report.drafting for report in found.report]
    return sum(sum(d.accepted) for d in drafting) / max(1, sum(sum(d.tried) for d in drafting))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("target", ["target", "hybrid"])
def test_plain_sampling_follows_the_law(target: str, name: str) -> None:
    code = slow_motion.plain(tables(name, target), DRAWS)
    assert follows(code, name, target) < 1
    assert torch.equal(code_of(plain(name, target)), code[:SHARED])


DRAFTERS: dict[str, tuple[str, Callable[[], Any], bool]] = {
    "suffix": ("target", lambda: "suffix", False),
    "suffix with memory": ("target", copying, False),
    "stubborn": ("target", Stubborn, False),
    "model": ("target", small, False),
    "diffusion": ("target", window, False),
    "self": ("hybrid", lambda: "self", False),
    "tree of a model": ("target", lambda: TreeDrafter(small()), True),
    "tree of a diffusion drafter": ("target", lambda: TreeDrafter(window()), True),
    "tree of a suffix drafter": ("target", lambda: TreeDrafter(SuffixDrafter()), False),
    "tree of one's own": ("target", Forked, True),
}
"""Name -> model, drafter, True: drafts are trees."""


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", DRAFTERS)
def test_with_shared_noise_the_text_is_that_of_plain_sampling(kind: str, name: str) -> None:
    """Five hundred seeds, token for token."""
    target, make, trees = DRAFTERS[kind]
    found = drafted(name, target, make(), SHARED)
    assert torch.equal(found.sequences, plain(name, target))
    assert (sum(report.drafting.trees for report in found.report) > SHARED // 2) == trees
    assert 0.02 < share(found) < 0.98, "drafts are accepted and rejected"


Oracle = Callable[[], slow_motion.Drawn]
CHAIN = "drafts are chains: acceptance='rejection' knows the probabilities of a chain alone"
FROM_MODEL: Oracle = lambda: slow_motion.Drawn(slow_motion.smaller_model)  # noqa: E731
FROM_WINDOW: Oracle = lambda: slow_motion.Drawn(slow_motion.window_of_another)  # noqa: E731
FIXED: Oracle = lambda: slow_motion.Same(DRAWS, [2, 5, 0])  # noqa: E731
RULES: dict[str, tuple[str, Oracle, dict[str, Callable[[], Any]]]] = {
    "model": ("target", FROM_MODEL, {"model": small, "tree": lambda: TreeDrafter(small())}),
    "diffusion": ("target", FROM_WINDOW, {"diffusion": window, "tree": lambda: TreeDrafter(window())}),
    "stubborn": ("target", FIXED, {"stubborn": Stubborn, "tree": Forked}),
    "suffix": (
        "target",
        lambda: slow_motion.Copies(DRAWS, SuffixDrafter),
        {"suffix": lambda: Apart(SuffixDrafter)},
    ),
    "suffix with memory": (
        "target",
        lambda: slow_motion.Copies(DRAWS, copying),
        {"memory": lambda: Apart(copying), "tree": lambda: TreeDrafter(Apart(copying))},
    ),
    "self": ("hybrid", lambda: slow_motion.OwnWindow(DRAWS, THRESHOLD), {"self": lambda: "self"}),
}
"""Name -> model, oracle, drafters that write what it says."""


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("rule", RULES)
def test_with_rejection_draws_follow_the_law_and_are_those_of_the_pipeline(rule: str, name: str) -> None:
    target, oracle, drafters = RULES[rule]
    code = written(tables(name, target), oracle(), DRAWS)
    assert follows(code, name, target) < 1
    for kind, make in drafters.items():
        found = drafted(name, target, make(), REJECTED, acceptance="rejection")
        assert torch.equal(code_of(found.sequences), code[:REJECTED])
        assert 0.02 < share(found) < 0.98, "drafts are accepted and rejected"
        assert all(report.drafting.trees == 0 for report in found.report)
        notes = [CHAIN] if kind == "tree" and "suffix" not in rule else []
        assert all(report.fallbacks == notes for report in found.report), "a tree that is a chain says so"


def test_a_drafter_that_lies_about_its_probabilities_is_caught() -> None:
    liar = slow_motion.Drawn(slow_motion.smaller_model, honest=False)
    assert follows(written(tables("warped", "target"), liar, DRAWS), "warped", "target") > 10
