"""A model, its head and its drafter need not have the same ids.

Bugs these tests catch: a drafter that is fed an id it has no row for; an id of the prompt that the head does not have
in a draft, a tree, a memory or its file; an end beyond the vocabulary that is looked for in the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hf_hybrid
from hf_hybrid import DiffusionDrafter, Draft, Drafter, ModelDrafter, SuffixDrafter, SuffixMemory, Text, TreeDrafter
from tests.models_for_tests import CONTROL, VOCAB, hybrid, tiny, writer

IDS = torch.tensor([[3, 7, 9, 2, 11, 3, 7, 9, 2, 11, 3, 7]])
PLACEHOLDERS = torch.tensor([[3, 7, 64, 65, 66, 9, 2, 11, 3, 7, 64, 65, 66, 9, 2, 11, 3, 7]])
FULL: dict[str, Any] = {"strategy": "speculative", "adaptive": False, "max_new_tokens": 24, "do_sample": False}
DRAWN: dict[str, Any] = {**FULL, "do_sample": True, "seed": 3, "acceptance": "rejection", "max_new_tokens": 12}


def narrow() -> Any:
    """Has a row for 41 of 61 ids."""
    return tiny("llama", seed=5, vocab_size=41)


def narrow_hybrid() -> Any:
    small = hybrid(seed=5, favours={}, vocab_size=61)
    table, head = small.get_input_embeddings(), small.get_output_embeddings()
    table.weight.data, table.num_embeddings = table.weight.data[:41], 41
    head.weight.data, head.bias.data, head.out_features = head.weight.data[:41], head.bias.data[:41], 41
    record = {name: 40 - i for i, name in enumerate(("mask_token_id", "par", "topic", "async", "sync", "spad"))}
    small.config.hf_hybrid = {**record, "lengths": [[2, 30]], "depends": []}
    small.config.vocab_size, small.generation_config.eos_token_id = 41, 29
    return small


def wide() -> Any:
    """Reads ids 61 to 69 and cannot write them."""
    host = hf_hybrid.enable(tiny("llama"))
    table = nn.Embedding(70, 32, dtype=torch.float64)
    table.weight.data[:VOCAB] = host.get_input_embeddings().weight.data
    host.set_input_embeddings(table)
    return host


def answer(host: Any, ids: torch.Tensor = IDS, **options: Any) -> list[list[int]]:
    return host.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    "drafter",
    [
        lambda: narrow(),
        lambda: ModelDrafter(narrow(), least_chance=0.0),
        lambda: TreeDrafter(ModelDrafter(narrow(), least_chance=0.0)),
        lambda: DiffusionDrafter(narrow_hybrid(), window=4, least_chance=0.0),
    ],
    ids=["model", "unsure", "tree", "diffusion"],
)
def test_a_drafter_with_fewer_ids(drafter: Any, rows: int) -> None:
    host = hf_hybrid.enable(tiny("llama"))
    host.generation_config.eos_token_id = None
    ids = torch.cat([IDS, IDS.flip(1)])[:rows]
    expected = answer(host, ids, max_new_tokens=24, do_sample=False)
    assert max(map(max, expected)) > 41, "ids that the drafter does not have are written"
    assert answer(host, ids, drafter=drafter(), **FULL) == expected
    drawn = answer(host, ids, drafter=drafter(), **DRAWN)
    assert len(drawn) == rows


class Copies(Drafter):
    """Copies the prompt from its third token, as a chain or beside a guess."""

    def __init__(self, tree: bool):
        self.tree = tree

    def propose(self, texts: Sequence[Text], length: int, sampler: Any) -> list[Draft]:
        copied = PLACEHOLDERS[0, :6].tolist()
        if not self.tree:
            return [Draft(copied) for _ in texts]
        return [Draft([*copied, 47], parents=(-1, 0, 1, 2, 3, 4, -1)) for _ in texts]


@pytest.mark.parametrize(
    "drafter",
    ["suffix", Copies(False), Copies(True), lambda: ModelDrafter(wide(), least_chance=0.0), narrow],
    ids=["suffix", "own chain", "own tree", "model that reads them", "model that does not"],
)
def test_ids_of_the_prompt_that_the_head_does_not_have(drafter: Any) -> None:
    host = wide()
    partner = drafter() if callable(drafter) else drafter
    expected = answer(host, PLACEHOLDERS, max_new_tokens=24, do_sample=False)
    assert answer(host, PLACEHOLDERS, drafter=partner, **FULL) == expected
    assert answer(host, PLACEHOLDERS, strategy="autoregressive", max_new_tokens=24, do_sample=False) == expected
    assert max(answer(host, PLACEHOLDERS, drafter=partner, **DRAWN)[0]) < VOCAB
    reading = host.generate(PLACEHOLDERS, drafter=partner, return_dict_in_generate=True, **FULL)
    if isinstance(partner, ModelDrafter):
        assert reading.report[0].drafting.rounds > 0, "it drafts behind them"


def test_a_memory_keeps_what_can_be_written(tmp_path: Path) -> None:
    memory, host = SuffixMemory(), wide()
    for _ in range(2):
        text = answer(host, PLACEHOLDERS, drafter=SuffixDrafter(memory), **FULL)[0]
    whole = [9, 2, 11, 3, 7]
    assert memory.texts == [[3, 7], whole, [*whole, *text]], "once, although it was written twice"
    memory.save(tmp_path / "memory.json")
    again = SuffixMemory.load(tmp_path / "memory.json")
    assert answer(host, PLACEHOLDERS, drafter=SuffixDrafter(again), **FULL) == [text]


def test_an_id_that_the_model_cannot_read_is_an_error() -> None:
    class Wrong(Copies):
        def propose(self, texts: Sequence[Text], length: int, sampler: Any) -> list[Draft]:
            return [Draft([9, 70], parents=(-1, 0) if self.tree else None) for _ in texts]

    for tree in (False, True):
        with pytest.raises(ValueError, match=r"Wrong drafted \[9, 70\]; a draft holds token ids \(int\) from 0 to 60"):
            answer(wide(), PLACEHOLDERS, drafter=Wrong(tree), **FULL)


@pytest.mark.parametrize("strategy", ["autoregressive", "speculative", "block_diffusion", "planned_diffusion"])
@pytest.mark.parametrize("ends", [99, [CONTROL.noise.end, 99]])
def test_an_end_beyond_the_vocabulary_is_never_written(strategy: str, ends: Any) -> None:
    host = writer(strategy == "planned_diffusion")
    options = {"max_new_tokens": 20, "min_new_tokens": 6, "do_sample": False, "eos_token_id": ends}
    found = answer(host, strategy=strategy, **options)
    if strategy in ("autoregressive", "speculative"):
        assert found == answer(host, **options)
    else:
        assert len(found[0]) > 0


IDS_THAT_ARE_NONE = [-1, [], [-1], VOCAB, 99, [CONTROL.noise.end, 99], [-1, -2]]


@pytest.mark.parametrize("strategy", ["autoregressive", "speculative"])
@pytest.mark.parametrize("stored", [True, False], ids=["stored", "given"])
@pytest.mark.parametrize("ends", IDS_THAT_ARE_NONE, ids=str)
@pytest.mark.parametrize("least", [0, 4])
def test_ends_that_are_no_token(strategy: str, stored: bool, ends: Any, least: int) -> None:
    host = hf_hybrid.enable(tiny("llama", seed=2))
    host.generation_config.eos_token_id, host.generation_config.pad_token_id = 27, 0
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": least or None, "do_sample": False}
    if stored:
        host.generation_config.eos_token_id = ends
    else:
        options["eos_token_id"] = ends
    ids = torch.tensor([[3, 7, 9, 2, 11], [5, 5, 5, 5, 5]])
    assert answer(host, ids, strategy=strategy, **options) == answer(host, ids, **options)


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "given"])
@pytest.mark.parametrize(("pad", "shown"), [(-1, 27), (VOCAB, VOCAB), (99, 99)])
def test_paddings_that_are_no_token(stored: bool, pad: int, shown: int) -> None:
    """The host reads them behind an answer that ended, and breaks where the model has no row for them."""
    host = hf_hybrid.enable(tiny("llama", seed=2))
    host.generation_config.eos_token_id, host.generation_config.pad_token_id = 27, pad if stored else 0
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, **({} if stored else {"pad_token_id": pad})}
    ids = torch.tensor([[3, 7, 9, 2, 11], [5, 5, 5, 5, 5]])
    first, second = answer(host, ids, strategy="autoregressive", **options)
    assert first == answer(host, ids[:1], **options)[0] and second == [27, *[shown] * 5]


def test_a_hybrid_model_passes_over_ends_that_are_none() -> None:
    host = hybrid(seed=13)
    host.generation_config.eos_token_id = [99, -1, CONTROL.noise.end]
    assert hf_hybrid.control_tokens(host) == CONTROL
