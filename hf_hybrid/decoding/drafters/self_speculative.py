"""SelfDrafter: the noisy window behind the clean rows drafts, and the clean rows of the next pass check it.

Source: the verified spans of ``planned_diffusion``, on one lane; Gat et al., "Set Block Decoding is a Language Model
Inference Accelerator", 2025, for the same weights in both roles. A round takes one pass, and there is no second model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_hybrid.core.tokens import NoiseTokens
from hf_hybrid.decoding.drafters.drafter import Draft, Drafter, Sampler, Text
from hf_hybrid.decoding.drafters.suffix import SuffixDrafter

_SURE = 0.8
_KEPT = 0.9  # weight of the past in the running mean


class SelfDrafter(Drafter):
    """Hands on what the model's own window proposed in the last pass. Where it proposed nothing (it expected another
    first token than the clean row wrote, or a draft before it was rejected) the text is copied, as ``SuffixDrafter``
    does.

    Args:
        noise: of the model; no plain answer holds what it bans. window: open positions behind the last clean row.

    Attributes:
        written: running mean of tokens per pass.
    """

    name = "self"

    def __init__(self, noise: NoiseTokens, window: int):
        self.window, self._banned = window, frozenset(noise.banned)
        self._offered: dict[int, list[int]] = {}
        self._copies = SuffixDrafter(recycle=False)
        self.written = window / 2  # optimistic at first

    def offer(self, index: int, tokens: Sequence[int]) -> None:
        """The window behind text ``index`` proposed ``tokens``."""
        stop = next((i for i, token in enumerate(tokens) if token in self._banned), len(tokens))
        self._offered[index] = list(tokens[:stop])

    def prepare(self, model: Any, vocab_size: int, batch_size: int) -> None:
        """Nothing was offered yet."""
        self._offered.clear()
        self._copies.prepare(model, vocab_size, batch_size)

    def begin(self, text: Text) -> None:
        """One more text to copy from."""
        self._copies.begin(text)

    def propose(self, texts: Sequence[Text], length: int, sampler: Sampler) -> list[Draft]:
        """What was offered since the last pass, else a copy that is almost sure: one that is rejected takes the window
        behind it along."""
        copies = self._copies.propose(texts, min(length, self.window), sampler)
        offers = [self._offered.pop(text.index, []) for text in texts]
        sure = [copy if copy.chance >= _SURE else Draft(()) for copy in copies]
        return [
            Draft(offer[:length], bucket="window", chance=0.9) if offer else copy
            for offer, copy in zip(offers, sure, strict=True)
        ]

    def learn(self, text: Text, draft: Draft, accepted: int, chosen: Sequence[int]) -> None:
        """Tokens per pass, and where a copy would go on."""
        self.written = _KEPT * self.written + (1 - _KEPT) * (1 + accepted)
        self._copies.learn(text, draft, accepted, chosen)

    def end(self, text: Text) -> None:
        """The text is finished."""
        self._offered.pop(text.index, None)
        self._copies.end(text)
