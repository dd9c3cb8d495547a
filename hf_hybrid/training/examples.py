"""What the trainer reads: a prompt and an answer whose structure is known, as token ids."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One part of a round.

    Attributes:
        label: token ids that open the part and name it in the plan (text, not control tokens).
        text: token ids behind the label.
        depends: 0-based indices of earlier parts of the same round that this part reads.
    """

    label: tuple[int, ...]
    text: tuple[int, ...]
    depends: tuple[int, ...] = ()


Tokens = tuple[int, ...]
Parts = tuple[Part, ...]


@dataclass(frozen=True)
class Example:
    """A prompt and its answer: texts and rounds in text order.

    Attributes:
        prompt: token ids of the whole prompt, markers of the chat format included.
        pieces: a tuple of ids is a text; a tuple of ``Part`` is a round.
    """

    prompt: tuple[int, ...]
    pieces: tuple[Tokens | Parts, ...]

    @property
    def answer(self) -> tuple[int, ...]:
        """The plain answer: every token in text order, without control tokens and without ``eos``."""
        ids: list[int] = []
        for piece in self.pieces:
            for item in piece:
                if isinstance(item, Part):
                    ids.extend(item.label + item.text)
                else:
                    ids.append(item)
        return tuple(ids)

    @property
    def planned_rows(self) -> int:
        """Number of clean rows in the planned form (`hf_hybrid.training.layout`), the longest one."""
        rows = len(self.prompt) + 1 + len(self.answer)
        for parts in self.rounds:
            rows += 1 + sum(3 + len(part.label) + len(part.depends) for part in parts)
        return rows

    @property
    def planned_spans(self) -> int:
        """Number of spans in the planned form: two per part (itself and its entry; the first entry belongs to the trunk
        segment before it), and a trunk segment before and behind every round."""
        return 1 + sum(2 * len(parts) for parts in self.rounds)

    @property
    def rounds(self) -> list[Parts]:
        """The rounds of parts, in order."""
        return [piece for piece in self.pieces if piece and isinstance(piece[0], Part)]  # type: ignore[misc]
