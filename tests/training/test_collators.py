"""Collated batches: their shape, their noise, and by perturbation who sees whom.

Catches: a batch that depends on what was collated before, rows left empty, a block without a term in the loss, window
lengths that decoding uses and training never shows, blocks that never reach behind an end, targets behind a plan,
openings that are hidden, a block over a plan that misses its earlier entries, a shown token that is scored, weights
of other targets, and the leak of a block's own answer through its clean copy.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
import torch
from models_for_tests import tiny
from oracles import Row, clean, mask, window
from torch import Tensor
from training_examples import BARE, CONTROL, FORMS, OVERRUN, PAD, TAGS, TWO_ROUNDS, batch_of, rows_of

from hf_hybrid.core.rows import PADDING
from hf_hybrid.training.collators import CollatorSettings, HybridCollator, TooLong
from hf_hybrid.training.examples import Example, Part
from hf_hybrid.training.layout import IGNORE, Form
from hf_hybrid.training.objectives import attention_mask

LENGTHS = {1: 1.0, 2: 1.0, 5: 1.0}
ROWS = 120
EXAMPLES = [TWO_ROUNDS, BARE, OVERRUN]


def collator(form: Form | None = None, seed: int = 0, **changes: object) -> HybridCollator:
    """Of one form alone, or of all of them."""
    forms = dict.fromkeys(FORMS, 1.0) if form is None else {form: 1.0}
    settings: dict[str, object] = {"num_rows": ROWS, "max_spans": 12, "forms": forms, "block_lengths": LENGTHS}
    return HybridCollator(CONTROL, PAD, CollatorSettings(**{**settings, **changes}), seed)  # type: ignore[arg-type]


def many(form: Form | None = None, count: int = 60, **changes: object) -> dict[str, Tensor]:
    return collator(form, **changes)([(i, EXAMPLES[i % 3]) for i in range(count)])


def blocks_of(rows: list[Row]) -> dict[int, list[int]]:
    """Block -> its rows."""
    found: dict[int, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        if row.noisy:
            found[row.block].append(i)
    return found


def test_a_batch_is_a_function_of_seed_and_index() -> None:
    pairs = [(7, TWO_ROUNDS), (9, BARE), (11, OVERRUN)]
    one, other = collator(), collator()
    other([(1, BARE), (2, OVERRUN)])
    first, second = one(pairs), other(pairs[::-1])
    for name in first:
        assert torch.equal(first[name], second[name].flip(0)), name
    assert not torch.equal(first["input_ids"], collator(seed=1)(pairs)["input_ids"])
    again = collator()([(7, TWO_ROUNDS), (8, TWO_ROUNDS)])
    assert not torch.equal(again["input_ids"][0], again["input_ids"][1])


def test_shapes_and_types_are_static() -> None:
    for examples in ([(0, BARE)], [(3, TWO_ROUNDS), (4, OVERRUN)]):
        batch = collator()(examples)
        for name in ("input_ids", "position", "span", "anchor", "block", "target"):
            assert batch[name].shape == (len(examples), ROWS) and batch[name].dtype == torch.int64, name
        assert batch["noisy"].shape == (len(examples), ROWS) and batch["noisy"].dtype == torch.bool
        assert batch["depends"].shape == (len(examples), 12, 12) and batch["depends"].dtype == torch.bool


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_full_and_every_block_has_a_term(form: Form) -> None:
    batch = many(form)
    assert (batch["span"] != PADDING).all()
    seen: Counter[int] = Counter()
    for b in range(len(batch["span"])):
        rows, target = rows_of(batch, b), batch["target"][b].tolist()
        blocks = blocks_of(rows)
        assert sorted(blocks) == list(range(1, len(blocks) + 1))
        first = next(i for i, row in enumerate(rows) if row.noisy)
        assert all(row.noisy == (i >= first) for i, row in enumerate(rows))  # clean rows first
        for index in blocks.values():
            assert index == list(range(index[0], index[-1] + 1))
            assert any(target[i] != IGNORE for i in index)
            seen[len(index)] += 1
            head = rows[index[0]]
            for offset, i in enumerate(index):
                assert rows[i][1:] == (head.position + offset, head.span, True, head.position, head.block)
                scored = target[i] != IGNORE
                assert not scored or rows[i].token == CONTROL.noise.mask
    assert set(LENGTHS) <= set(seen)


@pytest.mark.parametrize("form", FORMS)
def test_noisy_rows_hold_the_token_of_their_place(form: Form) -> None:
    """Shown or as a target, a noisy row has the token of its clean row; behind the end it is ``<spad>``."""
    batch = many(form)
    beyond, ends = Counter(), {CONTROL.noise.filler: 0, CONTROL.noise.end: 0}
    for b in range(len(batch["span"])):
        rows, target = rows_of(batch, b), batch["target"][b].tolist()
        clean = [r for r in rows if not r.noisy]
        # A plan is a chain of spans, one per entry, behind the span of <par> or <sync/>; a window may reach over them.
        roots = {r.span for r in clean if r.token in (CONTROL.tags.par, CONTROL.tags.sync)}
        entries = {r.span for r in clean if r.token == CONTROL.tags.topic} - roots
        root = {r.span: max(s for s in roots if s < r.span) if r.span in entries else r.span for r in rows}
        clean_rows = {(root[r.span], r.position): r.token for r in clean}
        learned = [(r, t) for r, t in zip(rows, target, strict=True) if not r.noisy and t != IGNORE]
        nexts = {(root[r.span], r.position + 1): t for r, t in learned}
        for row, goal in zip(rows, target, strict=True):
            if not row.noisy:
                continue
            key = (root[row.span], row.position)
            token = goal if goal != IGNORE else row.token
            expected = clean_rows.get(key, nexts.get(key))
            if expected is not None:
                assert token in (expected, CONTROL.noise.mask)
                assert goal != IGNORE or row.token == expected
                if expected in ends:
                    ends[expected] += 1
            elif token != CONTROL.noise.mask:
                assert token == CONTROL.noise.filler
                beyond[goal != IGNORE] += 1
    assert beyond[True] and beyond[False]  # shown and hidden pads behind an end
    assert ends[CONTROL.noise.filler if form in ("sparse", "dag") else CONTROL.noise.end]


@pytest.mark.parametrize("form", FORMS)
def test_a_block_sees_all_of_its_text_before_it(form: Form) -> None:
    """As a window does in decoding: the rows of its text in front of its anchor, none behind, and what that text
    reads. A plan is one text of several spans, and a window over its later entries reads the earlier ones."""
    batch, later = many(form, trunk_share=0.6), 0
    seen = attention_mask(batch)[:, 0]  # (batch, rows, rows)
    for b in range(len(batch["span"])):
        rows = rows_of(batch, b)
        clean = [i for i, row in enumerate(rows) if not row.noisy]
        roots = sorted({rows[i].span for i in clean if rows[i].token in (TAGS.par, TAGS.sync)} or {0})
        entries = {rows[i].span for i in clean if rows[i].token == TAGS.topic}
        text = {s: max(r for r in roots if r <= s) if s in entries else s for s in {row.span for row in rows}}
        for index in blocks_of(rows).values():
            head = rows[index[0]]
            own = {i for i in clean if text[rows[i].span] == text[head.span]}
            before = {i for i in own if rows[i].position < head.position}
            if text[head.span] in roots:  # all that was written before this segment
                before |= {i for i in clean if rows[i].span < text[head.span]}
            found = {i for i in clean if seen[b, index[0], i]}
            assert before <= found and not found & (own - before), (head, rows)
            assert text[head.span] not in roots or found == before
            later += head.span not in roots and head.span in entries
    assert later > 50 or form in ("plain", "dense")


def test_nothing_is_learned_behind_a_plan() -> None:
    """A block over a plan may reach behind its ``<async>``: masks are there, without a target."""
    batch = many("dag", count=150, trunk_share=1.0, all_masked=0.0)
    behind = 0
    for b in range(len(batch["span"])):
        rows, target = rows_of(batch, b), batch["target"][b].tolist()
        plan_end = {
            r.span: r.position + 1
            for r, t in zip(rows, target, strict=True)
            if not r.noisy and t == CONTROL.tags.async_
        }
        for index in blocks_of(rows).values():
            for i in index:
                end = plan_end.get(rows[i].span)
                if end is not None and rows[i].position > end:
                    behind += 1
                    assert rows[i].token == CONTROL.noise.mask and target[i] == IGNORE
            assert any(target[i] != IGNORE for i in index)
    assert behind > 100


def test_trunk_share_and_whole_share() -> None:
    def share_of_plans(trunk_share: float) -> float:
        batch = many("dag", trunk_share=trunk_share)
        plans = total = 0
        for b in range(len(batch["span"])):
            rows = rows_of(batch, b)
            trunk = {r.span for r in rows if r.token == CONTROL.tags.topic and not r.noisy}
            spans = [rows[index[0]].span for index in blocks_of(rows).values()]
            plans += sum(span in trunk for span in spans)
            total += len(spans)
        return plans / total

    assert share_of_plans(0.0) == 0.0 and share_of_plans(1.0) == 1.0
    assert abs(share_of_plans(0.3) - 0.3) < 0.08  # four standard deviations of about 500 blocks
    whole, beyond = many("plain", whole_share=1.0, num_rows=400), set[int]()
    for number in range(60):
        rows = rows_of(whole, number)
        start = len(EXAMPLES[number % 3].prompt)
        blocks = list(blocks_of(rows).values())
        assert all(rows[index[0]].anchor == start for index in blocks)
        size = len(EXAMPLES[number % 3].answer) + 1
        beyond |= {len(index) - size for index in blocks[:-1]}
    assert beyond == {0, 1, 2, 3}  # a few positions behind the end


def test_a_dense_round_is_one_block_with_given_openings() -> None:
    batch = many("dense")
    for b in range(60):
        rows, target = rows_of(batch, b), batch["target"][b].tolist()
        for index in blocks_of(rows).values():
            if rows[index[0]].token != CONTROL.tags.async_ or rows[index[0]].span == 0:
                continue
            for i in index:
                if rows[i].token == CONTROL.tags.async_:
                    assert target[i] == IGNORE and target[i + 1] == IGNORE and rows[i + 1].token != CONTROL.noise.mask
    heads = [rows_of(batch, 0)[index[0]] for index in blocks_of(rows_of(batch, 0)).values()]
    assert [h.span for h in heads[:2]] == [1, 3]  # both rounds of the first example, whole


def test_all_masked_share() -> None:
    for share, expected in ((1.0, 1.0), (0.0, 0.0)):
        batch = many("plain", all_masked=share, lowest_noise=0.0, block_lengths={40: 1.0})
        full = []
        for b in range(60):
            rows = rows_of(batch, b)
            index = max(blocks_of(rows).values(), key=len)
            full.append(all(rows[i].token == CONTROL.noise.mask for i in index))
        assert sum(full) / 60 == pytest.approx(expected, abs=0.1)  # t near 1 hides all of 40 rows now and then


def test_window_decay_weighs_the_first_positions_of_a_window_most() -> None:
    """Clean rows keep their weights, and a dense round, which settles in any order, counts alike."""
    for form in ("dag", "dense"):
        plain, decayed = many(form, count=20), many(form, count=20, window_decay=0.5)
        assert torch.equal(plain["input_ids"], decayed["input_ids"])
        for b in range(20):
            rows = rows_of(plain, b)
            weight = (decayed["weight"][b] / plain["weight"][b].clamp(min=1e-9)).tolist()
            offset = {i: rows[i].position - rows[i].anchor for i, row in enumerate(rows) if row.noisy}
            opens = {rows[i].block for i in offset if (offset[i], rows[i].token) == (0, CONTROL.tags.async_)}
            whole = opens if form == "dense" else set()
            for i, row in enumerate(rows):
                if row.span != PADDING:
                    in_order = row.noisy and row.block not in whole
                    assert weight[i] == pytest.approx(0.5 ** offset[i] if in_order else 1.0)


def test_structure_and_lengths_weigh_what_they_are_told_to() -> None:
    """Tags, the end and the first token of a label; lengths apart from them; ``<spad>`` and the rest count alike."""
    batch = collator("dag", structure_weight=3.0, length_weight=0.5)([(0, TWO_ROUNDS)])
    parts = [part for piece in TWO_ROUNDS.pieces for part in piece if isinstance(part, Part)]
    lengths = [i for _, i in CONTROL.tags.lengths]
    structure = {
        CONTROL.tags.topic,
        CONTROL.tags.async_,
        CONTROL.noise.end,
        *CONTROL.tags.depends,
        *(part.label[0] for part in parts),
    }
    seen = Counter[float]()
    for row, target, weight in zip(
        rows_of(batch), batch["target"][0].tolist(), batch["weight"][0].tolist(), strict=True
    ):
        if not row.noisy and target != IGNORE:
            assert weight == (3.0 if target in structure else 0.5 if target in lengths else 1.0), target
            seen[weight] += 1
    assert seen[0.5] == len(parts) and seen[3.0] > 2 * len(parts) and seen[1.0] > len(parts)


def test_too_long_names_the_rows_it_needs() -> None:
    with pytest.raises(TooLong, match=r"example 5 needs 26 rows and 1 spans; there are num_rows=20"):
        collator("plain", num_rows=20)([(5, Example((1,), (tuple(range(1, 26)),)))])
    with pytest.raises(TooLong, match="max_spans=3"):
        collator("dag", max_spans=3)([(0, TWO_ROUNDS)])
    exact = collator("plain", num_rows=26)([(0, Example((1,), (tuple(range(1, 26)),)))])
    assert not exact["noisy"].any() and exact["span"].shape == (1, 26)


@pytest.mark.parametrize("form", FORMS)
def test_attention_mask_is_the_row_rule(form: Form) -> None:
    """Against nested loops over the table; with rows to spare filled by padding, which sees itself alone."""
    batch = many(form, count=3)
    batch["span"][0, -4:] = PADDING
    got = attention_mask(batch)
    assert got.shape == (3, 1, ROWS, ROWS) and got.dtype == torch.bool
    for b in range(3):
        reads = {s: set(batch["depends"][b, s].nonzero().flatten().tolist()) - {s} for s in range(12)}
        assert torch.equal(got[b, 0], mask(rows_of(batch, b), reads))
    assert torch.equal(got[0, 0, -4:], torch.eye(ROWS, dtype=torch.bool)[-4:])
    assert not got[0, 0, :-4, -4:].any()


@torch.no_grad()
def logits_of(model: object, batch: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits ``(variants, rows, vocab)`` of one collated example with other tokens ``(variants, rows)``."""
    seen = attention_mask(batch).expand(len(tokens), -1, -1, -1)
    positions = batch["position"].expand(len(tokens), -1)
    return model(input_ids=tokens, position_ids=positions, attention_mask=seen, use_cache=False).logits  # type: ignore[operator]


