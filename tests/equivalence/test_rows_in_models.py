"""The row rule inside real models: joint passes, windows, anchors, spans.

Catches: a window that sees its own answer (``<=`` for ``<`` at the anchor), a clean row that sees a noisy one, noisy
rows of another block that are seen, a dependent span that sees only part of an overrun one, an independent span that
sees any of it, and results that depend on where in a pass a row stands or on whether its prefix was cached.
"""

from __future__ import annotations

import oracles
import pytest
import torch
from models_for_tests import ATTENTION, MODELS, tiny
from oracles import Row, clean, pack, window

from hf_hybrid.models.cached import CachedRunner

TEXT = [5, 9, 2, 31, 17, 8, 44, 3]
BOTH = [(name, attention) for name in MODELS for attention in ATTENTION]
PARTS = {1: {0}, 2: {0}, 3: {0, 1}}
"""Behind the trunk 0: part 1, part 2 that is independent of it, part 3 that reads it."""


def runner_for(model: object, reads: dict[int, set[int]]) -> CachedRunner:
    runner = CachedRunner(model, 1)
    for span, others in reads.items():
        runner.relate(0, span, sorted(others))
    return runner


def passed(runner: CachedRunner, rows: list[Row]) -> torch.Tensor:
    """Logits ``(rows, vocab)`` of one pass."""
    return runner.run(*pack([rows]), len(rows)).logits[0]


@pytest.mark.parametrize(("name", "attention"), BOTH)
def test_joint_pass_equals_the_causal_model_and_block_decoding(name: str, attention: str):
    """Theorem 2: windows behind every prefix, in one pass with the clean rows; then with the prefix cached."""
    model, tolerance = tiny(name, attention), ATTENTION[attention][1]
    windows = {start: window(start, 3, block=start) for start in (2, 5, 8)}
    rows = clean(TEXT) + [row for block in windows.values() for row in block]
    joint = passed(runner_for(model, {}), rows)
    with torch.no_grad():
        causal = model(torch.tensor([TEXT])).logits[0]
    torch.testing.assert_close(joint[:8], causal, rtol=0, atol=tolerance)
    for number, (start, block) in enumerate(windows.items()):
        expected = oracles.forward(model, clean(TEXT[:start]) + block, {})[start:]
        torch.testing.assert_close(joint[8 + 3 * number : 11 + 3 * number], expected, rtol=0, atol=tolerance)
        runner = runner_for(model, {})
        passed(runner, clean(TEXT[:start]))
        runner.commit()
        torch.testing.assert_close(passed(runner, block), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("name", "attention"), BOTH)
def test_committing_in_the_pass_of_the_next_window_is_exact(name: str, attention: str):
    model, tolerance = tiny(name, attention), ATTENTION[attention][1]
    one, two = runner_for(model, PARTS), runner_for(model, PARTS)
    for runner in (one, two):
        passed(runner, clean(TEXT[:3]))
        runner.commit()
    settled = clean(TEXT[3:5], 3, span=1) + clean(TEXT[5:8], 9, span=2)
    ahead = window(5, 4, span=1, block=1) + window(12, 4, span=2, block=2)
    got = passed(one, settled + ahead)[5:]
    one.commit()
    passed(two, settled)
    two.commit()
    torch.testing.assert_close(got, passed(two, ahead), rtol=0, atol=tolerance)
    two.commit()
    for first, second in zip(one.cache.layers, two.cache.layers, strict=True):
        assert one.slots_of(0).tolist() == two.slots_of(0).tolist() == list(range(8))
        torch.testing.assert_close(first.keys[0, :, :8], second.keys[0, :, :8], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_a_block_sees_its_own_span_strictly_before_its_anchor(name: str):
    """Theorem 3 by perturbation. A masked key has weight exactly zero, so what may not matter changes no bit."""
    model = tiny(name)
    anchor = 4
    block = window(anchor, 3)

    def noisy_logits(text: list[int], cached: bool) -> torch.Tensor:
        runner = runner_for(model, {})
        if cached:
            passed(runner, clean(text))
            runner.commit()
            return passed(runner, block)
        return passed(runner, clean(text) + block)[len(text) :]

    for cached in (False, True):
        base = noisy_logits(TEXT, cached)
        for position in range(len(TEXT)):
            changed = list(TEXT)
            changed[position] = 50
            difference = (noisy_logits(changed, cached) - base).abs().amax()
            assert (difference == 0) == (position >= anchor), (position, cached)


@pytest.mark.parametrize("name", MODELS)
def test_clean_rows_never_see_noisy_ones_and_blocks_see_only_themselves(name: str):
    model = tiny(name)
    rows = clean(TEXT) + window(4, 2, block=4) + window(8, 2, block=8)
    base = passed(runner_for(model, {}), rows)
    for index, reach in ((8, {8, 9}), (11, {10, 11})):
        changed = list(rows)
        changed[index] = changed[index]._replace(token=33)
        difference = (passed(runner_for(model, {}), changed) - base).abs().amax(dim=-1)
        assert set(difference.nonzero().flatten().tolist()) == reach


@pytest.mark.parametrize("name", MODELS)
def test_a_span_reaches_only_what_depends_on_it_however_long_it_grew(name: str):
    """Part 1 was planned with 3 tokens at positions 8 to 10 and overran to 14: the others start at 11 all the same."""
    model = tiny(name)
    part = [11, 12, 13, 14, 15, 16, 18]
    later = clean([20, 21], 11, span=2) + window(13, 2, span=2, block=2)
    later += clean([22, 23], 11, span=3) + window(13, 2, span=3, block=3)

    def after(tokens: list[int]) -> torch.Tensor:
        runner = runner_for(model, PARTS)
        passed(runner, clean(TEXT))
        runner.commit()
        passed(runner, clean(tokens, 8, span=1))
        runner.commit()
        return passed(runner, later)

    base = after(part)
    for index in range(len(part)):
        changed = list(part)
        changed[index] = 50
        difference = (after(changed) - base).abs().amax(dim=-1)
        assert difference[:4].amax() == 0 and difference[4:].amin() > 0, index
    expected = oracles.forward(model, clean(TEXT) + clean(part, 8, span=1) + later, PARTS)[15:]
    torch.testing.assert_close(base, expected, rtol=0, atol=ATTENTION["sdpa"][1])


@pytest.mark.parametrize(("name", "attention"), BOTH)
def test_permuting_the_rows_of_a_pass_permutes_its_output(name: str, attention: str):
    """Theorem 7: neither the order of a pass nor the slots matter, only what the rows say of themselves."""
    model, tolerance = tiny(name, attention), ATTENTION[attention][1]
    rows = (
        clean(TEXT[3:6], 8, span=1)
        + window(11, 3, span=1, block=1)
        + clean(TEXT[6:], 20, span=2)
        + window(22, 2, span=2, block=2)
    )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(5)).tolist()
    prompt_order = [2, 0, 1]
    straight, mixed = runner_for(model, PARTS), runner_for(model, PARTS)
    passed(straight, clean(TEXT[:3]))
    passed(mixed, [clean(TEXT[:3])[i] for i in prompt_order])
    straight.commit()
    mixed.commit()
    expected = passed(straight, rows)[order]
    torch.testing.assert_close(passed(mixed, [rows[i] for i in order]), expected, rtol=0, atol=tolerance)
    straight.commit()
    mixed.commit()
    follow = clean([1], 11, span=1) + clean([2], 22, span=2)
    torch.testing.assert_close(passed(mixed, follow), passed(straight, follow), rtol=0, atol=tolerance)
