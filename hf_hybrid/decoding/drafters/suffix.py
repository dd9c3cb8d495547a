"""SuffixDrafter: copies what followed the last words where they occurred before. No weights, any model, microseconds.

Sources: Saxena, "Prompt Lookup Decoding", 2023, for the idea; Hu et al., "SAM Decoding", 2024, for the automaton; Luo
et al., "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling", 2024, for
successors seen in checked rows. Ours: the longest match decides between the text itself and a memory of earlier calls,
its latest place is copied, and behind a copied word that was replaced the copy goes on from the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from hf_hybrid.decoding.drafters.automaton import Match, SuffixAutomaton
from hf_hybrid.decoding.drafters.drafter import Draft, Drafter, Sampler, Text
from hf_hybrid.decoding.drafters.memory import GAP, SuffixMemory

GRADES: tuple[tuple[int, str, float], ...] = (
    (1, "one word", 0.2),
    (2, "two words", 0.4),
    (4, "up to four words", 0.6),
    (8, "up to eight words", 0.8),
    (1 << 30, "more words", 0.92),
)
"""Longest match, name, and how often a copied token is accepted before anything is known."""
RESUMED, RECYCLED = "resumed", "recycled"
_RECYCLED_LENGTH = 4


@dataclass(eq=False)
class _Reading:
    """What is known of one text: its automaton, its match in the memory, and where the last draft was copied from."""

    automaton: SuffixAutomaton = field(default_factory=SuffixAutomaton)
    match: Match | None = None
    version: int = 0
    source: list[int] | None = None  # the sequence that was copied from
    place: int = 0  # index in ``source`` of what was expected next


class SuffixDrafter(Drafter):
    """Drafts for any model from the prompt, the answer so far, and a memory of earlier calls.

    Args:
        memory: texts of earlier calls; every finished text is added. None: this call alone.
        recycle: True: without a match, draft the tokens that the model put behind the same token before.
    """

    name = "suffix"

    def __init__(self, memory: SuffixMemory | None = None, recycle: bool = True):
        self.memory, self.recycle = memory, recycle
        self._readings: dict[Text, _Reading] = {}
        self._successor: dict[int, int] = {}  # token -> what the model put behind it last

    def prepare(self, model: Any, vocab_size: int, batch_size: int) -> None:
        """Checks the memory against the vocabulary; a call that was left unfinished is forgotten."""
        self._readings.clear()
        self._successor.clear()
        if self.memory is not None:
            self.memory.bind(vocab_size)

    def begin(self, text: Text) -> None:
        """Read nothing yet: the prompt is read with the first draft."""
        self._readings[text] = _Reading()

    def propose(self, texts: Sequence[Text], length: int, sampler: Sampler) -> list[Draft]:
        """The continuation of the longest match of each text."""
        with nullcontext() if self.memory is None else self.memory.lock:  # a text of another call may be added
            return [self._draft(text, min(length, text.room)) for text in texts]

    def learn(self, text: Text, draft: Draft, accepted: int, chosen: Sequence[int]) -> None:
        """Where the copy would go on, and what the model put behind each token."""
        reading = self._readings[text]
        # The token behind the draft was written by the model: the next one to copy follows it.
        reading.place += accepted + 1
        if draft.bucket == RESUMED and not accepted:
            reading.source = None
        if self.recycle and chosen:
            self._successor.update(zip((text.tokens[-1], *draft.tokens), chosen, strict=False))

    def end(self, text: Text) -> None:
        """Keep the text in the memory."""
        if self._readings.pop(text, None) is not None and self.memory is not None:
            self.memory.add(text.tokens)

    def _draft(self, text: Text, length: int) -> Draft:
        reading = self._readings[text]
        self._read(reading, text.tokens)
        automaton, match = reading.automaton, reading.match
        source, matched, place = automaton.tokens, automaton.suffix_length, automaton.suffix_end + 1
        tokens = _copied(source, place, length) if matched else []
        if match is not None and match.length > matched and self.memory is not None:
            remembered = _copied(self.memory.automaton.tokens, match.end + 1, length)
            if remembered:  # none: it ends where a text of the memory ends
                source, matched, place, tokens = self.memory.automaton.tokens, match.length, match.end + 1, remembered
        if matched < 2 and reading.source is not None:
            reading.place += _copied(reading.source, reading.place, 1) == text.tokens[-1:]  # a word was left out
            resumed = _copied(reading.source, reading.place, length)
            if resumed:
                return Draft(resumed, bucket=RESUMED, chance=0.5)  # ``source`` and ``place`` stay
        if tokens:
            reading.source, reading.place = source, place
            bucket, chance = next((name, chance) for most, name, chance in GRADES if matched <= most)
            return Draft(tokens, bucket=bucket, chance=chance)
        reading.source = None
        if not self.recycle:
            return Draft(())
        last = text.tokens[-1]
        while len(tokens) < min(length, _RECYCLED_LENGTH) and (last := self._successor.get(last, GAP)) != GAP:
            tokens.append(last)
        return Draft(tokens, bucket=RECYCLED, chance=0.25)

    def _read(self, reading: _Reading, tokens: list[int]) -> None:
        """Let the automata read what is new."""
        begin = len(reading.automaton.tokens)
        for token in tokens[begin:]:
            reading.automaton.extend(token)
        if self.memory is None or not len(self.memory):
            return
        automaton = self.memory.automaton
        if reading.match is None or reading.version != self.memory.version:
            reading.match, reading.version, begin = Match(automaton), self.memory.version, 0
        for token in tokens[begin:]:
            reading.match.advance(token)


def _copied(source: list[int], place: int, length: int) -> list[int]:
    """Up to ``length`` tokens of ``source`` from ``place`` on, to the end of its text; a copy that reaches the end of a
    growing text goes on with what it copied."""
    copied = source[place : place + length]
    if GAP in copied:
        return copied[: copied.index(GAP)]
    period = len(source) - place
    while copied and len(copied) < length:
        copied.append(copied[len(copied) - period])
    return copied
