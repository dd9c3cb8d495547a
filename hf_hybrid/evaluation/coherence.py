"""Coherence: how surprising an answer is to the same weights in autoregressive mode, at the seams and elsewhere.

A part that is written without having read its neighbours may begin in a way that plain decoding would not. So the
negative log-likelihood of the finished text, read from left to right, is split: the first tokens behind every heading
(seams) and the rest (middles). Only the difference to the same numbers of an autoregressive answer says anything.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_hybrid.core.precision import double_device

SEAM = 8
"""Tokens behind a heading that count as seam."""


@dataclass(frozen=True)
class Coherence:
    """Sums of the negative log-likelihood in nats, and the numbers of their tokens."""

    seam_nll: float
    seam_tokens: int
    middle_nll: float
    middle_tokens: int


def seams(text: Sequence[int], labels: Collection[tuple[int, ...]]) -> list[bool]:
    """True: the token of ``text`` is one of the first ``SEAM`` behind one of ``labels``."""
    marked = [False] * len(text)
    for label in labels:
        for end in range(len(label), len(text) + 1):
            if tuple(text[end - len(label) : end]) == label:
                marked[end : end + SEAM] = [True] * len(marked[end : end + SEAM])
    return marked


@torch.no_grad()
def coherence(model: Any, prompt: Sequence[int], text: Sequence[int], labels: Collection[tuple[int, ...]]) -> Coherence:
    """Score an answer behind its prompt in one plain causal pass.

    Args:
        model: a causal model. prompt, text: token ids; the prompt has at least one. labels: token ids of the headings
            that may begin a part.
    """
    if not text:
        return Coherence(0.0, 0, 0.0, 0)
    ids = torch.tensor([[*prompt, *text]], device=model.device)  # (1, prompt + text)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]  # (text, vocab)
    made = double_device(logits.device)
    written = ids[0, len(prompt) :].to(made)  # (text,)
    nll = torch.nn.functional.cross_entropy(logits.to(made).double(), written, reduction="none").tolist()
    marked = seams(text, labels)
    at_seams = [value for value, seam in zip(nll, marked, strict=True) if seam]
    between = [value for value, seam in zip(nll, marked, strict=True) if not seam]
    return Coherence(sum(at_seams), len(at_seams), sum(between), len(between))
