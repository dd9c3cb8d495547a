"""Runner: its cache against the host's, its slots, ragged batches, refusals, adoption.

Catches: a rejected or noisy row that stays, holes that are never used again, metadata that moves to another slot than
its keys, a pass that sees a neighbour's padding, a sequence that leaves and takes another's spans along, a host mask
used where slots are dead, models and caches that would be silently wrong.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import oracles
import pytest
import torch
from models_for_tests import ATTENTION, MAX_POSITIONS, MODELS, tiny
from oracles import FILLER, Row, clean, pack, window
from transformers import (
    DynamicCache,
    LlamaConfig,
    MambaConfig,
    MambaForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_hybrid.core.rows import PADDING
from hf_hybrid.models.cached import CachedRunner
from hf_hybrid.models.host import CACHE
from hf_hybrid.models.opening import runner_of
from hf_hybrid.models.runner import Runner, Unsupported

PROMPT = [5, 9, 2, 31, 17]
MORE = [8, 44, 3, 21, 6]
BOTH = [(name, attention) for name in MODELS for attention in ATTENTION]
READS = {1: {0}, 2: {0}, 3: {0, 1, 2}}
"""Two independent parts behind a trunk, then a trunk segment behind both."""


def related(runner: Runner, reads: dict[int, set[int]] = READS) -> Runner:
    for row in range(runner.batch_size):
        for span, others in reads.items():
            runner.relate(row, span, sorted(others))
    return runner


@torch.no_grad()
def host_logits(model: Any, steps: list[list[int]]) -> torch.Tensor:
    """Logits ``(tokens, vocab)`` of the host with its own DynamicCache, one forward per step."""
    cache = DynamicCache()
    parts = [model(input_ids=torch.tensor([step]), use_cache=True, **{CACHE: cache}).logits[0] for step in steps]
    return torch.cat(parts)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(("name", "attention"), BOTH)
def test_row_cache_equals_dynamic_cache_token_by_token(name: str, attention: str, plain: bool):
    model = tiny(name, attention)
    steps = [PROMPT, *([token] for token in MORE[:3]), MORE[3:]]
    runner, got, position = CachedRunner(model, 1, capacity=4), [], 0
    for step in steps:
        tokens, rows = pack([clean(step, position)])
        got.append(runner.run(tokens, rows, len(step), plain=plain).logits[0])
        runner.commit()
        position += len(step)
    torch.testing.assert_close(torch.cat(got), host_logits(model, steps), rtol=0, atol=ATTENTION[attention][1])


@torch.no_grad()
def test_a_rewound_row_equals_a_fresh_one():
    """Two sequences of different lengths, each rewound to another length; only what is left is seen afterwards."""
    model = tiny("llama")
    texts = [PROMPT + MORE, MORE[:3] + PROMPT]
    runner = CachedRunner(model, 2, capacity=4)
    for begin, end in ((0, 4), (4, 8)):
        tokens, rows = pack([clean(text[begin:end], begin) for text in texts])
        runner.run(tokens, rows, 1)
        runner.commit()
    for row, stays in ((0, 6), (1, 3)):
        runner.rewind(row, stays)
        assert sorted(runner.committed(row).position[0].tolist()) == list(range(stays))
    more = [[7, 7], [30, 1]]
    tokens, rows = pack([clean(more[0], 6), clean(more[1], 3)])
    got = runner.run(tokens, rows, 2).logits
    runner.commit()
    for row, stays in ((0, 6), (1, 3)):
        want = host_logits(model, [texts[row][:stays], more[row]])[-2:]
        torch.testing.assert_close(got[row], want, rtol=0, atol=ATTENTION["sdpa"][1])
    runner.rewind(0, 100)  # nothing is there
    with pytest.raises(ValueError, match="sequence 2, position 0: sequences are 0 to 1"):
        runner.rewind(2, 0)
    runner.run(tokens, rows, 2)
    with pytest.raises(ValueError, match=r"commit\(\) the last pass before a sequence is rewound"):
        runner.rewind(0, 0)


def random_lane_passes(generator: torch.Generator) -> list[tuple[list[Row], list[bool]]]:
    """Passes over a trunk, two parts at once and a second trunk segment, with random acceptance: ``(rows, kept)``."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    passes: list[tuple[list[Row], list[bool]]] = []
    ends = {0: 0, 1: 40, 2: 60, 3: 90}
    for spans in ((0,), (0,), (1, 2), (1, 2), (2,), (1, 2), (3,)):
        rows: list[Row] = []
        kept: list[bool] = []
        for span in spans:
            count = draw(1, 4)
            stays = draw(1, count + 1)
            rows += clean([draw(0, 60) for _ in range(count)], ends[span], span)
            kept += [i < stays for i in range(count)]
            ahead = draw(0, 4)
            rows += window(ends[span] + count, ahead, span, block=span)
            kept += [True] * ahead  # asked for in vain: noisy rows never stay
            ends[span] += stays
        passes.append((rows, kept))
    return passes


