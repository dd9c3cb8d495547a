"""A reader of GGUF files: metadata, and tensors as float32.

The format is little-endian: a header, key-value pairs, a line per tensor, then aligned tensor data
(ggml-org/ggml, docs/gguf.md, versions 2 and 3). Every count and length in the file is held against the bytes that are
left before anything is allocated, so a damaged file ends in an error that says where.

Own code because the GGUF loading of transformers 5.23 took 29 s and its tokenizer 9 s for a model of 135 M parameters,
against 5 s here for both; it wants the package ``gguf``, and leaves a model that cannot be saved.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
_ALIGNMENT_KEY, _ALIGNMENT = "general.alignment", 32

# Value type -> its struct code (docs/gguf.md, gguf_metadata_value_type); 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class GgufError(ValueError):
    """A file that is no GGUF file, is damaged, or holds a kind of data that is not read here."""


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: its ``shape`` (numpy order: slowest dimension first), kind, and place in the file in
    bytes."""

    shape: tuple[int, ...]
    kind: int
    start: int
    size: int


def _float32(data: np.ndarray) -> np.ndarray:
    return data.view("<f4").astype(np.float32)


def _float16(data: np.ndarray) -> np.ndarray:
    return data.view("<f2").astype(np.float32)


def _q8_0(data: np.ndarray) -> np.ndarray:
    """``scale * q``: per 32 values a float16 scale and 32 signed bytes."""
    blocks = data.reshape(-1, 34)  # (blocks, bytes)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)  # (blocks, 1)
    return scale * blocks[:, 2:].view(np.int8).astype(np.float32)


def _q4_1(data: np.ndarray) -> np.ndarray:
    """``scale * q + minimum``: per 32 values two float16 and 16 bytes; low halves hold values 0 to 15, high ones 16 to
    31."""
    blocks = data.reshape(-1, 20)  # (blocks, bytes)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)  # (blocks, 1)
    minimum = blocks[:, 2:4].copy().view("<f2").astype(np.float32)  # (blocks, 1)
    packed = blocks[:, 4:]  # (blocks, 16)
    quants = np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)  # (blocks, 32)
    return scale * quants + minimum


_KINDS: dict[int, tuple[str, int, int, Callable[[np.ndarray], np.ndarray]]] = {
    0: ("F32", 1, 4, _float32),
    1: ("F16", 1, 2, _float16),
    3: ("Q4_1", 32, 20, _q4_1),
    8: ("Q8_0", 32, 34, _q8_0),
}
"""Tensor kind -> name, values and bytes of a block, and how a flat array of bytes becomes float32."""


class GgufFile:
    """An open GGUF file; use it as a context.

    Attributes:
        metadata: key -> number, bool, string, or list of them. tensors: name -> ``TensorEntry``.
    """

    def __init__(self, path: Path) -> None:
        """Read header and metadata; tensor data stays on disk.

        Raises:
            GgufError: no GGUF file, or a damaged one. OSError: it cannot be read.
        """
        self.path = path
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise GgufError(f"{path} is no GGUF file; it does not begin with {MAGIC.decode()}")
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = len(MAGIC)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorEntry] = {}
        try:
            self._read_header()
        except BaseException:
            self._bytes.close()
            raise

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._bytes.close()

    def tensor(self, name: str) -> np.ndarray:
        """Float32 array ``tensors[name].shape``, a copy.

        Raises:
            GgufError: no such tensor.
        """
        if name not in self.tensors:
            raise self._damaged(f"no tensor {name!r}")
        entry = self.tensors[name]
        data = np.frombuffer(self._bytes[entry.start : entry.start + entry.size], dtype=np.uint8)  # (size,)
        return _KINDS[entry.kind][3](data).reshape(entry.shape)

    def _read_header(self) -> None:
        (version,) = self._take("I")
        if version not in VERSIONS:
            raise self._damaged(f"version {version}; versions {' and '.join(map(str, VERSIONS))} are read")
        num_tensors, num_pairs = self._take("QQ")
        for _ in range(self._bounded(num_pairs, 13, "metadata")):  # key length, type and a value of one byte
            key = self._string()
            if key in self.metadata:
                raise self._damaged(f"the key {key!r} stands twice")
            (kind,) = self._take("I")
            self.metadata[key] = self._value(kind)
        lines: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(self._bounded(num_tensors, 24, "tensor")):  # name length, dimensions, kind, offset
            name = self._string()
            if name in lines:
                raise self._damaged(f"the tensor {name!r} stands twice")
            (dimensions,) = self._take("I")
            if dimensions > MAX_DIMENSIONS:
                raise self._damaged(f"the tensor {name!r} has {dimensions} dimensions")
            shape = self._take(f"{dimensions}Q")[::-1]
            lines[name] = (shape, *self._take("IQ"))
        alignment = self.metadata.get(_ALIGNMENT_KEY, _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._damaged(f"{_ALIGNMENT_KEY} is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        self.tensors = {name: self._entry(name, start, *line) for name, line in lines.items()}

    def _entry(self, name: str, start: int, shape: tuple[int, ...], kind: int, offset: int) -> TensorEntry:
        if kind not in _KINDS:
            known = ", ".join(names[0] for names in _KINDS.values())
            raise self._damaged(f"the tensor {name!r} is of kind {kind}; {known} are read")
        _, block, width, _ = _KINDS[kind]
        if not shape or shape[-1] % block or min(shape) < 1:
            raise self._damaged(f"the tensor {name!r} has the shape {shape}")
        size = math.prod(shape) // block * width
        if start + offset + size > len(self._bytes):
            raise self._damaged(f"the tensor {name!r} ends behind the end of the file; download it again")
        return TensorEntry(shape, kind, start + offset, size)

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._take(_SCALARS[kind])[0]
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self._damaged(f"a value of type {kind}")
        inner, count = self._take("IQ")
        if inner == _STRING:
            return [self._string() for _ in range(self._bounded(count, 8, "list"))]
        if inner not in _SCALARS:
            raise self._damaged(f"a list of values of type {inner}")
        code = _SCALARS[inner]
        return list(self._take(f"{self._bounded(count, struct.calcsize(code), 'list')}{code}"))

    def _string(self) -> str:
        (length,) = self._take("Q")
        end = self._at + self._bounded(length, 1, "text")
        raw, self._at = self._bytes[self._at : end], end
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged("a text that is not UTF-8") from error

    def _take(self, codes: str) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{codes}")
        self._bounded(size, 1, "header")
        values = struct.unpack_from(f"<{codes}", self._bytes, self._at)
        self._at += size
        return values

    def _bounded(self, count: int, least_bytes: int, what: str) -> int:
        """``count``, checked: that many items of at least ``least_bytes`` fit into what is left of the file."""
        if count * least_bytes > len(self._bytes) - self._at:
            raise self._damaged(f"{count} {what} entries or bytes, more than the file holds; download it again")
        return count

    def _damaged(self, what: str) -> GgufError:
        return GgufError(f"{self.path}, byte {self._at}: {what}")
