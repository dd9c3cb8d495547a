"""Finds the plan of an answer in its structure: which parts it has, what they are called, what each reads.

The first structure that fits is taken:

1. a JSON object or array: its members, or those of its elements that are objects;
2. Markdown headings: the sections of the level that occurs most often (the shallower of two);
3. top-level Markdown lists: their items;
4. paragraphs.

Everything else stays text. Nothing is added, dropped or moved: the pieces, joined, are the answer.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from markdown_it import MarkdownIt
from markdown_it.token import Token

from hf_hybrid.core.plan import PlanLimits
from hf_hybrid.fields import setting
from hf_hybrid.models.vocabulary import MAX_DEPENDS
from hf_hybrid.training.recipes.sheets import SheetPart

Treatment = Literal["parallel", "chain", "text"]
Piece = str | tuple[SheetPart, ...]

_NEWLINE = re.compile(r"\r\n?|\n")  # what Markdown takes for the end of a line; str.splitlines knows more
_ITEM = re.compile(r"[ \t]*(?:[-+*]|\d{1,9}[.)])[ \t]+(?:\[[ xX]\][ \t]+)?")
_NAME = re.compile(r"[^\S\r\n]*(?:\*\*[^*\r\n]{1,60}\*\*:?|[^:\r\n]{1,40}:(?=\s)|\S+(?:[ \t]+\S+){0,2})")
_CLOSING = re.compile(
    r"(?:in )?(?:summary|conclusions?|short|all)|totals?|overall|(?:key )?takeaways?|tl;?dr", re.IGNORECASE
)
_REFERENCE = re.compile(r"\b(?:step|part|section|point|item)s?[ \t]+(\d{1,3})\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class AnnotatorSettings:
    """How each kind of structure is planned.

    ``parallel``: parts read none of their neighbours unless they name them; ``chain``: every part reads the one before
    it, so the parts are written one after the other; ``text``: the structure is not planned.
    """

    json: Treatment = setting("parallel", "members of a JSON object, or objects in a JSON array")
    headings: Treatment = setting("parallel", "sections under Markdown headings")
    lists: Treatment = setting("parallel", "items of Markdown lists with bullets")
    ordered_lists: Treatment = setting("chain", "items of numbered Markdown lists: steps build on one another")
    paragraphs: Treatment = setting("parallel", "paragraphs, where there is no other structure")
    shortest_parts: int = setting(
        16, "parts are planned if their mean length, without labels, is at least this many characters", 0, 10000
    )


@dataclass(frozen=True)
class _Cut:
    """Where the parts of a group are in a text.

    Part i is ``text[edges[i]:edges[i + 1]]``, and its label ends at ``labels[i]``. ``names``: what other parts may call
    them.
    """

    edges: tuple[int, ...]
    labels: tuple[int, ...]
    names: tuple[str, ...]
    treatment: Treatment


def annotate(answer: str, settings: AnnotatorSettings | None = None) -> tuple[Piece, ...]:
    """The pieces of ``answer``: texts, and rounds of parts with their dependencies. Joined they are the answer."""
    settings = settings or AnnotatorSettings()
    cuts = next((found for cut in _CUTTERS if (found := _worth_it(answer, cut(answer, settings), settings))), [])
    pieces: list[Piece] = []
    at = 0
    for cut in cuts:
        pieces += [answer[at : cut.edges[0]], *split_rounds(_parts(answer, cut))]
        at = cut.edges[-1]
    return join_texts([*pieces, answer[at:]])


def _worth_it(answer: str, cuts: Sequence[_Cut], settings: AnnotatorSettings) -> list[_Cut]:
    """The groups that are worth a plan: two parts or more, to be planned, and long enough."""
    kept: list[_Cut] = []
    for cut in cuts:
        bodies = [end - label for label, end in zip(cut.labels, cut.edges[1:], strict=True)]
        if cut.treatment != "text" and len(bodies) >= 2 and sum(bodies) >= settings.shortest_parts * len(bodies):
            kept.append(cut)
    return kept


def _parts(answer: str, cut: _Cut) -> list[SheetPart]:
    """The parts of a group, with their dependencies as indices in the group."""
    parts: list[SheetPart] = []
    for number, ((start, end), label) in enumerate(zip(pairwise(cut.edges), cut.labels, strict=True)):
        text = answer[label:end]
        if _CLOSING.fullmatch(cut.names[number]):
            depends = set(range(number))
        else:
            depends = {number - 1} if cut.treatment == "chain" and number else set[int]()
            depends |= {n for n, name in enumerate(cut.names[:number]) if _refers(text, name)}
            depends |= {n for match in _REFERENCE.finditer(text) if 0 <= (n := int(match[1]) - 1) < number}
        parts.append(SheetPart(answer[start:label], text, tuple(sorted(depends))))
    return parts


def _refers(text: str, name: str) -> bool:
    """True: ``text`` refers to the part called ``name``, with "see", "under", "section" or "above in" before
    the name.
    """
    words = r"\b(?:see|under|section|sections|above in|described in)[ \t]+(?:the[ \t]+)?[\"'*_`\[]*"
    return len(name) > 2 and name in text and re.search(words + re.escape(name) + r"(?!\w)", text, re.I) is not None


def split_rounds(parts: Sequence[SheetPart]) -> list[Piece]:
    """Split parts into rounds that a plan can name; their dependencies count from the first part.

    A round has at most ``PlanLimits.max_parts`` parts, and a part can name the first ``MAX_DEPENDS`` of its round.
    Where more is needed a new round begins: it reads everything before it. A round of one part is text, without a plan.
    """
    rounds: list[list[SheetPart]] = [[]]
    first = 0  # index in ``parts`` of the first part of the running round
    for number, part in enumerate(parts):
        inside = [d - first for d in part.depends if d >= first]
        if len(rounds[-1]) >= PlanLimits().max_parts or any(d >= MAX_DEPENDS for d in inside):
            rounds.append([])
            first, inside = number, []
        rounds[-1].append(SheetPart(part.label, part.text, tuple(inside)))
    return [tuple(r) if len(r) > 1 else "".join(part.label + part.text for part in r) for r in rounds]


def join_texts(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Drop empty texts and join neighbouring ones."""
    joined: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        elif piece:
            joined.append(piece)
    return tuple(joined)


