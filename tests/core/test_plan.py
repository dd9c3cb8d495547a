"""Plans and their grammar.

Catches: a plan that does not survive being written and read, numbers that are no ints and pass for tokens, a grammar
that writes more parts, longer labels or more tokens than its caps or the room that is left, one that walks into a dead
end or refuses what would fit, starts that overlap, an unstable sort, and huge plans that cost time or memory before
they are refused.
"""

from __future__ import annotations

import random
import time
import tracemalloc
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch

from hf_hybrid.core.grammars import PlanState
from hf_hybrid.core.grammars.native import NativeGrammar, PlanTags
from hf_hybrid.core.plan import Plan, PlanError, PlanLimits, Span
from hf_hybrid.core.tokens import ControlTokens

TEXT, VOCAB = range(10), 32
TAGS = PlanTags(
    par=12, topic=13, async_=14, sync=15,
    lengths=((2, 17), (4, 18), (8, 19), (16, 20)), depends=(21, 22, 23, 24, 25, 26),
)  # fmt: skip
TOKENS = ControlTokens.of(mask=10, end=11, filler=16, tags=TAGS)
LIMITS = PlanLimits(max_parts=5, max_part_length=16, max_plan_length=60, max_label_length=4)
GRAMMAR = NativeGrammar(TOKENS, VOCAB, LIMITS)


def random_plan(rng: random.Random, limits: PlanLimits = LIMITS) -> Plan:
    """A plan within the part, label and dependency caps; its lengths are values of length tokens."""
    spans: list[Span] = []
    for number in range(rng.randint(1, limits.max_parts)):
        label = tuple(rng.choices(TEXT, k=rng.randint(1, limits.max_label_length)))
        depends = tuple(d for d in range(number) if rng.random() < 0.4)
        spans.append(Span(label, rng.choice([2, 4, 8, 16]), depends))
    return Plan(tuple(spans))


def test_parse_inverts_render() -> None:
    rng = random.Random(0)
    for _ in range(200):
        plan = random_plan(rng)
        ids = (*rng.choices(TEXT, k=rng.randint(0, 3)), *GRAMMAR.render(plan), TAGS.async_)
        state, count = GRAMMAR.parse((*ids, *plan.spans[0].label))
        assert state.stage == "written" and state.plan == plan
        assert count == len(ids)
        assert GRAMMAR.total(state.parts) == sum(1 + len(s.label) + s.length for s in plan.spans)


def test_render_rounds_lengths_up_and_caps_them() -> None:
    lengths = {1: 2, 2: 2, 3: 4, 8: 8, 9: 16, 16: 16, 99: 16}
    for asked, written in lengths.items():
        state, _ = GRAMMAR.parse(GRAMMAR.render(Plan((Span((1,), asked),))))
        assert state.parts[0].length == written


def test_parse_keeps_an_unfinished_plan() -> None:
    ids = (1, 2, TAGS.topic, 3, 18, TAGS.topic, 4)
    state, count = GRAMMAR.parse(ids)
    assert (state.stage, state.parts, state.label, count) == ("label", (Span((3,), 4),), (4,), len(ids))


@pytest.mark.parametrize(
    "ids",
    [
        (TAGS.async_,),
        (TAGS.sync,),
        (TAGS.par,),
        (18,),
        (TAGS.topic, 18),
        (TAGS.topic, TAGS.topic),
        (TAGS.topic, TOKENS.noise.end),
        (TAGS.topic, 1, TOKENS.noise.mask),
        (TAGS.topic, 1, TAGS.async_),
        (TAGS.topic, 1, 18, 18),
        (TAGS.topic, 1, 18, 1),
        (TAGS.topic, 1, 18, TAGS.depends[0]),
        (TAGS.topic, 1, 18, TAGS.topic, 1, 18, TAGS.depends[0], TAGS.depends[0]),
    ],
)
def test_parse_refuses_what_the_grammar_does_not_write(ids: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match=r"not allowed in stage"):
        GRAMMAR.parse(ids)


def test_nothing_follows_a_written_plan() -> None:
    state = PlanState("written", (Span((1,), 4),))
    assert GRAMMAR.choices(state) == (False, ())
    assert not GRAMMAR.allowed(state).any()
    with pytest.raises(PlanError, match="written"):
        GRAMMAR.advance(state, 1)


def walk(grammar: NativeGrammar, rng: random.Random, room: int | None, text: int) -> tuple[list[int], PlanState]:
    """Random allowed tokens until the plan is written, the answer ends, the room is used up or ``text`` tokens
    passed without a plan."""
    state, ids = PlanState(), list[int]()
    while state.stage != "written" and (room is None or len(ids) < room):
        mask = grammar.allowed(state, room=None if room is None else room - len(ids))
        if state.stage == "text" and len(ids) >= text:
            if not mask[TAGS.topic]:
                return ids, state
            token = TAGS.topic
        else:
            token = rng.choice([i for i in mask.nonzero().flatten().tolist() if i != TOKENS.noise.end])
        ids.append(token)
        state = grammar.advance(state, token)
    return ids, state


