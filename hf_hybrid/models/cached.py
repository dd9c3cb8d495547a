"""CachedRunner: rows in slots. The Runner of models whose layers keep one key per row.

A pass writes the keys of all its rows into slots of a RowCache, builds the mask with the row rule
(``core.rows.visible``) and returns scores. ``commit`` then says which clean rows stay; the slots of all others are
free for the next pass, so that rejecting a draft or a noisy window costs nothing. What the slots hold is kept on the
host (``models.slots``), so that a pass never waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from hf_hybrid.core.rows import PADDING, Rows
from hf_hybrid.models.cache import RowCache
from hf_hybrid.models.host import (
    Unsupported,
    adoptable,
    cache_argument,
    mask_dtype,
    text_config,
    unwrapped,
    without_extras,
)
from hf_hybrid.models.layers import layers_of
from hf_hybrid.models.products import FewRows
from hf_hybrid.models.refusals import (
    refuse_attention_without_masks,
    refuse_checkpointing,
    refuse_counted_positions,
    refuse_encoder_decoders,
    refuse_missing_arguments,
    refuse_states,
)
from hf_hybrid.models.runner import Abilities, Runner, Scores, kept_rows
from hf_hybrid.models.slots import Slots, Where


@dataclass
class _Pass:
    """A pass that is not committed yet: its rows ``(active, rows)`` on the host, and int64 slots alike."""

    rows: Rows
    slots: np.ndarray
    first: int


class CachedRunner(Runner):
    """One model, one RowCache, and what its slots hold.

    Args:
        model, batch_size, synced_gpus: see ``Runner``.
        capacity: slots per sequence to begin with; doubled when more are needed, never allocated ahead.
        num_spans: spans per sequence to begin with; ``relate`` makes more.

    Attributes:
        products: how the model multiplies few rows by its weights.
    """

    abilities = Abilities()

    def __init__(
        self,
        model: Any,
        batch_size: int,
        *,
        capacity: int = 256,
        num_spans: int = 8,
        synced_gpus: bool | None = None,
    ) -> None:
        super().__init__(model, batch_size, capacity=capacity, synced_gpus=synced_gpus)
        self.cache = RowCache(text_config(model).num_hidden_layers, batch_size, capacity)
        self.products = FewRows(model, self.device, self.dtype)
        self._cache_argument = cache_argument(model)
        config = text_config(model)
        self._scale = (
            getattr(config, "floor_scale", None) if getattr(config, "attn_temperature_tuning", False) else None
        )
        dtype, layers = mask_dtype(model, self.device), layers_of(model)
        self._slots = Slots(batch_size, self.cache.capacity, num_spans, self.device, dtype, layers)
        self._pending: _Pass | None = None

    @classmethod
    def check_model(cls, model: Any) -> None:
        """See ``Runner.check_model``."""
        refuse_encoder_decoders(model)
        refuse_states(model)
        layers_of(model)
        refuse_counted_positions(model)
        refuse_missing_arguments(model, cached=True)
        refuse_attention_without_masks(model)
        refuse_checkpointing(model)

    @property
    def kind(self) -> str:
        """See ``FewRows.kind``."""
        return self.products.kind

    def filled(self, rows: int) -> int:
        """See ``FewRows.filled``."""
        return self.products.filled(rows)

    def relate(self, row: int, span: int, sees: Sequence[int]) -> None:
        """See ``Runner.relate``."""
        self._slots.relate(row, span, sees)

    @torch.no_grad()
    def run(self, tokens: Tensor, rows: Rows, keep: int, *, plain: bool = False, first: int = 0) -> Scores:
        """See ``Runner.run``. Of a plain pass without holes and with equal slots the host makes the mask."""
        lines, windows = slice(first, self.active), self._slots.layers.near
        rows = self._checked(tokens, rows, keep, first)
        self._pending = None
        slots, where = self._slots.choose(lines, tokens.shape[1])
        past = int(self._slots.top[lines].max())
        used = max(past, int(slots.max()) + 1)
        self.cache.place(where, used, past, lines)
        self._slots.grow(self.cache.capacity)
        self._pending = _Pass(rows, slots, first)
        # One interval for all means that every slot before it is taken: the host's own causal mask is the row rule. Its
        # windows count slots.
        self._check_scale(rows, where, lines)
        own = plain and isinstance(where, tuple) and (not windows or self._slots.in_order(rows, where, lines))
        mask = None if own else self._slots.mask(rows, slots, where, used, first)
        with self.products.of(tokens.numel()):
            arguments: dict[str, Any] = {self._cache_argument: self.cache, "use_cache": True}
            return self._forward(tokens, rows, mask, keep, lines, **arguments)

    def _check_scale(self, rows: Rows, where: Where, lines: slice) -> None:
        """Refuse positions that a class would scale its queries by, where it takes slots for them (Llama 4)."""
        scale = self._scale
        if scale and int(rows.position.max()) + 1 >= scale and not self._slots.in_order(rows, where, lines):
            raise Unsupported(
                f"{type(unwrapped(self.model)).__name__} scales its queries from position {int(scale) - 1} on, by the "
                "number of keys; answer one prompt at a time with strategy='speculative' or 'autoregressive', or stay "
                "below it (max_new_tokens)"
            )

    def commit(
        self,
        kept: Tensor | Sequence[Sequence[bool]] | np.ndarray | None = None,
        spans: Sequence[tuple[int, int, int]] = (),
    ) -> None:
        """See ``Runner.commit``."""
        done = self._pending
        if done is None:
            raise ValueError("there is no pass to commit; call run() first, and commit() once after it")
        stays = kept_rows(done.rows, kept)
        self._pending = None
        rows = done.rows
        if spans:
            owners = rows.span.clone()
            for line, column, span in spans:
                owners[line, column] = span
            rows = replace(rows, span=owners)
        self._slots.hold(rows, done.slots, stays, done.first)

    def rewind(self, row: int, position: int) -> None:
        """See ``Runner.rewind``."""
        self._expect_committed("a sequence is rewound")
        if not 0 <= row < self.active or position < 0:
            raise ValueError(
                f"sequence {row}, position {position}: sequences are 0 to {self.active - 1}, positions from 0"
            )
        self._slots.forget(row, position)

    def committed(self, row: int) -> Rows:
        """See ``Runner.committed``; in the order of ``slots_of(row)``."""
        slots = self.slots_of(row)
        held = (self._slots.position[row, slots], self._slots.span[row, slots])
        return Rows.clean(*(torch.from_numpy(a).unsqueeze(0) for a in held))

    def slots_of(self, row: int) -> np.ndarray:
        """The slots that hold committed rows of sequence ``row``: int64 ``(count,)``, rising."""
        return np.flatnonzero(self._slots.span[row] != PADDING)

    def catch_up(self, texts: Sequence[tuple[int, list[int]]]) -> None:
        """See ``Runner.catch_up``."""
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
        """See ``Runner.layers``."""
        at = [self._at(row)[: len(columns)] for row, columns in entries]
        lines = torch.tensor([i for i, slots in enumerate(at) for _ in slots], device=self.device)
        rows = torch.tensor([e[0] for e, slots in zip(entries, at, strict=True) for _ in slots], device=self.device)
        slots = torch.from_numpy(np.concatenate(at)).to(self.device)
        columns = torch.tensor([c for entry in entries for c in entry[1]], device=self.device)
        index = (rows, slots, lines, columns)
        return [layer.gathered(*index, size=(len(entries), length)) for layer in self.cache.layers]

    def _at(self, row: int) -> np.ndarray:
        """The slots of sequence ``row`` that hold positions 0, 1, ... without a gap: int64 ``(count,)``."""
        slots = self.slots_of(row)
        position = self._slots.position[row, slots]
        order = np.argsort(position, kind="stable")
        whole = position[order] == np.arange(len(order))
        return slots[order][: len(order) if whole.all() else int(whole.argmin())]

    @torch.no_grad()
    def adopt(self, cache: Cache, attention_mask: Tensor | None = None, positions: Tensor | None = None) -> None:
        """See ``Runner.adopt``."""
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
                f"the cache has {layers[0][0].shape[0]} sequences, the Runner {self.batch_size}; make them equal"
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

    def _swap(self, i: int, j: int) -> None:
        with self._mode():
            self.cache.swap(i, j, int(self._slots.top[[i, j]].max()))
        self._slots.swap(i, j)

    def _clear(self, row: int) -> None:
        self._slots.clear(row)

    def _expect_committed(self, event: str) -> None:
        if self._pending is not None:
            raise ValueError(f"commit() the last pass before {event}")

    def _num_spans(self) -> int:
        return self._slots.num_spans


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
