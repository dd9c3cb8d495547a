"""What a terminal shows: the canvas while it grows, the plan above it, the race below it.

Bugs these tests catch: a view taller or wider than the terminal; control tags on the screen; a cursor that stays
hidden; text that steers the terminal; a race on another clock; an answer that differs from the one without a view.
"""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_for_tests import read_checkpoint
from rich.console import Console

from hf_hybrid import ControlTokens, control_tokens, grammar_of
from hf_hybrid.cli.plan_display import read_trunk, readable
from hf_hybrid.cli.race import Race
from hf_hybrid.cli.view import MASK, CanvasView, Playback, watchable
from hf_hybrid.core.canvas import Canvas
from hf_hybrid.core.grammars import Entry
from hf_hybrid.core.grammars.native import PlanTags
from hf_hybrid.core.lane import Drafted, Lane, PlannedPart, Window
from tests.cli_for_tests import call


def canvas_of(parts: int, tokens: int) -> Canvas:
    """A prompt, a plan, and parts: the first is done, the second writes, the last of three and more waits for it."""
    canvas = Canvas(0, 0, [1, 2], 100)
    canvas.lanes = [Lane("trunk", 0, 0, [1, 2, 3], reason="end")]
    for number in range(parts):
        lane = Lane("span", number + 1, 3, [4, 50 + number, *[7] * tokens], window=Window(3), drafted=Drafted([8]))
        depends = tuple(canvas.lanes[2:3]) if number == parts - 1 else ()
        lane.part = PlannedPart(number, opening=2, planned=tokens, depends=depends)
        canvas.lanes.append(lane)
    canvas.lanes[1].finish("end")
    return canvas


def words(ids: list[int]) -> str:
    return "".join(f"w{token} " for token in ids)


def drawn(canvas: Canvas, width: int, height: int | None, terminal: bool = False, race: Race | None = None) -> str:
    out = Console(file=io.StringIO(), width=width, height=24, force_terminal=terminal, color_system=None)
    view = CanvasView(out, words, "title", playback=Playback(1.0, 10, 1.0), race=race)
    out.print(view.frame(canvas, height))
    return out.file.getvalue()  # type: ignore[attr-defined]


def test_a_part_shows_what_is_settled_drafted_and_open() -> None:
    lines = drawn(canvas_of(3, 2), 80, None).splitlines()
    top = lines[2]  # behind title and border
    done, writing = top[:40], top[40:]
    assert done.split() == ["│", "w7", "w7", "│"] and "·" not in done  # finished: nothing open, no draft
    assert writing.split() == ["│", "w7", "w7", "w8", "···", "│"]
    text = "\n".join(lines)
    assert "w50" in text and "2/2" in text and "waits" in text


@pytest.mark.parametrize(("parts", "tokens", "height"), [(2, 5, 23), (8, 60, 23), (5, 200, 23), (8, 60, 40)])
def test_the_view_fits_into_the_terminal(parts: int, tokens: int, height: int) -> None:
    lines = drawn(canvas_of(parts, tokens), 80, height).splitlines()
    assert len(lines) <= height and max(map(len, lines)) <= 80
    assert sum("w5" in line for line in lines) >= parts // 2  # every row of panels is there


@pytest.mark.parametrize("height", [5, 8, 12, 23, 39])
@pytest.mark.parametrize("parts", [2, 8, 16])
def test_the_view_fits_beside_a_race(parts: int, height: int) -> None:
    lines = drawn(canvas_of(parts, 40), 80, height, race=Race([0.1, 0.2, 0.3], [1, 2, 3], [5, 6, 7])).splitlines()
    assert len(lines) <= height and max(map(len, lines)) <= 80
    assert lines[-1].startswith("pass 0") and (height < 12 or any("token by token" in line for line in lines))


def test_finished_parts_make_room_for_those_that_are_written() -> None:
    canvas = canvas_of(8, 2)
    for lane in canvas.lanes[1:6]:
        lane.finish("end")
    text = drawn(canvas, 80, 8)
    assert "w55" in text and "w56" in text and "w50" not in text


def test_a_race_is_where_it_was_at_that_time() -> None:
    race = Race([0.5, 1.0, 1.5], [1, 1, 4], [5, 6, 7, 8])
    assert [race.at(t) for t in (0.4, 0.5, 1.2)] == [(0, []), (1, [5]), (2, [5])]
    assert race.at(race.seconds) == (3, [5, 6, 7, 8])


TAGS = PlanTags(par=92, topic=93, async_=94, sync=95, lengths=((16, 97), (32, 98)), depends=(99, 100))
CONTROL = ControlTokens.of(mask=90, end=91, filler=96, tags=TAGS)
GRAMMAR = grammar_of(CONTROL)


def test_a_plan_is_read_while_it_is_written() -> None:
    plan = [92, 1, 2, 93, 50, 51, 97, 93, 52, 98, 99, 93, 53]
    text, entries = read_trunk(plan, GRAMMAR)
    assert text == [1, 2]
    assert entries == [Entry([50, 51], 16), Entry([52], 32, [1]), Entry([53])]
    assert read_trunk([95, 7, 91], GRAMMAR) == ([7], []) and read_trunk([92, 7], None) == ([92, 7], [])


