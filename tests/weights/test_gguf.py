"""The GGUF reader against values computed one by one, and against damaged files.

Bugs these tests catch: halves of a byte in the wrong order, a scale read as the minimum, dimensions not reversed, data
that begins before its alignment; a cut file that gives a traceback, or a huge count that gives a huge allocation.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf_for_tests import float32, gguf, text

from hf_hybrid.weights.gguf import GgufError, GgufFile

RNG = np.random.default_rng(0)
METADATA = {
    "a.text": "naïve",
    "a.number": 7,
    "a.real": 0.5,
    "a.flag": True,
    "a.list": [3, -1],
    "a.texts": ["x", "", "Ġy"],
}


def read(path: Path, content: bytes) -> GgufFile:
    path.write_bytes(content)
    return GgufFile(path)


def q4_1(blocks: int) -> tuple[bytes, list[float]]:
    raw, values = b"", []
    for _ in range(blocks):
        scale, minimum = np.float16(RNG.uniform(0, 1)), np.float16(RNG.uniform(-1, 1))
        quants = [int(q) for q in RNG.integers(0, 16, 32)]
        raw += struct.pack("<ee", scale, minimum) + bytes(quants[i] + 16 * quants[i + 16] for i in range(16))
        values += [float(np.float32(scale) * np.float32(q) + np.float32(minimum)) for q in quants]
    return raw, values


def q8_0(blocks: int) -> tuple[bytes, list[float]]:
    raw, values = b"", []
    for _ in range(blocks):
        scale = np.float16(RNG.uniform(0, 1))
        quants = [int(q) for q in RNG.integers(-128, 128, 32)]
        raw += struct.pack("<e32b", scale, *quants)
        values += [float(np.float32(scale) * np.float32(q)) for q in quants]
    return raw, values


def test_every_kind_of_tensor_has_the_values_of_its_formula(tmp_path: Path) -> None:
    packed4, values4 = q4_1(6)
    packed8, values8 = q8_0(4)
    halves = RNG.standard_normal((5, 3)).astype(np.float16)
    full = RNG.standard_normal((2, 3, 4)).astype(np.float32)
    tensors = {
        "four": ((3, 64), 3, packed4),
        "eight": ((4, 32), 8, packed8),
        "half": (halves.shape, 1, halves.tobytes()),
        "full": float32(full),
    }
    for version, alignment in ((2, 32), (3, 32), (3, 64)):
        metadata = {"general.alignment": alignment} if alignment != 32 else {}
        with read(tmp_path / "x", gguf(metadata, tensors, version, alignment)) as file:
            assert np.array_equal(file.tensor("four"), np.array(values4, np.float32).reshape(3, 64))
            assert np.array_equal(file.tensor("eight"), np.array(values8, np.float32).reshape(4, 32))
            assert np.array_equal(file.tensor("half"), halves.astype(np.float32))
            assert np.array_equal(file.tensor("full"), full)
            with pytest.raises(GgufError, match="no tensor 'other'"):
                file.tensor("other")


def test_metadata_comes_back(tmp_path: Path) -> None:
    with read(tmp_path / "x", gguf(METADATA, {})) as file:
        assert file.metadata == METADATA and file.tensors == {}


def test_a_file_that_was_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = gguf(METADATA, {"a": float32(np.ones((2, 3))), "b": float32(np.ones(5))})
    for length in range(len(whole)):
        with pytest.raises(GgufError):
            read(tmp_path / "x", whole[:length])
    with read(tmp_path / "x", whole) as file:
        assert file.tensors.keys() == {"a", "b"}


HUGE = 2**63
HEAD = b"GGUF" + struct.pack("<I", 3)
DAMAGED = {
    "no GGUF file": b"PK\3\4 and more",
    "version 1": b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
    "metadata entries": HEAD + struct.pack("<QQ", 0, HUGE),
    "tensor entries": HEAD + struct.pack("<QQ", HUGE, 0),
    "text entries": HEAD + struct.pack("<QQQ", 0, 1, HUGE) + b"x" * 20,
    "list entries": HEAD + struct.pack("<QQ", 0, 1) + text("k") + struct.pack("<IIQ", 9, 4, HUGE),
    "of type 9": HEAD + struct.pack("<QQ", 0, 1) + text("k") + struct.pack("<IIQ", 9, 9, 1),
    "of type 13": HEAD + struct.pack("<QQ", 0, 1) + text("k") + struct.pack("<IQ", 13, 0),
    "not UTF-8": HEAD + struct.pack("<QQQ", 0, 1, 2) + b"\xff\xfe" + b"\0" * 20,
    "stands twice": HEAD + struct.pack("<QQ", 0, 2) + (text("k") + struct.pack("<II", 4, 1)) * 2,
    "'t' stands twice": HEAD + struct.pack("<QQ", 2, 0) + (text("t") + struct.pack("<IQIQ", 1, 1, 0, 0)) * 2,
    "9 dimensions": HEAD + struct.pack("<QQ", 1, 0) + text("t") + struct.pack("<I9Q", 9, *[1] * 9),
    "of kind 77": HEAD + struct.pack("<QQ", 1, 0) + text("t") + struct.pack("<IQIQ", 1, 1, 77, 0),
    "has the shape (33,)": HEAD + struct.pack("<QQ", 1, 0) + text("t") + struct.pack("<IQIQ", 1, 33, 8, 0),
    "has the shape (0,)": HEAD + struct.pack("<QQ", 1, 0) + text("t") + struct.pack("<IQIQ", 1, 0, 0, 0),
    "has the shape ()": HEAD + struct.pack("<QQ", 1, 0) + text("t") + struct.pack("<IIQ", 0, 0, 0) + b"\0" * 8,
    "behind the end": HEAD + struct.pack("<QQ", 1, 0) + text("t") + struct.pack("<IQQIQ", 2, 2**62, 2**62, 0, 0),
    "general.alignment is 0": gguf({"general.alignment": 0}, {}),
}


@pytest.mark.parametrize("message", DAMAGED)
def test_damage_is_named_and_nothing_large_is_allocated(message: str, tmp_path: Path) -> None:
    with pytest.raises(GgufError) as error:
        read(tmp_path / "x", DAMAGED[message])
    assert message in str(error.value) and str(tmp_path) in str(error.value)
