"""Transcript: the logits and scores of every emitted token, for ``output_logits`` and ``output_scores``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_hybrid.core.canvas import Canvas, Lane


class Transcript:
    """What the model said of every token that it wrote.

    Tokens that no row wrote (the label of a part, a text that was given, padding behind an answer) were certain: their
    score is 0 and that of all others ``-inf``, as behind the host's processors that force a token.

    Args:
        logits, scores: True: is asked for.
    """

    def __init__(self, *, logits: bool, scores: bool):
        self.logits, self.scores = logits, scores
        self._rows: dict[Lane, dict[int, tuple[Tensor | None, Tensor | None]]] = {}

    def note(self, lane: Lane, index: int, logits: Tensor | None, scores: Tensor | None) -> None:
        """``lane.tokens[index]`` was written by a row with these logits and scores, each ``(vocab,)``."""
        pair = (one.float().clone() if one is not None else None for one in (logits, scores))
        self._rows.setdefault(lane, {})[index] = (*pair,)  # type: ignore[assignment]

    def columns(
        self, canvases: Sequence[Canvas], control: bool, pad: int, vocab: int
    ) -> tuple[tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        """Logits and scores as the host returns them: for each new token ``(batch, vocab)``; None: not asked for.

        Args:
            control: True: plan and control tokens are in the sequences. pad: the id behind answers that ended.
        """
        lines = [self._line(canvas, control) for canvas in canvases]
        longest = max(len(line) for line in lines)
        found: list[tuple[Tensor, ...] | None] = []
        for which, asked in enumerate((self.logits, self.scores)):
            columns = []
            for column in range(longest if asked else 0):
                cells = [line[column] if column < len(line) else (pad, None) for line in lines]
                rows = [pair[which] if pair is not None else None for _, pair in cells]
                device = next((row.device for row in rows if row is not None), None)
                ids = (token for token, _ in cells)
                known = [_certain(t, vocab) if row is None else row for t, row in zip(ids, rows, strict=True)]
                columns.append(torch.stack([row.to(device or row.device) for row in known]))
            found.append(tuple(columns) if asked else None)
        return found[0], found[1]

    def _line(self, canvas: Canvas, control: bool) -> list[tuple[int, tuple[Tensor | None, Tensor | None] | None]]:
        """The new tokens of one sequence in text order, and what is known of each."""
        line = []
        for number, lane in enumerate(canvas.lanes):
            hidden = [] if control else lane.hidden
            rows = self._rows.get(lane, {})
            for index in range(len(canvas.prompt) if number == 0 else 0, len(lane.tokens)):
                if not any(begin <= index < stop for begin, stop in hidden):
                    line.append((lane.tokens[index], rows.get(index)))
        return line[: len(canvas.confirmed(control))]


def _certain(token: int, vocab: int) -> Tensor:
    """Scores ``(vocab,)`` of a token that was certain."""
    scores = torch.full((vocab,), -torch.inf)
    scores[token] = 0.0
    return scores