@pytest.mark.parametrize("bounded", [False, True])
def test_every_walk_is_a_plan_within_the_caps(bounded: bool) -> None:
    rng, written = random.Random(1), 0
    for _ in range(300):
        limits = PlanLimits(rng.randint(1, 5), rng.choice([2, 5, 16]), rng.randint(4, 60), rng.randint(1, 4))
        grammar = NativeGrammar(TOKENS, VOCAB, limits)
        room = rng.randint(0, 50) if bounded else None
        ids, state = walk(grammar, rng, room, text=rng.randint(0, 4))
        again, count = grammar.parse(ids)
        assert again == state and count == len(ids)
        # A begun plan always finishes: no dead end, no plan cut by the room.
        assert state.stage in ("written", "text")
        if state.stage == "written":
            written += 1
            assert grammar.check(state.plan) == Plan(state.parts)
            # A part takes a topic, a label, a length and fewer dependencies than there are parts.
            assert len(ids) <= 5 + limits.max_parts * (2 + limits.max_label_length + limits.max_parts) + 1
            if room is not None:
                assert len(ids) - 1 + grammar.total(state.parts) <= room  # the async is the first token of the openings
    assert written > 100


def test_the_grammar_offers_exactly_what_can_be_finished() -> None:
    """Against a search over all continuations: a tag is offered if and only if a plan within caps and room can
    follow."""
    tags = replace(TAGS, lengths=((2, 17), (3, 18)), depends=(21, 22))
    tokens = replace(TOKENS, tags=tags)
    everything = (0, tags.topic, tags.async_, 17, 18, 21, 22)
    seen = 0
    for limits in (
        PlanLimits(2, 3, 9, 2),
        PlanLimits(2, 2, 20, 1),
        PlanLimits(1, 1, 20, 2),
        PlanLimits(3, 3, 4, 2),
        PlanLimits(0),
    ):
        free = NativeGrammar(tokens, VOCAB, PlanLimits(10, 10, 10**6, 10))
        grammar = NativeGrammar(tokens, VOCAB, limits)

        def after(state: PlanState, token: int, free: NativeGrammar = free) -> PlanState | None:
            try:
                return free.advance(state, token)
            except PlanError:
                return None

        @lru_cache(None)
        def finishes(state: PlanState, room: int, grammar: NativeGrammar = grammar) -> bool:
            if state.parts:
                try:
                    grammar.check(state.plan)
                except PlanError:
                    return False
            if room < 0 or len(state.label) > grammar.limits.max_label_length or grammar.total(state.parts) > room:
                return False
            if state.stage == "length":
                return True
            following = [after(state, token) for token in everything]
            return any(s is not None and finishes(s, room - 1) for s in following)

        todo = [(PlanState("label"), room) for room in range(20) if finishes(PlanState("label"), room)]
        for room in range(21):
            offered = bool(grammar.allowed(PlanState(), room=room)[tags.topic])
            assert offered == (room > 0 and finishes(PlanState("label"), room - 1))
        while todo:
            state, room = todo.pop()
            mask = grammar.allowed(state, room=room)
            for token in everything:
                following = after(state, token)
                ends = state.stage == "length" and token == tags.async_
                expected = following is not None and (ends or finishes(following, room - 1))
                assert bool(mask[token]) == expected, (limits, state, room, token)
                seen += 1
                if expected and following is not None and not ends:
                    todo.append((following, room - 1))
    assert seen > 2000  # rooms up to 19 hold two parts with their dependencies


def test_text_may_always_end_and_rounds_may_be_forbidden() -> None:
    for room in (0, 1, 6, 7, 50, None):
        mask = GRAMMAR.allowed(PlanState(), room=room)
        assert mask[TOKENS.noise.end] and mask[list(TEXT)].all()
        # A topic, a label, a length, an opening of two and two tokens of text.
        assert bool(mask[TAGS.topic]) == (room is None or room >= 7)
    assert not GRAMMAR.allowed(PlanState(), rounds_left=False)[TAGS.topic]


def test_a_label_ends_even_when_the_room_vanished() -> None:
    mask = GRAMMAR.allowed(PlanState("label", (), (1, 2)), room=0)
    assert mask.nonzero().flatten().tolist() == [TAGS.lengths[0][1]]


