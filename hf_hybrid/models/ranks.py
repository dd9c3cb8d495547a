"""Ranks: the processes of ``torch.distributed`` that share one model, and what they must decide alike.

Where a model is spread over processes (tensor parallelism, FSDP, ZeRO-3) its passes are collective: every process must
make as many of them, and those that read the same batch the same rows. Two processes never measure the same times nor
draw the same numbers, so nothing of that may choose what a pass holds; what must be chosen, the first process chooses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed

_OWN_BATCH = ("dp", "data", "rep", "ep")
"""In the names of those dimensions of a device mesh along which every process reads a batch of its own (fsdp,
dp_replicate, ...); along the others (tp, pp, ...) all read the same one."""


def processes() -> int:
    """How many processes work together; 1 without ``torch.distributed``."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


class Ranks:
    """The processes that share a model with this one; in an ordinary process nothing is asked and nothing changes.

    Args:
        model: a loaded model. device: where its passes begin.
        synced: True: the processes write answers of their own, and each makes passes until all have finished. None: if
            the weights are gathered for every pass (FSDP, ZeRO-3), as in the host's ``synced_gpus``.

    Attributes:
        shared: True: a pass of the model is collective, so nothing may be chosen by time.
        synced: True: passes are made until every process has finished.
    """

    def __init__(self, model: Any, device: torch.device, synced: bool | None = None):
        many = processes() > 1
        gathered = many and _gathered(model)
        meshes = list(_meshes(model)) if many else []
        self.shared = gathered or bool(meshes)
        self.synced = many and (gathered if synced is None else bool(synced))
        self._device = device
        self._groups = list(_same_batch(meshes, gathered))

    def agreed(self, number: int) -> int:
        """``number`` of the first of those processes that read the same batch."""
        if not self._groups:
            return number
        word = torch.tensor(number, dtype=torch.int64, device=self._device)  # ()
        for group in self._groups:
            distributed.broadcast(word, src=distributed.get_global_rank(group, 0), group=group)
        return int(word)

    def others_go_on(self, going_on: bool) -> bool:
        """True: some process (this one too) needs another pass. Every process asks before each of its passes."""
        if not self.synced:
            return going_on
        flag = torch.tensor(float(going_on), device=self._device)  # ()
        distributed.all_reduce(flag)
        return bool(flag > 0)


def _gathered(model: Any) -> bool:
    """True: every pass gathers the weights from all processes, each of which reads a batch of its own."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules()):
        return True
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())  # DeepSpeed's ZeRO-3


def _meshes(model: Any) -> Iterator[Any]:
    """The device meshes of more than one process over which the model is spread."""
    from torch.distributed.tensor import DTensor

    own = [getattr(model, "_device_mesh", None)]  # of transformers, which may hold plain shards
    own += [weight.device_mesh for weight in (*model.parameters(), *model.buffers()) if isinstance(weight, DTensor)]
    seen: set[int] = set()
    for mesh in own:
        if mesh is not None and id(mesh) not in seen and mesh.size() > 1:
            seen.add(id(mesh))
            yield mesh


def _same_batch(meshes: list[Any], gathered: bool) -> Iterator[Any]:
    """Process groups along the dimensions of the meshes in which all read the same batch, each once."""
    seen: set[tuple[int, ...]] = set()
    for mesh in meshes:
        # A mesh without names: of FSDP if the weights are gathered, else of tensor parallelism.
        names = mesh.mesh_dim_names or (("fsdp",) if gathered else ("tp",)) * mesh.ndim
        for number, name in enumerate(names):
            if any(word in name.lower() for word in _OWN_BATCH):
                continue
            group = mesh.get_group(number)
            members = tuple(distributed.get_process_group_ranks(group))
            if len(members) > 1 and members not in seen:
                seen.add(members)
                yield group
