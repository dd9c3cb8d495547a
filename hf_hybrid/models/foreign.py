"""Code of others inside a model: hooks, forwards set on a layer, classes from outside of transformers."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

_KNOWN = ("accelerate", "torch", "transformers", "hf_hybrid")
"""Packages whose hooks move weights or note outputs, and whose classes are known."""


def foreign_hooks(host: nn.Module) -> Iterator[tuple[Hashable, Any]]:
    """Numbers and functions of forward hooks, and of forwards set on a layer, whose author is not known."""
    for registry in (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks):
        yield from ((number, hook) for number, hook in registry.items() if not _is_known_hook(hook))
    for layer in host.modules():
        for registry in (layer._forward_hooks, layer._forward_pre_hooks):
            if registry:
                yield from ((number, hook) for number, hook in registry.items() if not _is_known_hook(hook))
        forward = layer.__dict__.get("forward")
        # accelerate's own is in front of what was there before.
        if forward is not None and hasattr(layer, "_hf_hook"):
            forward = layer.__dict__.get("_old_forward")
        if forward is not None and not _is_known_hook(forward):
            yield ("forward", id(forward)), forward


def foreign_class(host: nn.Module) -> type | None:
    """The class of the model from outside of transformers, such as one of a repository; None: there is none."""
    own = (c for c in type(host).__mro__ if issubclass(c, nn.Module) and not _is_known(c.__module__))
    return next(own, None)


def names_of(hooks: Sequence[tuple[Hashable, Any]]) -> str:
    """For messages."""
    names = dict.fromkeys(
        getattr(hook, "__qualname__", None) or getattr(getattr(hook, "func", hook), "__qualname__", type(hook).__name__)
        for _, hook in hooks
    )
    return ", ".join(list(names)[:3]) + (", ..." if len(names) > 3 else "")


def _is_known_hook(hook: Any) -> bool:
    if isinstance(hook, functools.partial):
        return _is_known_hook(hook.func)
    if getattr(hook, "row_by_row", False) is True:  # ours, in a pass of another thread, or its author says so
        return True
    owner = getattr(hook, "__self__", None)
    module = getattr(hook, "__module__", None) or type(hook).__module__
    # A method set on a layer again, such as a saved ``layer.forward``, is its class's.
    return _is_known(type(owner).__module__ if isinstance(owner, nn.Module) else module)


def _is_known(module: str) -> bool:
    return module.partition(".")[0] in _KNOWN
