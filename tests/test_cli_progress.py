"""What commands say while they load and measure: on a terminal a spinner and a bar, elsewhere at most a line per stage.

Bugs these tests catch: a command that is silent while it loads, warms up or answers; progress in standard output or
beside an error; standard output that is led into standard error while a bar is shown; a bar that a thread draws while
answers are timed; a bar that stays behind.
"""

from __future__ import annotations

import io
import json
import re
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from checkpoint_for_tests import write_checkpoint
from rich.console import Console
from typer.testing import CliRunner

from hf_hybrid import evaluation
from hf_hybrid.cli import app, progress
from hf_hybrid.evaluation import Candidate

FEW = (Candidate("host", None), Candidate("planned", "planned_diffusion", {"window_length": 4}))
SPEAKS = ["warming up (6 steps to go)", "answering (4 steps to go)"]  # 2 candidates, 2 prompts and a warm-up each


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is written to standard error, which is a terminal of 100 columns."""
    written = io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=written, force_terminal=True, width=100))
    return written


def test_elsewhere_a_measurement_is_a_line_per_stage(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "CANDIDATES", FEW)
    flags = ["--num-prompts", "2", "--max-new-tokens", "8", "--json", str(tmp_path / "numbers.json")]
    result = CliRunner().invoke(app, ["bench", "--model", str(folder), *flags])
    assert result.exit_code == 0 and result.stderr.splitlines() == SPEAKS
    assert "to go" not in result.stdout and result.stdout.startswith("2 prompts")
    assert json.loads((tmp_path / "numbers.json").read_text())["num_prompts"] == 2


def test_a_terminal_shows_what_goes_on_and_nothing_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch, terminal: io.StringIO
) -> None:
    monkeypatch.setattr(evaluation, "CANDIDATES", FEW)
    flags = ["--num-prompts", "2", "--max-new-tokens", "8", "--passes"]
    result = CliRunner().invoke(app, ["bench", "--model", str(folder), *flags])
    assert result.exit_code == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    order = ["loading torch and transformers", f"loading {folder}", "warming up: host", "warming up: planned"]
    order += ["answering: host", "answering: planned", "timing single passes"]
    starts = [shown.index(text[:60]) for text in order]
    assert starts == sorted(starts) and "5/6" in shown
    assert terminal.getvalue().endswith("\x1b[1A\x1b[2K"), "the last line was wiped"
    assert "warming" not in result.stdout + result.stderr and result.stdout.startswith("2 prompts")


def test_the_demo_says_how_far_it_is(folder: Path, terminal: io.StringIO) -> None:
    result = CliRunner().invoke(app, ["demo", "--model", str(folder), "--max-new-tokens", "4"])
    assert result.exit_code == 0 and "warming up: planned_verified" in terminal.getvalue()
    assert "answering: block_diffusion" in terminal.getvalue() and "warming" not in result.output


@pytest.mark.parametrize("shown", [partial(progress.waiting, "loading"), progress.counting])
def test_standard_output_stays_standard_output(
    terminal: io.StringIO, capsys: pytest.CaptureFixture[str], shown: Any
) -> None:
    before = sys.stdout
    with shown():
        assert sys.stdout is before
        print("a result")
    assert capsys.readouterr().out == "a result\n" and "a result" not in terminal.getvalue()


def test_no_thread_draws_while_answers_are_timed(terminal: io.StringIO) -> None:
    before = threading.active_count()
    with progress.counting() as told:
        told("answering", "[host]", 3, 6)
        assert threading.active_count() == before
    assert "answering: [host]" in terminal.getvalue() and "3/6" in terminal.getvalue()
    with progress.waiting("loading"):
        assert threading.active_count() == before + 1  # there is nothing to disturb
