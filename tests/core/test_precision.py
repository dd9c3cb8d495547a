"""Devices without float64 (Apple's GPUs) make their numbers of double precision on the CPU, and get the same ones.

There is no such device here: tensors that only say where they are (``FakeTensorMode``) stand for it, and float64 on it
raises what it raises there.

Bugs these tests catch: a float64 tensor on a device that has none, in the noise of sampling, in schedules, or in what a
pass brings back from the device; noise of another device that is not the CPU's, bit for bit; float64 in any pass of any
strategy beside those places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models_for_tests import hybrid, left_padded, tiny
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from hf_hybrid.core import acceptance, precision
from hf_hybrid.core.acceptance import keyed_noise, keyed_uniform
from hf_hybrid.core.precision import double_device, has_double
from hf_hybrid.core.schedules import SCHEDULES, unmask_counts
from hf_hybrid.decoding import denoise, sampling, scoring, speculative
from hf_hybrid.decoding.scoring import to_host
from hf_hybrid.models.side_by_side import honours_branches

KIND = "lazy"
"""Of a device that torch knows and that no machine has, for its part of an Apple's."""


class NoDoubles(TorchDispatchMode):
    """Refuses float64 on devices of one kind, in the words of torch on Apple's."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float64 and tensor.device.type == self.kind:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support it")
        return out


@pytest.fixture
def apple() -> Iterator[torch.device]:
    """A device without float64; its tensors have no values."""
    has_double.cache_clear()
    with NoDoubles(KIND), FakeTensorMode():
        yield torch.device(KIND)
    has_double.cache_clear()


def test_where_doubles_are_made(apple: torch.device) -> None:
    with pytest.raises(TypeError, match="float64"):
        torch.ones(3, device=apple).double()
    assert double_device(apple) == torch.device("cpu")
    assert double_device("cpu") == torch.device("cpu")
    assert double_device(torch.device("cuda", 1)) == torch.device("cuda", 1)


def test_noise(apple: torch.device) -> None:
    for noise in (keyed_noise([1, 2], [3, 4], 7, apple), keyed_uniform(1, [3, 4], apple)):
        assert noise.device.type == KIND and noise.dtype == torch.float32


def test_schedules(apple: torch.device) -> None:
    counts = unmask_counts(torch.ones(3, dtype=torch.long, device=apple), 4, "cosine")
    assert counts.device.type == KIND and counts.shape == (3, 4)
    for schedule in SCHEDULES.values():
        weight = schedule.loss_weight(torch.ones(5, device=apple))
        assert weight.device.type == KIND and weight.dtype == torch.float32


def test_what_a_pass_brings_back(apple: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeTensor, "tolist", lambda self: (self.device.type, self.dtype, tuple(self.shape)))
    sent = (torch.ones(4, dtype=torch.long), torch.ones(4), torch.ones((2, 3), dtype=torch.bool))
    brought = to_host(*(tensor.to(apple) for tensor in sent))
    assert brought == [("cpu", tensor.dtype, tuple(tensor.shape)) for tensor in sent]


def test_the_noise_is_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def made(device: torch.device | str) -> torch.device:
        asked.append(torch.device(device))
        return torch.device("cpu")

    before = keyed_noise([5, 6, 7], [0, 9, 2**40], 100)
    monkeypatch.setattr(acceptance, "double_device", made)
    assert torch.equal(keyed_noise([5, 6, 7], [0, 9, 2**40], 100), before)
    assert keyed_noise(5, [0], 100, "meta").device.type == "meta" and asked[-1].type == "meta"
    assert precision.double_device("cpu") == torch.device("cpu")


def outside(made: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As on the CPU beside such a device."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        with _disable_current_modes():
            return made(*args, **kwargs)

    return run


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "autoregressive"},
        {"strategy": "speculative", "drafter": "self", "adaptive": False},
        {"strategy": "speculative", "acceptance": "rejection", "draft_length": 3},
        {"strategy": "block_diffusion", "selection": "random", "max_denoising_steps": 3},
        {"strategy": "planned_diffusion", "verify_spans": False, "commit": "block", "max_denoising_steps": 3},
        {"strategy": "planned_diffusion"},
    ],
)
def test_no_pass_needs_doubles(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (scoring, sampling, denoise, speculative):
        for name in ("keyed_noise", "keyed_uniform", "unmask_counts"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, outside(getattr(module, name)))
    model = hybrid(seed=26).float()
    options = {**settings, "do_sample": True, "top_p": 0.9, "seed": 3, "max_new_tokens": 30}
    wanted = model.generate(**left_padded(), **options)
    with NoDoubles("cpu"):
        assert torch.equal(model.generate(**left_padded(), **options), wanted)


def test_branches_are_probed_without_doubles() -> None:
    model = tiny("llama").float()
    with NoDoubles("cpu"):
        assert honours_branches(model)
