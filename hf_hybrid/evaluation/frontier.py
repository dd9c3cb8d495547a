"""Draws the frontier of a bench run: right answers against speed, a point per setting."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STAGES = ("prefill", "plan", "spans", "text")
"""Stages of an answer, in order; ``total`` is their sum and the time between passes."""
OTHER = "other"
"""Time outside of all stages; the whole time where none was observed."""
_COLOURS = (
    "#555555",
    "#56b4e9",
    "#009e73",
    "#0072b2",
    "#e69f00",
    "#d55e00",
    "#cc79a7",
    "#8c6d31",
    "#999933",
    "#882255",
)
"""Colours of the families: those of Okabe and Ito first, which colour-blind readers can tell apart."""
_SHADES = {"prefill": 1.0, "plan": 0.75, "spans": 0.5, "text": 0.3, OTHER: 0.12}
"""Stage -> its share of the colour of its family."""


class PlotError(RuntimeError):
    """A picture that cannot be drawn; the message says what is missing."""


def families(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Results by the first word of their names, each family from slow to fast."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        found.setdefault(result["name"].split()[0], []).append(result)
    return {name: sorted(members, key=_speed) for name, members in found.items()}


def pareto(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The Pareto-optimal results in speed and right answers, from slow to fast."""
    kept: list[Mapping[str, Any]] = []
    for result in sorted(results, key=lambda r: (-_speed(r), -_right(r))):
        if not kept or _right(result) > _right(kept[-1]):
            kept.append(result)
    return kept[::-1]


def check_plots() -> None:
    """Raise a ``PlotError`` if pictures cannot be drawn; called before a long run."""
    if importlib.util.find_spec("matplotlib") is None:
        raise PlotError('pictures need matplotlib: pip install "hf-hybrid[plots]"')


def draw_frontier(data: Mapping[str, Any], path: Path) -> None:
    """Draw a bench run: right answers against speed, and the seconds of every stage, a colour per family in both.

    Bars are the 95 % intervals of the settings that the right half shows; those of other settings are about as wide.

    Args:
        data: what ``hf_hybrid.evaluation.to_json`` made. path: of the picture; its suffix is the format (png, svg).

    Raises:
        PlotError: matplotlib is not installed, or the run has no results.
    """
    check_plots()
    if not data["results"]:
        raise PlotError("the run has no results to draw")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), width_ratios=(3, 2), layout="constrained")
    groups = families(data["results"])
    colours = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(groups)}
    _points(left, groups, colours)
    shown = {name: _representative(members) for name, members in groups.items()}
    _stages(right, shown, colours)
    device = data["device"]
    figure.suptitle(
        f"{data['num_prompts']} prompts, {device['dtype']}, {device['processor']}, {device['threads']} threads",
        fontsize="medium",
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def is_default(result: Mapping[str, Any]) -> bool:
    """True: the result was made with what the checkpoint stores."""
    return result["name"].endswith(" default")


def _speed(result: Mapping[str, Any]) -> float:
    """Speed relative to the baseline, where both answers are right; over all prompts if that is never so."""
    return result["speedup"] or result["speedup_all"] or 0.0


def _right(result: Mapping[str, Any]) -> float:
    """Right answers, in percent."""
    return 100 * result["answer_exact_match"]


def _representative(members: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return next((member for member in members if is_default(member)), members[-1])


def _points(axes: Any, groups: Mapping[str, Sequence[Mapping[str, Any]]], colours: Mapping[str, str]) -> None:
    """Draw a point per setting, the intervals, and the Pareto line."""
    for name, members in groups.items():
        across, up = [_speed(member) for member in members], [_right(member) for member in members]
        axes.scatter(across, up, s=24, color=colours[name], alpha=0.7, linewidth=0, label=name, zorder=3)
        shown = _representative(members)
        point = (_speed(shown), _right(shown))
        bars = {
            "xerr": _reach(shown["speedup_interval"], point[0], 1),
            "yerr": _reach(shown["answer_exact_match_interval"], point[1], 100),
        }
        axes.errorbar(*point, **bars, color=colours[name], alpha=0.6, linewidth=1.2, capsize=3, zorder=2)
        if is_default(shown):
            axes.scatter(*point, s=190, marker="*", color=colours[name], edgecolor="white", linewidth=0.8, zorder=4)
    best = pareto([member for members in groups.values() for member in members])
    ends = [(_speed(member), _right(member)) for member in best]
    slowest = min(_speed(member) for members in groups.values() for member in members)
    line = {"color": "black", "linewidth": 1, "linestyle": ":", "drawstyle": "steps-pre", "zorder": 1}
    axes.plot(*zip((slowest, ends[0][1]), *ends, strict=True), label="Pareto line", **line)
    axes.set(xlabel="speed, times the baseline (median where both answers are right)", ylabel="answers right, %")
    axes.set_title("star: default of the checkpoint; bars: 95 % intervals", fontsize="medium", loc="left")
    axes.legend(fontsize="small", loc="lower left")
    axes.grid(alpha=0.3)


def _reach(interval: Sequence[float] | None, middle: float, factor: float) -> list[list[float]] | None:
    """Lengths of an interval below and above its point; None: it is not known."""
    if interval is None:
        return None
    return [[max(middle - factor * interval[0], 0.0)], [max(factor * interval[1] - middle, 0.0)]]


def _stages(axes: Any, shown: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    """Draw stacked bars: mean seconds of an answer by stage, in shades of the colour of its family."""
    from matplotlib.patches import Patch

    names = [result["name"] for result in shown.values()]
    left = [0.0] * len(names)
    patches: list[Patch] = []
    for stage, shade in _SHADES.items():
        seconds = [_seconds(result, stage) for result in shown.values()]
        if any(seconds):
            bars = [_mixed(colours[name], shade) for name in shown]
            axes.barh(names, seconds, left=left, color=bars, edgecolor="white", linewidth=0.6)
            left = [a + b for a, b in zip(left, seconds, strict=True)]
            patches.append(Patch(facecolor=_mixed("#000000", shade), edgecolor="#999999", label=stage))
    axes.invert_yaxis()
    axes.set(xlabel="seconds of an answer, mean")
    axes.legend(handles=patches, fontsize="small", loc="lower right")
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)


def _mixed(colour: str, share: float) -> tuple[float, float, float]:
    """A colour mixed from ``share`` of ``colour`` and white."""
    from matplotlib.colors import to_rgb

    red, green, blue = (1 - share + share * part for part in to_rgb(colour))
    return red, green, blue


def _seconds(result: Mapping[str, Any], stage: str) -> float:
    """Mean seconds of a stage."""
    observed = result["seconds_per_stage"]
    if stage != OTHER:
        return observed.get(stage, 0.0)
    total = observed.get("total", result["seconds_per_answer"] or 0.0)
    return max(total - sum(observed.get(name, 0.0) for name in STAGES), 0.0)
