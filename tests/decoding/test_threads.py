"""One model, one drafter and one memory in several calls at the same time.

Bugs these tests catch: what a drafter knows of its texts kept where another call clears it or finds its own rows; a
memory that grows while a match walks through it; a drafter that stays taken behind a call that was broken off; a
layer that looks foreign because another thread is in a pass.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from threading import Barrier, BrokenBarrierError
from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from hf_hybrid import (
    DiffusionDrafter,
    Draft,
    Drafter,
    DrafterError,
    ModelDrafter,
    SuffixDrafter,
    SuffixMemory,
    Text,
    TreeDrafter,
    generate_many,
)
from hf_hybrid.models.products import FewRows, _forward
from tests.models_for_tests import PROMPTS, tiny, writer

OPTIONS: dict[str, Any] = {"strategy": "speculative", "adaptive": False, "max_new_tokens": 24, "do_sample": False}


class Rows(Drafter):
    """Knows its texts by their row, in a dict that is made once: so does many a drafter."""

    def __init__(self) -> None:
        self.lengths: dict[int, int] = {}
        self.asked = 0

    def prepare(self, model: Any, vocab_size: int, batch_size: int) -> None:
        self.lengths.clear()

    def begin(self, text: Text) -> None:
        assert text.index not in self.lengths
        self.lengths[text.index] = len(text.tokens)

    def propose(self, texts: Sequence[Text], length: int, sampler: Any) -> list[Draft]:
        self.asked += 1
        return [Draft(text.tokens[: self.lengths[text.index]][:3]) for text in texts]

    def end(self, text: Text) -> None:
        del self.lengths[text.index]


DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "suffix": SuffixDrafter,
    "memory": lambda: SuffixDrafter(SuffixMemory(200)),
    "model": lambda: ModelDrafter(tiny("llama", seed=5), least_chance=0.0),
    "diffusion": lambda: DiffusionDrafter(writer(True), window=4, least_chance=0.0),
    "tree": lambda: TreeDrafter(ModelDrafter(tiny("llama", seed=5), least_chance=0.0)),
    "by row": Rows,
}


@cache
def expected() -> dict[int, list[int]]:
    answers = generate_many(writer(False), PROMPTS, strategy="autoregressive", max_new_tokens=24, do_sample=False)
    return {answer.index: answer.tokens for answer in answers}


@pytest.mark.parametrize("name", DRAFTERS)
def test_calls_that_take_turns(name: str) -> None:
    drafter = DRAFTERS[name]()
    calls = [generate_many(writer(False), PROMPTS, batch_size=2, drafter=drafter, **OPTIONS) for _ in range(2)]
    found: list[dict[int, list[int]]] = [{}, {}]
    for pair in zip(*calls, strict=True):
        for texts, answer in zip(found, pair, strict=True):
            texts[answer.index] = answer.tokens
    assert found == [expected(), expected()]


class Step(BaseStreamer):
    """Goes on when the other call is as far."""

    def __init__(self, together: Barrier):
        self.together = together

    def put(self, value: torch.Tensor) -> None:
        with suppress(BrokenBarrierError):
            self.together.wait(timeout=20)

    def end(self) -> None:
        self.together.abort()


def in_step(drafter: Drafter, host: Any = None) -> list[list[int]]:
    """The answers to two prompts, written in two threads that take turns."""
    together = Barrier(2)

    def write(row: int) -> list[int]:
        ids = torch.tensor([PROMPTS[row]])
        step = Step(together)
        try:
            out = (host or writer(False)).generate(ids, drafter=drafter, streamer=step, **OPTIONS)
        finally:
            step.end()
        return out[0, ids.shape[1] :].tolist()

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(write, range(2)))


@pytest.mark.parametrize("name", DRAFTERS)
def test_calls_in_threads(name: str) -> None:
    drafter = DRAFTERS[name]()
    for _ in range(2):  # a drafter is free again behind both
        assert in_step(drafter) == [expected()[0], expected()[1]]
    alone = writer(False).generate(torch.tensor([PROMPTS[2]]), drafter=drafter, **OPTIONS)
    assert alone[0, len(PROMPTS[2]) :].tolist() == expected()[2]


def test_who_gets_the_drafter_itself() -> None:
    drafter = Rows()
    first = generate_many(writer(False), PROMPTS[:2], batch_size=1, drafter=drafter, **OPTIONS)
    next(first)
    asked = drafter.asked
    writer(False).generate(torch.tensor([PROMPTS[2]]), drafter=drafter, **OPTIONS)
    assert drafter.asked == asked, "a call beside one that is not over works with a copy"
    first.close()  # type: ignore[attr-defined]
    writer(False).generate(torch.tensor([PROMPTS[2]]), drafter=drafter, **OPTIONS)
    assert drafter.asked > asked, "behind a call that was broken off it is free"


def test_a_drafter_inside_another_is_taken_with_it() -> None:
    inner = Rows()
    trees = [TreeDrafter(inner), TreeDrafter(inner)]
    calls = [generate_many(writer(False), PROMPTS, batch_size=2, drafter=tree, **OPTIONS) for tree in [*trees, inner]]
    for answers in zip(*calls, strict=True):
        assert all(answer.tokens == expected()[answer.index] for answer in answers)


def test_a_drafter_that_cannot_be_copied_says_so() -> None:
    class Single(Rows):
        def __copy__(self) -> Any:
            raise TypeError("a socket")

    drafter = Single()
    first = generate_many(writer(False), PROMPTS, batch_size=1, drafter=drafter, **OPTIONS)
    next(first)
    message = r"Single serves another call .*cannot be copied \(a socket\); give each call a drafter of its own"
    with pytest.raises(DrafterError, match=message):
        writer(False).generate(torch.tensor([PROMPTS[2]]), drafter=drafter, **OPTIONS)
    assert [answer.tokens for answer in first] == [expected()[i] for i in (1, 2, 3)]


def test_a_memory_that_is_filled_while_it_is_read() -> None:
    memory = SuffixMemory(300)
    drafter = SuffixDrafter(memory)

    def fill(number: int) -> None:
        for i in range(400):
            memory.add([(number + i + j) % 40 for j in range(20)])
            if i % 50 == 0:
                assert sum(map(len, memory.texts)) == len(memory)

    with ThreadPoolExecutor(3) as pool:
        filling = [pool.submit(fill, number) for number in range(2)]
        texts = [pool.submit(in_step, drafter).result() for _ in range(3)]
        for done in filling:
            done.result()
    assert texts == [[expected()[0], expected()[1]]] * 3
    assert len(memory) == sum(map(len, memory.texts)) <= 300


def test_a_memory_is_copied_and_pickled() -> None:
    memory = SuffixMemory(100)
    memory.add([1, 2, 3])
    for other in (copy.copy(memory), copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        other.add([4])
        assert other.texts == [[1, 2, 3], [4]] and memory.texts == [[1, 2, 3]]


def test_a_layer_in_a_pass_of_another_thread_is_no_foreign_one() -> None:
    host = tiny("llama", hidden_size=128, intermediate_size=256).float()  # large enough to count
    first = FewRows(host, torch.device("cpu"), torch.float32)
    first.most = 8
    layers = FewRows._layers(host)
    assert layers
    first._forwards = [(layer.__dict__, _forward(layer, 8)) for layer in layers]
    with first.of(4):
        assert FewRows._layers(host) == layers
    layers[0].forward = lambda x: x  # type: ignore[method-assign]
    assert FewRows._layers(host) == layers[1:]
