"""Draws acceptance along a text: which tokens were drafted and accepted, and which the model wrote itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

from rich.cells import cell_len

if TYPE_CHECKING:
    from hf_hybrid.decoding import GenerationReport

CELL, LINE, MARGIN, WIDTH = 7.3, 20.0, 14.0, 92  # width of a character, height of a line, border in pixels; characters
BACKGROUND, PLAIN, DIM = "#0d1117", "#c9d1d9", "#8b949e"
COLORS = {"accepted": "#1f6f3a", "own": "#7a5b12", "alone": "none"}
"""accepted: drafted and accepted; own: the model's, where a draft ended or was rejected; alone: of a pass without a
draft."""
_LEGEND = (("accepted", "drafted, accepted"), ("own", "the model's own, behind a draft"), ("alone", "no draft"))


def acceptance_svg(pieces: Sequence[str], report: GenerationReport) -> str:
    """The picture.

    Args:
        pieces: text of every new token. report: of the answer, with ``drafting``.
    """
    drafting = report.drafting
    assert drafting is not None
    kinds = [*_kinds(drafting.passes)]
    kinds += ["alone"] * (len(pieces) - len(kinds))
    head = (
        f"drafter {drafting.drafter}: {report.num_tokens} tokens in {report.num_forwards} passes, "
        f"{sum(drafting.accepted)} of them drafted"
    )
    shapes = [_words(MARGIN, MARGIN + 12, head, DIM)]
    x = MARGIN
    for kind, name in _LEGEND:
        shapes.append(_box(x, MARGIN + LINE, 10, kind))
        shapes.append(_words(x + 15, MARGIN + LINE + 12, name, DIM))
        x += 15 + CELL * (len(name) + 3)
    row, column = 2.5, 0
    for piece, kind in zip(pieces, kinds, strict=False):
        for number, text in enumerate(piece.split("\n")):
            if number:
                row, column = row + 1, 0
            while text:
                if column and column + cell_len(text) > WIDTH:
                    row, column = row + 1, 0
                shown, text = text[:WIDTH], text[WIDTH:]
                x, y = MARGIN + CELL * column, MARGIN + LINE * row
                shapes.append(_box(x, y, CELL * cell_len(shown) - 1, kind))
                shapes.append(_words(x, y + 12, shown, PLAIN))
                column += cell_len(shown)
    wide, high = 2 * MARGIN + CELL * WIDTH, 2 * MARGIN + LINE * (row + 1)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide:.0f}" height="{high:.0f}" '
        f'viewBox="0 0 {wide:.0f} {high:.0f}">\n<title>{escape(head)}</title>\n'
        "<style>text{font:12px ui-monospace,Menlo,Consolas,monospace;white-space:pre}</style>\n"
        f'<rect width="100%" height="100%" fill="{BACKGROUND}"/>\n' + "\n".join(shapes) + "\n</svg>\n"
    )


def _kinds(passes: Sequence[tuple[int, int, int]]) -> Iterator[str]:
    """What each token is, pass by pass."""
    for drafted, accepted, written in passes:
        yield from ["accepted"] * min(accepted, written)
        yield from ["own" if drafted else "alone"] * (written - min(accepted, written))


def _box(x: float, y: float, width: float, kind: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="16" rx="2" fill="{COLORS[kind]}"/>'


def _words(x: float, y: float, text: str, color: str) -> str:
    # Control characters are not allowed in XML; the text length makes the boxes fit in every font.
    shown = escape("".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text))
    length = CELL * max(cell_len(text), 1)
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}" textLength="{length:.1f}" xml:space="preserve">{shown}</text>'
