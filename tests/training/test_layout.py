"""Layout: positions and spans of an example's tokens, and what each row should predict.

Catches: a target one row off, ``<par>`` that is learned, a term behind the prompt in planned form, an answer token
that is learned twice or never, a span that never learns to end, a label or text at the wrong position, ``<sync/>`` on
top of a span, dependencies that are not closed, a second round that forgets the first, and a cut text that is taught
as a finished one; a guessed length that is learned.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
from training_examples import BARE, CONTROL, FORMS, OVERRUN, TAGS, TWO_ROUNDS

from hf_hybrid.core.grammars import grammar_of
from hf_hybrid.core.plan import Plan
from hf_hybrid.training.examples import Example, Part
from hf_hybrid.training.layout import IGNORE, Form, Layout, lay_out

EXAMPLES = [TWO_ROUNDS, BARE, OVERRUN]
GRAMMAR = grammar_of(CONTROL)
C = CONTROL.noise
T = TAGS
L2, L4, L8 = (i for _, i in T.lengths)
D1, D2, _ = T.depends


def laid(example: Example, form: Form, longer_plan: float = 0.0) -> Layout:
    return lay_out(example, form, GRAMMAR, random.Random(0), longer_plan)


def columns(layout: Layout) -> list[tuple[int, int, int, int]]:
    """``(token, position, span, target)`` of every row."""
    return list(zip(layout.tokens, layout.position, layout.span, layout.target, strict=True))


def test_plain_form_by_hand() -> None:
    layout = laid(Example((1, 2, 3), ((4,), (Part((10,), (11,)),), (5,))), "plain")
    assert columns(layout) == [
        (1, 0, 0, IGNORE), (2, 1, 0, IGNORE), (3, 2, 0, 4),
        (4, 3, 0, 10), (10, 4, 0, 11), (11, 5, 0, 5), (5, 6, 0, C.end),
    ]  # fmt: skip
    (stretch,) = layout.stretches
    assert (stretch.span, stretch.start, stretch.tokens, stretch.tail) == (0, 3, (4, 10, 11, 5, C.end), True)
    assert layout.depends == [{0}]


def test_planned_form_by_hand() -> None:
    """Text, a plan of two dependent parts at their planned positions, a gap, ``<sync/>``, text."""
    parts = (Part((10,), (11, 12, 13)), Part((14, 15), (16,), depends=(0,)))
    layout = laid(Example((1, 2), ((4,), parts, (5,))), "dag")
    none = IGNORE
    assert columns(layout) == [
        (1, 0, 0, none), (2, 1, 0, none), (T.par, 2, 0, 4),
        (4, 3, 0, T.topic), (T.topic, 4, 0, 10), (10, 5, 0, L4), (L4, 6, 0, T.topic),
        # The second entry is a span of its own, which part 1 does not read.
        (T.topic, 7, 2, 14), (14, 8, 2, 15), (15, 9, 2, L2), (L2, 10, 2, D1), (D1, 11, 2, T.async_),
        # Part 1 opens behind its entry and holds 1 + 1 + 4 positions; part 2 opens these behind its own entry.
        (T.async_, 7, 1, none), (10, 8, 1, 11), (11, 9, 1, 12), (12, 10, 1, 13), (13, 11, 1, C.filler),
        (T.async_, 18, 3, none), (14, 19, 3, none), (15, 20, 3, 16), (16, 21, 3, C.filler),
        (T.sync, 22, 4, 5), (5, 23, 4, C.end),
    ]  # fmt: skip
    assert layout.depends == [{0}, {0, 1}, {0, 2}, {0, 1, 2, 3}, {0, 1, 2, 3, 4}]
    stretches = [
        (stretch.span, stretch.start, stretch.tokens, stretch.tail, stretch.breaks) for stretch in layout.stretches
    ]
    assert stretches == [
        (0, 3, (4, T.topic, 10, L4, T.topic, 14, 15, L2, D1, T.async_), False, ((4, 2),)),
        (1, 9, (11, 12, 13, C.filler), True, ()),
        (3, 21, (16, C.filler), True, ()),
        (4, 23, (5, C.end), True, ()),
    ]
    assert [layout.stretches[0].span_at(offset) for offset in (0, 3, 4, 9)] == [0, 0, 2, 2]


@pytest.mark.parametrize("form", ["sparse", "dag"])
def test_guessed_lengths_are_read_and_never_learned(form: Form) -> None:
    """Rows read a random length and parts begin where it puts them; targets and texts are the true ones."""
    true = laid(TWO_ROUNDS, form)
    lengths = {i: n for n, i in T.lengths}
    differ = 0
    for seed in range(20):
        layout = lay_out(TWO_ROUNDS, form, GRAMMAR, random.Random(seed), 0.0, 1.0)
        assert (layout.target, layout.span, layout.depends) == (true.target, true.span, true.depends)
        assert [stretch.tokens for stretch in layout.stretches] == [stretch.tokens for stretch in true.stretches]
        changed = {(a, b) for a, b in zip(layout.tokens, true.tokens, strict=True) if a != b}
        assert all(a in lengths and b in lengths for a, b in changed)
        differ += bool(changed)
        opens = [p for t, p in zip(layout.tokens, layout.position, strict=True) if t == T.async_]
        planned = [lengths[t] for t in layout.tokens if t in lengths]
        # Parts 1 and 2 of the first round: openings of two and of three tokens, and the entry of the next part.
        assert [opens[1] - opens[0], opens[2] - opens[1]] == [2 + planned[0] + 5, 3 + planned[1] + 4]
        before = [p for t, p, s in zip(layout.tokens, layout.position, layout.span, strict=True) if s == 0]
        assert opens[0] == max(before) + 1
    assert differ > 15


def test_a_dense_round_keeps_its_lengths() -> None:
    assert columns(lay_out(TWO_ROUNDS, "dense", GRAMMAR, random.Random(1), 0.0, 1.0)) == columns(
        laid(TWO_ROUNDS, "dense")
    )


def test_dense_form_by_hand() -> None:
    """One span for the round; the gap behind a short part holds no clean row and ``<spad>`` on the canvas."""
    parts = (Part((10,), (11, 12, 13)), Part((14,), (15,)))
    layout = laid(Example((1,), (parts,)), "dense")
    assert columns(layout)[8:] == [
        (T.async_, 8, 1, IGNORE), (10, 9, 1, 11), (11, 10, 1, 12), (12, 11, 1, 13), (13, 12, 1, C.filler),
        (T.async_, 14, 1, IGNORE), (14, 15, 1, 15), (15, 16, 1, C.filler),
        (T.sync, 17, 2, C.end),
    ]  # fmt: skip
    canvas = layout.stretches[1]
    assert canvas.tokens == (T.async_, 10, 11, 12, 13, C.filler, T.async_, 14, 15, C.filler)
    assert canvas.start == 8 and canvas.whole and canvas.fixed == {0, 1, 6, 7}
    assert layout.depends == [{0}, {0, 1}, {0, 1, 2}]


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("form", FORMS)
def test_every_stretch_continues_its_span(form: Form, example: Example) -> None:
    """A stretch's tokens have the positions of its span's clean rows, and each is the target of the row before it."""
    layout = laid(example, form)
    held = {(s, p): token for token, p, s, _ in columns(layout)}
    targets = {(s, p): target for _, p, s, target in columns(layout)}
    for stretch in layout.stretches:
        for offset, token in enumerate(stretch.tokens[:-1]):
            where = (stretch.span_at(offset), stretch.start + offset)
            assert held.get(where, C.filler) == token
            if token != C.filler and offset not in stretch.fixed:
                assert targets[stretch.span_at(offset - 1), where[1] - 1] == token
        if not stretch.whole:
            last = len(stretch.tokens) - 2
            assert targets[stretch.span_at(last), stretch.start + last] == stretch.tokens[-1]
            assert stretch.tokens[-1] in (T.async_, C.filler, C.end)


# What a dense round cuts has its own test below.
@pytest.mark.parametrize(("form", "example"), [(f, e) for f in FORMS for e in EXAMPLES if (f, e) != ("dense", OVERRUN)])
def test_targets(form: Form, example: Example) -> None:
    layout = laid(example, form)
    assert not {T.par, C.mask, T.sync} & set(layout.target)
    counts = Counter(target for target in layout.target if 0 < target < 40)
    assert counts == Counter(example.answer)  # the texts hold no token twice
    prompt = layout.target[: len(example.prompt)]
    first = IGNORE if form != "plain" else example.answer[0]
    assert prompt == [IGNORE] * (len(prompt) - 1) + [first]
    parts = sum(len(piece) for piece in example.pieces if isinstance(piece[0], Part))
    rounds = sum(isinstance(piece[0], Part) for piece in example.pieces)
    planned = form != "plain"
    assert layout.target.count(C.filler) == parts * planned
    assert layout.target.count(T.async_) == rounds * planned and layout.target.count(T.topic) == parts * planned
    assert layout.target.count(C.end) == 1 and layout.target[-1] == C.end
    if planned:
        assert layout.tokens[len(prompt)] == T.par


def test_openings_are_given_and_their_last_token_predicts_the_text() -> None:
    layout = laid(TWO_ROUNDS, "sparse")
    rows = columns(layout)
    for i, (token, *_) in enumerate(rows):
        if token == T.async_:
            assert rows[i][3] == IGNORE
    span = [row for row in rows if row[2] == 3]
    assert [row[3] for row in span] == [IGNORE, IGNORE, 15, 16, 17, C.filler]


def test_spans_read_what_they_name_and_trunks_read_everything() -> None:
    """TWO_ROUNDS: trunk 0, parts 1, 3, 5 (3 reads 1, 5 reads 3) between the entries 2 and 4; trunk 6, parts 7 and 9
    around the entry 8; trunk 10."""
    everything = [set(range(span + 1)) for span in range(11)]
    entries = {2: {0, 2}, 4: {0, 2, 4}, 8: {*everything[6], 8}}
    round_two = {7: {*everything[6], 7}, 9: {*everything[6], 8, 9}}
    trunks = {0: {0}, 6: everything[6], 10: everything[10]}
    sparse = {1: {0, 1}, 3: {0, 2, 3}, 5: {0, 2, 4, 5}}
    dag = {1: {0, 1}, 3: {0, 2, 3, 1}, 5: {0, 2, 4, 5, 3, 1}}
    for form, parts in (("sparse", sparse), ("dag", dag)):
        expected = {**trunks, **entries, **round_two, **parts}
        assert laid(TWO_ROUNDS, form).depends == [expected[span] for span in range(11)]
    assert laid(TWO_ROUNDS, "dense").depends == everything[:5]


@pytest.mark.parametrize("form", ["sparse", "dag", "dense"])
@pytest.mark.parametrize("longer_plan", [0.0, 1.0])
def test_plans_are_what_the_grammar_reads(form: Form, longer_plan: float) -> None:
    """The plan's tokens parse into a plan whose starts are the spans' and whose lengths are the planned ones."""
    grammar = GRAMMAR
    layout = laid(TWO_ROUNDS, form, longer_plan)
    plans = [stretch for stretch in layout.stretches if stretch.tokens[-1] == T.async_]
    for parts, stretch in zip((TWO_ROUNDS.pieces[1], TWO_ROUNDS.pieces[3]), plans, strict=True):
        state, read = grammar.parse(stretch.tokens)
        assert state.stage == "written" and read == len(stretch.tokens)
        plan: Plan = state.plan
        assert [s.label for s in plan.spans] == [p.label for p in parts if isinstance(p, Part)]
        assert [s.depends for s in plan.spans] == [p.depends for p in parts if isinstance(p, Part)]
        # The smallest of 2, 4, 8 that holds the text, or the one behind it.
        least = [next(n for n in (2, 4, 8) if n >= len(p.text)) for p in parts if isinstance(p, Part)]
        longer = [min(2 * n, 8) for n in least]
        assert [s.length for s in plan.spans] == (longer if longer_plan else least)
        end = stretch.start + len(stretch.tokens) - 1
        begin = stretch.start + stretch.tokens.index(T.topic)
        opens = [p for token, p, _, _ in columns(layout) if token == T.async_ and p >= begin][: len(plan.spans)]
        assert tuple(opens) == (grammar.dense_starts(plan, end) if form == "dense" else grammar.starts(plan, begin))
        assert tuple(stretch.tokens[-len(grammar.render(plan)) - 1 : -1]) == grammar.render(plan)


def test_longer_plan_is_a_share() -> None:
    example = Example((1,), (tuple(Part((10,), (11, 12)) for _ in range(20)),))
    rng = random.Random(4)
    longer = sum(lay_out(example, "sparse", GRAMMAR, rng, 0.15).tokens.count(L4) for _ in range(50))
    assert abs(longer / 1000 - 0.15) < 0.045  # four standard deviations of 1000 draws


def test_a_part_longer_than_the_longest_length_keeps_counting() -> None:
    """It is planned with 8, has 10 tokens, and the next part starts at its planned position all the same."""
    layout = laid(OVERRUN, "dag")
    starts = {s: p for token, p, s, _ in columns(layout) if token == T.async_}
    assert starts[3] - starts[1] == 2 + 8 + 4  # its opening and planned length, and the next entry
    last = [p for _, p, s, _ in columns(layout) if s == 1][-1]
    assert last == starts[1] + 1 + 10
    assert layout.target[layout.tokens.index(29)] == C.filler
    assert layout.stretches[1].tokens == (*range(20, 30), C.filler)
    largest = max(p for _, p, s, _ in columns(layout) if s in (1, 3, 5))
    assert [p for token, p, _, _ in columns(layout) if token == T.sync] == [largest + 1]


def test_sync_stands_behind_the_largest_position_even_of_an_early_part() -> None:
    """The first of two parts grows beyond the second one's position."""
    example = Example((1,), ((Part((10,), tuple(range(20, 39))), Part((11,), (12,))),))
    layout = laid(example, "sparse")
    first = [p for _, p, s, _ in columns(layout) if s == 1]
    assert layout.position[layout.tokens.index(T.sync)] == first[-1] + 1 == max(layout.position)


