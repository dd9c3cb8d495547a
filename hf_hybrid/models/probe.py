"""Probe: does a model that may do something else than its class says write a token from its prefix alone?

A strategy runs several rows in one pass, and takes for granted that each row gives what it would give alone. Every
class of transformers that the Runner serves does. What a hook does, a class of somebody else or an encoder that is used
as a decoder is not known, so such a model runs three tokens in one pass and one by one, once, before it is used.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from hf_hybrid.core.rows import Rows
from hf_hybrid.models.foreign import foreign_class, foreign_hooks, names_of
from hf_hybrid.models.host import (
    Unsupported,
    cache_argument,
    start_device,
    text_config,
    unwrapped,
    without_extras,
)
from hf_hybrid.models.opening import open_runner
from hf_hybrid.models.release import release_note
from hf_hybrid.models.runner import Runner

_TOLERANCE: dict[torch.dtype, float] = {torch.float64: 1e-4, torch.float32: 1e-2}
_COARSE = 1e-1
"""How far the logits of a row may lie apart, relative to their spread. Rounding alone: a softmax in float32 inside a
float64 model 1e-6, TF32 over many layers 1e-3, bfloat16 2e-2. Another text to read moves them by about 1."""
_ROWS = 3
_faults: WeakKeyDictionary[Any, dict[Hashable, str]] = WeakKeyDictionary()
"""model -> what was looked at -> what was found; empty: nothing."""


def check_rows(
    model: Any, prompt: Sequence[int], sequences: int, *, one_by_one: bool, kind: type[Runner] | None = None
) -> None:
    """Refuse a model whose rows are not what a strategy takes them for. Costs passes only where there is a reason to
    doubt it, and once for the same hooks.

    Args:
        model: that a Runner serves. prompt: token ids, at least one. sequences: of the batch.
        kind: of the Runner; None: the one that serves the model.
        one_by_one: True: after the prompt each pass has one row, as in the host, so that only the model's class can be
            in doubt.

    Raises:
        Unsupported: a row depends on those beside it, a hook serves one batch alone, or a pass breaks; the message says
            what to do.
    """
    host = unwrapped(model)
    hooks = list(foreign_hooks(host))
    try:
        _check_adapters([hook for _, hook in hooks], sequences, one_by_one)
    except Unsupported:
        _drop_adapters(host)
        raise
    reasons = [] if one_by_one or not hooks else [f"forward hooks or replaced forwards ({names_of(hooks)})"]
    if (foreign := foreign_class(host)) is not None:
        reasons.append(f"a class from outside of transformers ({foreign.__module__}.{foreign.__qualname__})")
    if not one_by_one and _reads_both_ways(host):
        reasons.append("is_decoder=False")
    if release_note():
        reasons.append("a release of transformers that is not known")
    if not reasons:
        return
    key = (kind, one_by_one, host.training, text_config(host)._attn_implementation, *(number for number, _ in hooks))
    known = _faults.setdefault(host, {})
    if key not in known:
        known[key] = _fault(model, (list(prompt) * _ROWS)[:_ROWS], one_by_one, kind)
    if known[key]:
        training = " (it is in training mode: call model.eval())" if host.training else ""
        raise Unsupported(
            f"{type(host).__name__} has {' and '.join(reasons)}, and {known[key]}{training}. {_advice(reasons)}"
            f"{release_note()}"
        )


def _advice(reasons: Sequence[str]) -> str:
    first = "Load it with is_decoder=True" if "is_decoder=False" in reasons else "Remove what makes the difference"
    return f"{first}, or take strategy='autoregressive' or none"


def _check_adapters(hooks: Sequence[Any], sequences: int, one_by_one: bool) -> None:
    """Hooks of PEFT that know which sequence of a batch has which adapter."""
    for hook in hooks:
        keywords = hook.keywords if isinstance(hook, functools.partial) else {}
        if keywords.get("adapter_names") is not None and (sequences > 1 or len(keywords["adapter_names"]) > 1):
            raise Unsupported(
                "adapter_names= gives each sequence of a batch its adapter, and sequences leave a batch when they end; "
                "call generate() with one sequence at a time, or model.set_adapter(name) and one adapter for all"
            )
        if keywords.get("alora_offsets") is not None and (sequences > 1 or not one_by_one):
            raise Unsupported(
                "aLoRA counts the tokens of a pass from its end; take strategy='autoregressive' with one sequence, or "
                "leave out strategy="
            )


def _drop_adapters(host: nn.Module) -> None:
    """Take the hooks of PEFT off: it does so only behind a call that ends well, and later calls would have them."""
    for layer in host.modules():
        for number, hook in list(layer._forward_pre_hooks.items()):
            if isinstance(hook, functools.partial) and {"adapter_names", "alora_offsets"} & hook.keywords.keys():
                del layer._forward_pre_hooks[number]
                layer._forward_pre_hooks_with_kwargs.pop(number, None)


def _reads_both_ways(host: nn.Module) -> bool:
    """True: an encoder, used as a decoder without saying so."""
    if getattr(text_config(host), "is_decoder", None) is not False:
        return False
    return any(getattr(layer, "is_decoder", None) is False for layer in host.modules())


@torch.no_grad()
def _fault(model: Any, ids: list[int], one_by_one: bool, kind: type[Runner] | None) -> str:
    """What is wrong with the passes of ``model``, in words; empty: nothing."""
    try:
        if apart(_of_host(model, ids), _of_runner(_runner(model, kind), ids)):
            return "passes with our cache give other logits than the model's own"
        if one_by_one:
            return ""
        runner = _runner(model, kind)
        single = torch.cat([_run(runner, [token], place, True) for place, token in enumerate(ids)])
        if any(apart(single, _run(_runner(model, kind), ids, 0, plain)) for plain in (True, False)):
            return f"{len(ids)} tokens in one pass give other logits than one by one"
    except Unsupported:
        raise
    except Exception as error:  # whatever somebody else's code does
        return f"a pass of {len(ids)} tokens fails ({type(error).__name__}: {error})"
    return ""


def _of_host(model: Any, ids: list[int]) -> Tensor:
    """Logits ``(2, vocab)`` of the model's own forward: a prompt of all tokens but the last, then that."""
    cache, device = DynamicCache(), start_device(model)
    found: list[Tensor] = []
    for begin, end in ((0, len(ids) - 1), (len(ids) - 1, len(ids))):
        output = model(
            input_ids=torch.tensor([ids[begin:end]], device=device),
            attention_mask=torch.ones((1, end), dtype=torch.long, device=device),
            position_ids=torch.arange(begin, end, device=device)[None],
            use_cache=True,
            return_dict=True,
            **{cache_argument(model): cache},
            **without_extras(model),
        )
        found.append(output.logits[0, -1:])
    return torch.cat(found)