def test_allowed_is_cached_and_never_names_the_input_switches() -> None:
    state = PlanState("label", (), (1,))
    assert GRAMMAR.allowed(state) is GRAMMAR.allowed(state)
    inert = [TOKENS.noise.mask, TAGS.par, TAGS.sync, TOKENS.noise.filler]
    for stage in ("text", "label", "length"):
        mask = GRAMMAR.allowed(PlanState(stage, (Span((1,), 4),), (1,)))
        assert mask.shape == (VOCAB,) and not mask[inert].any()


def test_starts_follow_the_entry_and_leave_room_for_openings_and_lengths() -> None:
    """A part's position is known when its entry is, and is behind the planned end of every part before it."""
    rng = random.Random(2)
    for _ in range(50):
        plan, begin = random_plan(rng), rng.randint(0, 9)
        starts = GRAMMAR.starts(plan, begin)
        for k, (span, start) in enumerate(zip(plan.spans, starts, strict=True)):
            so_far = Plan(plan.spans[: k + 1])
            assert GRAMMAR.starts(so_far, begin) == starts[: k + 1], "later entries move nothing"
            assert start >= begin + len(GRAMMAR.render(so_far))
            assert all(
                start >= s + 1 + len(p.label) + p.length for s, p in zip(starts[:k], plan.spans[:k], strict=True)
            )
            assert len(GRAMMAR.entry(span)) == len(GRAMMAR.render(so_far)) - len(GRAMMAR.render(Plan(plan.spans[:k])))
        taken = [1 + len(s.label) + s.length for s in plan.spans]
        assert GRAMMAR.dense_starts(plan, begin) == tuple(begin + sum(taken[:i]) for i in range(len(taken)))
    assert GRAMMAR.starts(Plan(()), 3) == () == GRAMMAR.dense_starts(Plan(()), 3)


def shuffled(plan: Plan, order: list[int]) -> Plan:
    """The parts in ``order``, still depending on the same parts."""
    number_of = {old: new for new, old in enumerate(order)}
    return Plan(
        tuple(replace(plan.spans[i], depends=tuple(number_of[d] for d in plan.spans[i].depends)) for i in order)
    )


def test_sorted_is_topological_stable_and_keeps_meaning() -> None:
    rng = random.Random(3)
    for _ in range(200):
        # Labels are unique, so that they name the parts.
        plan = Plan(tuple(replace(s, label=(i,)) for i, s in enumerate(random_plan(rng).spans)))
        assert plan.sorted() == plan  # stable
        order = list(range(len(plan.spans)))
        rng.shuffle(order)
        edited = shuffled(plan, order)
        done = edited.sorted()
        NativeGrammar(TOKENS).check(done)
        for before, now in ((edited, done), (plan, done)):
            named = [{s.label: {p.spans[d].label for d in s.depends} for s in p.spans} for p in (before, now)]
            assert named[0] == named[1]
        # Stable: always the first part of the given order whose dependencies are there.
        left, taken = list(edited.spans), list[Span]()
        names = {s.label: {edited.spans[d].label for d in s.depends} for s in edited.spans}
        while left:
            following = next(s for s in left if names[s.label] <= {x.label for x in taken})
            left.remove(following)
            taken.append(following)
        assert [s.label for s in done.spans] == [s.label for s in taken]


def test_sorted_refuses_cycles_and_unknown_parts() -> None:
    ring = Plan((Span((1,), 2), Span((1,), 2, (2,)), Span((1,), 2, (1,))))
    with pytest.raises(PlanError, match=r"\[2, 3\] form a cycle"):
        ring.sorted()
    with pytest.raises(PlanError, match="cycle"):
        Plan((Span((1,), 2, (0,)),)).sorted()
    for d in (-1, 1):
        with pytest.raises(PlanError, match="part 1 depends on a part that does not exist"):
            Plan((Span((1,), 2, (d,)),)).sorted()


def test_depends_matrix() -> None:
    plan = Plan((Span((1,), 2), Span((1,), 2, (0,)), Span((1,), 2, (1,)), Span((1,), 2)))
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]
    assert plan.depends("dag").long().tolist() == expected
    assert torch.equal(plan.depends("sparse"), torch.eye(4, dtype=torch.bool))


