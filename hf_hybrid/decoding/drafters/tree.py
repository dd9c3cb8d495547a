"""TreeDrafter: more than one guess for a position, so that a draft is seldom rejected at once.

Sources: Miao et al., "SpecInfer: Accelerating Generative Large Language Model Serving with Tree-based Speculative
Inference and Verification", 2024, for trees of drafts; Wang et al., "OPT-Tree: Speculative Decoding with Adaptive Draft
Tree Structure", 2024, for growing a tree by the chance that a node is accepted. Ours: any drafter that draws with the
``Sampler`` is widened, since the logits that it draws from pass by here; no drafter knows that it is in a tree.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_hybrid.decoding.drafters.drafter import Draft, Drafter, DrafterError, Sampler, Text
from hf_hybrid.decoding.drafters.model import ModelDrafter
from hf_hybrid.models.side_by_side import honours_branches

MOST_NODES = 256
Guesses = list[list[tuple[int, float]]]
"""For each place of a draft, tokens and how likely they are, the drafted one first."""


CHAINS = "drafts are chains: acceptance='rejection' knows the probabilities of a chain alone"
ONE_BRANCH = "drafts are chains: passes of this model read one branch alone"
"""What the report says of trees that rejection cannot check."""


class TreeDrafter(Drafter):
    """Widens another drafter. The drafter's own chain is the trunk of the tree; beside each of its tokens are the
    next best ones. Where the tokens of a drafter do not depend on one another (``drafter.independent``), the tree goes
    on behind those too; else they are leaves.

    With ``acceptance="rejection"``, and for a model that does not honour the mask of a pass, the chain is all there is;
    the report says so.

    Args:
        drafter: one that draws its tokens with the ``Sampler``: ``ModelDrafter``, ``DiffusionDrafter``, or your own;
            or a model, for which ``ModelDrafter`` is taken. Others (``SuffixDrafter``) stay chains.
        width: guesses for a place, 1 to 16; 1: the chain.
        size: most tokens of a tree, 1 to 256.

    Raises:
        ValueError: ``width`` or ``size`` out of range.
        DrafterError: a drafter that is none.
    """

    def __init__(self, drafter: Any, *, width: int = 3, size: int = 24):
        if not 1 <= width <= 16 or not 1 <= size <= MOST_NODES:
            raise ValueError(f"width={width!r} must be 1 to 16, size={size!r} 1 to {MOST_NODES}")
        drafter = ModelDrafter(drafter) if isinstance(drafter, torch.nn.Module) else drafter
        if not isinstance(drafter, Drafter):
            raise DrafterError(f"{type(drafter).__name__} is no drafter; give a hf_hybrid.Drafter or a model")
        self.drafter, self.width, self.size = drafter, width, size
        self.costly, self.independent, self.model = drafter.costly, drafter.independent, drafter.model
        self.name = f"tree of {drafter.name or type(drafter).__name__}"
        self.note = ""

    def prepare(self, model: Any, vocab_size: int, batch_size: int) -> None:
        """See whether the model honours the mask of a tree."""
        self.drafter.prepare(model, vocab_size, batch_size)
        self.note = "" if honours_branches(model) else "drafts are chains: the model does not honour the mask of a tree"

    def begin(self, text: Text) -> None:
        """As for the drafter."""
        self.drafter.begin(text)

    def learn(self, text: Text, draft: Draft, accepted: int, chosen: Sequence[int]) -> None:
        """As for the drafter; of a tree it hears the accepted branch."""
        self.drafter.learn(text, draft, accepted, chosen)

    def end(self, text: Text) -> None:
        """As for the drafter."""
        self.drafter.end(text)

    def propose(self, texts: Sequence[Text], length: int, sampler: Sampler) -> list[Draft]:
        """The drafter's chains, widened."""
        if self.width == 1 or self.note:
            return list(self.drafter.propose(texts, length, sampler))
        listening = _Listening(sampler, self.width)
        drafts = self.drafter.propose(texts, length, listening)
        if any(draft.probabilities is not None for draft in drafts):
            self.note = CHAINS
        return [
            self._widened(draft, listening.guesses.get(text, []), text.room)
            for text, draft in zip(texts, drafts, strict=True)
        ]

    def _widened(self, draft: Draft, guesses: Guesses, room: int) -> Draft:
        """The likeliest nodes, each behind the one that it goes on from. A draft that was not drawn, or was drawn from
        something and must be known to come from it, stays as it is."""
        chain = list(draft.tokens[:room])
        drawn = [place[0][0] for place in guesses[: len(chain)]]
        if not chain or draft.parents is not None or draft.probabilities is not None or drawn != chain:
            return draft
        # A place behind the chain was not sure enough to be drafted, but its guesses were made.
        guesses = guesses[: min(len(chain) + 1, room)]
        tokens: list[int] = []
        parents: list[int] = []
        ranks: list[int] = []
        # (-chance, order, token, parent, place, rank, True: on the chain)
        heap = [(-chance, r, token, -1, 0, r, r == 0) for r, (token, chance) in enumerate(guesses[0])]
        heapq.heapify(heap)
        count = len(heap)
        while heap and len(tokens) < self.size:
            reached, _, token, parent, place, rank, trunk = heapq.heappop(heap)
            node = len(tokens)
            tokens.append(token)
            parents.append(parent)
            ranks.append(rank)
            if place + 1 >= len(guesses) or not (trunk or self.independent):
                continue
            for next_rank, (next_token, share) in enumerate(guesses[place + 1]):
                behind = trunk and next_rank == 0
                heapq.heappush(heap, (reached * share, count, next_token, node, place + 1, next_rank, behind))
                count += 1
        return Draft(tokens, None, draft.bucket, draft.chance, tuple(parents), tuple(ranks))


class _Listening:
    """A ``Sampler`` that notes what else could have been drawn, in the order of the check: with the same noise."""

    def __init__(self, sampler: Sampler, width: int):
        self._sampler, self._width = sampler, width
        self.guesses: dict[Text, Guesses] = {}

    def draw(self, logits: Tensor, texts: Sequence[Text], ahead: int) -> tuple[list[int], Tensor, Tensor | None]:
        """See ``Sampler.draw``."""
        drawn = self._sampler.draw(logits, texts, ahead)
        tokens, chances = self._sampler.rank(logits, texts, ahead, self._width)
        for text, own, shares in zip(texts, tokens, chances, strict=True):
            places = self.guesses.setdefault(text, [])
            if len(places) == ahead:  # a drafter that draws a place twice knows why; the first time counts
                places.append(list(zip(own, shares, strict=True)))
        return drawn

    def rank(
        self, logits: Tensor, texts: Sequence[Text], ahead: int, count: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """See ``Sampler.rank``."""
        return self._sampler.rank(logits, texts, ahead, count)
