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
from hf_hybrid.models.runner import Runner

MOST_PADDING = 1024
"""Vocabularies whose sizes differ by more are not taken for one tokenizer with another padding."""


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
        self._compared = tokenizer is not None and target_tokenizer is not None
        if self._compared and tokenizer.get_vocab() != target_tokenizer.get_vocab():
            raise DrafterError(
                "the drafter has another tokenizer than the model; take one of the same family, or drafter='suffix'"
            )
        self._runner: Runner | None = None
        self._lines: list[Text] = []  # batch row of the Runner -> its text
        self._line: dict[Text, int] = {}
        self._fed: dict[Text, list[int]] = {}  # tokens whose keys are in the cache
        self._settled: dict[Text, int] = {}  # how many of them were no draft

    def prepare(self, model: Any, vocab_size: int, batch_size: int) -> None:
        """Compare the models, and make a Runner for the call."""
        own = int(self.model.get_output_embeddings().weight.shape[0])
        ends = [_ids(host.generation_config.eos_token_id) for host in (model, self.model)]
        if not self._compared and (abs(own - vocab_size) > MOST_PADDING or (all(ends) and not ends[0] & ends[1])):
            raise DrafterError(
                f"the drafter ({own} tokens, ends {sorted(ends[1])}) seems to have another tokenizer than the model "
                f"({vocab_size} tokens, ends {sorted(ends[0])}); take one of the same family, or vouch for it: "
                "ModelDrafter(drafter, tokenizer=..., target_tokenizer=...)"
            )
        self._known = min(own, vocab_size)
        config = self.model.config.get_text_config(decoder=True)
        self._held = getattr(config, "max_position_embeddings", None) or 1 << 40
        self._runner = Runner(self.model, batch_size)
        self._lines, self._line, self._fed, self._settled = [], {}, {}, {}

    def begin(self, text: Text) -> None:
        """A batch row for ``text``."""
        assert self._runner is not None
        if len(self._lines) == self._runner.active:
            self._runner.enter()
        self._line[text] = len(self._lines)
        self._lines.append(text)
        self._fed[text], self._settled[text] = [], 0

    def end(self, text: Text) -> None:
        """Its batch row is free; with the last one the cache goes."""
        if text not in self._fed or self._runner is None:
            return
        line, last = self._line[text], self._lines.pop()
        if last is not text:
            self._lines[line], self._line[last] = last, line
        for notes in (self._line, self._fed, self._settled):
            del notes[text]
        self._runner.leave(line)
        if not self._lines:
            self._runner = None

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
        assert self._runner is not None
        fed, tokens = self._fed[text], text.tokens
        same, most = self._settled[text], min(len(fed), len(tokens) - 1)
        while same < most and fed[same] == tokens[same]:
            same += 1
        same = min(same, most)
        self._settled[text] = len(tokens)
        if same < len(fed):
            self._runner.rewind(self._line[text], same)
            del fed[same:]
        return tokens[same:]

    def _pass(self, rows: dict[Text, list[int]]) -> Tensor:
        """Feed tokens to some texts: logits ``(texts, vocab)`` behind the last of each."""
        assert self._runner is not None
        first = min(self._line[text] for text in rows)
        active = self._runner.active - first
        width = max(map(len, rows.values()))
        ids = torch.zeros((active, width), dtype=torch.long)  # (active, width)
        position, span = torch.zeros_like(ids), torch.full_like(ids, PADDING)
        for text, tokens in rows.items():
            line, begin, count = self._line[text] - first, len(self._fed[text]), len(tokens)
            ids[line, width - count :] = torch.tensor(tokens)
            position[line, width - count :] = torch.arange(begin, begin + count)
            span[line, width - count :] = 0
            self._fed[text] += tokens
        plain = bool((span == 0).all())
        logits = self._runner.run(ids, Rows.clean(position, span), 1, plain=plain, first=first)
        self._runner.commit()
        return logits[[self._line[text] - first for text in rows], 0]


def _ids(value: Any) -> set[int]:
    """Token ids of a config: one, several or none."""
    if value is None:
        return set()
    return {value} if isinstance(value, int) else {int(v) for v in value}
