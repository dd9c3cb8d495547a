"""ModelDrafter: a smaller causal model writes the draft, token by token, in passes of its own.

Source: Leviathan et al., 2023; Chen et al., 2023. A bare loop over a Runner: no ``generate()`` inside ``generate()``,
and every batch row keeps its own cache, which drops what was rejected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_hybrid.core.rows import PADDING, Rows
from hf_hybrid.decoding.drafters.drafter import Draft, Drafter, DrafterError, Sampler, Text
from hf_hybrid.decoding.drafters.partner import BatchRows, check_family, positions_of
from hf_hybrid.models.runner import Runner
from hf_hybrid.models.vocabulary import width_of


class ModelDrafter(Drafter):
    """Drafts with a causal language model that has the tokenizer of the model it drafts for.

    Args:
        model: a loaded model that the Runner serves, in eval mode.
        tokenizer, target_tokenizer: of the two models; compared when both are given. Without them, the sizes of the
            vocabularies (which may be padded differently) and the end tokens are.
        least_chance: a draft ends before a token that is less likely than this, 0 to 1.

    Raises:
        DrafterError: another tokenizer.
        ValueError: ``least_chance`` out of range.
    """

    costly = True
    name = "model"

    def __init__(self, model: Any, *, tokenizer: Any = None, target_tokenizer: Any = None, least_chance: float = 0.3):
        if not 0 <= least_chance <= 1:
            raise ValueError(f"least_chance={least_chance!r} is out of range: 0 to 1")
        self.model, self.least_chance = model, least_chance
        self._compared = False  # True: the tokenizers are known to be the same
        if tokenizer is not None and target_tokenizer is not None:
            self._compared = tokenizer.get_vocab() == target_tokenizer.get_vocab()
        if tokenizer is not None and target_tokenizer is not None and not self._compared:
            raise DrafterError(
                "the drafter has another tokenizer than the model; take one of the same family, or drafter='suffix'"
            )
        self._rows: BatchRows | None = None
        self._fed: dict[Text, list[int]] = {}  # tokens whose keys are in the cache
        self._settled: dict[Text, int] = {}  # how many of them were no draft

    def prepare(self, model: Any, vocab_size: int, batch_size: int) -> None:
        """Compare the models, and make a Runner for the call."""
        if not self._compared:
            check_family(self.model, model, vocab_size)
        self._known = min(width_of(self.model), vocab_size)
        self._held = positions_of(self.model)
        self._rows = BatchRows(Runner(self.model, batch_size))
        self._fed, self._settled = {}, {}

    def begin(self, text: Text) -> None:
        """A batch row for ``text``."""
        assert self._rows is not None
        self._rows.enter(text)
        self._fed[text], self._settled[text] = [], 0

    def end(self, text: Text) -> None:
        """Its batch row is free; with the last one the cache goes."""
        if text not in self._fed or self._rows is None:
            return
        del self._fed[text], self._settled[text]
        self._rows.leave(text)
        if not self._fed:
            self._rows = None

    def propose(self, texts: Sequence[Text], length: int, sampler: Sampler) -> list[Draft]:
        """Up to ``length`` tokens for each text, in as many passes."""
        lengths = [max(0, min(length, text.room, self._held - len(text.tokens))) for text in texts]
        drafts: dict[Text, tuple[list[int], list[Tensor]]] = {text: ([], []) for text in texts}
        going = {text: most for text, most in zip(texts, lengths, strict=True) if most and self._feedable(text)}
        rows = {text: self._pending(text) for text in going}
        for ahead in range(length):
            if not rows:
                break
            logits = self._pass(rows)  # (texts, vocab)
            tokens, sure, probabilities = sampler.draw(logits, list(rows), ahead)
            following: dict[Text, list[int]] = {}
            for i, (text, chance) in enumerate(zip(rows, sure.tolist(), strict=True)):
                # Decided before the draw is looked at, so that rejection stays exact.
                if chance < self.least_chance:
                    continue
                drafts[text][0].append(tokens[i])
                if probabilities is not None:
                    drafts[text][1].append(probabilities[i])
                if ahead + 1 < going[text] and tokens[i] < self._known:
                    following[text] = [tokens[i]]
            rows = following
        return [Draft(tokens, torch.stack(law) if law else None, chance=0.7) for tokens, law in drafts.values()]

    def _feedable(self, text: Text) -> bool:
        """True: the drafter knows every new token."""
        return all(token < self._known for token in text.tokens[len(self._fed[text]) :])

    def _pending(self, text: Text) -> list[int]:
        """Forget what was fed of rejected drafts; the tokens that are to be fed."""
        assert self._rows is not None
        fed, tokens = self._fed[text], text.tokens
        same, most = self._settled[text], min(len(fed), len(tokens) - 1)
        while same < most and fed[same] == tokens[same]:
            same += 1
        same = min(same, most)
        self._settled[text] = len(tokens)
        if same < len(fed):
            self._rows.runner.rewind(self._rows.line[text], same)
            del fed[same:]
        return tokens[same:]

    def _pass(self, rows: dict[Text, list[int]]) -> Tensor:
        """Feed tokens to some texts: logits ``(texts, vocab)`` behind the last of each."""
        assert self._rows is not None
        runner, lines = self._rows.runner, self._rows.line
        first = min(lines[text] for text in rows)
        active = runner.active - first
        width = max(map(len, rows.values()))
        ids = torch.zeros((active, width), dtype=torch.long)  # (active, width)
        position, span = torch.zeros_like(ids), torch.full_like(ids, PADDING)
        for text, tokens in rows.items():
            line, begin, count = lines[text] - first, len(self._fed[text]), len(tokens)
            ids[line, width - count :] = torch.tensor(tokens)
            position[line, width - count :] = torch.arange(begin, begin + count)
            span[line, width - count :] = 0
            self._fed[text] += tokens
        plain = bool((span == 0).all())
        logits = runner.run(ids, Rows.clean(position, span), 1, plain=plain, first=first)
        runner.commit()
        return logits[[lines[text] - first for text in rows], 0]
