"""Runner: rows in, logits out. The only place that calls a model's ``forward``.

A pass writes the keys of all its rows into slots of a RowCache, builds the mask with the row rule
(``core.rows.visible``) and returns logits. ``commit`` then says which clean rows stay; the slots of all others are
free for the next pass, so that rejecting a draft or a noisy window costs nothing. What the slots hold is kept on the
host (``models.slots``), so that a pass never waits for the device.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from hf_hybrid.core.rows import PADDING, Rows
from hf_hybrid.models.cache import RowCache
from hf_hybrid.models.foreign import foreign_class, foreign_hooks
from hf_hybrid.models.host import (
    Unsupported,
    adoptable,
    cache_argument,
    check_model,
    forward_parameters,
    mask_dtype,
    position_table,
    start_device,
    text_config,
    unwrapped,
    without_extras,
)
from hf_hybrid.models.products import FewRows
from hf_hybrid.models.ranks import Ranks
from hf_hybrid.models.slots import Slots


@dataclass
class _Pass:
    """A pass that is not committed yet: its rows ``(active, rows)`` on the host, and int64 slots alike."""

    rows: Rows
    slots: np.ndarray
    first: int


class Runner:
    """One model, one RowCache, and what its slots hold.

    Args:
        model: a model that passes ``check_model``, in eval mode.
        batch_size: batch rows at the start.
        capacity: slots per batch row to begin with; doubled when more are needed, never allocated ahead.
        num_spans: spans per batch row to begin with; ``relate`` makes more.
        synced_gpus: as in the host's ``generate()``; see ``Ranks``.

    Attributes:
        active: the first ``active`` batch rows are still running.
        num_passes: int64 ``(batch_size,)``, passes that each batch row took part in.
        num_rows: int64 ``(batch_size,)``, rows but padding that each batch row has run.
        products: how the model multiplies few rows by its weights. ranks: the processes that share the model.
        vectors: table ``(n, hidden)`` of prompts that are given as vectors, which tokens -2, -3, ... stand for.
        forward_seconds: seconds spent in calls of the model (on an accelerator: in starting them).
    """

    def __init__(
        self,
        model: Any,
        batch_size: int,
        *,
        capacity: int = 256,
        num_spans: int = 8,
        synced_gpus: bool | None = None,
    ) -> None:
        check_model(model)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: a Runner needs at least one batch row")
        config = text_config(model)
        self.model, self.batch_size, self.active = model, batch_size, batch_size
        self.device = start_device(model)
        self.dtype: torch.dtype = unwrapped(model).dtype
        self.cache = RowCache(config.num_hidden_layers, batch_size, capacity)
        self.num_passes = np.zeros(batch_size, dtype=np.int64)  # (batch,)
        self.num_rows = np.zeros(batch_size, dtype=np.int64)  # (batch,)
        self.ranks = Ranks(unwrapped(model), self.device, synced_gpus)
        self.products = FewRows(model, self.device, self.dtype)
        self.forward_seconds = 0.0
        self._cache_argument = cache_argument(model)
        self._extras = without_extras(model)
        host = unwrapped(model)
        own = all(type(parameter) in (Tensor, torch.nn.Parameter) for parameter in host.parameters())
        self._closed = own and foreign_class(host) is None and not any(True for _ in foreign_hooks(host))
        self._keeps_logits = "logits_to_keep" in forward_parameters(model)
        self._slots = Slots(batch_size, self.cache.capacity, num_spans, self.device, mask_dtype(model, self.device))
        self._max_positions = position_table(model)
        self.vectors: Tensor | None = None
        self._pending: _Pass | None = None

    def relate(self, row: int, span: int, sees: Sequence[int]) -> None:
        """Batch row ``row``: ``span`` reads the spans in ``sees``, itself always, and no other.

        Args:
            sees: the transitive closure (with every span what that span reads), all finished before ``span`` begins.
        """
        self._slots.relate(row, span, sees)

    @torch.no_grad()
    def run(self, tokens: Tensor, rows: Rows, keep: int, *, plain: bool = False, first: int = 0) -> Tensor:
        """One pass. A pass before it that was not committed leaves nothing behind.

        Args:
            tokens: int64 ``(active, rows)``.
            rows: what they are, ``(active, rows)``, span ``PADDING`` for filler (any token, any position in range).
                Best on the host: a mask is made there, and rows on the device are waited for.
            keep: logits of the last ``keep`` rows are wanted, 0 to rows.
            plain: True is the caller's promise that every row is clean and sees every committed slot and the rows
                before it in the pass. Without holes, and with equal slots in all batch rows, the host makes its mask.
            first: only the active batch rows from this one on take part; ``active`` above is then their number.

        Returns:
            logits ``(active, keep, vocab)`` in the model's dtype.
        """
        lines = slice(first, self.active)
        rows = self._check(tokens, rows, keep, self.active - first)
        self._pending = None
        slots, where = self._slots.choose(lines, tokens.shape[1])
        past = int(self._slots.top[lines].max())
        used = max(past, int(slots.max()) + 1)
        self.cache.place(where, used, past, lines)
        self._slots.grow(self.cache.capacity)
        self._pending = _Pass(rows, slots, first)
        # One interval for all means that every slot before it is taken: the host's own causal mask is the row rule.
        mask = None if plain and isinstance(where, tuple) else self._slots.mask(rows, slots, where, used, first)
        arguments: dict[str, Any] = {self._cache_argument: self.cache, **self._extras}
        if self._keeps_logits:
            arguments["logits_to_keep"] = max(keep, 1)
        self.ranks.others_go_on(True)
        start = time.perf_counter()
        with self._mode(), self.products.of(tokens.numel()):
            output = self.model(
                **self._inputs(tokens),
                attention_mask=mask,
                position_ids=rows.position.to(self.device),
                use_cache=True,
                return_dict=True,
                **arguments,
            )
        self.forward_seconds += time.perf_counter() - start
        self.num_passes[lines] += 1
        self.num_rows[lines] += (rows.span.numpy() != PADDING).sum(axis=1)
        logits: Tensor = output.logits  # (active, rows or keep, vocab)
        logits = logits[:, logits.shape[1] - keep :]
        # What leaves the pass is an ordinary tensor: whoever keeps it may change it, or train with it.
        return logits.clone() if logits.is_inference() else logits

    def _mode(self) -> AbstractContextManager[Any]:
        """``inference_mode`` inside a pass, which takes a twentieth off it, compared with ``no_grad``. Not for tensor
        subclasses (sharded or quantised weights), which it does not serve everywhere, nor for code of others in the
        model, which may keep what it sees."""
        return torch.inference_mode() if self._closed else nullcontext()

    def _inputs(self, tokens: Tensor) -> dict[str, Tensor]:
        """Ids ``(active, rows)``, or vectors where some of them stand for vectors."""
        ids = tokens.to(self.device)
        if self.vectors is None or not bool((tokens < -1).any()):
            return {"input_ids": ids}
        given = ids < -1  # (active, rows), True: a vector of the table
        vectors = unwrapped(self.model).get_input_embeddings()(ids.clamp(min=0))  # (active, rows, hidden)
        return {"inputs_embeds": vectors.masked_scatter(given.unsqueeze(-1), self.vectors[-2 - ids[given]])}

    def commit(
        self,
        kept: Tensor | Sequence[Sequence[bool]] | np.ndarray | None = None,
        spans: Sequence[tuple[int, int, int]] = (),
    ) -> None:
        """Say which rows of the last pass stay in the cache; noisy and padding rows never do.

        Args:
            kept: bool ``(active, rows)``, True: the row stays if it is clean. None: every clean row stays.
            spans: (line of the pass, column, span): the row belongs to that span from now on. It must have seen what a
                row of that span sees at its position: a branch of drafts that became the text.
        """
        done = self._pending
        if done is None:
            raise ValueError("there is no pass to commit; call run() first, and commit() once after it")
        stays = ~done.rows.noisy.numpy() & (done.rows.span.numpy() != PADDING)  # (active, rows), True: stays
        if kept is not None:
            wanted = kept.cpu().numpy() if isinstance(kept, Tensor) else np.asarray(kept)
            if wanted.shape != stays.shape:
                raise ValueError(f"kept has shape {wanted.shape}, the last pass had {stays.shape} rows")
            stays &= wanted.astype(bool)
        self._pending = None
        rows = done.rows
        if spans:
            owners = rows.span.clone()
            for line, column, span in spans:
                owners[line, column] = span
            rows = replace(rows, span=owners)
        self._slots.hold(rows, done.slots, stays, done.first)

    def rewind(self, row: int, position: int) -> None:
        """Batch row ``row`` forgets its committed rows at ``position`` and behind it."""
        if self._pending is not None:
            raise ValueError("commit() the last pass before a batch row is rewound")
        if not 0 <= row < self.active or position < 0:
            raise ValueError(f"batch row {row}, position {position}: rows are 0 to {self.active - 1}, positions from 0")
        self._slots.forget(row, position)

    def wait(self) -> None:
        """All answers are finished: go along with the passes that other processes still make (over any token)."""
        while self.ranks.others_go_on(False):
            token = torch.zeros((1, 1), dtype=torch.long, device=self.device)
            with torch.no_grad():
                self.model(input_ids=token, position_ids=token, use_cache=False)

    def leave(self, row: int) -> int:
        """Batch row ``row`` is finished: it and the last active one change places (counters and spans too).

        Returns:
            index of the batch row that moved to ``row`` (``row`` itself when it was the last).
        """
        if not 0 <= row < self.active:
            raise ValueError(f"batch row {row} is not active; the active ones are 0 to {self.active - 1}")
        if self._pending is not None:
            raise ValueError("commit() the last pass before a batch row leaves")
        last = self.active - 1
        if row != last:
            with self._mode():
                self.cache.swap(row, last, int(self._slots.top[[row, last]].max()))
            self._slots.swap(row, last)
            for array in (self.num_passes, self.num_rows):
                array[[row, last]] = array[[last, row]]
        self.active = last
        return last

    def enter(self) -> int:
        """A batch row that is not active becomes the last active one, empty, with its counters at zero; its index."""
        if self.active == self.batch_size:
            raise ValueError(f"all {self.batch_size} batch rows are active; one must leave() before another enters")
        if self._pending is not None:
            raise ValueError("commit() the last pass before a batch row enters")
        row = self.active
        self._slots.clear(row)
        self.num_passes[row] = self.num_rows[row] = 0
        self.active += 1
        return row

    def committed(self, row: int) -> Rows:
        """What the cache holds of batch row ``row``, ``(1, count)``, in the order of ``slots_of(row)``."""
        slots = self.slots_of(row)
        held = (self._slots.position[row, slots], self._slots.span[row, slots])
        return Rows.clean(*(torch.from_numpy(a).unsqueeze(0) for a in held))

    def slots_of(self, row: int) -> np.ndarray:
        """The slots that hold committed rows of batch row ``row``: int64 ``(count,)``, rising."""
        return np.flatnonzero(self._slots.span[row] != PADDING)

    def catch_up(self, texts: Sequence[tuple[int, list[int]]]) -> None:
        """Read what no pass has read yet of texts that all stand in span 0, such as the last token of one that ended
        before the others. Batch rows that left are active again.

        Args:
            texts: of each batch row the tokens at positions 0, 1, ...
        """
        self.active = self.batch_size
        missing = [range(len(self._at(row)), len(tokens)) for row, tokens in texts]
        if any(missing):
            width = max(map(len, missing))
            tokens = torch.zeros((self.batch_size, width), dtype=torch.int64)
            position, span = torch.zeros_like(tokens), torch.full_like(tokens, PADDING)
            for (row, text), wanted in zip(texts, missing, strict=True):
                for column, index in enumerate(wanted):
                    tokens[row, column], position[row, column], span[row, column] = text[index], index, 0
            self.run(tokens, Rows.clean(position, span), 0)
            self.commit()

    @torch.no_grad()
    def layers(self, entries: Sequence[tuple[int, list[int]]], length: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values per layer, each ``(entries, heads, length, head_dim)``, of texts that all stand in span 0.

        Args:
            entries: for each its batch row, and the columns that its positions 0, 1, ... take; other columns are zero.
        """
        at = [self._at(row)[: len(columns)] for row, columns in entries]
        lines = torch.tensor([i for i, slots in enumerate(at) for _ in slots], device=self.device)
        rows = torch.tensor([e[0] for e, slots in zip(entries, at, strict=True) for _ in slots], device=self.device)
        slots = torch.from_numpy(np.concatenate(at)).to(self.device)
        columns = torch.tensor([c for entry in entries for c in entry[1]], device=self.device)
        index = (rows, slots, lines, columns)
        return [layer.gathered(*index, size=(len(entries), length)) for layer in self.cache.layers]

    def _at(self, row: int) -> np.ndarray:
        """The slots of batch row ``row`` that hold positions 0, 1, ... without a gap: int64 ``(count,)``."""
        slots = self.slots_of(row)
        position = self._slots.position[row, slots]
        order = np.argsort(position, kind="stable")
        whole = position[order] == np.arange(len(order))
        return slots[order][: len(order) if whole.all() else int(whole.argmin())]

    @torch.no_grad()
    def adopt(self, cache: Cache, attention_mask: Tensor | None = None, positions: Tensor | None = None) -> None:
        """Take over a host cache that holds a clean causal prefix; it becomes committed rows of span 0. Copies once.

        Args:
            cache: a ``DynamicCache`` of full-attention layers with ``length`` slots.
            attention_mask: ``(batch_size, length)`` or longer, nonzero: a token, zero: padding. None: no padding.
            positions: int64 ``(batch_size, length)``. None: counted from the attention mask, as ``generate()`` does.
        """
        if self._pending is not None or self._slots.count.any() or self.active != self.batch_size:
            raise ValueError("a Runner can adopt a cache only before its first pass; make a new Runner")
        layers = adoptable(cache)
        length = int(cache.get_seq_length())
        if length == 0:
            return
        if len(layers) != len(self.cache.layers):
            raise Unsupported(
                f"the cache has {len(layers)} layers, the model {len(self.cache.layers)}; pass the cache of this model"
            )
        if layers[0][0].shape[0] != self.batch_size:
            raise Unsupported(
                f"the cache has {layers[0][0].shape[0]} batch rows, the Runner {self.batch_size}; make them equal"
            )
        whole = torch.ones((self.batch_size, length), dtype=torch.bool)
        real = whole if attention_mask is None else attention_mask[:, :length].to("cpu", torch.bool)  # True: a token
        if real.shape != whole.shape:
            raise Unsupported(f"attention_mask {tuple(real.shape)} must cover the cache {tuple(whole.shape)}")
        if positions is None:
            positions = (real.long().cumsum(dim=1) - 1).clamp(min=0)
        self.cache.place((0, length), length, 0)
        with self._mode():
            for layer, (keys, values) in zip(self.cache.layers, layers, strict=True):
                layer.update(keys, values)
        self._slots.grow(self.cache.capacity)
        rows = Rows.clean(positions[:, :length].cpu(), torch.zeros_like(real, dtype=torch.int64))
        self._slots.hold(rows, np.tile(np.arange(length), (self.batch_size, 1)), real.numpy())

    def _check(self, tokens: Tensor, rows: Rows, keep: int, active: int) -> Rows:
        """The rows on the host, after checks."""
        shape = (active, tokens.shape[-1])
        if active < 1 or tokens.shape != shape or rows.span.shape != shape or shape[1] == 0:
            found = f"tokens {tuple(tokens.shape)} and rows {tuple(rows.span.shape)}"
            raise ValueError(f"{found} must be ({active}, rows), rows > 0")
        if not 0 <= keep <= shape[1]:
            raise ValueError(f"keep={keep}: the pass has {shape[1]} rows")
        if rows.span.device.type != "cpu":
            rows = Rows(*(getattr(rows, f.name).cpu() for f in fields(rows)))
        last = int(rows.span.numpy().max())
        if last >= self._slots.num_spans:
            raise ValueError(f"span {last} is not known; call relate() for it first")
        if self._max_positions is not None and int(rows.position.max()) >= self._max_positions:
            raise ValueError(
                f"position {int(rows.position.max())} is beyond the {self._max_positions} learned positions; "
                "shorten the prompt, lower max_new_tokens or use a model with rotary positions"
            )
        return rows


@torch.no_grad()
def causal_cache(model: Any, ids: Tensor, attention_mask: Tensor, cache: DynamicCache | None = None) -> DynamicCache:
    """A host cache of a text at consecutive positions, so that a host call can go on from it.

    Args:
        ids: int64 ``(batch, length)``, what ``cache`` lacks. attention_mask: int64 ``(batch, all)``, 0: padding.
        cache: of the beginning, filled in place; None: there is none.

    Returns:
        a ``DynamicCache`` of all tokens but the last, which is left for the call that continues.
    """
    cache = DynamicCache() if cache is None else cache
    if ids.shape[1] > 1:
        mask = attention_mask[:, :-1]
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, 1 - ids.shape[1] :]
        model(
            input_ids=ids[:, :-1],
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            return_dict=True,
            **{cache_argument(model): cache},
            **without_extras(model),
        )
    return cache
