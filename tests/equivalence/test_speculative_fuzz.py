"""Theorem 4 for calls that were put together by chance: drafters that know, guess, lie or break, trees and chains of
any shape, and whatever else a call may say, beside ``strategy="autoregressive"``.

Bugs these tests catch: those that need two things at once, as a tree in a batch of unequal prompts with a penalty, a
stop string inside a branch, a draft that is longer than the room behind a token in doubt, or a stream of a tree.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from hf_hybrid import DiffusionDrafter, Draft, Drafter, ModelDrafter, SuffixDrafter, SuffixMemory, Text, TreeDrafter
from tests.equivalence.test_speculative import model, smaller
from tests.models_for_tests import CONTROL, TEXT, VOCAB, left_padded, tiny, words


class Wild(Drafter):
    """Beginnings of the answer, nonsense, ends, twins, and more than there is room for, as chains and as trees.

    Args:
        answers: of every row of the call. draws: what chance says.
    """

    name = "wild"

    def __init__(self, answers: list[list[int]], draws: random.Random):
        self.answers, self.draws = answers, draws
        self.right, self.size, self.trees = draws.random(), draws.choice((3, 12, 40)), draws.random()

    def propose(self, texts: Sequence[Text], length: int, sampler: Any) -> list[Draft]:
        return [self.draft(text) for text in texts]

    def draft(self, text: Text) -> Draft:
        draw, ends = self.draws, [CONTROL.noise.end, *model().generation_config.eos_token_id]
        answer = self.answers[text.index][len(text.tokens) - text.prompt_length :]
        chain = draw.random() >= self.trees
        tokens, parents, depths = list[int](), list[int](), [0]
        for i in range(draw.randint(0, self.size)):
            parent = i - 1 if chain else draw.choice((-1, i - 1, draw.randint(-1, i - 1)))
            depth = depths[parent + 1]
            right = draw.random() < self.right and depth < len(answer)
            tokens.append(answer[depth] if right else draw.choice((draw.randrange(VOCAB), draw.choice(ends))))
            parents.append(parent)
            depths.append(depth + 1)
        if chain:
            return Draft(tokens, bucket=draw.randrange(3))
        return Draft(tokens, parents=tuple(parents), ranks=tuple(draw.randrange(3) for _ in tokens))


class Listener(BaseStreamer):
    """Keeps what it gets."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


@cache
def broken() -> Any:
    host = tiny("llama", seed=5)
    host.model.norm.weight.data[3] = math.nan
    return host


@cache
def memory() -> SuffixMemory:
    return SuffixMemory(max_tokens=200)


def call(draw: random.Random) -> dict[str, Any]:
    """What a call says of anything but its drafter."""
    prompts = tuple(tuple(draw.choices(TEXT, k=draw.randint(1, 9))) for _ in range(draw.choice((1, 1, 2, 4))))
    settings: dict[str, Any] = {**left_padded(prompts), "max_new_tokens": draw.choice((1, 2, 5, 12, 20))}
    chance: dict[str, Any] = {"do_sample": True, "seed": draw.randrange(1 << 40)}
    chance |= {"temperature": draw.choice((0.3, 1.0, 1.6)), "top_k": draw.choice((0, 5))}
    chance |= {"top_p": draw.choice((1.0, 0.8))}
    some: list[dict[str, Any]] = [
        {"repetition_penalty": draw.choice((0.7, 1.5))},
        {"no_repeat_ngram_size": draw.choice((1, 2))},
        {"min_new_tokens": min(draw.choice((1, 4, 9)), settings["max_new_tokens"])},
        {"bad_words_ids": [[draw.choice(TEXT)] for _ in range(9)] + [[draw.choice(TEXT), draw.choice(TEXT)]]},
        {"stop_strings": [f"w{draw.choice(TEXT):02}" for _ in range(6)], "tokenizer": words()},
        {"eos_token_id": [CONTROL.noise.end, *draw.sample(TEXT, 4)]},
    ]
    for option in (chance, *some):
        if draw.random() < (0.6 if option is chance else 0.25):
            settings |= option
    return settings


def drafter_of(draw: random.Random, answers: list[list[int]]) -> Any:
    """Most often a wild one, which is right now and then."""
    inner: list[Any] = [ModelDrafter(smaller(), least_chance=draw.choice((0.0, 0.3)))]
    inner += [DiffusionDrafter(model(), window=draw.randint(1, 6), least_chance=0.0), broken(), SuffixDrafter(memory())]
    others = ["self", "suffix", *inner]
    others += [TreeDrafter(one, width=draw.randint(2, 5), size=draw.choice((2, 9, 40))) for one in inner]
    return Wild(answers, draw) if draw.random() < 0.5 else draw.choice(others)


@cache
def compare(number: int) -> Any:
    """One call by chance, written plainly and with drafts: both texts, and the output of the latter."""
    draw = random.Random(number)
    settings = call(draw)
    width, alone = settings["input_ids"].shape[1], len(settings["input_ids"]) == 1
    expected = model().generate(**settings, strategy="autoregressive")
    listener = Listener() if alone else None
    found = model().generate(
        **settings,
        strategy="speculative",
        drafter=drafter_of(draw, expected[:, width:].tolist()),
        adaptive=draw.random() < 0.3,
        draft_length=draw.choice((1, 3, 24)),
        window_length=draw.randint(1, 6),
        draft_threshold=draw.choice((0.0, 0.5)),
        recheck_margin=draw.choice((None, 0.0, 0.3)),
        streamer=listener,
        return_dict_in_generate=True,
    )
    if listener is not None:
        assert listener.tokens == [*found.sequences[0].tolist(), -1]
    return expected, found


@pytest.mark.parametrize("number", range(60))
def test_a_call_by_chance_writes_the_text_of_plain_decoding(number: int) -> None:
    expected, found = compare(number)
    assert torch.equal(found.sequences, expected)
    for report in found.report:
        drafting = report.drafting
        assert drafting.rounds + drafting.off + drafting.empty + drafting.rechecked == report.num_forwards
        assert sum(drafting.accepted) == sum(report.accepted_per_round)


def test_the_calls_are_of_every_kind() -> None:
    """Else they would prove little."""
    reports = [report for number in range(60) for report in compare(number)[1].report]
    drafters = {report.drafting.drafter for report in reports}
    assert drafters >= {"wild", "self", "suffix", "model", "diffusion", "tree of model", "tree of diffusion"}
    assert sum(report.drafting.trees for report in reports) > 10  # 35; measured times may leave some out