def _json(answer: str, settings: AnnotatorSettings) -> list[_Cut]:
    """Members of the one JSON value that the answer is."""
    start = len(answer) - len(answer.lstrip())
    if answer[start : start + 1] not in ("{", "["):
        return []
    try:
        value, end = json.JSONDecoder().raw_decode(answer, start)
        if answer[end:].strip():
            return []
        if isinstance(value, dict):
            labels, ends = _members(answer, start)
        elif value and all(isinstance(element, dict) and element for element in value):
            labels, ends = _elements(answer, start)
        else:
            return []
    except (ValueError, RecursionError):
        return []
    return [_Cut((start + 1, *ends), tuple(labels), ("",) * len(labels), settings.json)]


def _skip(text: str, at: int) -> int:
    """Index of the next character that is no JSON white space."""
    while text[at] in " \t\r\n":
        at += 1
    return at


def _members(text: str, start: int) -> tuple[list[int], list[int]]:
    """Where each member's value begins in the valid JSON object at ``start``, and where the member ends.

    A member ends behind its comma, the last one behind its value.
    """
    decode = json.JSONDecoder().raw_decode
    labels: list[int] = []
    ends: list[int] = []
    at = _skip(text, start + 1)
    while text[at] != "}":
        _, at = decode(text, at)  # the key
        at = _skip(text, _skip(text, at) + 1)  # behind the colon
        labels.append(at)
        _, at = decode(text, at)
        behind = _skip(text, at)
        ends.append(behind + 1 if text[behind] == "," else at)
        at = _skip(text, ends[-1])
    return labels, ends


def _elements(text: str, start: int) -> tuple[list[int], list[int]]:
    """The same for the array of objects at ``start``: where each label ends, and where the object does.

    The label ends behind an object's first value when that is short, else before it.
    """
    decode = json.JSONDecoder().raw_decode
    labels: list[int] = []
    ends: list[int] = []
    at = _skip(text, start + 1)
    while text[at] != "]":
        values, inner = _members(text, at)
        short = len(inner) > 1 and inner[0] - values[0] <= 40
        labels.append(inner[0] if short else values[0])
        _, at = decode(text, at)
        behind = _skip(text, at)
        ends.append(behind + 1 if text[behind] == "," else at)
        at = _skip(text, ends[-1])
    return labels, ends


