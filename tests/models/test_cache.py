"""RowCache alone, without a model.

Catches: states written to the wrong slot or sequence, contents lost when storage grows, copies instead of views,
memory that is not zeroed (masked NaN is still NaN), a swap that loses a row, a length that counts the rows of a pass
too early or never.
"""

from __future__ import annotations

import pytest
import torch

from hf_hybrid.models.cache import CacheError, RowCache


def states(batch: int, rows: int, start: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct keys ``(batch, 2, rows, 3)`` and values of another head size ``(batch, 2, rows, 5)``."""
    keys = torch.arange(batch * 2 * rows * 3, dtype=torch.float64).view(batch, 2, rows, 3) + start
    values = torch.arange(batch * 2 * rows * 5, dtype=torch.float64).view(batch, 2, rows, 5) - start
    return keys, values


def test_slots_hold_what_was_written_to_them_through_growth():
    cache = RowCache(num_layers=1, batch_size=2, capacity=3)
    expected = torch.zeros(2, 2, 16, 3, dtype=torch.float64)
    slots = torch.tensor([[0, 2], [1, 0]])
    for number, names in enumerate((slots, slots + 4, (3, 4), torch.tensor([[9], [11]]))):
        rows = names[1] - names[0] if isinstance(names, tuple) else names.shape[1]
        keys, values = states(2, rows, start=100.0 * (number + 1))
        cache.place(names, used=12)
        got, _ = cache.update(keys, values, 0)
        for row in range(2):
            listed = list(range(*names)) if isinstance(names, tuple) else names[row].tolist()
            for column, slot in enumerate(listed):
                expected[row, :, slot] = keys[row, :, column]
        assert torch.equal(got, expected[:, :, :12])
    assert cache.capacity == 12


def test_capacity_doubles_and_is_never_more_than_needed():
    cache = RowCache(num_layers=1, batch_size=1, capacity=4)
    sizes = []
    for used in (1, 4, 5, 8, 9, 40):
        cache.place((used - 1, used), used)
        cache.update(*states(1, 1), 0)
        sizes.append(cache.layers[0].keys.shape[2])
    assert sizes == [4, 4, 8, 8, 16, 40]


def test_update_returns_views_and_unwritten_slots_are_zero():
    cache = RowCache(num_layers=1, batch_size=2, capacity=8)
    cache.place((4, 5), 6)
    keys, values = cache.update(*states(2, 1), 0)
    assert keys.shape == (2, 2, 6, 3) and values.shape == (2, 2, 6, 5)
    assert keys.data_ptr() == cache.layers[0].keys.data_ptr() and values.data_ptr() == cache.layers[0].values.data_ptr()
    assert keys[:, :, [0, 1, 2, 3, 5]].abs().sum() == 0


def test_a_pass_over_some_batch_rows_leaves_the_others_alone():
    cache = RowCache(num_layers=1, batch_size=3, capacity=4)
    cache.place((0, 2), 2)
    first, _ = states(3, 2)
    cache.update(*states(3, 2), 0)
    before = first.clone()  # (3, heads, 2, dim)
    cache.place(torch.tensor([[0], [1]]), 2, lines=slice(1, 3))
    keys, _ = cache.update(*states(2, 1, start=1000.0), 0)
    assert keys.shape[0] == 2
    now = cache.layers[0].keys[:, :, :2]
    assert torch.equal(now[0], before[0])
    changed = (now != before).flatten(3).any(dim=3).any(dim=1)  # (batch, slots)
    assert changed.tolist() == [[False, False], [True, False], [False, True]]
    cache.place((2, 3), 3, lines=slice(2, 3))
    keys, _ = cache.update(*states(1, 1, start=2000.0), 0)
    assert keys.shape[0] == 1 and torch.equal(keys[0, :, :2], cache.layers[0].keys[2, :, :2])
    assert (cache.layers[0].keys[:2, :, 2] == 0).all()


def test_swap_exchanges_two_batch_rows_in_every_layer():
    cache = RowCache(num_layers=2, batch_size=3, capacity=4)
    cache.place((0, 2), 2)
    for layer in range(2):
        cache.update(*states(3, 2, start=10.0 * layer), layer)
    before = [layer.keys.clone() for layer in cache.layers]
    values = [layer.values.clone() for layer in cache.layers]
    cache.swap(0, 2, 2)
    for layer, keys, value in zip(cache.layers, before, values, strict=True):
        assert torch.equal(layer.keys, keys[[2, 1, 0]]) and torch.equal(layer.values, value[[2, 1, 0]])


def test_lengths_follow_the_host_convention():
    cache = RowCache(num_layers=2, batch_size=1, capacity=8)
    assert cache.get_seq_length() == 0 and cache.get_max_length() == -1
    cache.place((3, 5), 5)
    # Before the states of a pass are written the host takes the length for the position of the first query.
    assert cache.get_seq_length() == 3 and cache.get_mask_sizes(2, 0) == (5, 0)
    cache.update(*states(1, 2), 0)
    assert cache.get_seq_length(0) == 5 and cache.get_seq_length(1) == 3


def test_what_it_cannot_do_is_refused_with_a_way_out():
    cache = RowCache(num_layers=1, batch_size=1)
    with pytest.raises(CacheError, match="place"):
        cache.update(*states(1, 1), 0)
    for call in (
        lambda: cache.crop(-1),
        lambda: cache.reset(),
        lambda: cache.reorder_cache(torch.tensor([0])),
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.batch_select_indices(torch.tensor([0])),
    ):
        with pytest.raises(CacheError, match=r"Runner\.commit"):
            call()
