"""SuffixMemory: bounded, saved and loaded, and never used with another vocabulary.

Bugs these tests catch: a memory that grows for ever, or forgets the newest text; matches that run from one text into
the next; a truncated, foreign or giant file that is taken for a memory; a save that leaves half a file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_hybrid import DrafterError, MemoryFileError, SuffixMemory
from hf_hybrid.decoding.drafters.automaton import Match
from hf_hybrid.decoding.drafters.memory import FORMAT, GAP, LARGEST
from tests.models_for_tests import words


def filled() -> SuffixMemory:
    memory = SuffixMemory(100)
    memory.bind(61)
    for text in ([1, 2, 3], [4, 5], [6]):
        memory.add(text)
    return memory


def test_the_oldest_texts_leave() -> None:
    memory = SuffixMemory(10)
    for start in range(8):
        memory.add([10 * start + i for i in range(3)])
        assert len(memory) == sum(map(len, memory.texts)) <= 10
        assert memory.texts[-1][0] == 10 * start
        held = [token for text in memory.texts for token in [*text, GAP]]
        assert memory.automaton.tokens == held
    memory.add(list(range(100, 150)))
    assert memory.texts == [list(range(140, 150))], "the end of a text that is too long"
    memory.clear()
    assert len(memory) == 0 and memory.texts == [] and memory.automaton.tokens == []


def test_a_text_that_was_just_added_counts_once() -> None:
    memory = filled()
    memory.add([6])
    memory.add([])
    assert memory.texts == [[1, 2, 3], [4, 5], [6]]


def test_no_match_crosses_two_texts() -> None:
    match = Match(filled().automaton)
    for token, length in ((2, 1), (3, 2), (4, 1), (5, 2), (6, 1)):
        match.advance(token)
        assert match.length == length


def test_save_and_load(tmp_path: Path) -> None:
    memory, path = filled(), tmp_path / "memory.json"
    memory.save(path)
    loaded = SuffixMemory.load(path)
    assert (loaded.texts, loaded.max_tokens, loaded.vocab_size) == (memory.texts, 100, 61)
    assert [p.name for p in tmp_path.iterdir()] == ["memory.json"]
    with pytest.raises(DrafterError, match=r"vocabulary of 61 tokens, the model has 32; use a memory of its own"):
        loaded.bind(32)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    path, tokenizer, other = tmp_path / "memory.json", words(), words()
    other.add_tokens(["new"])
    memory = SuffixMemory(tokenizer=tokenizer)
    memory.add([1, 2])
    memory.save(path)
    assert SuffixMemory.load(path, tokenizer).texts == [[1, 2]] == SuffixMemory.load(path).texts
    with pytest.raises(MemoryFileError, match="saved with another tokenizer; start a new SuffixMemory"):
        SuffixMemory.load(path, other)


GOOD: dict[str, Any] = {"format": FORMAT, "vocab_size": 9, "tokenizer": None, "max_tokens": 50, "texts": [[1, 2]]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "pickle"}, "does not begin with the format"),
        ({"max_tokens": LARGEST + 1}, "max_tokens=16777217 is out of range"),
        ({"max_tokens": True}, "max_tokens=True is out of range"),
        ({"vocab_size": "9"}, "vocab_size='9' is no size"),
        ({"tokenizer": 3}, "its tokenizer is no digest"),
        ({"texts": [1, 2]}, "its texts are no lists"),
        ({"texts": [[1, 9]]}, "a token id is outside 0 to 8"),
        ({"texts": [[1, -1]]}, "a token id is outside 0 to 8"),
        ({"texts": [[1, 2.0]]}, "a token id is outside 0 to 8"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_foreign_files(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "memory.json"
    for content in (GOOD, {name: GOOD[name] for name in ("format", "max_tokens", "texts")}):
        path.write_text(json.dumps(content))
        assert SuffixMemory.load(path).texts == [[1, 2]]
    path.write_text(json.dumps({**GOOD, **changes}))
    with pytest.raises(MemoryFileError, match=message):
        SuffixMemory.load(path)


def test_truncated_and_other_files(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    filled().save(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(MemoryFileError, match="truncated or not JSON"):
        SuffixMemory.load(path)
    path.write_bytes(b"\x80\x04]")
    with pytest.raises(MemoryFileError, match="truncated or not JSON"):
        SuffixMemory.load(path)
    path.write_text("[" * 100_000)
    with pytest.raises(MemoryFileError, match="truncated or not JSON"):
        SuffixMemory.load(path)
    path.write_text("[]")
    with pytest.raises(MemoryFileError, match="does not begin with the format"):
        SuffixMemory.load(path)
    with path.open("wb") as file:
        file.truncate(16 * LARGEST + 1)  # sparse: takes no room
    with pytest.raises(MemoryFileError, match="more than any SuffixMemory"):
        SuffixMemory.load(path)


@pytest.mark.parametrize("bound", [0, LARGEST + 1])
def test_bounds(bound: int) -> None:
    with pytest.raises(ValueError, match=f"max_tokens={bound} is out of range"):
        SuffixMemory(bound)