def test_a_dense_round_cuts_what_it_has_no_room_for_and_does_not_call_it_finished() -> None:
    layout = laid(OVERRUN, "dense")
    rows = [row for row in columns(layout) if row[2] == 1]
    assert [token for token, *_ in rows[:10]] == [T.async_, 10, *range(20, 28)]
    assert rows[9][3] == 28  # the next token of the text, not <spad>
    positions = [p for _, p, _, _ in rows]
    assert positions == sorted(set(positions))
    assert layout.stretches[1].tokens[2:10] == tuple(range(20, 28))


def test_pieces_without_text_and_an_empty_text() -> None:
    layout = laid(BARE, "dag")
    syncs = [i for i, token in enumerate(layout.tokens) if token == T.sync]
    assert [layout.target[i] for i in syncs] == [T.topic, C.end]
    assert layout.target[layout.tokens.index(T.par)] == T.topic
    assert columns(laid(Example((1,), ((), (5,), (6,))), "sparse"))[1:] == [
        (T.par, 1, 0, 5), (5, 2, 0, 6), (6, 3, 0, C.end)
    ]  # fmt: skip
    empty = laid(Example((1,), ((Part((10,), ()),),)), "sparse")
    assert [row[3] for row in columns(empty) if row[2] == 1] == [IGNORE, C.filler]


def test_answers() -> None:
    assert TWO_ROUNDS.answer == (4, 5, *range(10, 20), 6, *range(20, 30), 7, 8)