@pytest.mark.parametrize(("name", "attention"), BOTH)
def test_cache_after_rejections_equals_a_fresh_prefill_of_what_stayed(name: str, attention: str):
    model, tolerance = tiny(name, attention), ATTENTION[attention][1]
    runner = related(CachedRunner(model, 1, capacity=4, num_spans=2))
    stayed: list[Row] = []
    highest = 0
    for rows, kept in random_lane_passes(torch.Generator().manual_seed(3)):
        got = runner.run(*pack([rows]), len(rows)).logits[0]
        expected = oracles.forward(model, stayed + rows, READS)[len(stayed) :]
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
        runner.commit([kept])
        highest = max(highest, len(stayed) + len(rows))
        stayed += [row for row, stays in zip(rows, kept, strict=True) if stays and not row.noisy]
    held = runner.committed(0)
    order = {(row.span, row.position): index for index, row in enumerate(stayed)}
    pick = [order[pair] for pair in zip(held.span[0].tolist(), held.position[0].tolist(), strict=True)]
    assert sorted(pick) == list(range(len(stayed)))
    fresh = DynamicCache()
    oracles.forward(model, stayed, READS, fresh)
    for layer, host in zip(runner.cache.layers, fresh.layers, strict=True):
        slots = runner.slots_of(0)
        torch.testing.assert_close(layer.keys[0][:, slots], host.keys[0][:, pick], rtol=0, atol=tolerance)
        torch.testing.assert_close(layer.values[0][:, slots], host.values[0][:, pick], rtol=0, atol=tolerance)
    # Holes are filled before the top grows: never more slots than rows that were alive at once.
    assert runner.cache.get_seq_length() <= highest


def test_a_pass_without_commit_leaves_nothing_behind():
    model = tiny("llama")
    runner = CachedRunner(model, 1)
    runner.run(*pack([clean(PROMPT)]), 1)
    runner.commit()
    follow = pack([clean(MORE[:2], 5) + window(7, 2)])
    first = runner.run(*follow, 4).logits
    assert runner.committed(0).span.shape == (1, 5)
    # The same slots, the same numbers: exactly equal.
    assert torch.equal(runner.run(*follow, 4).logits, first)
    runner.commit([[False] * 4])
    assert torch.equal(runner.run(*follow, 4).logits, first)


def test_a_longer_pass_without_commit_is_not_seen_behind_a_longer_neighbour():
    """Sequence 0 is shorter, so the slots behind its own are looked at: an abandoned draft must not be found there."""
    model = tiny("llama")
    runner = CachedRunner(model, 2)
    runner.run(*pack([clean(PROMPT[:1]), clean(PROMPT + MORE)]), 1)
    runner.commit()
    runner.run(*pack([clean(MORE, 1), clean(MORE, 10)]), 1)
    got = runner.run(*pack([clean([7], 6), clean([7], 15)]), 1).logits
    expected = oracles.forward(model, [*clean(PROMPT[:1]), *clean([7], 6)], {})[1:]
    torch.testing.assert_close(got[0], expected, rtol=0, atol=ATTENTION["sdpa"][1])


def test_plain_promise_is_ignored_while_slots_are_dead():
    model = tiny("llama")
    runner = CachedRunner(model, 1)
    runner.run(*pack([clean(PROMPT[:2]) + window(2, 3) + clean(PROMPT[2:], 2)]), 1)
    runner.commit()
    got = runner.run(*pack([clean(MORE[:2], 5)]), 2, plain=True).logits[0]
    torch.testing.assert_close(got, host_logits(model, [PROMPT, MORE[:2]])[5:], rtol=0, atol=ATTENTION["sdpa"][1])


