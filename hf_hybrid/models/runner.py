"""Runner: rows in, scores out. The interface of all that may run the passes of a model.

Only a Runner calls a model's ``forward`` or touches a cache. ``run`` makes a pass, ``commit`` says which of its clean
rows stay, and whatever does not stay was never there. What a Runner can do beside that is in its ``abilities``;
``hf_hybrid.models.opening`` chooses one for a model.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hf_hybrid.core.rows import PADDING, Rows
from hf_hybrid.models.foreign import foreign_class, foreign_hooks
from hf_hybrid.models.host import (
    Unsupported,
    forward_parameters,
    position_table,
    start_device,
    unwrapped,
    without_extras,
)
from hf_hybrid.models.ranks import Ranks


@dataclass(frozen=True)
class Abilities:
    """What a Runner can do beside reading a text from left to right; True: it can.

    Attributes:
        noisy_rows: masked positions, which see one another. spans: stretches of text that do not read one another.
        branches: several rows at one position. rewind: forget rows from a position on.
        keys: take over the keys of a host cache, and hand out its own.
        host_cache: a plain host cache of keys can hold the text, so that a host call goes on from it.
        drafts: read several tokens behind a text in about the time of one.
    """

    noisy_rows: bool = True
    spans: bool = True
    branches: bool = True
    rewind: bool = True
    keys: bool = True
    host_cache: bool = True
    drafts: bool = True


@dataclass(frozen=True)
class Scores:
    """What a pass says of its last rows: ``logits`` ``(active, keep, vocab)`` in the model's dtype."""

    logits: Tensor


