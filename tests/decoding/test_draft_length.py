"""How long a draft is and whether there is one, with given costs and acceptance, and a cost model from given passes.

Bugs these tests catch: a one-token draft where two rows cost twice as much as one; a draft that goes on where nobody
expects it to be accepted; drafting that stays off for ever, or whose probes cost more than their share; a cost that one
outlier ruins; acceptance that is counted behind a rejected token.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from hf_hybrid import Draft, Drafter, ModelDrafter, SuffixDrafter, TreeDrafter
from hf_hybrid.decoding.draft_length import PROBE_SHARE, Acceptance, DraftLength, Experience, experience_of
from hf_hybrid.models.cost_model import MOST_ROWS, MeasuredCosts, cost_model_of
from tests.models_for_tests import tiny


def steep(rows: int) -> float:
    """Like a model of 135 M parameters on two cores, float32, in milliseconds."""
    return 34.0 if rows == 1 else 52.0 + 1.4 * rows


def best_by_hand(rows: list[int], chances: list[list[float]], seconds: object) -> float:
    """The most tokens per second, over all lengths, from the definition."""
    best = 0.0
    for length in range(max(map(len, chances)) + 1):
        written = 0.0
        for own in chances:
            reached = 1.0
            written += 1
            for chance in own[:length]:
                reached *= chance
                written += reached
        width = max(r + min(length, len(own)) for r, own in zip(rows, chances, strict=True))
        best = max(best, written / seconds(len(rows) * width))  # type: ignore[operator]
    return best


def test_the_length_with_the_most_tokens_per_second() -> None:
    draw = random.Random(0)
    for _ in range(200):
        batch = draw.choice([1, 1, 3])
        chances = [[draw.random() ** 0.3 for _ in range(draw.randint(0, 12))] for _ in range(batch)]
        rows = [draw.choice([1, 1, 2]) for _ in range(batch)]
        length, probing = DraftLength(steep).choose(rows, chances)
        assert not probing
        width = max(r + min(length, len(own)) for r, own in zip(rows, chances, strict=True))
        written = sum(1 + sum(itertools.accumulate(own[:length], lambda a, b: a * b)) for own in chances)
        best, plain = best_by_hand(rows, chances, steep), batch / steep(batch * max(rows))
        if length:
            assert written / steep(batch * width) == pytest.approx(best)
        else:
            assert best < 1.03 * plain or max(map(len, chances)) == 0


def test_one_token_cannot_pay_where_the_second_row_is_dear() -> None:
    lengths = DraftLength(steep)
    assert lengths.choose([1], [[0.6]]) == (0, False)
    assert lengths.choose([1], [[0.9] * 7]) == (7, False)
    assert DraftLength(lambda rows: 1.0).choose([1], [[0.1]]) == (1, False), "where rows are free, any draft pays"
    assert lengths.choose([1], [[0.9] * 7], seconds_per_token=34.0) == (0, False), "a drafter as slow as the model"


def test_a_drafter_that_often_has_nothing_is_paid_for_its_first_place() -> None:
    """All lengths by hand: with chance 0.5 there is no draft, and a token was drawn."""
    cost, offered = 10.0, 0.5
    for chance in (0.5, 0.9, 0.99):
        by_hand = [1 / steep(1)]
        for length in range(1, 9):
            written = 1 + sum(chance**i for i in range(1, length + 1))
            with_draft, without = steep(1 + length) + length * cost, steep(1) + cost
            tokens = offered * written + (1 - offered)
            by_hand.append(tokens / (offered * with_draft + (1 - offered) * without))
        best = by_hand.index(max(by_hand))
        length, _ = DraftLength(steep).choose([1], [[chance] * 8], cost, offered)
        assert length == (best if max(by_hand) >= 1.03 * by_hand[0] else 0)


def test_a_pass_is_wide_as_soon_as_one_text_of_a_batch_has_a_draft() -> None:
    """Every way in which two texts have a draft or none, by hand."""
    cost, offered, chance = 8.0, 0.4, 0.95
    by_hand = [2 / steep(2)]
    for length in range(1, 9):
        tokens = seconds = 0.0
        for has in itertools.product([True, False], repeat=2):
            share = math.prod(offered if one else 1 - offered for one in has)
            tokens += share * (2 + sum(has) * sum(chance**i for i in range(1, length + 1)))
            seconds += share * (steep(2 * (1 + length)) + length * cost if any(has) else steep(2) + cost)
        by_hand.append(tokens / seconds)
    best = by_hand.index(max(by_hand))
    assert best and max(by_hand) > 1.03 * by_hand[0], "the case is one in which a draft pays"
    length, _ = DraftLength(steep).choose([1, 1], [[chance] * 8] * 2, cost, offered)
    assert length == best


def test_what_a_draft_takes_is_told_from_what_finding_none_takes() -> None:
    known = Experience()
    known.note_made(0.3, 0, 0.0)
    assert known.seconds_per_token == pytest.approx(0.3), "a drafter that has nothing to say is not free"
    known.note_made(0.001, 0, 0.0)
    assert known.seconds_per_token == pytest.approx(0.3) and known.offered == pytest.approx(0.81)
    known.note_made(8.0, 8, 1.0)
    assert known.seconds_per_token == pytest.approx(0.36), "an outlier counts as twice what was expected"
    known.note_made(0.8, 8, 1.0)
    assert known.seconds_per_token == pytest.approx(0.308)


def test_what_is_known_of_a_drafter_that_takes_time_outlives_it() -> None:
    target, draft = tiny("llama"), tiny("llama", seed=2)
    known = experience_of(ModelDrafter(draft), target)
    assert experience_of(ModelDrafter(draft), target) is known
    trees = experience_of(TreeDrafter(draft), target)
    assert experience_of(TreeDrafter(draft), target) is trees is not known
    assert experience_of(ModelDrafter(draft), draft) is not known
    assert experience_of(ModelDrafter(draft), target, "elsewhere") is not known
    assert experience_of(SuffixDrafter(), target) is not experience_of(SuffixDrafter(), target)

    @dataclass
    class Unhashable(Drafter):
        costly = True

        def propose(self, texts: Any, length: int, sampler: Any) -> list[Draft]:
            return []

    assert experience_of(Unhashable(), target) is not known


def test_probes_cost_no_more_than_their_share() -> None:
    lengths, plain, spent, lost, probes = DraftLength(steep), steep(1), 0.0, 0.0, 0
    for _ in range(3000):
        length, probing = lengths.choose([1], [[0.05] * 8])
        assert probing == (length > 0)
        seconds = steep(1 + length)
        lengths.note(seconds, probing, plain, 1.0)  # nothing is ever accepted
        spent, lost, probes = spent + seconds, lost + seconds - plain, probes + probing
    assert probes > 20, "it goes on looking"
    assert lost <= PROBE_SHARE * spent


def test_it_comes_back_when_drafts_stand_again() -> None:
    lengths, acceptance, drafted = DraftLength(steep), Acceptance(), []
    for step in range(900):
        chances = acceptance.chances("copy", 0.8, 8)
        length, probing = lengths.choose([1], [chances])
        accepted = length if step >= 450 else 0
        acceptance.note("copy", length, accepted)
        lengths.note(steep(1 + length), probing, steep(1), 1.0 + accepted)
        drafted.append(length)
    assert sum(n > 0 for n in drafted[50:450]) < 20, "off"
    assert all(n == 8 for n in drafted[-200:]), "on"


def test_acceptance_is_conditional() -> None:
    acceptance = Acceptance()
    for _ in range(200):
        acceptance.note("a", 6, 1)  # the first is accepted, the second rejected, the others are never reached
    first, second, third = acceptance.chances("a", 0.5, 6)[:3]
    # The claim of 0.5 counts as two tokens beside some 33 that are remembered.
    assert first > 0.95 and second < 0.06
    # Never reached: as the one before it.
    assert third == pytest.approx(second)
    assert acceptance.chances("b", 0.5, 3) == [0.5] * 3
    assert acceptance.refined("a", [0.5, 0.5])[0] > 0.95


def test_costs_of_two_kinds_of_passes() -> None:
    costs = MeasuredCosts("packed")
    assert costs.seconds(1) == 1.0 < costs.seconds(2) == costs.seconds(5) < costs.seconds(30), "a first guess"
    draw = random.Random(1)
    for _ in range(300):
        rows = draw.choice([1, 6, 9, 17, 33])
        costs.note(rows, steep(rows) * (20 if draw.random() < 0.02 else draw.uniform(0.95, 1.05)))
    for rows in (1, 6, 12, 25, 33):
        # The outliers, one in fifty, count as twice the cost; the guesses as one pass each.
        assert costs.seconds(rows) == pytest.approx(steep(rows), rel=0.12)
    before = costs.seconds(8)
    costs.note(MOST_ROWS + 1, 1e9)
    costs.note(8, 0.0)
    assert costs.seconds(8) == before


def test_costs_before_a_pass_of_one_row() -> None:
    costs = MeasuredCosts("packed")
    costs.note(8, 0.5)
    assert costs.seconds(8) == pytest.approx(0.5, rel=0.2) and 0.2 < costs.seconds(1) < 0.4


def test_cost_models_belong_to_a_model_on_a_device() -> None:
    one, two, cpu = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), torch.device("cpu")
    costs = cost_model_of(one, cpu, torch.float32)
    assert cost_model_of(one, cpu, torch.float32) is costs
    assert cost_model_of(two, cpu, torch.float32) is not costs
    assert cost_model_of(one, cpu, torch.bfloat16) is not costs
