"""The masks of Slots against the row rule, over everything that is held and the rows of the pass.

Catches: columns that a commit forgot to draw, lines that keep what a span read before, rejected or padding rows that
stay visible, sequences that change their index and leave their slots behind, growth that loses what was drawn, and rows
that do not follow their own span (the short cut must not be taken for them).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_hybrid.core.rows import PADDING, Rows, visible
from hf_hybrid.models import slots as slots_module
from hf_hybrid.models.slots import Slots

SPANS = {1: [0], 2: [0], 3: [0, 1], 5: [0, 1, 2, 3]}


class Mirror:
    """What is held, as lists; the mask of a pass, from one call of the rule over all rows."""

    def __init__(self, slots: Slots):
        self.slots, self.held = slots, {}

    def expected(self, rows: Rows, chosen: np.ndarray, used: int) -> Tensor:
        active, width = rows.span.shape
        keys = Rows.clean(torch.zeros(active, used, dtype=torch.int64), torch.full((active, used), PADDING))
        for line in range(active):
            for slot, (position, span) in self.held.get(line, {}).items():
                keys.position[line, slot], keys.span[line, slot] = position, span
            for row, slot in enumerate(chosen[line].tolist()):
                for name in ("position", "span", "noisy", "anchor", "block"):
                    getattr(keys, name)[line, slot] = getattr(rows, name)[line, row]
        sees = visible(rows, keys, torch.from_numpy(self.slots.depends[:active]))
        for line in range(active):
            sees[line, torch.arange(width), torch.from_numpy(chosen[line])] = True
        return sees.unsqueeze(1)

    def hold(self, rows: Rows, chosen: np.ndarray, stays: np.ndarray) -> None:
        self.slots.hold(rows, chosen, stays)
        for line, row in zip(*np.nonzero(stays), strict=True):
            kept = (int(rows.position[line, row]), int(rows.span[line, row]))
            self.held.setdefault(int(line), {})[int(chosen[line, row])] = kept

    def swap(self, i: int, j: int) -> None:
        self.slots.swap(i, j)
        self.held[i], self.held[j] = self.held.get(j, {}), self.held.get(i, {})


def random_rows(g: torch.Generator, active: int, width: int, behind: int) -> Rows:
    """Rows of known spans; at or behind ``behind`` when it is not 0, else anywhere."""
    shape = (active, width)
    noisy = torch.rand(shape, generator=g) < 0.4
    span = torch.randint(PADDING, 4, shape, generator=g)
    position = behind + torch.randint(0, 3 if behind else 12, shape, generator=g)
    anchor = behind + torch.randint(0, 3 if behind else 12, shape, generator=g)
    return Rows(position, span, noisy, anchor, torch.randint(0, 2, shape, generator=g))


@pytest.mark.parametrize("few", [slots_module.FEW, 0], ids=["in numpy", "by visible"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("active", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_the_mask_is_the_rule_over_held_rows_and_the_pass(
    seed: int, active: int, ordered: bool, dtype: torch.dtype, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots_module, "FEW", few)
    g = torch.Generator().manual_seed(seed)
    slots = Slots(active, 4, 2, torch.device("cpu"), dtype)
    mirror = Mirror(slots)
    for number in range(12):
        width = int(torch.randint(1, 5, (), generator=g))
        for line in range(active):
            for span in [s for s, at in zip(SPANS, (0, 0, 4, 8), strict=True) if at == number]:
                slots.relate(line, span, SPANS[span])
        chosen, where = slots.choose(slice(0, active), width)
        used = max(int(slots.top.max()), int(chosen.max()) + 1)
        slots.grow(max(slots.span.shape[1], used))
        rows = random_rows(g, active, width, 3 * number if ordered else 0)
        rows.span[rows.span >= slots.num_spans] = 0
        mask = slots.mask(rows, chosen, where, used)
        seen = mask if dtype == torch.bool else mask == 0
        assert torch.equal(seen, mirror.expected(rows, chosen, used))
        if dtype != torch.bool:
            assert (mask[~seen] == torch.finfo(dtype).min).all()
        stays = (torch.rand(rows.span.shape, generator=g) < 0.7) & ~rows.noisy & (rows.span != PADDING)
        mirror.hold(rows, chosen, stays.numpy())
        if active > 1 and number % 3 == 2:
            mirror.swap(0, 2)
    assert slots.count.tolist() == [len(mirror.held.get(line, {})) for line in range(active)]
    assert slots.top.tolist() == [max(mirror.held.get(line, {-1: 0})) + 1 for line in range(active)]


def test_a_mask_copies_only_what_a_commit_added() -> None:
    slots = Slots(1, 64, 2, torch.device("cpu"), torch.float32)
    rows = Rows.clean(torch.arange(3).unsqueeze(0), torch.zeros(1, 3, dtype=torch.int64))
    for number in range(4):
        chosen, where = slots.choose(slice(0, 1), 3)
        rows = Rows.clean(rows.position + 3 * min(number, 1), rows.span)
        slots.mask(rows, chosen, where, 3 * number + 3)
        before = slots._lines
        assert slots._drawn == 3 * number
        slots.hold(rows, chosen, np.ones((1, 3), dtype=bool))
        assert slots._lines is before