@pytest.mark.parametrize("form", FORMS)
def test_what_a_clean_token_reaches(form: Form) -> None:
    """Theorem 3 on a collated batch: a hidden key has weight exactly zero, so what may not matter changes no bit."""
    model = tiny("llama")
    batch = collator(form, seed=3)([(0, TWO_ROUNDS)])
    rows, depends = rows_of(batch), batch["depends"][0]
    base = batch["input_ids"]
    clean_index = [i for i, row in enumerate(rows) if not row.noisy]
    variants = base.repeat(len(clean_index), 1)  # (clean rows, rows), one token changed in each
    for variant, i in enumerate(clean_index):
        variants[variant, i] = 39 if rows[i].token != 39 else 38
    difference = (logits_of(model, batch, variants) - logits_of(model, batch, base)).abs().amax(-1)
    checked = Counter()
    begin = {block: rows[index[0]].position for block, index in blocks_of(rows).items()}
    for variant, i in enumerate(clean_index):
        key = rows[i]
        for q, row in enumerate(rows):
            if not row.noisy:
                continue
            if row.span == key.span:
                reached = key.position < begin[row.block]
                checked["own", key.position - begin[row.block]] += 1
            else:
                reached = bool(depends[row.span, key.span])
                checked["other", reached] += 1
            assert (difference[variant, q] > 0) == reached, (key, row)
    if form != "dense":  # the clean rows of a dense round are all at or behind its anchor
        assert checked["own", -1] and checked["own", 0] and checked["own", 1]
    assert form == "plain" or (checked["other", True] and checked["other", False])


