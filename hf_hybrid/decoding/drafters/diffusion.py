"""DiffusionDrafter: the noisy window of a hybrid model drafts a whole block in one pass, for another model.

Sources: Christopher et al., "Speculative Diffusion Decoding", 2024; Chen et al., "DFlash: Block Diffusion for Flash
Speculative Decoding", 2026. Ours: the drafter keeps clean keys of the settled text alone, and reads what is new in the
pass that drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_hybrid.core.rows import PADDING, Rows
from hf_hybrid.decoding.drafters.drafter import Draft, Drafter, DrafterError, Sampler, Text
from hf_hybrid.decoding.drafters.partner import TextsInRunner, check_family, positions_of
from hf_hybrid.models.vocabulary import noise_tokens, readable


class DiffusionDrafter(Drafter):
    """Drafts with the window of a hybrid model that has the tokenizer of the model it drafts for.

    The last clean row gives the first token, the window behind it the others, each on its own.

    Args:
        model: a hybrid model (with a mask token in ``config.hf_hybrid``), in eval mode.
        window: open positions, 1 to 1024.
        least_chance: a draft ends before a token that is less likely than this, 0 to 1.

    Raises:
        DrafterError: a model without a mask token.
        ValueError: ``window`` or ``least_chance`` out of range.
    """

    costly = True
    independent = True
    name = "diffusion"

    def __init__(self, model: Any, *, window: int = 8, least_chance: float = 0.45):
        if not 1 <= window <= 1024 or not 0 <= least_chance <= 1:
            raise ValueError(f"window={window!r} must be 1 to 1024, least_chance={least_chance!r} 0 to 1")
        noise = noise_tokens(model)
        if noise is None:
            raise DrafterError(
                "the drafter has no mask token; add one with hf_hybrid.prepare_vocabulary(model, tokenizer) and train "
                "it, or let it draft token by token: ModelDrafter"
            )
        self.model, self.window, self.least_chance = model, window, least_chance
        self._mask, self._tags = noise.mask, frozenset(noise.banned)
        self._rows: TextsInRunner | None = None
        self._read: dict[Text, int] = {}  # tokens whose keys are in the cache

    def prepare(self, model: Any, vocab_size: int, batch_size: int) -> None:
        """Compare the models, and make a Runner for the call."""
        check_family(self.model, model, vocab_size)
        self._known, self._held = readable(self.model), positions_of(self.model)
        self._rows, self._read = TextsInRunner(self.model, batch_size), {}
        if not self._rows.runner.abilities.noisy_rows:
            raise DrafterError("passes of this drafter read from left to right alone; use ModelDrafter")

    def begin(self, text: Text) -> None:
        """A sequence of the Runner for ``text``."""
        assert self._rows is not None
        self._rows.enter(text)
        self._read[text] = 0

    def end(self, text: Text) -> None:
        """Its sequence is free."""
        if text not in self._read:
            return
        assert self._rows is not None
        del self._read[text]
        self._rows.leave(text)

    def propose(self, texts: Sequence[Text], length: int, sampler: Sampler) -> list[Draft]:
        """A block for each text, in one pass."""
        sizes = {text: max(0, min(length, self.window + 1, text.room)) for text in texts}
        going = [text for text in texts if sizes[text] and self._fits(text, sizes[text])]
        drafts: dict[Text, tuple[list[int], list[Tensor]]] = {text: ([], []) for text in texts}
        if not going:
            return [Draft(())] * len(texts)
        logits = self._pass(going, sizes)  # (window + 1, vocab) each
        for ahead in range(max(sizes[text] for text in going)):
            going = [text for text in going if ahead < sizes[text]]
            if not going:
                break
            scores = torch.stack([logits[text][ahead] for text in going])  # (texts, vocab)
            tokens, sure, probabilities = sampler.draw(scores, going, ahead)
            # Decided before the draw is looked at, so that rejection stays exact.
            stays = [text for text, chance in zip(going, sure.tolist(), strict=True) if chance >= self.least_chance]
            for i, text in enumerate(going):
                if text in stays:
                    drafts[text][0].append(tokens[i])
                    if probabilities is not None:
                        drafts[text][1].append(probabilities[i])
            going = stays
        return [Draft(tokens, torch.stack(law) if law else None, chance=0.7) for tokens, law in drafts.values()]

    def _fits(self, text: Text, size: int) -> bool:
        """True: there are positions for the window, and every new token is known."""
        new = text.tokens[self._read[text] :]
        return len(text.tokens) + size <= self._held and all(token < self._known for token in new)

    def _pass(self, texts: Sequence[Text], sizes: dict[Text, int]) -> dict[Text, Tensor]:
        """Read what is new of each text, with a window of its size behind it: logits ``(window + 1, vocab)``, of which
        the first ``size`` are those of its draft."""
        assert self._rows is not None
        runner, lines = self._rows.runner, self._rows.line
        first = min(lines[text] for text in texts)
        active = runner.active - first
        new = {text: text.tokens[self._read[text] :] for text in texts}
        window = max(sizes[text] for text in texts) - 1
        width = max(map(len, new.values())) + window
        fields = torch.zeros((6, active, width), dtype=torch.long)
        ids, position, span, noisy, anchor, block = fields
        span.fill_(PADDING)
        ids.fill_(self._mask)
        clean = width - window  # column of the first open position
        for text, tokens in new.items():
            line, end, opens = lines[text] - first, len(text.tokens), sizes[text] - 1
            # A window of its own room: wider ones of other texts must not change what this one says.
            begin, stop = clean - len(tokens), clean + opens
            ids[line, begin:clean] = torch.tensor(tokens)
            position[line, begin:stop] = torch.arange(self._read[text], end + opens)
            span[line, begin:stop] = 0
            noisy[line, clean:stop] = 1
            anchor[line, clean:stop] = end
            block[line, clean:stop] = 1
            self._read[text] = end
        rows = Rows(position, span, noisy.bool(), anchor, block)
        logits = runner.run(ids, rows, window + 1, first=first).logits
        runner.commit()
        scored = {text: logits[lines[text] - first] for text in texts}
        tags = [tag for tag in self._tags if tag < logits.shape[-1]]
        for scores in scored.values():
            scores[1:, tags] = float("-inf")  # control tags are no text, but a window may think of them
        return scored
