"""The picture of a sweep: what is drawn where, in which colour, and that ``card`` draws it from recorded numbers.

Bugs these tests catch: settings joined by a line that means nothing; a colour that says one thing on the left and
another on the right; a Pareto line through a setting that another one beats; a range of chance that belongs to another
point, or to none; a default that is not marked; a stage that is left out of the time of an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_hybrid.cli import app
from hf_hybrid.evaluation import PlotError, draw_frontier
from hf_hybrid.evaluation.frontier import families, pareto

ROOT = Path(__file__).resolve().parents[1]
SWEEP = ROOT / "model_cards" / "results" / "hybrid-pocket-sweep.json"


def result(name: str, speedup: float | None, right: float, **changes: Any) -> dict[str, Any]:
    values = {
        "name": name,
        "speedup": speedup,
        "speedup_all": speedup or 1.5,
        "speedup_interval": None if speedup is None else (speedup - 0.5, speedup + 0.25),
        "answer_exact_match": right,
        "answer_exact_match_interval": (right - 0.25, right + 0.125),
        "seconds_per_answer": 4.0,
        "seconds_per_stage": {"prefill": 1.0, "text": 2.0, "total": 4.0},
    }
    return values | changes


RESULTS = (
    result("block w4", 3.0, 0.5),
    result("block default", 2.0, 0.75),
    result("host", 1.0, 0.75, seconds_per_stage={}, speedup_interval=None),
    result("verified w4", 2.0, 0.5),
    result("verified w8", None, 0.0),
)
FACTS = {"num_prompts": 3, "device": {"dtype": "float32", "processor": "Abacus", "threads": 2}}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Any, Any]:
    """The two halves of the picture of ``RESULTS``."""
    from matplotlib.figure import Figure

    figures: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    draw_frontier({"results": RESULTS, **FACTS}, tmp_path / "frontier.png")
    return tuple(figures[0].axes)


def colour(value: Any) -> tuple[int, ...]:
    """Red, green and blue from 0 to 255, without the opacity."""
    from matplotlib.colors import to_rgb

    return tuple(round(255 * part) for part in to_rgb(value))


def points(axes: Any) -> dict[str, Any]:
    """Family -> its points."""
    return {found.get_label(): found for found in axes.collections if not found.get_label().startswith("_")}


def test_families_are_from_slow_to_fast() -> None:
    groups = families(RESULTS)
    assert {name: [r["name"] for r in members] for name, members in groups.items()} == {
        "block": ["block default", "block w4"],
        "host": ["host"],
        "verified": ["verified w8", "verified w4"],  # without a pair of right answers: over all prompts
    }


def test_the_pareto_line_holds_what_nothing_beats() -> None:
    assert [r["name"] for r in pareto(RESULTS)] == ["block default", "block w4"]
    assert [r["name"] for r in pareto((*RESULTS, result("b", 3.5, 0.25), result("a", 3.0, 0.875)))] == ["a", "b"]


def test_the_left_half_is_points_the_pareto_line_and_ranges(drawn: tuple[Any, Any]) -> None:
    left, _ = drawn
    assert {name: found.get_offsets().tolist() for name, found in points(left).items()} == {
        "block": [[2.0, 75.0], [3.0, 50.0]],
        "host": [[1.0, 75.0]],
        "verified": [[1.5, 0.0], [2.0, 50.0]],
    }
    joined = [line for line in left.lines if line.get_linestyle() not in ("None", "")]
    lines = [line for line in joined if len(line.get_xdata()) > 1]
    assert [line.get_label() for line in lines] == ["Pareto line"], "settings are joined by nothing else"
    assert list(zip(*lines[0].get_data(), strict=True)) == [(1.0, 75.0), (2.0, 75.0), (3.0, 50.0)]
    bars = [container.lines[2] for container in left.containers]  # of each family: one or two collections
    ends = [[segment.tolist() for bar in two for segment in bar.get_segments()] for two in bars]
    assert ends == [
        [[[1.5, 75.0], [2.25, 75.0]], [[2.0, 50.0], [2.0, 87.5]]],  # of the default, not of the fastest
        [[[1.0, 50.0], [1.0, 87.5]]],
        [[[1.5, 50.0], [2.25, 50.0]], [[2.0, 25.0], [2.0, 62.5]]],
    ]
    (star,) = [found for found in left.collections if max(getattr(found, "get_sizes", list)(), default=0) > 100]
    assert star.get_offsets().tolist() == [[2.0, 75.0]]


def test_a_family_has_one_colour_in_both_halves(drawn: tuple[Any, Any]) -> None:
    left, right = drawn
    names = [label.get_text() for label in right.get_yticklabels()]
    assert names == ["block default", "host", "verified w4"]
    first: Mapping[str, Any] = dict(zip(names, right.containers[0], strict=True))  # the prefill, in the full colour
    found = {name: colour(dots.get_facecolor()[0][:3]) for name, dots in points(left).items()}
    assert len(set(found.values())) == 3
    assert {name.split()[0]: colour(bar.get_facecolor()[:3]) for name, bar in first.items()} == found
    for stage, bars in enumerate(right.containers[1:]):  # shades of it, ever lighter
        for name, bar in zip(names, bars, strict=True):
            shade, own = colour(bar.get_facecolor()[:3]), found[name.split()[0]]
            assert all(light > full or full == 255 for light, full in zip(shade, own, strict=True)), (stage, name)
    whole = [sum(bars[family].get_width() for bars in right.containers) for family in range(3)]
    assert whole == [4.0, 4.0, 4.0]
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["prefill", "text", "other"]


def test_the_file_is_what_its_suffix_says(tmp_path: Path) -> None:
    draw_frontier({"results": RESULTS, **FACTS}, tmp_path / "frontier.svg")
    text = (tmp_path / "frontier.svg").read_text()
    assert "<!-- block default -->" in text and "Abacus" in text
    with pytest.raises(PlotError, match="no results"):
        draw_frontier({"results": [], **FACTS}, tmp_path / "none.png")


def test_the_card_draws_the_recorded_sweep(tmp_path: Path) -> None:
    card = ["card", "hybrid-pocket", "--about", str(ROOT / "model_cards" / "hybrid-pocket" / "about.md")]
    picture = tmp_path / "sweep.png"
    options = ["--draw", str(SWEEP), "--picture", str(picture), "--out", str(tmp_path / "card" / "README.md")]
    options += ["--results", str(SWEEP.with_name("hybrid-pocket.json"))]
    (tmp_path / "card").mkdir()
    done = CliRunner().invoke(app, [*card, *options])
    assert done.exit_code == 0, done.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "card" / "sweep.png").read_bytes() == picture.read_bytes()
    assert CliRunner().invoke(app, [*card, "--draw", str(SWEEP)]).exit_code == 2
