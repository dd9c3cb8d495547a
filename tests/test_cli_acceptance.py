"""``generate --picture``: the picture shows what the report counted.

Bugs these tests catch: tokens shown as drafted that were not; text that is no XML; options that do not go together.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from hf_hybrid.cli import app
from hf_hybrid.cli.acceptance import COLORS, acceptance_svg
from hf_hybrid.decoding import DraftingReport, GenerationReport


def test_every_token_has_the_colour_of_its_pass() -> None:
    drafting = DraftingReport("suffix", accepted=[1, 1], passes=[(3, 2, 3), (0, 0, 1), (2, 0, 1), (4, 0, 0)])
    report = GenerationReport("speculative", num_tokens=5, num_forwards=4, drafting=drafting)
    svg = acceptance_svg(["<a>", "b\n", "c & \x00", "d", "e"], report)
    root = ElementTree.fromstring(svg)
    fills = [box.get("fill") for box in root.iter("{http://www.w3.org/2000/svg}rect")][4:]  # background and legend
    accepted, own, alone = COLORS["accepted"], COLORS["own"], COLORS["alone"]
    assert fills == [accepted, accepted, own, alone, own]
    assert "5 tokens in 4 passes, 2 of them drafted" in svg


def test_the_command_draws(tmp_path: Path) -> None:
    picture = tmp_path / "a.svg"
    call = ["generate", "Capital: Lima", "--strategy", "speculative", "--max-new-tokens", "12", "--picture"]
    result = CliRunner().invoke(app, [*call, str(picture)])
    assert result.exit_code == 0, result.output
    assert "drafter suffix: 9 tokens" in "".join(ElementTree.fromstring(picture.read_text()).itertext())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--picture", "a.svg"], "--picture is of one answer of --strategy speculative"),
        (["--strategy", "speculative", "--picture", "a.png"], "give an .svg file"),
        (["--strategy", "speculative", "--picture", "/no/such/a.svg"], "in a folder that exists"),
    ],
)
def test_a_picture_of_something_else_is_refused(options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["generate", "x", *options])
    assert result.exit_code == 2 and message in " ".join(result.output.split())
