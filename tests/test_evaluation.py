"""What a result holds: pairing, medians, intervals, groups, pictures.

Bugs these tests catch: a ratio upside down, or a quotient of medians for a median of quotients; prompts drawn in the
bootstrap where countries should be; a slow baseline chosen; a wrong answer counted into the speedup; a commit of
somebody else's repository.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_hybrid.config import settings_for
from hf_hybrid.evaluation import (
    CANDIDATES,
    FEEDBACK,
    Candidate,
    Measurement,
    Run,
    bootstrap_interval,
    groups_of,
    in_types,
    kinds_of,
    paired_ratios,
    report,
    results_of,
    shape_of,
    to_json,
)
from hf_hybrid.training.recipes.sheets import Sheet, SheetPart, TestItem


def item(name: str, country: str, answer: str = "- a\n") -> TestItem:
    return TestItem(name, "test", Sheet(f"prompt {name}", (answer,), (country,)))


def measured(seconds: float, right: bool = True, country: str = "A", text: str = "t", **changes: Any) -> Measurement:
    values: dict[str, Any] = {
        "text": text,
        "country": country,
        "seconds": seconds,
        "num_tokens": 10,
        "num_forwards": 5,
        "num_rows": 40,
        "seconds_to_first_text": 0.5,
        "seconds_per_stage": {"plan": 0.25},
        "peak_memory_mb": 100.0,
        "fields_right": 3,
        "fields_total": 4,
        "right": right,
    }
    return Measurement(**values | changes)


# Statistics.


def test_ratios_are_paired_and_the_baseline_stands_above() -> None:
    ratios = paired_ratios([2.0, 9.0, 4.0], [1.0, 3.0, 8.0], ["A", "B", "A"])
    assert ratios == {"A": [2.0, 0.5], "B": [3.0]}
    assert paired_ratios([2.0, 9.0, 4.0], [1.0, 3.0, 8.0], ["A", "B", "A"], [True, False, False]) == {"A": [2.0]}


def test_the_bootstrap_draws_groups_not_values() -> None:
    # Two groups: a draw is AA, AB, BA or BB. A alone (one draw in four) has median 1, so the lower end is 1;
    # if values were drawn, 1 of 100 values would never move the median.
    groups = {"A": [1.0], "B": [3.0] * 99}
    assert bootstrap_interval(groups, lambda v: float(np.median(v))) == (1.0, 3.0)


def test_the_bootstrap_is_the_same_every_time_and_for_every_order_of_groups() -> None:
    groups = {name: [float(n), n + 0.5] for n, name in enumerate("ABCDE")}
    mean = lambda values: float(values.mean())  # noqa: E731
    first = bootstrap_interval(groups, mean)
    assert first == bootstrap_interval(dict(reversed(groups.items())), mean)
    few = [bootstrap_interval(groups, mean, samples=9, seed=seed) for seed in (0, 1)]
    assert few[0] != few[1]
    assert first is not None and first[0] < 2.25 < first[1]  # the mean of all values


def test_one_group_has_no_interval() -> None:
    assert bootstrap_interval({"A": [1.0, 2.0], "B": []}, lambda v: float(v.mean())) is None


# Results.


@pytest.fixture
def run() -> Run:
    """Three prompts of two countries; the host is the faster baseline by its median, though not by its mean."""
    candidates = (
        Candidate("host", None),
        Candidate("ours", "autoregressive", equals="host"),
        Candidate("fast", "planned_diffusion", {"window_length": 4}, equals="ours"),
    )
    countries = ["A", "B", "A"]

    def row(seconds: Sequence[float], right: Sequence[bool], texts: str, **changes: Any) -> list[Measurement]:
        return [measured(s, r, c, t, **changes) for s, r, c, t in zip(seconds, right, countries, texts, strict=True)]

    measurements = {
        "host": row((4.0, 6.0, 90.0), (True, True, False), "xyz", num_forwards=10, seconds_per_stage={}),
        "ours": row((7.0, 7.0, 7.0), (True, True, False), "xyz", num_forwards=10),
        "fast": row(
            (2.0, 2.0, 5.0), (True, False, False), "xyq", extended=1, cut=2, fallen_back=3, contradictions=1, restated=2
        ),
    }
    return Run(candidates, [item(str(n), c) for n, c in enumerate(countries)], measurements)


def test_results_against_numbers_by_hand(run: Run) -> None:
    host, ours, fast = results_of(run, {"draft_threshold": 0.5})
    assert (host.strategy, host.baseline, ours.baseline) == ("host", True, False)  # medians 6 and 7
    assert (host.speedup, host.speedup_all, host.settings) == (1.0, 1.0, {})
    assert (fast.seconds_per_answer, fast.speedup, fast.speedup_prompts) == (2.0, 2.0, 1)  # only 4/2 is right on both
    assert fast.speedup_all == 3.0  # median of 2, 3, 18; the quotient of medians is 3, of means 11
    assert ours.speedup == pytest.approx((4 / 7 + 6 / 7) / 2)
    assert fast.speedup_interval is None and ours.speedup_interval == pytest.approx((4 / 7, 6 / 7))
    assert fast.tokens_per_second == pytest.approx(30 / 9) and fast.tokens_per_forward == 2.0
    assert (fast.num_forwards, fast.num_rows, fast.seconds_to_first_text) == (5.0, 40.0, 0.5)
    assert fast.seconds_per_stage == {"plan": 0.25} and host.seconds_per_stage == {}
    assert (fast.field_exact_match, fast.answer_exact_match) == (0.75, pytest.approx(1 / 3))
    assert (fast.extended, fast.cut, fast.fallen_back, fast.peak_memory_mb) == (3, 6, 9, 100.0)
    assert (fast.contradictions, fast.restated, host.restated) == (3, 6, 0)
    assert (ours.equal_share, fast.equal_to) == (1.0, "ours") and fast.equal_share == pytest.approx(2 / 3)
    assert fast.settings["window_length"] == 4 and fast.settings["draft_threshold"] == 0.5  # call, then checkpoint


def test_without_a_right_pair_there_is_no_speedup(run: Run) -> None:
    run.measurements["fast"] = [measured(1.0, False) for _ in run.items]
    fast = results_of(run)[2]
    assert fast.speedup is None and fast.speedup_interval is None and fast.speedup_all is not None


def test_groups_are_by_dependent_parts_and_share_the_baseline(run: Run) -> None:
    one, two = SheetPart("a", "b"), SheetPart("c", "d", (0,))
    run.items[1] = TestItem("1", "test", Sheet("p", ((one, two),), ("B",)))
    free, bound = groups_of(run)
    assert (free["dependent_parts"], free["num_prompts"]) == (0, 2)
    assert (bound["dependent_parts"], bound["num_prompts"]) == (1, 1)
    # Alone, prompts 0 and 2 have the medians 47 (host) and 7 (ours): the baseline is still that of the run, the host.
    by_name = {r["name"]: r for r in free["results"]}
    assert by_name["fast"]["speedup"] == 2.0 and by_name["fast"]["speedup_prompts"] == 1  # 4/2; prompt 2 is wrong
    assert by_name["fast"]["speedup_all"] == 10.0 and by_name["fast"]["answer_exact_match"] == 0.5  # 2 and 18
    (fast,) = [r for r in bound["results"] if r["name"] == "fast"]
    assert fast["speedup"] is None and fast["speedup_all"] == 3.0 and fast["num_forwards"] == 5.0
    assert to_json(run, results_of(run), {}, {}, "bench")["groups"] == [free, bound]


def test_kinds_are_by_what_bounds_the_gain_of_parts() -> None:
    def sheet(count: int, *behind: str, chained: bool = False) -> TestItem:
        parts = tuple(SheetPart(f"{n}", "x", (n - 1,) if chained and n else ()) for n in range(count))
        return TestItem("i", "test", Sheet("p", ("before", parts, *behind), ("A",)))

    items = [sheet(n) for n in (12, 2, 4, 4, 20)] + [sheet(4, "behind"), sheet(3, "behind", chained=True)]
    rows = [measured(seconds=n + 1.0, num_tokens=10 * n + 10, num_forwards=n + 1) for n in range(7)]
    rows[3] = measured(seconds=6.0, right=False, num_tokens=80, num_forwards=6)
    kinds = kinds_of(Run((Candidate("only", "autoregressive"),), items, {"only": rows}))
    found = [(k["kind"], k["parts"], k["num_prompts"]) for k in kinds]
    assert found == [
        ("independent parts", [2, 4], 3),
        ("independent parts", [12, 12], 1),
        ("independent parts", [20, 20], 1),
        ("text behind the parts", None, 1),
        ("parts that read parts", None, 1),  # whatever follows them
    ]
    (few,) = kinds[0]["results"]
    # Prompts 1, 2, 3: 20 + 30 + 80 tokens in 2 + 3 + 6 seconds and passes; not the mean of 10, 10, 13.
    assert few["tokens_per_second"] == few["tokens_per_forward"] == pytest.approx(130 / 11)
    assert (few["num_tokens"], few["answer_exact_match"]) == (pytest.approx(130 / 3), pytest.approx(2 / 3))


def test_types_have_their_own_baselines(run: Run) -> None:
    twice = in_types(run.candidates, ("float32", "bfloat16"))
    assert [c.name for c in twice[3:]] == ["host bf16", "ours bf16", "fast bf16"]
    assert [c.equals for c in twice[3:]] == [None, "host bf16", "ours bf16"]
    rows = {f"{name} bf16": [replace(m, seconds=m.seconds * 3) for m in ms] for name, ms in run.measurements.items()}
    both = results_of(Run(twice, run.items, {**run.measurements, **rows}))
    assert [r.baseline for r in both] == [True, False, False, True, False, False]
    assert [r.dtype for r in both] == [None] * 3 + ["bfloat16"] * 3
    assert [r.speedup_all for r in both[:3]] == pytest.approx([r.speedup_all for r in both[3:]])


def test_every_feedback_rule_is_on_once_and_off_once() -> None:
    stored = {"max_span_extension": 9.0}
    by_name = {c.name: settings_for(c.strategy, c.settings, stored) for c in FEEDBACK if c.strategy is not None}
    on: Any = by_name["all rules"]
    assert on.verify_spans and on.max_span_extension == 9.0 and on.span_fallback_confidence is not None
    rules = ("verify_spans", "max_span_extension", "span_fallback_confidence")
    changed = {
        name: [rule for rule in rules if getattr(settings, rule) != getattr(on, rule)]
        for name, settings in by_name.items()
        if name not in ("autoregressive", "spans", "all rules")
    }
    assert changed == {
        "-extension": ["max_span_extension"],
        "-fallback": ["span_fallback_confidence"],
        "-verification": ["verify_spans"],
        "-verif. -ext.": ["verify_spans", "max_span_extension"],
        "-verif. -fallb.": ["verify_spans", "span_fallback_confidence"],
        "no rules": list(rules),
    }


def test_an_empty_run_has_no_results() -> None:
    assert results_of(Run(CANDIDATES, [], {c.name: [] for c in CANDIDATES})) == []


def test_shape_of_a_test_set() -> None:
    def tokenizer(text: str, add_special_tokens: bool = True) -> dict[str, list[str]]:
        return {"input_ids": text.split() + ["mark"] * add_special_tokens}

    parts = (SheetPart("head ", "a b c "), SheetPart("head ", "a "))
    sheets = [Sheet("p q", ("t ", parts), ("A",)), Sheet("p q r s", ("t ",), ("B",))]
    shape = shape_of([TestItem(str(n), "dev", s) for n, s in enumerate(sheets)], tokenizer)
    assert shape == {
        "splits": ["dev"],
        "countries": 2,
        "prompt_tokens": 3.0,
        "answer_tokens": 4.0,  # 7 and 1
        "parts": 1.0,  # 2 and 0
        "longest_part": 3.0,
        "mean_part": 2.0,
        "longest_to_mean_part": 1.5,
    }


def test_the_commit_is_that_of_a_checkout_that_tracks_the_file(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=e"]
        done = subprocess.run(["git", "-C", tmp_path, *who, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    for name in ("tracked.py", "installed.py"):
        (tmp_path / name).write_text("")
    assert report._commit(tmp_path / "tracked.py") is None
    git("init", "-q")
    git("add", "tracked.py")
    git("commit", "-q", "-m", "m")
    assert report._commit(tmp_path / "tracked.py") == git("rev-parse", "HEAD")
    assert report._commit(tmp_path / "installed.py") is None
    (tmp_path / "tracked.py").write_text("changed")
    assert report._commit(tmp_path / "tracked.py") == git("rev-parse", "HEAD") + "-dirty"
