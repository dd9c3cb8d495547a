"""A start from which small models learn to copy in minutes instead of hours.

Answers that are read off a prompt need induction heads (Olsson et al., "In-context Learning and Induction Heads",
2022), and a small model spends most of a short run finding them. Here the first two layers of a Llama-shaped model
begin with them. The residual stream is split in two halves, one for the token itself and one for ``slots``: the
tokens 1 to 4 positions back.

* Layer 0, head h attends to the token h + 1 positions back, by the phase of the fast rotary dimensions (Su et al.,
  "RoFormer", 2021), reads a projection ``R`` of it and writes that into slot h.
* Layer 1 matches contents in the slow rotary dimensions, which hardly turn over a few hundred tokens, and adds the
  token that it finds to the stream: head 0 looks for a key whose previous token is the current one, head 1 for one
  whose previous two are the current and the previous one, heads 2 and 3 for one with the same token four or three
  positions back, which is what a masked position can use.

Everything stays trainable; only the start is set.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

CONSTANT = 4.0
"""Value of embedding dimension 0, in units of the embedding's standard deviation: what positional heads query with."""


@torch.no_grad()
def start_with_copy_heads(model: PreTrainedModel, seed: int = 0, sharpness: float = 12.0) -> PreTrainedModel:
    """Set the embedding and the first two attention layers of a Llama-shaped model, in place.

    Args:
        model: a model with ``model.model.layers[i].self_attn.{q,k,v,o}_proj`` without biases, 4 ungrouped heads or more
            of at least 64 dimensions, hidden size of at least four head sizes (Llama, or Qwen3 without its query and
            key norms).
        seed: of the random projections.
        sharpness: logit between the wanted position or content and a wrong one.

    Raises:
        ValueError: the model has another shape.
    """
    dim, head_dim = _shape(model)
    config = model.config
    width = head_dim // 2  # dimensions of a slot
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(dim - 1, dim - 1, generator=generator))[0].T
    basis = torch.cat([torch.zeros(dim - 1, 1), basis], dim=1)  # orthonormal, without the constant: (dim - 1, dim)
    slots = basis[: 4 * width].view(4, width, dim)
    content = basis[4 * width :]  # the half of the token itself, (dim - 1 - 4 * width, dim)
    read = content[:width]  # R

    embedding: Any = model.get_input_embeddings().weight  # (vocab, dim)
    std = float(embedding.std())
    # All embeddings have the same norm: a larger one would make a stronger key than its position deserves.
    directions = torch.nn.functional.normalize(embedding @ content.T @ content, dim=1)  # (vocab, dim)
    embedding.copy_(directions * std * math.sqrt(len(content)))
    embedding[:, 0] = CONSTANT * std
    rms = math.sqrt((CONSTANT**2 + len(content)) / dim)  # of the embedding, in units of std
    for layer in model.model.layers:  # a quiet start, so that the heads below hear one another
        layer.self_attn.o_proj.weight.mul_(0.3)
        layer.mlp.down_proj.weight.mul_(0.3)

    rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
    frequency = rope["rope_theta"] ** (-torch.arange(width) / width)  # (width,) radians per position
    positional = model.model.layers[0].self_attn
    matching = model.model.layers[1].self_attn
    for h in range(4):
        block = slice(h * head_dim, (h + 1) * head_dim)
        query, key = _look_back(h + 1, frequency, dim, sharpness, CONSTANT / rms)
        positional.q_proj.weight[block], positional.k_proj.weight[block] = query, key
        positional.v_proj.weight[block] = torch.cat([read, torch.zeros(head_dim - width, dim)])
        positional.o_proj.weight[:, block] = 0.0
        positional.o_proj.weight[:, block.start : block.start + width] = std * rms * slots[h].T

        query, key = _match(h, read, slots, head_dim, sharpness)
        matching.q_proj.weight[block], matching.k_proj.weight[block] = query, key
        value = torch.linalg.qr(torch.randn(len(content), head_dim, generator=generator))[0].T @ content
        matching.v_proj.weight[block] = value
        matching.o_proj.weight[:, block] = std * value.T
    return model


def _shape(model: PreTrainedModel) -> tuple[int, int]:
    """Hidden size and head size, or ``ValueError`` when the heads below do not fit into the model."""
    config = model.config
    dim, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or dim // heads
    fits = heads >= 4 and head_dim >= 64 and dim >= 4 * head_dim and config.num_hidden_layers >= 2
    if not fits or getattr(config, "num_key_value_heads", heads) != heads:
        raise ValueError(
            "copy heads need 2 layers, 4 ungrouped heads of 64 dimensions and a hidden size of 4 heads or more"
        )
    attention = getattr(next(iter(getattr(model.base_model, "layers", ())), None), "self_attn", None)
    projections = [getattr(attention, f"{name}_proj", None) for name in "qkvo"]
    if any(p is None or p.bias is not None for p in projections) or hasattr(attention, "q_norm"):
        raise ValueError(
            f"copy heads need q, k, v and o without biases and norms, and {type(model).__name__} has others; "
            "use a Llama, or leave copy heads out"
        )
    return dim, head_dim


def _look_back(distance: int, frequency: Tensor, dim: int, sharpness: float, constant: float) -> tuple[Tensor, Tensor]:
    """Query and key weights ``(head_dim, dim)`` whose score is largest ``distance`` positions back.

    With the query rotated back by ``distance`` positions, the score at distance d is the sum of cos(f (d - distance))
    over the pairs. Only fast pairs are used: slow ones add a large constant that differs with the key's norm and hides
    the peak.
    """
    width = len(frequency)
    fast = frequency > 0.1
    query, key = torch.zeros(2 * width, dim), torch.zeros(2 * width, dim)
    contrast = float((1 - torch.cos(frequency[fast])).sum())  # between the position and its neighbour
    gain = math.sqrt(sharpness * math.sqrt(2 * width) / contrast) / constant
    angle = -distance * frequency
    query[:width, 0] = gain * torch.cos(angle) * fast
    query[width:, 0] = gain * torch.sin(angle) * fast
    key[:width, 0] = gain * fast
    return query, key


def _match(head: int, read: Tensor, slots: Tensor, head_dim: int, sharpness: float) -> tuple[Tensor, Tensor]:
    """Query and key weights ``(head_dim, dim)`` of a content match; the slow rotary pairs carry it."""
    width, dim = read.shape
    slow = torch.arange(width // 2, width)
    dims = torch.cat([slow, slow + width])  # (width,) dimensions of the head
    query, key = torch.zeros(head_dim, dim), torch.zeros(head_dim, dim)
    if head == 0:
        query[dims], key[dims] = read, slots[0]
    elif head == 1:
        part = width // 2
        query[dims] = torch.cat([read[:part], slots[0][:part]])
        key[dims] = torch.cat([slots[0][:part], slots[1][:part]])
    else:
        slot = slots[{2: 3, 3: 2}[head]]
        query[dims], key[dims] = slot, slot
    scale = math.sqrt(sharpness * math.sqrt(head_dim) / width)  # components have about unit size behind the norm
    return scale * query, scale * key
