"""Products of few rows by the weights of a model, on the CPU in float32.

A pass that checks drafts or writes several parts has 2 to 64 rows. For these ``x @ weight.T``, which is how the host
calls MKL, first packs the whole weight, as if there were hundreds of rows to use it for: two rows then cost 1.7 times
as much as one. Asked for ``weight @ x.T``, MKL reads the weight where it lies (docs/performance.md). The sums are the
same ones in another order. Which way is faster is measured on this machine, once per process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from hf_hybrid.models.ranks import processes

_TRIED = (4, 16, 64)
"""Rows that are measured."""
_SHAPE, _WEIGHTS, _ROUNDS = (2048, 512), 4, 3  # 16 MB of weights: more than the second-level cache
_SMALL = 1 << 14  # weights, up to which the calls take longer than the products


class FewRows:
    """The linear layers of a model, with products of few rows made the faster way.

    Args:
        model: any module. Its layers stay as they are but for the time of a ``with few_rows.of(rows):``.
        device, dtype: of its passes.

    Attributes:
        most: products of up to so many rows are made the other way; 0: none.
        kind: ``flipped`` (so it is done), ``packed`` (the host's, on a CPU) or ``other``: what rows cost.
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype):
        # Two processes that share a model, or draft for one, must not differ in what they measured.
        alone = processes() == 1
        layers = self._layers(model) if alone and device.type == "cpu" and dtype == torch.float32 else []
        self.most = most_rows(torch.get_num_threads()) if layers else 0
        self.kind = "flipped" if self.most else "packed" if device.type == "cpu" else "other"
        self._forwards = [(layer.__dict__, _forward(layer, self.most)) for layer in layers] if self.most else []

    @contextmanager
    def of(self, rows: int) -> Iterator[None]:
        """For a pass of ``rows`` rows: one row alone is left to the host, to the last bit."""
        forwards = self._forwards if rows > 1 else []
        for attributes, forward in forwards:
            attributes["forward"] = forward
        try:
            yield
        finally:
            for attributes, _ in forwards:
                attributes.pop("forward", None)  # a pass beside this one, of the same model, may have been quicker

    def filled(self, rows: int) -> int:
        """``rows``, or a few more whose products take less time (docs/performance.md)."""
        if self.kind == "flipped":
            return 4 if rows == 3 else 16 if 8 < rows < 16 <= self.most else rows
        return 5 if self.kind == "packed" and 1 < rows < 5 else rows

    @staticmethod
    def _layers(model: nn.Module) -> list[nn.Linear]:
        """Those that do nothing but multiply: no subclass, no quantised weight, nothing put in front of them. None of a
        compiled model, which would be compiled anew."""
        if any(getattr(m, "_orig_mod", None) or getattr(m, "_compiled_call_impl", None) for m in model.modules()):
            return []
        return [
            layer
            for layer in model.modules()
            if type(layer) is nn.Linear
            and _free(layer.__dict__.get("forward"))
            and type(layer.weight) is nn.Parameter
            and layer.weight.dtype == torch.float32
            and layer.weight.device.type == "cpu"
            and layer.weight.is_contiguous()
            and layer.weight.numel() > _SMALL
        ]


def _forward(layer: nn.Linear, most: int) -> Callable[[Tensor], Tensor]:
    """In place of ``layer.forward``."""

    def forward(x: Tensor) -> Tensor:
        weight, bias = layer.weight, layer.bias  # (out, in), (out,) or None
        shape = x.shape
        rows = x.numel() // shape[-1]
        if not 1 < rows <= most or x.dtype != weight.dtype:
            return linear(x, weight, bias)
        product = flipped(x.reshape(rows, shape[-1]), weight).view(*shape[:-1], -1)
        return product if bias is None else product.add_(bias)

    forward.row_by_row = True  # pyright: ignore[reportFunctionMemberAccess]
    return forward


def _free(forward: Any) -> bool:
    """True: what a layer has as its own forward is nothing, or ours, of a pass that another thread makes meanwhile."""
    return forward is None or getattr(forward, "row_by_row", False) is True


def flipped(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``, made as ``(weight @ x.T).T``.

    Args:
        x: ``(rows, in)``, contiguous. weight: ``(out, in)``.

    Returns:
        ``(rows, out)``, contiguous.
    """
    return torch.mm(weight, x.t()).t().contiguous()


@cache
def most_rows(threads: int) -> int:
    """Up to how many rows ``flipped`` is faster here; 0: never. Takes 0.1 s, the first time.

    Args:
        threads: of torch, as set; what is measured holds for them.
    """
    del threads
    draw = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        weights = [torch.randn(_SHAPE, generator=draw) for _ in range(_WEIGHTS)]
        most = 0
        for rows in _TRIED:
            x = torch.randn((rows, _SHAPE[1]), generator=draw)
            seconds: dict[Any, list[float]] = {linear: [], flipped: []}
            for _ in range(1 + _ROUNDS):
                for product, taken in seconds.items():
                    started = time.perf_counter()
                    for weight in weights:
                        product(x, weight)
                    taken.append(time.perf_counter() - started)
            usual, other = (median(taken[1:]) for taken in seconds.values())
            if other > usual:
                break
            most = rows
    return most