class _Markdown:
    """The top-level blocks of a Markdown text, and where its lines begin."""

    def __init__(self, text: str) -> None:
        self.text = text
        # Blocks alone: what is bold or a link does not matter here, and "[" a thousand times takes long to find out.
        self.tokens: list[Token] = MarkdownIt("commonmark").disable("inline").parse(text)
        self.lines = [0, *(match.end() for match in _NEWLINE.finditer(text))]
        if self.lines[-1] != len(text):
            self.lines.append(len(text))

    def start_of(self, line: int) -> int:
        """Index of the first character of a line; behind the last line, the end of the text."""
        return self.lines[min(line, len(self.lines) - 1)]

    def blocks(self, kind: str, level: int = 0) -> Iterator[tuple[Token, int, int]]:
        """Opening tokens of a kind, with first line and the line behind the last."""
        for token in self.tokens:
            if token.type == kind and token.level == level and token.map is not None:
                yield token, token.map[0], token.map[1]

    def behind_blank_lines(self, line: int) -> int:
        """The first line from ``line`` on that is not blank."""
        while line < len(self.lines) - 1 and not self.text[self.lines[line] : self.lines[line + 1]].strip():
            line += 1
        return line

    def name(self, line: int, skip: re.Pattern[str] | None = None) -> tuple[int, str]:
        """The first words of a line, behind what ``skip`` matches: where they end, and the words."""
        start, end = self.start_of(line), self.start_of(line + 1)
        marker = skip.match(self.text, start, end) if skip is not None else None
        begin = marker.end() if marker else start
        words = _NAME.match(self.text, begin, end)
        return (words.end(), words[0].strip("*: \t")) if words else (begin if marker else end, "")


def _headings(answer: str, settings: AnnotatorSettings) -> list[_Cut]:
    """Sections of the commonest level; a shallower heading ends its group, and is text before the next."""
    page = _Markdown(answer)
    found = [(int(token.tag[1]), first, last) for token, first, last in page.blocks("heading_open")]
    counts = Counter(level for level, _, _ in found)
    if max(counts.values(), default=0) < 2:
        return []
    chosen = min(counts, key=lambda level: (-counts[level], level))
    titles = {index: token.content for index, token in _titles(page)}
    cuts: list[_Cut] = []
    edges: list[int] = []
    labels: list[int] = []
    names: list[str] = []

    def close(end: int) -> None:
        if edges:
            cuts.append(_Cut((*edges, end), tuple(labels), tuple(names), settings.headings))
        edges.clear()
        labels.clear()
        names.clear()

    for level, first, last in found:
        if level < chosen:
            close(page.start_of(first))
        elif level == chosen:
            edges.append(page.start_of(first))
            labels.append(page.start_of(page.behind_blank_lines(last)))
            names.append(titles.get(first, "").strip("*_`: "))
    close(len(answer))
    return cuts


def _titles(page: _Markdown) -> Iterator[tuple[int, Token]]:
    """(line, the heading's content) of the top-level headings."""
    for opening, inside in pairwise(page.tokens):
        if opening.type == "heading_open" and opening.level == 0 and opening.map is not None:
            yield opening.map[0], inside


def _lists(answer: str, settings: AnnotatorSettings) -> list[_Cut]:
    """Items of the top-level lists, one group a list."""
    page = _Markdown(answer)
    cuts: list[_Cut] = []
    items = [first for _, first, _ in page.blocks("list_item_open", 1)]
    kinds: dict[str, Treatment] = {"bullet_list_open": settings.lists, "ordered_list_open": settings.ordered_lists}
    for kind, treatment in kinds.items():
        for _, first, last in page.blocks(kind):
            own = [line for line in items if first <= line < last]
            named = [page.name(line, _ITEM) for line in own]
            edges = (*(page.start_of(line) for line in own), page.start_of(last))
            cuts.append(_Cut(edges, tuple(end for end, _ in named), tuple(name for _, name in named), treatment))
    return sorted(cuts, key=lambda cut: cut.edges)


def _paragraphs(answer: str, settings: AnnotatorSettings) -> list[_Cut]:
    """From every top-level paragraph to the next one."""
    page = _Markdown(answer)
    own = [first for _, first, _ in page.blocks("paragraph_open")]
    edges = (*(page.start_of(line) for line in own), len(answer))
    return [_Cut(edges, tuple(page.name(line)[0] for line in own), ("",) * len(own), settings.paragraphs)]


_CUTTERS: tuple[Callable[[str, AnnotatorSettings], list[_Cut]], ...] = (_json, _headings, _lists, _paragraphs)
