"""Block diffusion against a loop of un-cached forwards: prefix, whole block, the same selection.

Bugs these tests catch: a window that sees itself in the cache, or a clean row that a window saw before it changed; a
block that is shown with masks where tokens were settled; an ``eos`` inside a block after which text goes on, or before
which text is lost; a schedule that takes more passes than it may; a last block that is too long or too short; a random
order without its seed, or one order for all blocks.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import TemperatureLogitsWarper
from transformers.generation.streamers import BaseStreamer

from tests.models_for_tests import CONTROL, VOCAB, hybrid
from tests.oracles import Denoising, Pick, clean, write_noisy

PROMPT = (3, 7, 9, 2, 11)
GREEDY = Pick()


@cache
def model(eos: float = 0.0, name: str = "llama") -> Any:
    return hybrid(name, seed=31, favours={CONTROL.noise.end: eos})


def slow(host: Any, new: int, how: Denoising, pick: Pick = GREEDY) -> list[int]:
    """New tokens of the oracle."""
    allowed = torch.ones(VOCAB, dtype=torch.bool)  # (vocab,), True: may be written
    allowed[[i for i in CONTROL.noise.banned if i != CONTROL.noise.filler]] = False
    ends = {CONTROL.noise.end: True, CONTROL.noise.filler: False}
    rows = write_noisy(host, [], clean(PROMPT), {}, allowed, ends, new, pick, how, CONTROL.noise.mask)
    return [row.token for row in rows[len(PROMPT) :]]


def written(host: Any, new: int, how: Denoising, **host_arguments: Any) -> tuple[list[int], Any]:
    """New tokens of ``generate`` and its report."""
    output = host.generate(
        torch.tensor([PROMPT]),
        strategy="block_diffusion",
        max_new_tokens=new,
        return_dict_in_generate=True,
        **{**vars(how), **host_arguments},
    )
    return output.sequences[0, len(PROMPT) :].tolist(), output.report[0]


def masked_diffusion(host: Any, new: int, steps: int) -> list[int]:
    """Plain masked diffusion of ``new`` positions and one for the end, the surest ``(new + 1) / steps`` in each step.

    As in the strategy, the first position of the first step is the causal token."""
    tokens, size = [CONTROL.noise.mask] * (new + 1), new + 1
    for step in range(1, steps + 1):
        ids = torch.tensor([[*PROMPT, *tokens]])
        length = ids.shape[1]
        sees = torch.ones(length, length, dtype=torch.bool).tril()
        sees[len(PROMPT) :, :] = True
        logits = host(ids, attention_mask=sees[None, None], position_ids=torch.arange(length)[None]).logits[0]
        logits[:, list(CONTROL.noise.banned)] = -torch.inf
        first = int(logits[len(PROMPT) - 1].argmax())
        probability, best = logits[len(PROMPT) :].softmax(dim=-1).max(dim=-1)  # (size,)
        still = [i for i, token in enumerate(tokens) if token == CONTROL.noise.mask]
        still.sort(key=lambda i: -float(probability[i]))
        for i in still[: len(still) - (size - round(size * step / steps))]:
            tokens[i] = int(best[i])
        if step == 1:
            tokens[0] = first
    return tokens[:new]


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_one_block_is_plain_masked_diffusion(steps: int) -> None:
    # Never an end, so that nothing but selection matters; a threshold of 1 is reached by nobody.
    host = model(-99.0)
    host.get_output_embeddings().bias.data[CONTROL.noise.filler] = -99.0
    how = Denoising(64, "block", 1.0, max_denoising_steps=steps)
    with torch.no_grad():
        assert written(host, 14, how)[0] == masked_diffusion(host, 14, steps)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("commit", ["prefix", "block"])
@pytest.mark.parametrize(
    "settings",
    [
        {"window_length": 4, "confidence_threshold": 0.3},
        {"window_length": 7, "confidence_threshold": 0.0},
        {"window_length": 5, "confidence_threshold": 1.0},
        {"window_length": 1},
        {"window_length": 8, "confidence_threshold": 1.0, "max_denoising_steps": 3},
        {"window_length": 6, "confidence_threshold": 0.2, "selection": "margin"},
        {"window_length": 6, "confidence_threshold": 0.5, "selection": "entropy"},
        {"window_length": 6, "selection": "random", "seed": 5},
        {"window_length": 7, "selection": "random", "max_denoising_steps": 3, "seed": 1 << 41},
    ],
    ids=str,
)
def test_several_blocks_equal_uncached_blocks(name: str, commit: str, settings: dict[str, Any]) -> None:
    how = Denoising(commit=commit, **settings)
    assert written(model(name=name), 20, how)[0] == slow(model(name=name), 20, how)


@pytest.mark.parametrize("commit", ["prefix", "block"])
def test_sampled_blocks_equal_uncached_blocks(commit: str) -> None:
    how, pick = Denoising(5, commit, 0.3), Pick(23, (TemperatureLogitsWarper(1.3),))
    ids, _ = written(model(), 20, how, do_sample=True, temperature=1.3, top_k=0, seed=23)
    assert ids == slow(model(), 20, how, pick) != slow(model(), 20, how)


class Unmasking(BaseStreamer):
    """Notes the order in which the positions of every block are filled; the first one is that of the clean row."""

    def __init__(self, size: int):
        self.fresh = set(range(1, size))
        self.left, self.order = set(self.fresh), list[int]()
        self.orders: list[tuple[int, ...]] = []

    def put(self, value: torch.Tensor) -> None: ...

    def put_draft(self, value: torch.Tensor) -> None:
        left = {i for i, token in enumerate(value.tolist()) if token == CONTROL.noise.mask}
        if 0 in left:  # the next block
            self.end()
        else:
            self.order += self.left - left
            self.left = left

    def end(self) -> None:
        (last,) = self.left
        self.orders.append((*self.order, last))
        self.left, self.order = set(self.fresh), []


def test_a_random_order_is_drawn_with_the_seed() -> None:
    """Every block has an order of its own, another seed other ones, and every position comes first now and then."""
    size, firsts = 5, list[int]()
    host = hybrid(seed=31, favours={CONTROL.noise.end: -99.0, CONTROL.noise.filler: -99.0})
    how: dict[str, Any] = {"strategy": "block_diffusion", "commit": "block", "selection": "random", "window_length": 5}

    def orders(seed: int) -> list[tuple[int, ...]]:
        streamer = Unmasking(size)
        host.generate(torch.tensor([PROMPT]), max_new_tokens=4 * size, seed=seed, streamer=streamer, **how)
        return streamer.orders

    for seed in range(20):
        found = orders(seed)
        assert len(found) == 4 and all(sorted(order) == [1, 2, 3, 4] for order in found)
        assert len(set(found)) > 1 and found == orders(seed)
        firsts += [order[0] for order in found]
    # 80 blocks and four positions: 20 each, give or take 16, which are four standard deviations.
    assert all(abs(firsts.count(position) - 20) < 16 for position in range(1, size))
    # Sequences of a batch have seeds of their own.
    batch = host.generate(torch.tensor([PROMPT] * 4), max_new_tokens=4 * size, seed=0, **how)
    assert len({*map(tuple, batch.tolist())}) > 1


@pytest.mark.parametrize("commit", ["prefix", "block"])
def test_an_end_inside_a_block_ends_the_answer(commit: str) -> None:
    ends = 0
    for eos in (3.0, 5.0, 7.0):
        for threshold in (0.1, 0.9):
            how = Denoising(8, commit, threshold)
            ids, _ = written(model(eos), 30, how)
            assert ids == slow(model(eos), 30, how)
            assert CONTROL.noise.end not in ids[:-1] and not set(CONTROL.noise.banned) & set(ids)
            ends += ids[-1] == CONTROL.noise.end and len(ids) % 8 > 0
    assert ends, "an end inside a block really happens"


@pytest.mark.parametrize("commit", ["prefix", "block"])
def test_an_answer_that_its_end_has_no_room_in_was_cut(commit: str) -> None:
    host, how = hybrid(seed=7, favours={CONTROL.noise.end: 5.0}), Denoising(8, commit, 0.3)
    whole, report = written(host, 40, how)
    assert whole[-1] == CONTROL.noise.end and report.ended == "eos" and len(whole) < 40
    for new in range(1, len(whole) + 1):
        text, report = written(host, new, how)
        assert len(text) <= new and report.ended == ("eos" if text[-1] == CONTROL.noise.end else "length"), new
    text, report = written(host, len(whole) - 1, how)
    assert text == whole[:-1] and report.ended == "length"


@pytest.mark.parametrize("new", [1, 7, 8, 9, 20])
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_a_schedule_bounds_the_passes_of_every_block(new: int, steps: int) -> None:
    how = Denoising(8, "block", 1.0, max_denoising_steps=steps)
    host = hybrid(seed=31, favours={CONTROL.noise.end: -99.0, CONTROL.noise.filler: -99.0})
    ids, report = written(host, new, how)
    assert len(ids) == new
    assert report.num_forwards <= steps * (new // 8 + 1)  # one block more when the end is just behind a full one