@pytest.mark.parametrize("attention", ATTENTION)
def test_ragged_batch_equals_batches_of_one_while_rows_leave(attention: str):
    """Unequal prompts with filler, unequal acceptance, rows that leave in the middle and at the end."""
    model, tolerance = tiny("llama", attention), ATTENTION[attention][1]
    seeds, length = (3, 4, 5, 6), (7, 3, 5, 7)
    programs = [
        random_lane_passes(torch.Generator().manual_seed(seed))[:end] for seed, end in zip(seeds, length, strict=True)
    ]
    runner = related(CachedRunner(model, 4, capacity=4))
    alone = [related(CachedRunner(model, 1, capacity=4)) for _ in programs]
    lanes, step = [0, 1, 2, 3], 0
    expected_rows, expected_passes = [0] * 4, [0] * 4
    while runner.active:
        batch = [programs[lane][step] for lane in lanes]
        tokens, rows = pack([own for own, _ in batch])
        got = runner.run(tokens, rows, tokens.shape[1]).logits
        assert not got.isnan().any()
        kept = [[True] * (tokens.shape[1] - len(own)) + stays for own, stays in batch]
        runner.commit(torch.tensor(kept))
        for entry, (lane, (own, stays)) in enumerate(zip(lanes, batch, strict=True)):
            single = alone[lane].run(*pack([own]), len(own)).logits[0]
            alone[lane].commit([stays])
            torch.testing.assert_close(got[entry, -len(own) :], single, rtol=0, atol=tolerance)
            expected_rows[lane] += len(own)
            expected_passes[lane] += 1
        step += 1
        entry = 0
        while entry < len(lanes):
            if step < len(programs[lanes[entry]]):
                entry += 1
                continue
            lane = lanes[entry]
            assert (runner.num_rows[entry], runner.num_passes[entry]) == (expected_rows[lane], expected_passes[lane])
            moved = runner.leave(entry)
            assert moved == len(lanes) - 1
            lanes[entry] = lanes[moved]
            lanes.pop()
    assert step == 7


def test_leave_takes_the_spans_of_the_row_that_moves():
    model = tiny("llama")
    runner = CachedRunner(model, 2)
    runner.relate(1, 1, [0])  # in sequence 0 span 1 reads nothing
    runner.run(*pack([clean(PROMPT), clean(PROMPT)]), 1)
    runner.commit()
    assert runner.leave(0) == 1
    got = runner.run(*pack([clean(MORE, 5, span=1)]), 5).logits[0]
    expected = oracles.forward(model, clean(PROMPT) + clean(MORE, 5, span=1), {1: {0}})[5:]
    torch.testing.assert_close(got, expected, rtol=0, atol=ATTENTION["sdpa"][1])
    assert runner.active == 1 and runner.committed(0).position.tolist() == [[0, 1, 2, 3, 4]]


def test_padding_rows_are_finite_and_counted_nowhere():
    for attention, dtype in (("sdpa", torch.float64), ("eager", torch.float64), ("eager", torch.float32)):
        runner = CachedRunner(tiny("llama", attention).to(dtype), 2)
        logits = runner.run(*pack([clean(PROMPT), [FILLER] * 5]), 5).logits
        runner.commit()
        assert logits.isfinite().all()
        assert runner.num_rows.tolist() == [5, 0] and runner.committed(1).span.shape == (1, 0)
        # Now the sequences use different slots.
        assert runner.run(*pack([clean(MORE, 5), [FILLER] * 5]), 5).logits.isfinite().all()


def test_logits_to_keep_and_its_absence():
    model = tiny("gpt2")
    whole = CachedRunner(model, 1).run(*pack([clean(PROMPT)]), 5).logits
    runner = CachedRunner(model, 1)
    assert runner.run(*pack([clean(PROMPT)]), 0).logits.shape == (1, 0, 61)
    # One product of another shape: the last bits may differ.
    last = runner.run(*pack([clean(PROMPT)]), 2).logits
    torch.testing.assert_close(last, whole[:, 3:], rtol=0, atol=ATTENTION["sdpa"][1])
    runner._keeps_logits = False  # a forward that gives all logits
    assert torch.equal(runner.run(*pack([clean(PROMPT)]), 2).logits, whole[:, 3:])


def test_relate_grows_and_demands_the_closure():
    runner = CachedRunner(tiny("llama"), 1, num_spans=1)
    runner.relate(0, 1, [0])
    runner.relate(0, 9, [0, 1])
    depends = runner._slots.depends[0]
    assert depends[9].nonzero()[0].tolist() == [0, 1, 9] and depends[8].nonzero()[0].tolist() == [8]
    with pytest.raises(ValueError, match="closure"):
        runner.relate(0, 2, [1])


def test_a_span_may_be_related_between_passes():
    model = tiny("llama")
    runner = CachedRunner(model, 1)
    runner.run(*pack([clean(PROMPT)]), 1)
    runner.commit()
    runner.relate(0, 1, [0])
    got = runner.run(*pack([clean(MORE, 5, span=1)]), 5).logits[0]
    expected = oracles.forward(model, clean(PROMPT) + clean(MORE, 5, span=1), {1: {0}})[5:]
    torch.testing.assert_close(got, expected, rtol=0, atol=ATTENTION["sdpa"][1])


