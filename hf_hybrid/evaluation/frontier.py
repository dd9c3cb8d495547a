"""The frontier: exact match against speed, one line per family of settings, from the JSON of a bench run."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STAGES = ("prefill", "plan", "spans", "text")
"""Stages of an answer, in order; ``total`` is their sum and what lies between passes."""


class PlotError(RuntimeError):
    """A picture that cannot be drawn; the message says what is missing."""


def families(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Results by the first word of their names, each family from slow to fast."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        found.setdefault(result["name"].split()[0], []).append(result)
    return {name: sorted(members, key=lambda r: r["tokens_per_second"]) for name, members in found.items()}


def check_plots() -> None:
    """A ``PlotError`` when pictures cannot be drawn; to be known before a long run."""
    if importlib.util.find_spec("matplotlib") is None:
        raise PlotError('pictures need matplotlib: pip install "hf-hybrid[plots]"')


def draw_frontier(data: Mapping[str, Any], path: Path) -> None:
    """Draw a bench run: exact match of lines against answer tokens per second, and the seconds of every stage.

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
    for name, members in groups.items():
        across = [member["tokens_per_second"] for member in members]
        up = [100 * member["field_exact_match"] for member in members]
        (line,) = left.plot(across, up, marker="o", markersize=4, label=name, linewidth=1)
        marked = [(x, y) for x, y, member in zip(across, up, members, strict=True) if is_default(member)]
        if marked:
            left.plot(*zip(*marked, strict=True), linestyle="", marker="*", markersize=14, color=line.get_color())
    left.set(xlabel="answer tokens per second", ylabel="lines right, %")
    left.set_title("star: default of the checkpoint", fontsize="medium", loc="left")
    left.legend(fontsize="small")
    left.grid(alpha=0.3)
    _stages(right, [_representative(members) for members in groups.values()])
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


def _representative(members: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return next((member for member in members if is_default(member)), members[-1])


def _stages(axes: Any, results: Sequence[Mapping[str, Any]]) -> None:
    """Stacked bars: mean seconds of an answer, by stage."""
    names = [result["name"] for result in results]
    left = [0.0] * len(results)
    for stage in (*STAGES, "other"):
        seconds = [_seconds(result, stage) for result in results]
        if any(seconds):
            axes.barh(names, seconds, left=left, label=stage)
            left = [a + b for a, b in zip(left, seconds, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="seconds of an answer, mean")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3, axis="x")


def _seconds(result: Mapping[str, Any], stage: str) -> float:
    """Mean seconds of a stage; ``other``: what no stage counts, all of it where none was observed."""
    observed = result["seconds_per_stage"]
    if stage != "other":
        return observed.get(stage, 0.0)
    total = observed.get("total", result["seconds_per_answer"] or 0.0)
    return max(total - sum(observed.get(name, 0.0) for name in STAGES), 0.0)