def test_a_plan_shows_lengths_and_no_tags() -> None:
    canvas = Canvas(0, 0, [1, 2], 100)
    trunk = Lane("trunk", 0, 0, [1, 2, 92, 7, 93, 50, 97, 93, 51, 98, 99], window=Window(3))
    trunk.drafted = Drafted([93, 52])
    canvas.lanes = [trunk]
    canvas.lanes[0].fills = [93, 53]
    out = Console(file=io.StringIO(), width=80, height=24, color_system=None)
    out.print(CanvasView(out, words, "title", CONTROL).frame(canvas, 23))
    lines = [line.strip() for line in out.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert lines[1:5] == ["1 w50 16", "2 w51 32 reads 1", "3 w52 ?", "w7"]
    assert not any(f"w{tag}" in "".join(lines) for tag in CONTROL.noise.banned)


def test_text_cannot_steer_the_terminal() -> None:
    assert readable("a\x1b[2Jb\tc\u00a0d\ne\x07") == "a[2Jb c d\ne"


@pytest.mark.parametrize("strategy", ["planned_diffusion", "block_diffusion"])
def test_generate_in_a_terminal_shows_the_canvas_and_then_the_text(
    folder: Path, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("generate", "Area: 5", "--model", folder, "--max-new-tokens", 30, "--strategy", strategy)
    plain = call(*flags).stdout
    module = sys.modules["hf_hybrid.cli.generate"]
    out = Console(file=io.StringIO(), width=80, height=24, force_terminal=True, color_system="standard")
    monkeypatch.setattr(module, "console", lambda: out)
    monkeypatch.setattr(module, "watchable", lambda console: True)
    result = call(*flags, "--race")
    shown = out.file.getvalue()  # type: ignore[attr-defined]
    assert result.stdout == plain and "token by token" in shown and "<par>" not in shown and MASK in shown
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == [strategy, "autoregressive"]
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1
    before = len(shown)
    assert call(*flags, "--no-watch").stdout == plain
    assert len(out.file.getvalue()) == before  # type: ignore[attr-defined]


def test_a_race_without_a_terminal_is_in_numbers(folder: Path) -> None:
    flags = ("generate", "Area: 5", "--model", folder, "--max-new-tokens", 12)
    result = call(*flags, "--race")
    assert result.stdout == call(*flags).stdout and result.stderr.count(" passes, ") == 2
    content = json.loads(call(*flags, "--race", "--json").output)
    plain = json.loads(call(*flags, "--strategy", "autoregressive", "--json").output)
    assert content["race"]["text"] == plain["text"] and content["race"]["report"]["strategy"] == "autoregressive"


@pytest.mark.parametrize("settings", [{"encoding": "ascii"}, {"dumb": True}, {"terminal": False}])
def test_what_cannot_draw_gets_no_view(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb" if settings.get("dumb") else "xterm")
    file = io.TextIOWrapper(io.BytesIO(), encoding=settings.get("encoding", "utf-8"))
    assert not watchable(Console(file=file, force_terminal=settings.get("terminal", True)))
    monkeypatch.setenv("TERM", "xterm")
    good = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    assert watchable(Console(file=good, force_terminal=True))


@pytest.mark.parametrize("strategy", ["planned_diffusion", "autoregressive"])
def test_the_view_follows_a_real_call(folder: Path, strategy: str) -> None:
    model, tokenizer, items = read_checkpoint(folder, torch.float32)
    out = Console(file=io.StringIO(), width=80, height=24, force_terminal=True, color_system="standard")
    view = CanvasView(out, tokenizer.decode, "title", control_tokens(model))
    inputs = tokenizer(items[0].sheet.prompt, return_tensors="pt")["input_ids"]  # (1, prompt)
    options: dict[str, Any] = {"max_new_tokens": 40, "return_dict_in_generate": True}
    with view:
        output = model.generate(inputs, strategy=strategy, streamer=view, **options)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert view.passes == output.report[0].num_forwards
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor comes back


def test_the_clock_leaves_the_drawing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    view = CanvasView(Console(file=io.StringIO(), force_terminal=True), words, "title")
    monkeypatch.setattr(view, "_draw", lambda canvas: time.sleep(0.5))
    with view:
        for _ in range(3):
            view.put_canvas(canvas_of(2, 2), 0)
    assert 0 < view.clock < 0.5  # three drawings took 1.5 s


def test_the_cursor_comes_back_after_an_interrupt() -> None:
    out = Console(file=io.StringIO(), width=80, height=24, force_terminal=True, color_system="standard")
    with pytest.raises(KeyboardInterrupt), CanvasView(out, words, "title") as view:
        view.put_canvas(canvas_of(2, 2), 0)
        raise KeyboardInterrupt
    assert out.file.getvalue().rstrip().endswith("\x1b[?25h") or "\x1b[?25h" in out.file.getvalue()  # type: ignore[attr-defined]