def test_misuse_is_an_error_before_the_pass():
    runner = CachedRunner(tiny("gpt2"), 2)
    with pytest.raises(ValueError, match=f"{MAX_POSITIONS} learned positions"):
        runner.run(*pack([clean(PROMPT, MAX_POSITIONS - 4)] * 2), 1)
    with pytest.raises(ValueError, match="relate"):
        runner.run(*pack([clean(PROMPT, span=8)] * 2), 1)
    with pytest.raises(ValueError, match="must be"):
        runner.run(*pack([clean(PROMPT)]), 1)
    with pytest.raises(ValueError, match="keep"):
        runner.run(*pack([clean(PROMPT)] * 2), 6)
    with pytest.raises(ValueError, match=r"run\(\) first"):
        runner.commit()
    assert runner.num_passes.tolist() == [0, 0]
    runner.run(*pack([clean(PROMPT)] * 2), 1)
    with pytest.raises(ValueError, match="kept"):
        runner.commit([[True]])
    with pytest.raises(ValueError, match="commit"):
        runner.leave(0)
    # Rotary positions have no table that ends.
    assert CachedRunner(tiny("llama"), 1).run(*pack([clean(PROMPT, MAX_POSITIONS)]), 1).logits.isfinite().all()


def refused(model: Any, match: str) -> None:
    with pytest.raises(Unsupported, match=match):
        runner_of(model)


def test_models_that_would_be_wrong_are_refused():
    small = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1}
    refused(tiny("gpt-oss", attention="flex_attention"), r'set_attn_implementation\("sdpa"\)')
    with pytest.raises(Unsupported, match="full attention in every layer"):
        CachedRunner.check_model(MambaForCausalLM(MambaConfig(**small, state_size=4)))
    t5 = T5Config(vocab_size=61, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    refused(T5ForConditionalGeneration(t5), "decoder-only")
    for attention in ("flash_attention_2", "flex_attention"):
        model = tiny("llama")
        model.config._attn_implementation = attention
        refused(model, r'set_attn_implementation\("sdpa"\)')
    for name in MODELS:
        runner_of(tiny(name))


def test_a_forward_without_positions_is_refused():
    class Host:
        config = LlamaConfig(attn_implementation="sdpa")

        def forward(self, input_ids: Any, attention_mask: Any, past_key_values: Any) -> Any:
            return SimpleNamespace()

    with pytest.raises(Unsupported, match="position_ids"):
        CachedRunner.check_model(Host())


@pytest.mark.parametrize("attention", ATTENTION)
def test_adopt_continues_a_host_cache(attention: str):
    model, tolerance = tiny("llama", attention), ATTENTION[attention][1]
    ids = torch.tensor([[0, 0, *PROMPT[:3]], PROMPT])
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    positions = (real.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=real, position_ids=positions, use_cache=True, **{CACHE: cache})
    runner = CachedRunner(model, 2, capacity=2)
    runner.adopt(cache, real)
    assert runner.committed(0).position.tolist() == [[0, 1, 2]] and runner.slots_of(0).tolist() == [2, 3, 4]
    # One row first: it fills one of the two padded slots, the other must stay unseen.
    parts = [runner.run(*pack([clean(MORE[:1], 3), clean(MORE[:1], 5)]), 1).logits]
    runner.commit()
    parts.append(runner.run(*pack([clean(MORE[1:], 4), clean(MORE[1:], 6)]), 4).logits)
    got = torch.cat(parts, dim=1)
    for row, prompt in enumerate((PROMPT[:3], PROMPT)):
        expected = host_logits(model, [prompt, MORE])[len(prompt) :]
        torch.testing.assert_close(got[row], expected, rtol=0, atol=tolerance)
    assert cache.get_seq_length() == 5  # the caller's cache is as it was


def test_adopt_refuses_what_it_cannot_read():
    model = tiny("llama")
    runner = CachedRunner(model, 1)
    static = StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(Unsupported, match="DynamicCache"):
        runner.adopt(static)
    sliding = DynamicCache(config=tiny("mistral", sliding_window=4).config)
    with pytest.raises(Unsupported, match="full-attention"):
        runner.adopt(sliding)
    wide = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.tensor([PROMPT, PROMPT]), use_cache=True, **{CACHE: wide})
    with pytest.raises(Unsupported, match="sequences"):
        runner.adopt(wide)
    runner.adopt(DynamicCache())  # empty: nothing to take over
    assert runner.committed(0).span.shape == (1, 0)
    runner.run(*pack([clean(PROMPT)]), 1)
    runner.commit()
    with pytest.raises(ValueError, match="before its first pass"):
        runner.adopt(wide)
    assert (runner.committed(0).span != PADDING).all()