class Runner(ABC):
    """One model, and the rows that its passes have committed, for every sequence of a batch.

    Args:
        model: a model that the Runner serves (``check_model``), in eval mode.
        batch_size: sequences at the start.
        capacity: rows per sequence to begin with, where storage is allocated.
        synced_gpus: as in the host's ``generate()``; see ``Ranks``.

    Attributes:
        active: the first ``active`` sequences are still running.
        num_passes: int64 ``(batch_size,)``, passes that each sequence took part in.
        num_rows: int64 ``(batch_size,)``, rows but padding that each sequence has run.
        ranks: the processes that share the model.
        shifts: int64 ``(batch_size,)``, what the model counts as position less the index of a row in its text: not
            zero behind images, where those take fewer positions than tokens (M-RoPE).
        vectors: table ``(n, hidden)`` of prompts that are given as vectors, which tokens -2, -3, ... mean.
        forward_seconds: seconds spent in calls of the model (on an accelerator: in starting them).

    Raises:
        Unsupported: the Runner does not serve the model; the message says what to do.
    """

    abilities: Abilities

    def __init__(self, model: Any, batch_size: int, *, capacity: int = 256, synced_gpus: bool | None = None) -> None:
        self.check_model(model)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: a Runner needs at least one sequence")
        self.model, self.batch_size, self.active = model, batch_size, batch_size
        host = unwrapped(model)
        self.device = start_device(model)
        self.dtype: torch.dtype = host.dtype
        self.num_passes = np.zeros(batch_size, dtype=np.int64)  # (batch,)
        self.num_rows = np.zeros(batch_size, dtype=np.int64)  # (batch,)
        self.shifts = np.zeros(batch_size, dtype=np.int64)  # (batch,)
        self.ranks = Ranks(host, self.device, synced_gpus)
        self.vectors: Tensor | None = None
        self.forward_seconds = 0.0
        self._max_positions = position_table(model)
        self._extras = without_extras(model)
        known = forward_parameters(model)
        self._keeps_logits, self._positions = "logits_to_keep" in known, "position_ids" in known
        own = all(type(parameter) in (Tensor, torch.nn.Parameter) for parameter in host.parameters())
        self._closed = own and foreign_class(host) is None and not any(True for _ in foreign_hooks(host))

    @classmethod
    @abstractmethod
    def check_model(cls, model: Any) -> None:
        """Refuse, before the first pass, a model whose passes would be wrong or would abort.

        Args:
            model: a loaded transformers model.

        Raises:
            Unsupported: the Runner does not serve it; the message says what to do.
        """

    # What cost models need.

    @property
    def kind(self) -> str:
        """What rows cost, a key of the first guesses of a cost model."""
        return "other"

    def filled(self, rows: int) -> int:
        """``rows``, or a few more that take less time."""
        return rows

    # Passes.

    @abstractmethod
    def relate(self, row: int, span: int, sees: Sequence[int]) -> None:
        """Sequence ``row``: ``span`` reads the spans in ``sees``, itself always, and no other.

        Args:
            sees: the transitive closure (with every span what that span reads), all finished before ``span`` begins.
        """

    @abstractmethod
    def run(self, tokens: Tensor, rows: Rows, keep: int, *, plain: bool = False, first: int = 0) -> Scores:
        """One pass. A pass before it that was not committed leaves nothing behind.

        Args:
            tokens: int64 ``(active, rows)``.
            rows: what they are, ``(active, rows)``, span ``PADDING`` for filler (any token, any position in range).
                Best on the host: a mask is made there, and rows on the device are waited for.
            keep: scores of the last ``keep`` rows are wanted, 0 to rows.
            plain: True is the caller's promise that every row is clean and sees every committed row and the rows
                before it in the pass.
            first: only the active sequences from this one on take part; ``active`` above is then their number.
        """

    @abstractmethod
    def commit(
        self,
        kept: Tensor | Sequence[Sequence[bool]] | np.ndarray | None = None,
        spans: Sequence[tuple[int, int, int]] = (),
    ) -> None:
        """Say which rows of the last pass stay; noisy and padding rows never do.

        Args:
            kept: bool ``(active, rows)``, True: the row stays if it is clean. None: every clean row stays.
            spans: (line of the pass, column, span): the row belongs to that span from now on. It must have seen what a
                row of that span sees at its position: a branch of drafts that became the text.
        """

    @abstractmethod
    def rewind(self, row: int, position: int) -> None:
        """Sequence ``row`` forgets its committed rows at ``position`` and behind it."""

    @abstractmethod
    def committed(self, row: int) -> Rows:
        """The committed rows of sequence ``row``, ``(1, count)``."""

    # Sequences that come and go.

    def leave(self, row: int) -> int:
        """Sequence ``row`` is finished: it and the last active one change places (counters and spans too).

        Returns:
            index of the sequence that moved to ``row`` (``row`` itself when it was the last).
        """
        if not 0 <= row < self.active:
            raise ValueError(f"sequence {row} is not active; the active ones are 0 to {self.active - 1}")
        self._expect_committed("a sequence leaves")
        last = self.active - 1
        if row != last:
            self._swap(row, last)
            for array in (self.num_passes, self.num_rows, self.shifts):
                array[[row, last]] = array[[last, row]]
        self.active = last
        return last

    def enter(self) -> int:
        """A sequence that is not active becomes the last active one, empty, its counters at zero; its index."""
        if self.active == self.batch_size:
            raise ValueError(f"all {self.batch_size} sequences are active; one must leave() before another enters")
        self._expect_committed("a sequence enters")
        row = self.active
        self._clear(row)
        self.num_passes[row] = self.num_rows[row] = self.shifts[row] = 0
        self.active += 1
        return row

    def wait(self) -> None:
        """All answers are finished: go along with the passes that other processes still make (over any token)."""
        while self.ranks.others_go_on(False):
            token = torch.zeros((1, 1), dtype=torch.long, device=self.device)
            with torch.no_grad():
                positions = {"position_ids": token} if self._positions else {}
                self.model(input_ids=token, use_cache=False, **positions)

    # Keys from and for the host (``abilities.keys``).

    def adopt(self, cache: Cache, attention_mask: Tensor | None = None, positions: Tensor | None = None) -> None:
        """Take over a host cache that holds a clean causal prefix; it becomes committed rows of span 0. Copies once.

        Args:
            cache: a ``DynamicCache`` of full-attention layers with ``length`` slots.
            attention_mask: ``(batch_size, length)`` or longer, nonzero: a token, zero: padding. None: no padding.
            positions: int64 ``(batch_size, length)``. None: counted from the attention mask, as ``generate()`` does.
        """
        raise Unsupported(f"{type(self).__name__} keeps no keys; pass the whole text as input_ids, without a cache")

    def catch_up(self, texts: Sequence[tuple[int, list[int]]]) -> None:
        """Read what no pass has read yet of texts that are all in span 0, such as the last token of one that ended
        before the others. Sequences that left are active again.

        Args:
            texts: of each sequence the tokens at positions 0, 1, ...
        """
        raise Unsupported(f"{type(self).__name__} keeps no keys")

    def layers(self, entries: Sequence[tuple[int, list[int]]], length: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values per layer, each ``(entries, heads, length, head_dim)``, of texts that are all in span 0.

        Args:
            entries: for each its sequence, and the columns that its positions 0, 1, ... take; other columns are zero.
        """
        raise Unsupported(f"{type(self).__name__} keeps no keys")

    # What runners are made of.

    @abstractmethod
    def _swap(self, i: int, j: int) -> None:
        """Exchange what two sequences hold, their spans too."""

    @abstractmethod
    def _clear(self, row: int) -> None:
        """Sequence ``row`` holds nothing, and its spans read nothing but themselves."""

    @abstractmethod
    def _expect_committed(self, event: str) -> None:
        """Refuse ``event`` while a pass is not committed."""

    @abstractmethod
    def _num_spans(self) -> int:
        """Spans that rows may have."""

    def _forward(self, tokens: Tensor, rows: Rows, mask: Any, keep: int, lines: slice, **arguments: Any) -> Scores:
        """Call the model, and count the pass of the sequences ``lines``. The scores are of the last ``keep`` columns of
        ``tokens``.

        Args:
            rows: those that are counted; their positions are those of ``tokens`` unless ``arguments`` says others.
        """
        if self._keeps_logits:
            arguments["logits_to_keep"] = max(keep, 1)
        if self._positions:  # else the class counts what its cache holds
            shift = torch.from_numpy(self.shifts[lines, None])  # (active, 1)
            arguments.setdefault("position_ids", (rows.position + shift).to(self.device))
        self.ranks.others_go_on(True)
        start = time.perf_counter()
        with self._mode():
            output = self.model(
                **self._inputs(tokens), attention_mask=mask, return_dict=True, **self._extras, **arguments
            )
        self.forward_seconds += time.perf_counter() - start
        self.num_passes[lines] += 1
        self.num_rows[lines] += (rows.span.numpy() != PADDING).sum(axis=1)
        logits: Tensor = output.logits  # (active, rows or keep, vocab)
        logits = logits[:, logits.shape[1] - keep :]
        # What leaves the pass is an ordinary tensor: whoever keeps it may change it, or train with it.
        return Scores(logits.clone() if logits.is_inference() else logits)

    def _mode(self) -> AbstractContextManager[Any]:
        """``inference_mode`` inside a pass, which takes a twentieth off it, compared with ``no_grad``. Not for tensor
        subclasses (sharded or quantised weights), which it does not serve everywhere, nor for code of others in the
        model, which may keep what it sees."""
        return torch.inference_mode() if self._closed else nullcontext()

    def _inputs(self, tokens: Tensor) -> dict[str, Tensor]:
        """Ids ``(active, rows)``, or vectors where some of them mean vectors."""
        ids = tokens.to(self.device)
        if self.vectors is None or not bool((tokens < -1).any()):
            return {"input_ids": ids}
        given = ids < -1  # (active, rows), True: a vector of the table
        vectors = unwrapped(self.model).get_input_embeddings()(ids.clamp(min=0))  # (active, rows, hidden)
        return {"inputs_embeds": vectors.masked_scatter(given.unsqueeze(-1), self.vectors[-2 - ids[given]])}

    def _checked(self, tokens: Tensor, rows: Rows, keep: int, first: int) -> Rows:
        """The rows of a pass on the host, after checks."""
        active = self.active - first
        shape = (active, tokens.shape[-1])
        if active < 1 or tokens.shape != shape or rows.span.shape != shape or shape[1] == 0:
            found = f"tokens {tuple(tokens.shape)} and rows {tuple(rows.span.shape)}"
            raise ValueError(f"{found} must be ({active}, rows), rows > 0")
        if not 0 <= keep <= shape[1]:
            raise ValueError(f"keep={keep}: the pass has {shape[1]} rows")
        if rows.span.device.type != "cpu":
            rows = Rows(*(getattr(rows, f.name).cpu() for f in fields(rows)))
        last = int(rows.span.numpy().max())
        if last >= self._num_spans():
            raise ValueError(f"span {last} is not known; call relate() for it first")
        if self._max_positions is not None and int(rows.position.max()) >= self._max_positions:
            raise ValueError(
                f"position {int(rows.position.max())} is beyond the {self._max_positions} learned positions; "
                "shorten the prompt, lower max_new_tokens or use a model with rotary positions"
            )
        return rows


def kept_rows(rows: Rows, kept: Tensor | Sequence[Sequence[bool]] | np.ndarray | None) -> np.ndarray:
    """bool ``(active, rows)``, True: the row of a pass stays, as ``Runner.commit`` was asked."""
    stays = ~rows.noisy.numpy() & (rows.span.numpy() != PADDING)
    if kept is None:
        return stays
    wanted = kept.cpu().numpy() if isinstance(kept, Tensor) else np.asarray(kept)
    if wanted.shape != stays.shape:
        raise ValueError(f"kept has shape {wanted.shape}, the last pass had {stays.shape} rows")
    return stays & wanted.astype(bool)
