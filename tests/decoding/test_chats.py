"""The caller's cache is filled and read as the host does.

Bugs these tests catch: a cache of a chat that is never filled, or filled with the keys of a rejected draft; new tokens
beside a cache that are taken for the whole text; two names of a cache that disagree.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    DynamicCache,
)

from hf_hybrid.models.host import CACHE
from tests.hosts_for_tests import EXACT, PROMPT, every_exact, generate, refused, tiny
from tests.models_for_tests import writer


@every_exact
def test_a_cache_of_a_chat_is_filled_and_read(how: dict[str, Any]) -> None:
    model = tiny()
    theirs, ours, text = DynamicCache(), DynamicCache(), PROMPT
    for turn in range(3):
        expected = generate(model, text, 6, **{CACHE: theirs})
        found = generate(model, text, 6, return_dict_in_generate=True, **{CACHE: ours}, **how)
        assert torch.equal(found.sequences, expected)
        assert ours.get_seq_length() == theirs.get_seq_length() == expected.shape[1] - 1
        same(ours, theirs)
        # A turn reads its own three tokens and what it writes, drafts included, and never the text before it.
        assert turn == 0 or found.report[0].num_rows < text.shape[1] + 6 * 10
        text = torch.cat([expected, torch.tensor([[5, 9, 4]])], dim=1)
    # The new tokens alone, more of them than the cache holds, and fewer.
    for new in (torch.tensor([[8, 2, 6] * 20]), torch.tensor([[8, 2]])):
        mask = torch.ones((1, ours.get_seq_length() + new.shape[1]), dtype=torch.long)
        expected = generate(model, new, 6, attention_mask=mask, **{CACHE: theirs})
        assert torch.equal(generate(model, new, 6, attention_mask=mask, **{CACHE: ours}, **how), expected)
        same(ours, theirs)


def same(ours: Any, theirs: Any) -> None:
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, rtol=0, atol=1e-12)  # float64, sums in another order
        torch.testing.assert_close(one.values, other.values, rtol=0, atol=1e-12)


@every_exact
def test_the_cache_of_a_ragged_batch_is_the_hosts(how: dict[str, Any]) -> None:
    model = tiny(eos_token_id=[26, 29, 4])  # sequences end at different times
    ids, mask = torch.tensor([[0, 0, 3, 7, 9], [3, 7, 9, 2, 11], [0, 1, 2, 3, 4]]), torch.ones((3, 5), dtype=torch.long)
    mask[0, :2] = mask[2, 0] = 0
    options = {"attention_mask": mask, "return_dict_in_generate": True}
    expected, found = generate(model, ids, **options), generate(model, ids, **options, **how)
    assert torch.equal(found.sequences, expected.sequences)
    ends = [next((i for i, t in enumerate(row[5:]) if t in (26, 29, 4)), 16) for row in expected.sequences.tolist()]
    assert len(set(ends)) > 1
    for one, other in zip(found[CACHE].layers, expected[CACHE].layers, strict=True):
        assert one.keys.shape == other.keys.shape
        for row, end in enumerate(ends):
            real = [c for c in range(one.keys.shape[2]) if c >= 5 or mask[row, c]]
            real = [c for c in real if c <= 5 + end]  # the host reads padding behind an end
            torch.testing.assert_close(one.keys[row, :, real], other.keys[row, :, real], rtol=0, atol=1e-12)


def test_a_planned_call_fills_the_cache_of_its_caller() -> None:
    model, cache = writer(True), DynamicCache()
    ids = torch.tensor([[3, 7, 9, 2, 11]])
    output = model.generate(ids, strategy="planned_diffusion", max_new_tokens=30, **{CACHE: cache})
    assert cache.get_seq_length() == output.shape[1] - 1
    more = torch.cat([output, torch.tensor([[8, 4]])], dim=1)
    assert torch.equal(model.generate(more, max_new_tokens=8, **{CACHE: cache}), model.generate(more, max_new_tokens=8))


def test_either_name_of_a_cache_and_not_both() -> None:
    model, expected = tiny(), generate(tiny())
    for name in ("cache", "past_key_values"):
        cache = DynamicCache()
        assert torch.equal(generate(model, **{name: cache}, **EXACT["chain"]), expected)
        assert cache.get_seq_length() == expected.shape[1] - 1
    refused("two names of one", model, cache=DynamicCache(), past_key_values=DynamicCache(), **EXACT["chain"])