@pytest.mark.parametrize(
    "spans, message",
    [
        ((), "at least one part"),
        ((Span((1,), 2),) * 6, "6 parts, more than max_parts=5"),
        ((Span((), 2),), "part 1 has no label"),
        ((Span((1,), 2), Span((1,) * 5, 2)), "part 2 has 5 tokens, more than max_label_length=4"),
        ((Span((1, TOKENS.noise.end), 2),), "holds a control token"),
        ((Span((TAGS.depends[0],), 2),), "holds a control token"),
        ((Span((1,), 0),), "length 0, outside 1 to max_part_length=16"),
        ((Span((1,), 17),), "length 17, outside"),
        ((Span((1,), 2), Span((1,), 2, (1,))), "part 2 depends on part 2, which is not an earlier part"),
        ((Span((1,), 2, (-1,)),), "depends on part 0, which is not an earlier part"),
        ((Span((1,), 2), Span((1,), 2), Span((1,), 2, (1, 0))), "must rise"),
        ((Span((1,), 2), Span((1,), 2, (0, 0))), "must rise"),
        ((Span((1,), 16),) * 4, "72 tokens, more than max_plan_length=60"),
    ],
)
def test_check_names_what_is_wrong(spans: tuple[Span, ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        GRAMMAR.check(Plan(spans))


def test_check_knows_how_many_dependency_tags_there_are() -> None:
    plan = Plan((Span((1,), 2), Span((1,), 2), Span((1,), 2, (1,))))
    assert GRAMMAR.check(plan) is plan
    with pytest.raises(PlanError, match="only 1 dependency tags"):
        NativeGrammar(replace(TOKENS, tags=replace(TAGS, depends=TAGS.depends[:1])), VOCAB, LIMITS).check(plan)


def test_numbers_of_any_kind_become_ints_and_nothing_else_passes() -> None:
    """A tensor compares with a tag by value, but not in a set: it would pass the ban on control tokens."""
    plain = Plan((Span((1, 2), 4), Span((3,), 2, (0,), (5, 6))), lead=(7,))
    for kind in (torch.tensor, np.array, list, lambda ids: [torch.tensor(i) for i in ids]):
        spans = [Span(kind([1, 2]), np.int64(4)), Span(kind([3]), torch.tensor(2), kind([0]), kind([5, 6]))]  # type: ignore
        given = Plan(spans, lead=kind([7]))  # type: ignore[arg-type]
        assert given == plain and hash(given) == hash(plain) and type(given.spans[1].text[0]) is int  # type: ignore
        tagged = Plan((Span((1,), 4, text=kind([5, TAGS.sync])),))
        with pytest.raises(PlanError, match="the text of part 1 holds a control token"):
            GRAMMAR.check(tagged)
    for wrong in ([1.0], torch.tensor([1.0]), np.array([0.5]), [True], ["a"], torch.tensor([[1]]), [None], 3):
        for field in ("label", "depends", "text"):
            with pytest.raises(PlanError, match="whole number"):
                Span(**{"label": (1,), "length": 4, field: wrong})  # type: ignore[arg-type]
        with pytest.raises(PlanError, match="whole number"):
            Plan((Span((1,), 4),), lead=wrong)  # type: ignore[arg-type]
    for length in (4.0, 4.5, "4", None, True, torch.tensor(4.0), (4,)):
        with pytest.raises(PlanError, match="the length of a part must be a whole number"):
            Span((1,), length)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="token ids, not a text"):
        Span("Geography", 4)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="must be Spans"):
        Plan(((1,), 4))  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["label", "text", "lead"])
@pytest.mark.parametrize("token", [-1, VOCAB, 10**12])
def test_ids_outside_the_vocabulary_are_refused(where: str, token: int) -> None:
    span = Span(**{"label": (1,), "length": 4, **({where: (1, token)} if where != "lead" else {})})  # type: ignore
    plan = Plan((Span((2,), 4), span), lead=(token,) if where == "lead" else ())
    with pytest.raises(PlanError, match=rf"the token id {token}, and .* 0 to {VOCAB - 1}"):
        GRAMMAR.check(plan)
    GRAMMAR.check(Plan((Span((1,), 4, text=(VOCAB - 1,)),)))


def test_huge_plans_are_refused_at_once() -> None:
    million = 10**6
    part = Span((1,), 2)
    huge = [
        Plan((part,) * million),
        Plan((Span((1,) * million, 2),)),
        Plan((Span((1,), million),)),
        Plan((part, Span((1,), 2, tuple(range(million))))),
    ]
    written = [
        (TAGS.topic, *(1,) * million),
        (TAGS.topic, 1, 17) * (million // 3),
    ]
    tracemalloc.start()
    for plan in huge:
        with pytest.raises(PlanError):
            GRAMMAR.check(plan)
    for ids in written:
        with pytest.raises(PlanError, match=r"max_parts|max_label_length"):
            GRAMMAR.parse(ids)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 1024  # bytes; one copy of a million of anything takes eight million


def test_sorted_is_fast_on_long_chains() -> None:
    count = 20000
    chain = Plan(tuple(Span((1,), 2, (i + 1,) if i + 1 < count else ()) for i in range(count)))
    start = time.process_time()
    assert chain.sorted().spans[-1].depends == (count - 2,)
    # A quadratic search would make 2 * 10^8 steps, over ten seconds.
    assert time.process_time() - start < 5
