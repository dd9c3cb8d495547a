"""Loads a checkpoint and prints what it cost, as a line of JSON: ``python -P one_load.py ORDER``.

``load_cost.py`` starts a process per sample, because memory that an earlier load gave back to the allocator hides what
the next one takes. It is run as a file, so that the process of the host holds nothing of this package.
The order is JSON: ``loader`` (``module:class``), ``name`` and ``kwargs`` of its ``from_pretrained``.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import runpy
import sys
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

_THREADS_OFF = "HF_DEACTIVATE_ASYNC_LOAD"
"""Variable of transformers: read weights one after another. In threads, the peak is a matter of timing."""


def measure(order: dict[str, Any]) -> dict[str, float | None]:
    """Load three times in a row, each for another reading.

    Returns:
        ``start_seconds`` until the first model is there, all imports included, and in 2**20 bytes: ``process_mb``, all
        that is resident then; of the second load, whose imports are done, ``stays_mb``, by how much the resident memory
        grew for good, and ``peak_mb``, by how much while it loaded; ``tensors_mb`` that the model holds, each storage
        once (weights that the host maps from their file become resident when they are used); of the third load
        ``python_mb`` and ``python_peak_mb``, Python's own objects, counted. None: cannot be read on this system.
    """
    started = time.perf_counter()
    module, _, name = order["loader"].partition(":")
    loader = getattr(import_module(module), name)
    model = loader.from_pretrained(order["name"], **order["kwargs"])
    found: dict[str, float | None] = {"start_seconds": time.perf_counter() - started}
    memory = runpy.run_path(str(Path(__file__).with_name("memory.py")))  # imports torch alone
    resident, peak, reset = memory["resident_mb"], memory["peak_mb"], memory["reset_peak"]
    import torch

    settle()
    found["process_mb"] = resident()
    del model
    settle()
    reset(torch.device("cpu"))
    before = resident()
    model = loader.from_pretrained(order["name"], **order["kwargs"])
    highest = peak(torch.device("cpu"))
    settle()
    after = resident()
    found["stays_mb"] = None if before is None or after is None else after - before
    found["peak_mb"] = None if before is None or highest is None else highest - before
    found["tensors_mb"] = tensor_bytes(model) / 2**20
    del model
    settle()
    python = traced(lambda: loader.from_pretrained(order["name"], **order["kwargs"]))
    return found | {"python_mb": python[0] / 2**20, "python_peak_mb": python[1] / 2**20}


def settle() -> None:
    """Give free memory back to the system."""
    gc.collect()
    with suppress(AttributeError, OSError, TypeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def tensor_bytes(model: Any) -> int:
    """Bytes of parameters and buffers; tied weights are one storage."""
    storages = [tensor.untyped_storage() for tensor in chain(model.parameters(), model.buffers())]
    return sum(size for _, size in {(storage.data_ptr(), storage.nbytes()) for storage in storages})


def traced(load: Callable[[], Any]) -> tuple[int, int]:
    """Bytes of Python's objects that the result of ``load`` keeps alive, and the most while it ran."""
    tracemalloc.start()
    try:
        model = load()
        gc.collect()
        held, most = tracemalloc.get_traced_memory()
        del model
    finally:
        tracemalloc.stop()
    return held, most


if __name__ == "__main__":
    os.environ[_THREADS_OFF] = "1"
    print(json.dumps(measure(json.loads(sys.argv[1]))))
