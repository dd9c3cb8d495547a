"""The one door to a Runner."""

from __future__ import annotations

from typing import Any

from hf_hybrid.models.cached import CachedRunner
from hf_hybrid.models.host import Unsupported
from hf_hybrid.models.layers import ConfigFault
from hf_hybrid.models.runner import Runner
from hf_hybrid.models.state import StateRunner


def runner_of(model: Any, kind: type[Runner] | None = None) -> type[Runner]:
    """The class of Runner that serves ``model``, or ``kind`` if it does.

    Raises:
        Unsupported: none does, or ``kind`` does not; the message says what to do.
    """
    if kind is not None:
        kind.check_model(model)
        return kind
    try:
        CachedRunner.check_model(model)
    except ConfigFault:
        raise
    except Unsupported as refused:
        try:
            StateRunner.check_model(model)
        except Unsupported as error:
            raise error from refused
        return StateRunner
    return CachedRunner


def open_runner(
    model: Any,
    batch_size: int,
    *,
    capacity: int = 256,
    synced_gpus: bool | None = None,
    kind: type[Runner] | None = None,
) -> Runner:
    """The Runner of ``model``.

    Args:
        model, batch_size, capacity, synced_gpus: see ``Runner``.
        kind: see ``runner_of``.
    """
    return runner_of(model, kind)(model, batch_size, capacity=capacity, synced_gpus=synced_gpus)
