"""An animated SVG of answers that grow: every pass is a frame, and all answers share one clock."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.segment import Segment

from hf_hybrid.cli.view import CanvasView, Playback

if TYPE_CHECKING:
    from hf_hybrid.core.canvas import Canvas
    from hf_hybrid.core.tokens import ControlTokens

CELL, LINE, MARGIN = 7.2, 15.0, 12.0  # width of a character, height of a line, border; in pixels
BACKGROUND, PLAIN, BRIGHT, DIM = "#0d1117", "#c9d1d9", "#ffffff", "#6e7681"
COLORS = {"green": "#3fb950", "yellow": "#d29922", "cyan": "#39c5cf"}
HOLD = 3.0  # seconds that the finished answers stay
SHORTEST = 0.15  # seconds of a frame; passes between two frames are left out


@dataclass
class Film:
    """A streamer that keeps a frame per pass: hand it to ``generate(streamer=...)``.

    Args:
        decode: token ids to text. title: of the answer. control: tokens that are no text. playback: its speed.
        width, height: in characters.
    """

    decode: Any
    title: str
    control: ControlTokens | None
    playback: Playback
    width: int = 80
    height: int = 24
    frames: list[tuple[float, list[list[Segment]]]] = field(default_factory=list)
    """(seconds on the clock of the picture, lines) of every pass."""

    def __post_init__(self) -> None:
        self.console = Console(
            file=io.StringIO(), width=self.width, height=self.height, force_terminal=True, color_system="standard"
        )
        self.view = CanvasView(self.console, self.decode, self.title, self.control, self.playback)

    def put(self, value: Any) -> None:
        """Confirmed tokens; the canvas shows them."""

    def end(self) -> None:
        """Nothing follows."""

    def put_canvas(self, canvas: Canvas, mask: int) -> None:
        """Keep a frame of the canvas."""
        self.view.step(canvas)
        lines = self.console.render_lines(self.view.frame(canvas, self.height), pad=False)
        self.frames.append((self.view.passes * self.playback.pause, lines[: self.height]))


def animated_svg(films: Sequence[Film]) -> str:
    """Draw the films one above the other; they start together and repeat."""
    cycle = max(film.frames[-1][0] for film in films) + HOLD
    width = max(film.width for film in films) * CELL + 2 * MARGIN
    groups: list[str] = []
    top = MARGIN
    for film in films:
        frames = _thinned(film.frames)
        ends = [time for time, _ in frames[1:]] + [cycle]
        for number, ((begin, lines), end) in enumerate(zip(frames, ends, strict=True)):
            begin = begin if number else 0.0
            groups.append(_frame(lines, top, begin / cycle, end / cycle, cycle))
        top += LINE * max(len(lines) for _, lines in film.frames) + MARGIN
    style = f"text{{font:12px ui-monospace,Menlo,Consolas,monospace;fill:{PLAIN}}}"
    size = f'width="{width:.0f}" height="{top:.0f}" viewBox="0 0 {width:.0f} {top:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><style>{style}</style>'
    return head + f'<rect width="100%" height="100%" rx="6" fill="{BACKGROUND}"/>' + "".join(groups) + "</svg>\n"


def _thinned(frames: Sequence[tuple[float, list[list[Segment]]]]) -> list[tuple[float, list[list[Segment]]]]:
    """Frames that are far enough from the one before, and the last."""
    kept = list(frames[:1])
    for frame in frames[1:-1]:
        if frame[0] - kept[-1][0] >= SHORTEST:
            kept.append(frame)
    return kept + list(frames[-1:]) if len(frames) > 1 else kept


def _frame(lines: Sequence[Sequence[Segment]], top: float, begin: float, end: float, cycle: float) -> str:
    """One frame, visible from ``begin`` to ``end`` (shares of the cycle)."""
    times, values = [0.0], ["visible" if begin <= 0 else "hidden"]
    for time, value in ((begin, "visible"), (end, "hidden")):
        if 0 < time < 1:
            times.append(time)
            values.append(value)
    change = (
        f'<animate attributeName="visibility" dur="{cycle:.2f}s" repeatCount="indefinite" calcMode="discrete" '
        f'keyTimes="{";".join(f"{time:.4f}" for time in times)}" values="{";".join(values)}"/>'
    )
    rows = "".join(_line(line, top + LINE * (number + 0.8)) for number, line in enumerate(lines))
    return f'<g visibility="hidden">{change}{rows}</g>'


def _line(segments: Sequence[Segment], y: float) -> str:
    pieces: list[str] = []
    column = 0
    for segment in Segment.simplify(segments):
        for run in re.finditer(r"\S+(?: \S+)*", segment.text):
            # Every run has its own x and width: fonts differ, and some programs do not keep longer spaces.
            x = MARGIN + CELL * (column + cell_len(segment.text[: run.start()]))
            fit = f'x="{x:.1f}" textLength="{CELL * cell_len(run[0]):.1f}" lengthAdjust="spacingAndGlyphs"'
            pieces.append(f"<tspan {fit}{_style(segment)}>{escape(run[0])}</tspan>")
        column += segment.cell_length
    return f'<text y="{y:.1f}">{"".join(pieces)}</text>' if pieces else ""


def _style(segment: Segment) -> str:
    style = segment.style
    if style is None:
        return ""
    color = COLORS.get(style.color.name if style.color is not None else "")
    fill = color or (DIM if style.dim else BRIGHT if style.bold else "")
    found = f' fill="{fill}"' if fill else ""
    return found + (' font-style="italic"' if style.italic else "")
