"""Shows a growing canvas on a terminal: the plan, and a panel per part with settled, drafted and open positions."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text as RichText

from hf_hybrid.cli.plan_display import read_trunk, readable

if TYPE_CHECKING:
    from hf_hybrid.cli.race import Race
    from hf_hybrid.core.canvas import Canvas
    from hf_hybrid.core.grammars import Entry, Grammar
    from hf_hybrid.core.lane import Lane
    from hf_hybrid.core.tokens import ControlTokens

SETTLED, DRAFTED, OPEN = "bold", "dim italic", "dim"
MASK = "·"
BORDER = 2  # lines of a panel that hold no text
LIST_LINES, RACE_LINES = 3, 3  # most lines of the plan in a low terminal; lines of the rival's text
LONGEST_REPLAY = 3.0  # seconds in which a rival that is still writing gets to its end


def watchable(console: Console) -> bool:
    """True: the console can show a view: a terminal that moves its cursor and knows the signs that we draw with."""
    return console.is_terminal and not console.is_dumb_terminal and console.encoding.lower().startswith("utf")


@dataclass(frozen=True)
class Playback:
    """Shows an answer ``slower`` times slower than it was written.

    ``seconds`` and ``num_forwards`` are of the same call without drawing.
    """

    seconds: float
    num_forwards: int
    slower: float

    @property
    def pause(self) -> float:
        """Seconds that a pass takes on the screen."""
        return self.slower * self.seconds / max(self.num_forwards, 1)


class CanvasView:
    """A streamer that draws every pass: hand it to ``generate(streamer=...)`` inside ``with``.

    Args:
        console: a terminal. decode: token ids to text. title: of the answer. control: tokens that are no text; None:
            the model has none. playback: None: as fast as the answer is written; the clock leaves out the time of
            drawing. race: shown below, on the same clock.
    """

    def __init__(
        self,
        console: Console,
        decode: Any,
        title: str,
        control: ControlTokens | None = None,
        playback: Playback | None = None,
        race: Race | None = None,
    ):
        self.console, self.decode, self.title = console, decode, title
        self.playback, self.race = playback, race
        noise = control.noise if control is not None else None
        self.hidden = frozenset((*noise.banned, noise.end)) if noise is not None else frozenset[int | None]()
        self.grammar = _grammar(control)
        self.live = Live(console=console, auto_refresh=False, transient=True)
        self.passes, self.started, self.drawing, self.clock = 0, 0.0, 0.0, 0.0
        self.rival_clock: float | None = None
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
        """Draw the canvas; a playback then waits until the next pass is due."""
        begin = time.perf_counter()
        self.step(canvas)
        if self.playback is None:
            self.clock = begin - self.started - self.drawing
        self._draw(canvas)
        if self.playback is not None:
            time.sleep(max(self.started + self.passes * self.playback.pause - time.perf_counter(), 0.0))
        self.drawing += time.perf_counter() - begin

    def step(self, canvas: Canvas) -> None:
        """Count a pass."""
        self.passes, self.last = self.passes + 1, canvas
        if self.playback is not None:
            self.clock = min(self.passes / max(self.playback.num_forwards, 1), 1.0) * self.playback.seconds

    def finish_race(self) -> None:
        """Show the rival up to its end, faster if that would take long."""
        if self.race is None or self.last is None:
            return
        rest = self.race.seconds - self.clock
        speed = max(rest / LONGEST_REPLAY, 1.0)
        begin = time.perf_counter()
        while rest > 0 and (ahead := (time.perf_counter() - begin) * speed) < rest:
            self.rival_clock = self.clock + ahead
            self._draw(self.last)
            time.sleep(0.02)

    def _draw(self, canvas: Canvas) -> None:
        self.live.update(self.frame(canvas, self.console.height - 1), refresh=True)

    def frame(self, canvas: Canvas, height: int | None = None) -> RenderableType:
        """Render the canvas in at most ``height`` lines; None: as many as it needs, without plan and clock.

        From above: title, plan, text before the parts, parts, text behind them, the rival, clock.
        """
        trunks, spans = [], []
        for lane in canvas.lanes:
            (trunks if lane.kind == "trunk" else spans).append(lane)
        behind = trunks[-1] if len(trunks) > 1 or not spans else None
        title = RichText(readable(self.title), style="bold cyan", no_wrap=True, overflow="ellipsis")
        if height is None:
            foot = [self._trunk(canvas, behind)] if behind is not None else []
            return Group(title, *([self._panels(spans, None)] if spans else []), *foot)
        clock = RichText(self._clock(canvas, trunks, spans), no_wrap=True, overflow="ellipsis")
        room = height - 2  # title and clock
        rival = self._rival() if self.race is not None and room > 3 * BORDER + RACE_LINES else None
        room -= BORDER + RACE_LINES if rival is not None else 0
        plan = self._plan(canvas, trunks, spans, room)
        room -= len(plan)
        lead = self._lines(self._trunk(canvas, trunks[0]), 1) if spans and room > 1 + BORDER else []
        room -= len(lead)
        foot = (
            [] if behind is None else self._lines(self._trunk(canvas, behind), min(2, room - BORDER) if spans else room)
        )
        room -= len(foot)
        panels = [self._panels(spans, max(room, 1))] if spans else []
        return Group(title, *plan, *lead, *panels, *foot, *([rival] if rival is not None else []), clock)

    def _clock(self, canvas: Canvas, trunks: list[Lane], spans: list[Lane]) -> str:
        written = sum(len(self._read(canvas, lane)[0]) for lane in trunks) + sum(len(lane.text()) for lane in spans)
        slower = f"   (shown {self.playback.slower:g} times slower)" if self.playback is not None else ""
        return f"pass {self.passes}   {written / max(self.passes, 1):.1f} tokens a pass   {self.clock:.2f} s{slower}"

    def _read(self, canvas: Canvas, lane: Lane, drafted: bool = False) -> tuple[list[int], list[Entry]]:
        """Text and plan of a trunk segment, with ``drafted`` the drafted tokens too."""
        settled = lane.tokens[len(canvas.prompt) :] if lane is canvas.lanes[0] else lane.tokens
        return read_trunk([*settled, *lane.drafted.tokens] if drafted else settled, self.grammar)

    def _plan(self, canvas: Canvas, trunks: list[Lane], spans: list[Lane], room: int) -> list[RichText]:
        """The parts with their lengths: one per line where there is room, else side by side."""
        items: list[RichText] = []
        parts = [lane for lane in spans if lane.kind == "span"]
        rounds = [trunk for trunk in trunks if self._read(canvas, trunk, drafted=True)[1]]
        for number, trunk in enumerate(rounds, 1):
            settled = len(self._read(canvas, trunk)[1])
            for part, entry in enumerate(self._read(canvas, trunk, drafted=True)[1], 1):
                lane = parts[len(items)] if len(items) < len(parts) else None
                name = f"{number}.{part}" if len(rounds) > 1 else str(part)
                items.append(self._item(name, entry, lane, part > settled))
        if room - len(items) >= 6 * -(-max(len(spans), 1) // 2):
            return items
        row = RichText("   ").join(items)
        lines = list(row.wrap(self.console, self.console.width)) if items else []
        return lines[-min(LIST_LINES, room // 4) :] if room >= 4 else []

    def _item(self, name: str, entry: Entry, lane: Lane | None, drafted: bool) -> RichText:
        length = "?" if entry.length is None else str(entry.length)
        if lane is not None:
            length = f"{len(lane.tokens) - lane.opening}/{length}"
        reads = f" reads {','.join(map(str, entry.reads))}" if entry.reads else ""
        style = DRAFTED if drafted else "" if lane is None else _state_style(lane)
        return RichText(f"{name} {self._decode(entry.label).strip()} {length}{reads}", style=style, no_wrap=True)

    def _trunk(self, canvas: Canvas, lane: Lane) -> RichText:
        """The text of a trunk segment, up to its plan; drafted entries of the plan are shown with the plan."""
        settled, (drafted, entries) = self._read(canvas, lane)[0], self._read(canvas, lane, drafted=True)
        text = RichText(self._decode(settled).lstrip("\n"), style=SETTLED if not lane.done else "")
        text.append(self._decode(drafted[len(settled) :]), DRAFTED)
        return text if entries else self._open(text, lane)

    def _rival(self) -> RenderableType:
        """The answer of the race as far as it was written at this time."""
        assert self.race is not None
        clock = min(self.clock if self.rival_clock is None else self.rival_clock, self.race.seconds)
        passes, tokens = self.race.at(clock)
        text = RichText(self._decode(tokens))
        lines = _tail(text, self.console, self.console.width - 4, RACE_LINES)
        return Panel(
            lines,
            title="the same prompt, token by token",
            title_align="left",
            subtitle=f"pass {passes}   {len(tokens) / max(passes, 1):.1f} tokens a pass   {clock:.2f} s",
            subtitle_align="right",
            height=BORDER + RACE_LINES,
            border_style="green" if passes == len(self.race.ends) else "yellow",
        )

    def _panels(self, spans: list[Lane], height: int | None) -> Table:
        """Two panels (three on a wide terminal) side by side; a panel that is too small shows the end of its text.

        Where not all panels fit, those of finished parts are left out first.
        """
        columns = 3 if self.console.width >= 120 and len(spans) > 2 else min(2, len(spans))
        if height is not None:
            spans = _fitting(spans, columns * max(height // (1 + BORDER), 1))
        rows = -(-len(spans) // columns)
        room = None if height is None else max(1, height // rows - BORDER)
        grid = Table.grid(expand=True)
        for _ in range(columns):
            grid.add_column(ratio=1)
        panels = [self._panel(lane, self.console.width // columns - 4, room) for lane in spans]
        panels += [RichText()] * (rows * columns - len(panels))
        for row in range(rows):
            grid.add_row(*panels[row * columns : (row + 1) * columns])
        return grid

    def _panel(self, lane: Lane, width: int, room: int | None) -> Panel:
        words = self._words(lane)
        label = self._decode(lane.tokens[: lane.opening]).strip() or "part"
        written = len(lane.tokens) - lane.opening
        return Panel(
            words if room is None else _tail(words, self.console, width, room),
            title=RichText(label, no_wrap=True, overflow="ellipsis"),
            title_align="left",
            subtitle="waits" if not lane.ready() else f"{written}/{lane.planned}",
            subtitle_align="right",
            border_style=_state_style(lane),
        )

    def _words(self, lane: Lane) -> RichText:
        """The text of a part: settled tokens bright, drafted ones dim, open positions as dots."""
        text = RichText(self._decode(lane.tokens[lane.opening :]).lstrip("\n"), style=SETTLED if not lane.done else "")
        text.append(self._decode(lane.drafted.tokens), DRAFTED)
        return self._open(text, lane)

    def _open(self, text: RichText, lane: Lane) -> RichText:
        """``text`` and the window behind it, up to a proposed plan."""
        if not lane.ready():
            return text
        fills = lane.window.fills[: lane.open_length]
        for token in [*fills, *[None] * (lane.open_length - len(fills))]:
            if self.grammar is not None and token is not None and self.grammar.opens(token):
                break
            text.append(MASK if token is None else self._decode([token]), OPEN if token is None else DRAFTED)
        return text

    def _decode(self, tokens: list[int]) -> str:
        """Text without control tokens and without characters that would steer the terminal."""
        return readable(self.decode([token for token in tokens if token not in self.hidden]))

    def _lines(self, text: RichText, room: int) -> list[RichText]:
        """The last ``room`` lines of ``text``; none if it is empty."""
        text.rstrip()
        lines = list(text.wrap(self.console, self.console.width)) if text.plain.strip() else []
        return lines[-room:] if room > 0 else []


def _grammar(control: ControlTokens | None) -> Grammar | None:
    if control is None or control.tags is None:
        return None
    from hf_hybrid.core.grammars import grammar_of

    return grammar_of(control)


def _state_style(lane: Lane) -> str:
    return "green" if lane.done else "yellow" if lane.ready() else "dim"


def _fitting(spans: list[Lane], count: int) -> list[Lane]:
    """At most ``count`` of the parts, in their order; finished ones are left out first."""
    ranked = sorted(range(len(spans)), key=lambda i: (spans[i].done, not spans[i].ready(), i))
    return [spans[i] for i in sorted(ranked[:count])]


def _tail(text: RichText, console: Console, width: int, room: int) -> RichText:
    """The last ``room`` lines of ``text`` wrapped to ``width``."""
    lines = text.wrap(console, max(width, 1))
    return RichText("\n").join(list(lines)[-max(room, 1) :])
