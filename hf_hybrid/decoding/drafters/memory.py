"""SuffixMemory: texts of earlier calls, for drafts that copy from them. Token ids alone, bounded, kept by its user."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from threading import RLock
from typing import Any

from hf_hybrid.decoding.drafters.automaton import SuffixAutomaton
from hf_hybrid.decoding.drafters.drafter import DrafterError

FORMAT = "hf_hybrid suffix memory 1"
LARGEST = 1 << 24
"""Most tokens of a memory; a file that claims more is refused before anything is made of it."""
GAP = -1
"""Stands between two texts in the automaton; no token id."""


class MemoryFileError(ValueError):
    """A file that holds no memory, or one of another tokenizer; the message says what to do."""


class SuffixMemory:
    """Prompts and answers of earlier calls. The oldest leave when ``max_tokens`` would be exceeded. Calls in several
    threads may share one.

    Args:
        max_tokens: bound, in tokens; about half a kilobyte each.
        tokenizer: the tokenizer of the texts, so that a saved memory is never used with another one. Without it only
            the size of the vocabulary is compared.

    Attributes:
        lock: held while the automaton grows; hold it to read more than one thing of the memory.

    Raises:
        ValueError: ``max_tokens`` outside 1 to 2**24.
    """

    def __init__(self, max_tokens: int = 65536, tokenizer: Any = None):
        if not 1 <= max_tokens <= LARGEST:
            raise ValueError(f"max_tokens={max_tokens} is out of range: 1 to {LARGEST}")
        self.max_tokens = max_tokens
        self.vocab_size: int | None = None
        self.tokenizer_digest = None if tokenizer is None else digest(tokenizer)
        self.version = 0  # counts the times that the automaton was made anew
        self.lock = RLock()
        self._texts: deque[list[int]] = deque()
        self._count = 0
        self._automaton: SuffixAutomaton | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or a pickle, has a lock of its own and no automaton yet."""
        with self.lock:
            return {**vars(self), "lock": None, "_texts": deque(self._texts), "_automaton": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.lock = RLock()

    def __len__(self) -> int:
        """Tokens held."""
        return self._count

    @property
    def texts(self) -> list[list[int]]:
        """The texts, oldest first."""
        with self.lock:
            return [list(text) for text in self._texts]

    @property
    def automaton(self) -> SuffixAutomaton:
        """Over all texts, with ``GAP`` between them; made when first asked for."""
        with self.lock:
            if self._automaton is None:
                self.version += 1
                self._automaton = SuffixAutomaton()
                for text in self._texts:
                    self._append(text)
            return self._automaton

    def bind(self, vocab_size: int) -> None:
        """The texts are of a model with this vocabulary.

        Raises:
            DrafterError: they are of another one.
        """
        with self.lock:
            if self.vocab_size not in (None, vocab_size):
                raise DrafterError(
                    f"this SuffixMemory holds texts of a vocabulary of {self.vocab_size} tokens, the model has "
                    f"{vocab_size}; use a memory of its own for each tokenizer"
                )
            self.vocab_size = vocab_size

    def add(self, text: Sequence[int]) -> None:
        """Remember one text, or its end when it is longer than ``max_tokens``. Ids beyond the vocabulary, which a model
        may read (placeholders of images) and never writes, are left out, and what is between them is a text each.
        """
        with self.lock:
            pieces = self._pieces(text[-self.max_tokens :])
            if not pieces or list(self._texts)[-len(pieces) :] == pieces:
                return
            for piece in pieces:
                self._remember(piece)

    def _pieces(self, text: Sequence[int]) -> list[list[int]]:
        limit = self.vocab_size if self.vocab_size is not None else 1 << 62
        runs = groupby(text, lambda token: token < limit)  # True: can be written
        return [list(run) for written, run in runs if written]

    def _remember(self, text: list[int]) -> None:
        self._texts.append(text)
        self._count += len(text)
        if self._count > self.max_tokens:
            # More than is needed, so that the automaton is made anew once in a while and not for every text.
            while len(self._texts) > 1 and self._count > self.max_tokens * 3 // 4:
                self._count -= len(self._texts.popleft())
            self._automaton = None
        elif self._automaton is not None:
            self._append(text)

    def clear(self) -> None:
        """Forget all texts."""
        with self.lock:
            self._texts.clear()
            self._count, self._automaton = 0, None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the texts as JSON; a file that is there is replaced at once or not at all."""
        content = {
            "format": FORMAT,
            "vocab_size": self.vocab_size,
            "tokenizer": self.tokenizer_digest,
            "max_tokens": self.max_tokens,
            "texts": self.texts,
        }
        target = Path(path)
        beside = target.with_name(target.name + ".part")
        with self.lock:
            beside.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")
            beside.replace(target)

    @classmethod
    def load(cls, path: str | os.PathLike[str], tokenizer: Any = None) -> SuffixMemory:
        """Read what ``save`` wrote.

        Args:
            tokenizer: of the model that the memory is for; compared with the one that it was saved for.

        Raises:
            MemoryFileError: a truncated file, another kind of file, or one of another tokenizer.
        """
        source = Path(path)
        size = source.stat().st_size
        if size > 16 * LARGEST:
            raise MemoryFileError(f"{source} has {size} bytes, more than any SuffixMemory; give the right file")
        try:
            content = json.loads(source.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise MemoryFileError(f"{source} is truncated or not JSON ({error}); save the memory again") from error
        fault = _fault(content)
        if fault:
            raise MemoryFileError(f"{source} holds no SuffixMemory: {fault}; save the memory again")
        memory = cls(content["max_tokens"], tokenizer)
        saved = content.get("tokenizer")
        if saved is not None and memory.tokenizer_digest not in (None, saved):
            raise MemoryFileError(f"{source} was saved with another tokenizer; start a new SuffixMemory for this one")
        memory.tokenizer_digest = memory.tokenizer_digest or saved
        memory.vocab_size = content.get("vocab_size")
        for text in content["texts"]:
            memory.add(text)
        return memory

    def _append(self, text: Sequence[int]) -> None:
        assert self._automaton is not None
        for token in text:
            self._automaton.extend(token)
        self._automaton.extend(GAP)


def digest(tokenizer: Any) -> str:
    """SHA-256, hexadecimal, of the vocabulary of a tokenizer: every token and its id."""
    vocabulary = sorted((int(i), token) for token, i in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def _fault(content: Any) -> str:
    """What is wrong with the content of a file; empty when nothing is."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return f"it does not begin with the format {FORMAT!r}"
    size, most, texts = content.get("vocab_size"), content.get("max_tokens"), content.get("texts")
    if not isinstance(most, int) or isinstance(most, bool) or not 1 <= most <= LARGEST:
        return f"max_tokens={most!r} is out of range: 1 to {LARGEST}"
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        return f"vocab_size={size!r} is no size"
    if not isinstance(content.get("tokenizer"), str | None):
        return "its tokenizer is no digest"
    if not isinstance(texts, list) or not all(isinstance(text, list) for text in texts):
        return "its texts are no lists"
    limit = size if size is not None else 1 << 31
    if any(type(token) is not int or not 0 <= token < limit for text in texts for token in text):
        return f"a token id is outside 0 to {limit - 1}"
    return ""
