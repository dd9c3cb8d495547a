"""Annotated answers: nothing is lost, and structure is found where it is.

Catches: a byte that moves or vanishes when the pieces are joined again (line ends of other systems, tabs, characters
that Python takes for line ends and Markdown does not, headings inside code), a part that reads a later one or one that
no tag can name, more parts in a round than a plan may have, and structure that is missed or seen where there is none.
"""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest

from hf_hybrid.core.plan import PlanLimits
from hf_hybrid.models.vocabulary import MAX_DEPENDS
from hf_hybrid.training.recipes.annotate import AnnotatorSettings, Piece, annotate, join_texts, split_rounds
from hf_hybrid.training.recipes.sheets import SheetPart

ROOT = Path(__file__).parents[2]
ALL_PLANNED = AnnotatorSettings(shortest_parts=0)
FRAGMENTS = [
    *("# ", "## ", "### ", "####### ", "- ", "* ", "+ ", "1. ", "2) ", "12. ", "- [ ] ", "> ", "    ", "\t"),
    *("\n", "\n\n", "\r\n", "\r", "\n\n\n", "\x0b", "\x0c", "\u2028", "\x85", "\x00", "\ufeff", " "),
    *("```\n", "~~~\n", "---\n", "===\n", "***\n", "<div>\n", "| a | b |\n|---|---|\n", "[x]: y\n"),
    *(
        "**Name:** ",
        "Summary",
        "See Name",
        "step 2 ",
        "word ",
        "Größe ",
        "日本 ",
        "🙂",
        "e\u0301",
        "a: b",
        "\\",
        "`",
        "*",
        "_",
    ),
    *('{"a": 1}', '{"k": "v", "l": [1, 2]}', "[", "]", "{", "}", '"', ",", "<topic>", "<eos>", "<len:8>"),
]


def join(pieces: tuple[Piece, ...]) -> str:
    return "".join(p if isinstance(p, str) else "".join(part.label + part.text for part in p) for p in pieces)


def check(answer: str, settings: AnnotatorSettings) -> tuple[Piece, ...]:
    pieces = annotate(answer, settings)
    assert join(pieces).encode("utf-8") == answer.encode("utf-8")
    for one, two in pairwise(pieces):
        assert not (isinstance(one, str) and isinstance(two, str))
    for piece in pieces:
        assert piece
        if not isinstance(piece, str):
            assert 2 <= len(piece) <= PlanLimits().max_parts
            for number, part in enumerate(piece):
                assert part.label
                assert list(part.depends) == sorted(set(part.depends))
                assert all(0 <= d < number and d < MAX_DEPENDS for d in part.depends)
    return pieces


def random_json(rng: random.Random, depth: int = 0) -> object:
    kind = rng.randrange(6 if depth < 3 else 4)
    if kind == 0:
        return rng.choice([None, True, 0, -1.5e300, 12])
    if kind < 4:
        return "".join(rng.choices(FRAGMENTS, k=rng.randrange(4)))
    if kind == 4:
        return [random_json(rng, depth + 1) for _ in range(rng.randrange(5))]
    return {f"{n}{rng.choice(FRAGMENTS)}": random_json(rng, depth + 1) for n in range(rng.randrange(20))}


@pytest.mark.parametrize("treatment", ["parallel", "chain"])
def test_random_text_comes_back(treatment: str) -> None:
    rng = random.Random(treatment)
    names = ("json", "headings", "lists", "ordered_lists", "paragraphs")
    settings = AnnotatorSettings(**dict.fromkeys(names, treatment), shortest_parts=0)  # type: ignore[arg-type]
    planned = 0
    for _ in range(800):
        answer = "".join(rng.choices(FRAGMENTS, k=rng.randint(0, 40)))
        planned += any(not isinstance(piece, str) for piece in check(answer, settings))
    assert planned > 200  # the texts are not so broken that nothing is tested


def test_random_documents_come_back() -> None:
    """Well-formed Markdown of sections, lists and paragraphs, with every kind of line end."""
    rng = random.Random(5)
    parts = 0
    for _ in range(120):
        end = rng.choice(["\n", "\r\n", "\r"])
        blocks: list[str] = []
        for _ in range(rng.randint(1, 24)):
            words = " ".join(
                rng.choices(["tea", "sea:", "**bee**", "see Tea", "step 1", "x" * 50], k=rng.randint(1, 9))
            )
            kind = rng.choice(["# ", "## ", "## ", "- ", "1. ", "", ""])
            blocks.append(kind + words + end * rng.randint(1, 3))
        for piece in check("".join(blocks), ALL_PLANNED):
            parts += 0 if isinstance(piece, str) else len(piece)
    assert parts > 400


def test_random_json_comes_back() -> None:
    rng = random.Random(6)
    planned = 0
    for _ in range(200):
        style = rng.choice([{"indent": 2}, {}, {"separators": (",", ":")}, {"indent": "\t"}])
        answer = rng.choice(["", "\n ", "\t"]) + json.dumps(random_json(rng), ensure_ascii=rng.random() < 0.5, **style)
        planned += any(not isinstance(piece, str) for piece in check(answer + rng.choice(["", "\n"]), ALL_PLANNED))
    assert planned > 25


