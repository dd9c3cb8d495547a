"""The joint objective: next-token loss on clean rows, same-position loss on masked noisy rows, in one forward pass.

One pass over ``[clean rows | noisy rows]`` under the row rule gives both terms (Arriola et al., "Block Diffusion",
2025, section 3 and appendix B.6, whose clean copy is block-causal; ours is token-causal, so that the same weights also
write autoregressively). Each term is a mean over all tokens that contribute to it in the batch.

With a teacher, clean rows also learn its distribution (`hf_hybrid.training.teacher`), computed on the same rows
under the same rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_hybrid.core.rows import Rows, visible
from hf_hybrid.models.layers import WHOLE, Layers, layers_of
from hf_hybrid.training.layout import IGNORE


@dataclass(frozen=True)
class JointLoss:
    """Terms of the joint loss: scalars in nats per token, and accuracies in [0, 1].

    ``teacher_loss``: divergence of clean rows from the teacher; None: there is none.
    """

    loss: Tensor
    clean_loss: Tensor
    noisy_loss: Tensor
    clean_accuracy: Tensor
    noisy_accuracy: Tensor
    teacher_loss: Tensor | None = None


def joint_loss(
    logits: Tensor,
    target: Tensor,
    noisy: Tensor,
    noisy_weight: float = 1.0,
    weight: Tensor | None = None,
    *,
    teacher_logits: Tensor | None = None,
    teacher_share: float = 0.0,
) -> JointLoss:
    """The joint loss from the logits of all rows.

    Args:
        logits: ``(batch, rows, vocab)``. target: int64 ``(batch, rows)``, the next token for clean rows and the token
            of the position itself for noisy ones; ``IGNORE`` without a term.
        noisy: bool ``(batch, rows)``, True: a noisy row. noisy_weight: weight of the noisy term.
        weight: float ``(batch, rows)``, of the rows' terms; all means are weighted; None: all alike.
        teacher_logits: ``(batch, rows, vocab)``, of a teacher for the same rows. teacher_share: weight of the
            divergence from it in the clean rows' part of the loss, 0 to 1; their own loss has the rest.
    """
    flat = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), ignore_index=IGNORE, reduction="none")
    flat = flat.view_as(target)  # (batch, rows), 0 where ignored
    scored = target != IGNORE
    right = (logits.argmax(-1) == target) & scored
    clean, hidden = scored & ~noisy, scored & noisy
    num_clean, num_hidden = clean.sum().clamp(min=1), hidden.sum().clamp(min=1)
    weights = torch.ones_like(flat) if weight is None else weight  # (batch, rows)
    # Weight of each row in a term; 0 for a row that has none.
    clean_share, hidden_share = clean * weights, hidden * weights
    clean_loss = (flat * clean_share).sum() / clean_share.sum().clamp(min=1e-6)
    noisy_loss = (flat * hidden_share).sum() / hidden_share.sum().clamp(min=1e-6)
    learned, teacher_loss = clean_loss, None
    if teacher_logits is not None:
        apart = divergence(logits, teacher_logits)  # (batch, rows)
        teacher_loss = (apart * clean_share).sum() / clean_share.sum().clamp(min=1e-6)
        learned = (1 - teacher_share) * clean_loss + teacher_share * teacher_loss
    return JointLoss(
        learned + noisy_weight * noisy_loss,
        clean_loss,
        noisy_loss,
        (right & clean).sum() / num_clean,
        (right & hidden).sum() / num_hidden,
        teacher_loss,
    )


def divergence(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) of every row, in nats: ``(batch, rows)`` from logits ``(batch, rows, vocab)`` (Hinton et
    al., 2015, at temperature 1, where a drafter draws)."""
    own, wanted = (each.float().log_softmax(-1) for each in (logits, teacher_logits))  # (batch, rows, vocab)
    return (wanted.exp() * (wanted - own)).sum(-1)


def attention_mask(batch: dict[str, Tensor]) -> Tensor:
    """Apply the row rule to a collated batch: bool ``(batch, 1, rows, rows)``, True: the query sees the key.

    Padding rows see themselves, so that no softmax is empty; nobody sees them and they carry no loss.
    """
    rows = Rows(batch["position"], batch["span"], batch["noisy"], batch["anchor"], batch["block"])
    mask = visible(rows, rows, batch["depends"])  # (batch, rows, rows)
    own = torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
    return (mask | own).unsqueeze(1)


def attention_masks(batch: dict[str, Tensor], layers: Layers) -> Tensor | dict[str, Tensor]:
    """``attention_mask`` for a model with these ``layers``: of each kind, where its forward asks for that."""
    full, at = attention_mask(batch), batch["position"]  # (batch, 1, rows, rows), (batch, rows)
    return layers.masks(full, lambda reach: full & reach.within(at, at).unsqueeze(1))


class JointObjective(nn.Module):
    """A causal model and the joint loss as one module, so that mask, model and loss compile together.

    Args:
        model: learns. noisy_weight: see ``joint_loss``.
        teacher: a model of the same vocabulary that does not learn; stays in eval mode. teacher_share: see
            ``joint_loss``.

    Raises:
        ValueError: a model does not attend with sdpa, the one implementation that reads a boolean mask.
    """

    def __init__(
        self, model: nn.Module, noisy_weight: float = 1.0, teacher: nn.Module | None = None, teacher_share: float = 0.0
    ):
        super().__init__()
        for each in (model, teacher):
            attention = getattr(getattr(each, "config", None), "_attn_implementation", "sdpa")
            if attention != "sdpa":
                raise ValueError(f"the joint loss needs attn_implementation='sdpa', and the model uses {attention!r}")
        self.model, self.noisy_weight = model, noisy_weight
        self._layers, self._taught = _layers(model), _layers(teacher)
        self.teacher, self.teacher_share = teacher.eval() if teacher is not None else None, teacher_share

    def train(self, mode: bool = True) -> JointObjective:
        """The model's mode; the teacher is never trained."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, batch: dict[str, Tensor]) -> JointLoss:
        """``batch`` from ``HybridCollator``; each model is called once, without a cache."""
        inputs = {
            "input_ids": batch["input_ids"],
            "position_ids": batch["position"],
            "use_cache": False,
        }
        mask = attention_masks(batch, self._layers)
        taught = None
        if self.teacher is not None:
            with torch.no_grad():
                seen = mask if self._taught == self._layers else attention_masks(batch, self._taught)
                taught = self.teacher(**inputs, attention_mask=seen).logits  # (batch, rows, vocab)
        return joint_loss(
            self.model(**inputs, attention_mask=mask).logits,
            batch["target"],
            batch["noisy"],
            self.noisy_weight,
            batch.get("weight"),
            teacher_logits=taught,
            teacher_share=self.teacher_share,
        )


def _layers(model: nn.Module | None) -> Layers:
    """How far the layers of ``model`` look."""
    return layers_of(model) if hasattr(model, "config") else WHOLE
