"""Seams: what the package relies on in transformers, looked at once per process, so that a release which moved one is
refused with what to do and never writes a wrong text.

Names are looked at in every release. One that is newer than those that were tested must also pass a trial: a tiny model
read through a RowCache, rejected rows included, has the logits that it has without a cache.
"""

from __future__ import annotations

import inspect
from dataclasses import fields
from functools import cache
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from hf_hybrid.core.rows import Rows
from hf_hybrid.models.cache import RowCacheLayer
from hf_hybrid.models.cached import CachedRunner
from hf_hybrid.models.host import CACHES, Unsupported
from hf_hybrid.models.release import is_newer, release_note

LOOP = ("input_ids", "logits_processor", "stopping_criteria", "generation_config")
"""What ``generate()`` hands to every decoding loop, beside what the model's forward takes."""

_OUTPUT = {"sequences", "scores", "logits"}
_Host: Any = GenerationMixin  # its methods type ``self`` by a protocol


def check_seams() -> None:
    """Refuse a release of transformers that moved what we rely on.

    Raises:
        Unsupported: it did; the message names it, and says which releases were tested.
    """
    if found := moved():
        raise Unsupported(f"this release of transformers is not served: {'; '.join(found)}{release_note()}")


@cache
def moved() -> tuple[str, ...]:
    """What differs from the releases that were tested."""
    found = [*_in_generate(), *_in_outputs(), *_in_caches()]
    if not found and is_newer():
        found += _in_passes()
    return tuple(found)


def _in_generate() -> list[str]:
    taken = inspect.signature(_Host.generate).parameters
    loop = getattr(_Host, "_sample", None)
    handed = inspect.signature(loop).parameters if loop is not None else {}
    found = ["generate() takes no custom_generate"] if "custom_generate" not in taken else []
    missing = [name for name in LOOP if name not in handed]
    return [*found, f"generate() hands no {', '.join(missing)} to a decoding loop"] if missing else found


def _in_outputs() -> list[str]:
    names = {field.name for field in fields(GenerateDecoderOnlyOutput)}
    missing = sorted(_OUTPUT - names) + ([] if names & {*CACHES} else [" or ".join(CACHES)])
    return [f"outputs of generate() have no {', '.join(missing)}"] if missing else []


def _in_caches() -> list[str]:
    found: list[str] = []
    asked = sorted(getattr(RowCacheLayer, "__abstractmethods__", ()))
    if asked:
        found.append(f"a layer of a cache must have {', '.join(asked)}")
    if "layers" not in inspect.signature(Cache.__init__).parameters:
        found.append("a Cache is not made of layers")
    lacks = [name for name in ("keys", "values") if not hasattr(DynamicLayer(), name)]
    if lacks or not issubclass(DynamicLayer, CacheLayerMixin):
        found.append("a layer of a DynamicCache has no keys and values")
    return found


def _in_passes() -> list[str]:
    try:
        drift = _drift()
    except Exception as error:  # whatever a release to come may raise
        return [f"a pass over a tiny model fails ({type(error).__name__}: {error})"]
    return [] if drift < 1e-9 else ["a pass over a tiny model has other logits than without a cache"]


@torch.no_grad()
def _drift() -> float:
    """The largest difference between logits of a tiny model with a RowCache and without a cache, in float64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.5}
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="sdpa"))  # pyright: ignore[reportCallIssue]
        model = model.to(torch.float64).eval()
        ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
        wanted = model(input_ids=ids, use_cache=False).logits[0]  # (8, vocab)
        runner = CachedRunner(model, 1, capacity=4)
        for span in (1, 2):
            runner.relate(0, span, [0])
        found: list[torch.Tensor] = []
        for first in (0, 2):  # the host makes these masks
            found.append(_read(runner, ids[:, first : first + 2], [first, first + 1], [0, 0]))
            runner.commit()
        # A draft that is rejected, and beside it, at the same positions, what follows.
        beside = torch.cat([15 - ids[:, 4:6], ids[:, 4:6]], dim=1)
        found.append(_read(runner, beside, [4, 5, 4, 5], [1, 1, 2, 2])[2:])
        runner.commit([[False, False, True, True]], [(0, 2, 0), (0, 3, 0)])
        found.append(_read(runner, ids[:, 6:], [6, 7], [0, 0]))
    return float((torch.cat(found) - wanted).abs().max())


def _read(runner: CachedRunner, ids: torch.Tensor, positions: list[int], spans: list[int]) -> torch.Tensor:
    """Logits ``(rows, vocab)`` of a pass over clean rows."""
    rows = Rows.clean(torch.tensor([positions]), torch.tensor([spans]))
    return runner.run(ids, rows, len(positions), plain=not any(spans)).logits[0]