def test_the_documents_of_this_repository_come_back() -> None:
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("model_cards/**/*.json")]
    assert len(files) >= 5
    for path in files:
        pieces = check(path.read_bytes().decode("utf-8"), AnnotatorSettings())
        assert any(not isinstance(piece, str) for piece in pieces), path


def labels(answer: str, **settings: object) -> list[list[str]]:
    pieces = annotate(answer, AnnotatorSettings(shortest_parts=0, **settings))  # type: ignore[arg-type]
    return [[part.label for part in piece] for piece in pieces if not isinstance(piece, str)]


def depends(answer: str, **settings: object) -> list[tuple[int, ...]]:
    pieces = annotate(answer, AnnotatorSettings(shortest_parts=0, **settings))  # type: ignore[arg-type]
    return [part.depends for piece in pieces if not isinstance(piece, str) for part in piece]


def test_headings() -> None:
    record = "# Aba\nintro\n## Land\nflat\n\n### more\nx\n## Sea\n\nblue\n"
    assert labels(record) == [["## Land\n", "## Sea\n\n"]]
    # A shallower heading closes a round and is text between two.
    pieces = annotate(record + record.replace("Aba", "Bebe"), ALL_PLANNED)
    assert [piece if isinstance(piece, str) else len(piece) for piece in pieces] == [
        "# Aba\nintro\n",
        2,
        "# Bebe\nintro\n",
        2,
    ]
    assert labels("One\n===\na\n\nTwo\n---\nb\n\nThree\n---\nc\n") == [["Two\n---\n", "Three\n---\n"]]
    assert labels("## a\n```\n## no\n## heading\n```\n> ## quoted\n\n## b\nx") == [["## a\n", "## b\n"]]
    assert labels("# only\n\ntext") == []
    assert labels(record, headings="text") == [["intro", "flat", "x", "blue"]]  # the next structure that fits


def test_lists() -> None:
    answer = "Buy:\n\n- **Tea:** green\n  - nested\n- two red apples here\n\nand\n\n* [x] key: value\n* y\n"
    assert labels(answer) == [["- **Tea:**", "- two red apples"], ["* [x] key:", "* y"]]
    assert depends(answer) == [(), (), (), ()]
    steps = "".join(f"{n}. do this and that\n" for n in range(1, 12))
    assert labels(steps)[0][0] == "1. do this and"
    # A part cannot name the ninth one, so a round ends there and the next one reads all of it.
    assert depends(steps) == [(), *((n,) for n in range(8)), (), (0,)]
    assert depends(steps, ordered_lists="parallel") == [()] * 11
    assert labels(steps, ordered_lists="text") == []


def test_json() -> None:
    assert labels('{"a": 1, "b": [2, 3],\n "c": {"d": 4}}\n') == [['"a": ', ' "b": ', '\n "c": ']]
    assert annotate('{"a": 1, "b": 2}', ALL_PLANNED)[-1] == "}"
    rows = '[\n {"id": 1, "text": "x"},\n {"id": 2, "text": "y"}\n]'
    assert labels(rows) == [['\n {"id": 1,', '\n {"id": 2,']]
    assert labels('{"a": 1, "b": 2} trailing') == []
    assert labels("[1, 2, 3]") == [] and labels("{}") == [] and labels('{"a": 1,, "b": 2}') == []
    assert labels("[" * 100000) == []  # too deep to read is no JSON, and no crash


def test_paragraphs() -> None:
    assert labels("The sea is blue.\n\nThe hills\nare green.\n\n    code\n") == [["The sea is", "The hills"]]
    assert labels("one\n\ntwo", paragraphs="text") == []


def test_short_parts_are_not_worth_a_plan() -> None:
    answer = "- one two three four\n- one two three four\n"
    assert annotate(answer, AnnotatorSettings(shortest_parts=6))[0] != answer
    assert annotate(answer, AnnotatorSettings(shortest_parts=7)) == (answer,)  # " four\n" has six characters


def test_dependencies_are_read_from_the_text() -> None:
    answer = "## Land\nflat\n## Sea\nSee Land.\n## Air\nas in step 2 and section 9\n## Summary\nall\n"
    assert depends(answer) == [(), (0,), (1,), (0, 1, 2)]
    assert depends(answer, headings="chain") == [(), (0,), (1,), (0, 1, 2)]
    assert depends("## Land\nx\n## Sea\nthe Land is far, seeLand\n") == [(), ()]


def test_rounds() -> None:
    def parts(count: int, last: tuple[int, ...] = ()) -> list[SheetPart]:
        return [SheetPart(f"l{n}", "t", last if n == count - 1 else ()) for n in range(count)]

    assert [len(piece) for piece in split_rounds(parts(16))] == [16]
    assert split_rounds(parts(17))[1] == "l16t"  # a part alone is text
    # A part that reads more than can be named follows the round, which it reads whole.
    assert [len(piece) for piece in split_rounds(parts(12, tuple(range(11))))] == [11, len("l11t")]
    (whole,) = split_rounds(parts(9, tuple(range(8))))
    assert not isinstance(whole, str) and whole[-1].depends == tuple(range(8))
    assert join_texts(["", "a", "b", "", tuple(parts(2)), ""]) == ("ab", tuple(parts(2)))