def _of_runner(runner: Runner, ids: list[int]) -> Tensor:
    """The same by the Runner."""
    last = len(ids) - 1
    return torch.cat([_run(runner, ids[:last], 0, True)[-1:], _run(runner, ids[last:], last, True)])


def _runner(model: Any, kind: type[Runner] | None) -> Runner:
    return open_runner(model, 1, capacity=8, kind=kind)


def _run(runner: Runner, ids: list[int], begin: int, plain: bool) -> Tensor:
    """Logits ``(tokens, vocab)`` of one pass."""
    position = torch.arange(begin, begin + len(ids))[None]
    rows = Rows.clean(position, torch.zeros_like(position))
    logits = runner.run(torch.tensor([ids]), rows, len(ids), plain=plain).logits[0].clone()
    runner.commit()
    return logits


def tolerance(dtype: torch.dtype) -> float:
    """How far logits of this type may lie apart by rounding, relative to their spread."""
    return _TOLERANCE.get(dtype, _COARSE)


def apart(first: Tensor, second: Tensor) -> bool:
    """True: a row differs by more than rounding. What is not a number is left to the call that meets it."""
    most = tolerance(first.dtype)
    first, second = first.double().cpu(), second.double().cpu()
    spread = (first - first.mean(dim=-1, keepdim=True)).norm(dim=-1)  # (rows,)
    return bool(((first - second).norm(dim=-1) > most * spread.clamp(min=1e-30)).any())
