"""The growing canvas on a terminal: the plan, and a panel per part with settled, drafted and open positions."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from hf_hybrid.core.canvas import Canvas, Lane

SETTLED, DRAFTED, OPEN = "bold", "dim italic", "dim"
MASK = "·"
BORDER = 2  # lines of a panel that hold no text


class CanvasView:
    """A streamer that draws every pass: hand it to ``generate(streamer=...)`` inside ``with``.

    Args:
        console: a terminal. decode: token ids to text.
        seconds, num_forwards: of the same call without drawing. slower: how many times slower to show it.
    """

    def __init__(self, console: Console, decode: Any, title: str, seconds: float, num_forwards: int, slower: float):
        self.console, self.decode, self.title = console, decode, title
        self.pause = slower * seconds / max(num_forwards, 1)
        self.slower, self.seconds, self.num_forwards = slower, seconds, num_forwards
        self.live = Live(console=console, auto_refresh=False, transient=True)
        self.passes, self.started = 0, 0.0
        self.last: Canvas | None = None

    def __enter__(self) -> CanvasView:
        self.live.__enter__()
        self.started = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.__exit__(None, None, None)

    def put(self, value: Any) -> None:
        """Confirmed tokens; the canvas shows them."""

    def put_draft(self, value: Any) -> None:
        """Drafted tokens; the canvas shows them."""

    def end(self) -> None:
        """Nothing follows."""

    def put_canvas(self, canvas: Canvas, mask: int) -> None:
        """Draw, not before the pass is due."""
        self.passes, self.last = self.passes + 1, canvas
        self.live.update(self.frame(canvas, self.console.height - 1), refresh=True)
        wait = self.started + self.passes * self.pause - time.perf_counter()
        if wait > 0:
            time.sleep(wait)

    def frame(self, canvas: Canvas, height: int | None = None) -> RenderableType:
        """The canvas as it stands, in at most ``height`` lines (None: as many as it takes)."""
        share = min(self.passes / max(self.num_forwards, 1), 1.0)
        clock = (
            f"{self.title}   pass {self.passes}   {share * self.seconds:.2f} s   (shown {self.slower:g} times slower)"
        )
        head: list[RenderableType] = [Text(clock if height else self.title, style="bold cyan", no_wrap=True)]
        plans, spans = [], []
        for lane in canvas.lanes:
            if lane.kind == "trunk":
                plans.append(lane)
            else:
                spans.append(lane)
        trunk = plans[-1]
        if spans and (trunk is plans[0] or height is None):  # nothing behind the parts yet, or only the end
            return Group(*head, self._panels(spans, None if height is None else height - 1))
        written = trunk.tokens[len(canvas.prompt) :] if trunk is plans[0] else trunk.tokens
        words = self._words(trunk, written)
        if not spans:
            words = words if height is None else _tail(words, self.console, self.console.width, height - 1)
            return Group(*head, words)
        foot = words if height is None else _tail(words, self.console, self.console.width, 2)
        lines = 0 if height is None else height - 1 - max(1, len(foot.wrap(self.console, self.console.width)))
        return Group(*head, self._panels(spans, lines or None), foot)

    def _panels(self, spans: list[Lane], height: int | None) -> Table:
        """Two panels (three on a wide terminal) side by side; a panel that is too small shows the end of its text."""
        columns = 3 if self.console.width >= 120 and len(spans) > 2 else min(2, len(spans))
        rows = -(-len(spans) // columns)
        room = None if height is None else max(1, height // rows - BORDER)
        grid = Table.grid(expand=True)
        for _ in range(columns):
            grid.add_column(ratio=1)
        panels = [self._panel(lane, self.console.width // columns - 4, room) for lane in spans]
        panels += [Text()] * (rows * columns - len(panels))
        for row in range(rows):
            grid.add_row(*panels[row * columns : (row + 1) * columns])
        return grid

    def _panel(self, lane: Lane, width: int, room: int | None) -> Panel:
        words = self._words(lane, lane.tokens[lane.opening :])
        label = self.decode(lane.tokens[1 : lane.opening]).strip() or "part"
        written = len(lane.tokens) - lane.opening
        state = "waits" if not lane.ready() else f"{written}/{lane.planned}"
        style = "green" if lane.done else "yellow" if lane.ready() else "dim"
        return Panel(
            words if room is None else _tail(words, self.console, width, room),
            title=Text(label, no_wrap=True, overflow="ellipsis"),
            title_align="left",
            subtitle=state,
            subtitle_align="right",
            border_style=style,
        )

    def _words(self, lane: Lane, written: list[int]) -> Text:
        """Settled text bright, drafts dim, open positions as dots."""
        text = Text(self.decode(written).lstrip("\n"), style=SETTLED if not lane.done else "")
        if lane.done or not lane.ready():
            return text
        text.append(self.decode(lane.draft), DRAFTED)
        fills = lane.fills[: lane.open_length]
        for token in [*fills, *[None] * (lane.open_length - len(fills))]:
            text.append(MASK if token is None else self.decode([token]), OPEN if token is None else DRAFTED)
        return text


def plan_table(report: Any, decode: Any) -> Table:
    """Every part that was planned: its label, its planned and its written tokens, and what it reads."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name, justify in (("part", "right"), ("label", "left"), ("planned", "right"), ("written", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("reads parts")
    for span in report.spans:
        number = f"{span.round}.{span.part + 1}" if len(report.plans) > 1 else str(span.part + 1)
        reads = ", ".join(str(d + 1) for d in span.depends)
        label = decode(list(span.label)).strip()
        table.add_row(number, label, str(span.planned), str(len(span.tokens)), reads or "-")
    return table


def _tail(text: Text, console: Console, width: int, room: int) -> Text:
    """The last ``room`` lines of ``text`` wrapped to ``width``."""
    lines = text.wrap(console, max(width, 1))
    return Text("\n").join(list(lines)[-max(room, 1) :])
