"""Muon for the matrices, AdamW for the rest, behind one optimiser.

Muon orthogonalises the momentum of a weight matrix (Jordan et al., "Muon", 2024), here with the update scaled to
AdamW's RMS (Liu et al., "Muon is Scalable for LLM Training", 2025, section 2.2), so that one schedule serves both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import PreTrainedModel


class MuonAdamW(Optimizer):
    """Muon on 2-D weights inside the layers, AdamW on embeddings, the output head, norms and biases.

    The two inner optimisers own the parameter groups; a scheduler that sets ``group["lr"]`` here sets it there.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        matrix_lr: float,
        other_lr: float,
        weight_decay: float = 0.05,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
    ):
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        ends = [m for m in model.modules() if isinstance(m, nn.Embedding) or m is head]
        outside = {id(p) for m in ends for p in m.parameters()}
        matrices = [p for p in model.parameters() if p.requires_grad and p.ndim == 2 and id(p) not in outside]
        chosen = {id(p) for p in matrices}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
        self.muon = Muon(
            matrices, lr=matrix_lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = AdamW(others, lr=other_lr, betas=betas, weight_decay=0.0, fused=True)
        super().__init__([*matrices, *others], {})
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both; ``closure`` is not supported."""
        if closure is not None:
            raise ValueError("MuonAdamW takes no closure; call backward() before step()")
        self.muon.step()
        self.adamw.step()
        return None

    def state_dict(self) -> dict[str, Any]:
        """The states of both optimisers."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take both states back; the shared parameter groups stay shared."""
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]
