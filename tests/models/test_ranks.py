"""Which processes share a model, and which of them read the same batch.

Bugs these tests catch: an ordinary process that asks others; a seed shared by processes that read batches of their own
(their answers would be the same), or not shared by those that read one; drafts that follow from measured times where
passes are collective; products of few rows that were measured in each process.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_for_tests import hybrid, tiny

from hf_hybrid.decoding.drafting import Drafting
from hf_hybrid.models import products, ranks
from hf_hybrid.models.cost_model import GuessedCosts
from hf_hybrid.models.products import FewRows
from hf_hybrid.models.ranks import Ranks


class Mesh:
    """As a DeviceMesh, of groups that are tuples of processes."""

    def __init__(self, names: tuple[str, ...] | None, groups: list[tuple[int, ...]]):
        self.mesh_dim_names, self.groups, self.ndim = names, groups, len(groups)

    def size(self) -> int:
        return int(torch.tensor([len(group) for group in self.groups]).prod())

    def get_group(self, number: int) -> tuple[int, ...]:
        return self.groups[number]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four processes."""
    monkeypatch.setattr(ranks, "processes", lambda: 4)
    monkeypatch.setattr(products, "processes", lambda: 4)
    monkeypatch.setattr(ranks.distributed, "get_process_group_ranks", lambda group: list(group))


def test_an_ordinary_process_is_alone() -> None:
    model = tiny("llama")
    found = Ranks(model, torch.device("cpu"), synced=True)
    assert not found.shared and not found.synced
    assert found.agreed(7) == 7
    assert found.others_go_on(True) and not found.others_go_on(False)


def test_processes_with_a_whole_model_each_ask_nobody(world: None) -> None:
    found = Ranks(tiny("llama"), torch.device("cpu"))
    assert not found.shared and not found.synced and found.agreed(7) == 7


@pytest.mark.parametrize(
    ("names", "groups", "same"),
    [
        (("tp",), [(0, 1, 2, 3)], [(0, 1, 2, 3)]),
        (None, [(0, 1, 2, 3)], [(0, 1, 2, 3)]),
        (("pp", "fsdp", "tp"), [(0,), (0, 2), (0, 1)], [(0, 1)]),
        (("pp", "fsdp", "tp"), [(0, 2), (0,), (0, 1)], [(0, 2), (0, 1)]),
        (("dp_replicate", "fsdp"), [(0, 2), (0, 1)], []),
    ],
)
def test_who_reads_the_same_batch(
    world: None, names: tuple[str, ...] | None, groups: list[tuple[int, ...]], same: list[tuple[int, ...]]
) -> None:
    model = tiny("llama")
    model._device_mesh = Mesh(names, groups)
    found = Ranks(model, torch.device("cpu"))
    assert found.shared
    assert found._groups == same


def test_a_mesh_of_one_process_shares_nothing(world: None) -> None:
    model = tiny("llama")
    model._device_mesh = Mesh(("tp",), [(0,)])
    assert not Ranks(model, torch.device("cpu")).shared


def test_gathered_weights_wait_unless_told_not_to(world: None) -> None:
    model = tiny("llama")
    model.lm_head.weight.ds_id = 3  # as DeepSpeed's ZeRO-3 marks a parameter
    assert Ranks(model, torch.device("cpu")).synced
    told = Ranks(model, torch.device("cpu"), synced=False)
    assert told.shared and not told.synced
    assert told.agreed(7) == 7  # each has a batch of its own


def test_products_are_the_hosts_own_among_several(world: None) -> None:
    assert FewRows(tiny("llama").float(), torch.device("cpu"), torch.float32).kind == "packed"


def test_no_draft_follows_from_times_where_passes_are_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Drafting] = []
    original = Drafting.measured

    def measured(self: Drafting, texts: int, rows: int, written: float, seconds: float) -> None:
        seen.append(self)
        original(self, texts, rows, written, seconds * 10.0 ** (len(seen) % 7))

    monkeypatch.setattr(Drafting, "measured", measured)
    monkeypatch.setattr(ranks, "processes", lambda: 2)
    model, prompt = hybrid(seed=13), torch.tensor([[3, 7, 9, 2, 11, 3, 7, 9, 2, 11]])
    model._device_mesh = Mesh(("dp",), [(0, 1)])
    options: dict[str, Any] = {"strategy": "speculative", "return_dict_in_generate": True}
    for drafter in ("suffix", "self", tiny("llama", num_hidden_layers=1, seed=13)):
        passes = []
        for _ in range(2):
            if not isinstance(drafter, str):  # what is known of its drafts outlives a call
                drafter = tiny("llama", num_hidden_layers=1, seed=13)
            rich = model.generate(prompt, drafter=drafter, max_new_tokens=40, **options)
            passes.append(rich.report[0].drafting.passes)
        assert passes[0] == passes[1] and any(drafted for drafted, *_ in passes[0])
    assert all(isinstance(drafting.costs, GuessedCosts) for drafting in seen) and seen
    assert all(drafting.lengths.spent < 1000 for drafting in seen)  # passes of one row, not seconds of this machine