@pytest.mark.parametrize("form", FORMS)
def test_what_a_noisy_token_reaches(form: Form) -> None:
    """Its own block and nothing else: no other block, no clean row."""
    model = tiny("llama")
    batch = collator(form, seed=3)([(0, TWO_ROUNDS)])
    rows, base = rows_of(batch), batch["input_ids"]
    blocks = list(blocks_of(rows).values())
    variants = base.repeat(len(blocks), 1)
    for variant, index in enumerate(blocks):
        variants[variant, index[0]] = 39 if rows[index[0]].token != 39 else 38
    difference = (logits_of(model, batch, variants) - logits_of(model, batch, base)).abs().amax(-1)
    for variant, index in enumerate(blocks):
        assert difference[variant].nonzero().flatten().tolist() == index


def test_padding_rows_reach_nobody_and_are_finite() -> None:
    model = tiny("llama")
    rows = [*clean([1, 2, 3]), *window(3, 2, block=1), Row(PAD, 0, PADDING), Row(PAD, 0, PADDING)]
    batch = batch_of(rows, [{0}])
    changed = batch["input_ids"].clone()
    changed[0, -1] = 33
    got, other = logits_of(model, batch, batch["input_ids"])[0], logits_of(model, batch, changed)[0]
    assert torch.equal(got[:-1], other[:-1]) and got.isfinite().all()


def test_defaults_hold_all_forms_and_the_window_lengths_of_decoding() -> None:
    default = HybridCollator(CONTROL, PAD, CollatorSettings())
    assert set(default.forms) == set(FORMS) and sum(default.forms.values()) == pytest.approx(1)
    assert {4, 8, 16, 32} == set(default.block_lengths) and sum(default.block_lengths.values()) == pytest.approx(1)


def test_forms_occur_by_their_weights() -> None:
    weights: dict[Form, float] = {"plain": 1.0, "dag": 3.0}
    example = Example((1,), ((Part((10,), (11,)),),))
    batch = collator(None, forms=weights, num_rows=20)([(i, example) for i in range(400)])
    planned = float((batch["input_ids"] == CONTROL.tags.par).any(1).float().mean())
    assert abs(planned - 0.75) < 0.09  # four standard deviations of 400 draws
