"""StateRunner: the host's own cache, one for each sequence, and the state of before for what is rejected.

For models whose passes cannot be masked row by row: recurrent, linear and convolutional layers, which have a state in
place of a key per token; classes that count keys as positions; attention that chooses its keys by their order. A pass
is one call of the model per sequence, without padding, with the host's own causal mask, so rows are a chain. Attention
layers forget rejected rows by being cropped. A state cannot be cropped: the sequence goes back to the state of before
the pass, and the accepted rows are read again in front of the next pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hf_hybrid.core.rows import PADDING, Rows
from hf_hybrid.models.host import Unsupported, cache_argument
from hf_hybrid.models.refusals import (
    refuse_attention_without_masks,
    refuse_caches_of_their_own,
    refuse_checkpointing,
    refuse_encoder_decoders,
    refuse_missing_cache,
)
from hf_hybrid.models.runner import Abilities, Runner, Scores, kept_rows
from hf_hybrid.models.states import States, crop, empty_cache_of, has_states, length_of_states, steps_only

REREAD = 16
"""Rows that may be read again in front of a pass; more are read in a call of their own, and the state behind them is
kept, so that no row is read again and again."""


@dataclass
class _Sequence:
    """What one sequence holds.

    Attributes:
        cache: of the host. read: tokens that the cache holds. tokens: those that were committed; what the cache lacks
            of them is read in front of the next pass. before: the state to go back to, None: only the empty one.
        tried: tokens of the pass that is not committed yet.
    """

    cache: Cache
    read: int = 0
    tokens: list[int] = field(default_factory=list[int])
    before: States | None = None
    tried: list[int] = field(default_factory=list[int])


class StateRunner(Runner):
    """One model, and the host's cache of every sequence; arguments as for ``Runner``."""

    abilities = Abilities(noisy_rows=False, spans=False, branches=False, keys=False, host_cache=False)

    def __init__(self, model: Any, batch_size: int, *, capacity: int = 256, synced_gpus: bool | None = None) -> None:
        super().__init__(model, batch_size, capacity=capacity, synced_gpus=synced_gpus)
        self._cache_argument = cache_argument(model)
        self._steps = steps_only(model)
        if self._steps:
            self.abilities = replace(self.abilities, drafts=False)
        self._held = [self._empty() for _ in range(batch_size)]
        self._stateful = has_states(self._held[0].cache)
        self._pending: tuple[Rows, int] | None = None

    @classmethod
    def check_model(cls, model: Any) -> None:
        """See ``Runner.check_model``."""
        refuse_encoder_decoders(model)
        refuse_attention_without_masks(model)
        refuse_missing_cache(model)
        refuse_caches_of_their_own(model)
        refuse_checkpointing(model)

    @property
    def kind(self) -> str:
        """See ``Runner.kind``."""
        return "states"

    def relate(self, row: int, span: int, sees: Sequence[int]) -> None:
        """See ``Runner.relate``: there is one span."""
        if span:
            raise Unsupported("StateRunner has no spans; use strategy='speculative' or 'autoregressive'")

    @torch.no_grad()
    def run(self, tokens: Tensor, rows: Rows, keep: int, *, plain: bool = False, first: int = 0) -> Scores:
        """See ``Runner.run``. One call of the model per sequence."""
        rows = self._checked(tokens, rows, keep, first)
        self._forget_tried()
        real = rows.span.numpy() != PADDING  # (active, rows)
        self._expect_chains(rows, real, first)
        self._pending = (rows, first)
        width, ids = tokens.shape[1], tokens.cpu()
        logits: Tensor | None = None
        for line in range(len(real)):
            columns = torch.from_numpy(np.flatnonzero(real[line]))
            scored = columns[columns >= width - keep]
            if not len(columns):
                continue
            found = self._read(first + line, ids[line, columns].tolist(), len(scored))  # (scored, vocab)
            if logits is None:
                logits = found.new_zeros((len(real), keep, found.shape[1]))
            logits[line, (scored - (width - keep)).to(found.device)] = found
        if logits is None:
            raise ValueError("a pass of padding alone; give at least one row")
        return Scores(logits)

    def commit(
        self,
        kept: Tensor | Sequence[Sequence[bool]] | np.ndarray | None = None,
        spans: Sequence[tuple[int, int, int]] = (),
    ) -> None:
        """See ``Runner.commit``; of every sequence the first rows of the pass, as many as stay."""
        if self._pending is None:
            raise ValueError("there is no pass to commit; call run() first, and commit() once after it")
        rows, first = self._pending
        stays, real = kept_rows(rows, kept), rows.span.numpy() != PADDING
        counts: list[int] = []
        for line in range(len(real)):
            own = stays[line, real[line]]  # in the order of the text
            counts.append(int(own.sum()))
            if not own[: counts[-1]].all():
                raise ValueError(f"sequence {first + line}: a row behind a rejected one cannot stay; rows are a chain")
        self._pending = None
        for line, count in enumerate(counts):
            held = self._held[first + line]
            held.tokens += held.tried[:count]
            held.tried = []
            self._shorten(first + line)

    def rewind(self, row: int, position: int) -> None:
        """See ``Runner.rewind``."""
        self._expect_committed("a sequence is rewound")
        del self._held[row].tokens[position:]
        self._shorten(row)

    def committed(self, row: int) -> Rows:
        """See ``Runner.committed``; those that are read again with the next pass too."""
        position = torch.arange(len(self._held[row].tokens))[None]
        return Rows.clean(position, torch.zeros_like(position))

    # One sequence.

    def _read(self, row: int, tokens: list[int], scored: int) -> Tensor:
        """Read ``tokens`` behind those that are committed; logits ``(scored, vocab)`` of the last ``scored``."""
        held = self._held[row]
        held.tried = tokens
        text = [*held.tokens, *tokens]
        sure = len(text) - max(scored, 1)  # what is in front of the scored rows is seldom rejected
        if self._stateful and scored > 1 and sure - held.read > REREAD:
            self._call(row, text[held.read : sure], 0)
        if self._stateful and held.read and (scored > 1 or held.read - length_of_states(held.before) > REREAD):
            held.before = States.of(held.cache, held.read, held.before)
        return self._call(row, text[held.read :], scored)

    def _call(self, row: int, tokens: list[int], scored: int) -> Tensor:
        """Let the cache of a sequence read ``tokens``; logits ``(scored, vocab)``."""
        held = self._held[row]
        if self._steps and held.read and len(tokens) > 1:
            return torch.cat([self._call(row, [t], int(len(tokens) - i <= scored)) for i, t in enumerate(tokens)])
        position = torch.arange(held.read, held.read + len(tokens))[None]
        rows = Rows.clean(position, torch.zeros_like(position))
        arguments: dict[str, Any] = {self._cache_argument: held.cache, "use_cache": True}
        lines = slice(row, row + 1)
        scores = self._forward(torch.tensor([tokens]), rows, None, scored, lines, **arguments)
        held.read += len(tokens)
        return scores.logits[0]

    def _shorten(self, row: int) -> None:
        """The cache of a sequence holds nothing but committed tokens, or fewer."""
        held = self._held[row]
        if held.read <= len(held.tokens):
            return
        if not self._stateful:
            crop(held.cache, held.read - len(held.tokens))
            held.read = len(held.tokens)
        elif held.before is not None and held.before.length <= len(held.tokens):
            crop(held.cache, held.read - held.before.length)
            held.before.restore(held.cache)
            held.read = held.before.length
        else:
            self._held[row] = replace(self._empty(), tokens=held.tokens)

    def _forget_tried(self) -> None:
        """A pass that was not committed leaves nothing behind."""
        if self._pending is not None:
            self._pending = None
            for row in range(self.batch_size):
                self._held[row].tried = []
                self._shorten(row)

    def _expect_chains(self, rows: Rows, real: np.ndarray, first: int) -> None:
        """Refuse rows that do not follow one another behind what their sequence holds."""
        if bool((rows.noisy.numpy() & real).any()):
            raise ValueError("StateRunner reads from left to right and has no noisy rows")
        position = rows.position.numpy()
        for line in range(len(real)):
            found, begin = position[line, real[line]], len(self._held[first + line].tokens)
            if not np.array_equal(found, np.arange(begin, begin + len(found))):
                raise ValueError(
                    f"sequence {first + line} holds {begin} rows, and the next ones must have the positions from "
                    f"{begin} on, one by one; found {found.tolist()}"
                )

    # What runners are made of.

    def _empty(self) -> _Sequence:
        return _Sequence(empty_cache_of(self.model))

    def _swap(self, i: int, j: int) -> None:
        self._held[i], self._held[j] = self._held[j], self._held[i]

    def _clear(self, row: int) -> None:
        self._held[row] = self._empty()

    def _expect_committed(self, event: str) -> None:
        if self._pending is not None:
            raise ValueError(f"commit() the last pass before {event}")

    def _num_spans(self) -> int:
        return 1
