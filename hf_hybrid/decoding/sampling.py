"""How drafters draw: with the warpers and, by default, with the very noise that the check will draw with."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from hf_hybrid.core.acceptance import keyed_noise
from hf_hybrid.decoding.drafters.drafter import DrafterError, Text
from hf_hybrid.decoding.processors import Processors

DRAW = 0xD4AF7
"""Turns a seed into that of a stream of noise of its own, for drafts that are accepted by rejection."""


class DraftSampler:
    """The ``Sampler`` of a call.

    Args:
        processors: the call's; those that need no prefix act on drafts too. vocab_size: width of the model's logits.
        device: of the model. sampling: False: greedy. rejection: True: drafts need noise of their own, and their
            probabilities.
    """

    def __init__(
        self, processors: Processors, vocab_size: int, device: torch.device, *, sampling: bool, rejection: bool
    ):
        self._processors, self._vocab_size, self._device = processors, vocab_size, device
        self._sampling, self._rejection = sampling, rejection
        self.places = 0  # of the last draft that were drawn, those that were not sure enough included

    def draw(self, logits: Tensor, texts: Sequence[Text], ahead: int) -> tuple[list[int], Tensor, Tensor | None]:
        """See ``Sampler.draw``."""
        self.places = max(self.places, ahead + 1)
        scores = self._scores(logits)  # (texts, vocab)
        best, chosen = scores.max(dim=-1)  # (texts,)
        if not all(map(isfinite, best.tolist())):  # the largest of a row with a NaN is NaN
            raise DrafterError("the drafter gave NaN or infinite logits; check its weights and its dtype")
        noise = self._noise(texts, ahead) if self._sampling else None
        if self._rejection:
            probabilities = scores.softmax(dim=-1)
            assert noise is not None
            return (scores + noise).argmax(dim=-1).tolist(), probabilities.amax(dim=-1), probabilities
        sure = torch.exp(best - scores.logsumexp(dim=-1))
        if noise is not None:
            chosen = (scores + noise).argmax(dim=-1)
        return chosen.tolist(), sure, None

    def rank(
        self, logits: Tensor, texts: Sequence[Text], ahead: int, count: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """See ``Sampler.rank``."""
        scores = self._scores(logits)  # (texts, vocab)
        noisy = scores + self._noise(texts, ahead) if self._sampling else scores
        best = noisy.topk(min(count, noisy.shape[-1]), dim=-1).indices  # (texts, count)
        chances = scores.softmax(dim=-1).gather(-1, best)  # (texts, count)
        return best.tolist(), chances.tolist()

    def _scores(self, logits: Tensor) -> Tensor:
        """As the check has them, but for processors that need a prefix: ``(texts, vocab)``."""
        scores = self._fitted(logits)
        return scores if self._processors.trivial else self._processors.batched(scores)

    def _fitted(self, logits: Tensor) -> Tensor:
        """The drafter's logits ``(texts, any)`` as wide as the model's: padding of a vocabulary is no token."""
        logits = logits.to(self._device, torch.promote_types(logits.dtype, torch.float32))  # as the check has them
        missing = self._vocab_size - logits.shape[-1]
        if missing > 0:
            logits = torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))
        return logits[:, : self._vocab_size]

    def _noise(self, texts: Sequence[Text], ahead: int) -> Tensor:
        """Gumbel noise ``(texts, vocab)`` of the positions that are drawn."""
        salt = DRAW if self._rejection else 0
        places = [len(text.tokens) + ahead for text in texts]
        return keyed_noise([text.seed ^ salt for text in texts], places, self._vocab_size, self._device)
