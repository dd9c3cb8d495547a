"""ModelDrafter: a smaller causal model writes the draft, token by token, in passes of its own.

Source: Leviathan et al., 2023; Chen et al., 2023. A bare loop over a Runner: no ``generate()`` inside ``generate()``,
and every batch row keeps its own cache, which drops what was rejected.

The drafting model is itself sped up by drafts, which are looked up in the text and cost nothing: where the last tokens
stood before, what followed them rides in its next pass, and its own choices say how much of that stands (Chen et al.,
"Cascade Speculative Drafting for Even Faster LLM Inference", 2024). What it drafts is the same, in fewer passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from hf_hybrid.core.rows import PADDING, Rows
from hf_hybrid.decoding.drafters.drafter import Draft, Drafter, DrafterError, Sampler, Text
from hf_hybrid.decoding.drafters.lookup import Followers
from hf_hybrid.decoding.drafters.partner import BatchRows, check_family, positions_of
from hf_hybrid.models.vocabulary import readable

_LUCK = 0.5
"""Looked up tokens that must stand per pass on average: so many pay for the rows of them all."""
_AGAIN = 16  # passes until it is tried again, when fewer stand


_Drafts = dict[Text, tuple[list[int], list[Tensor]]]  # tokens, and what each was drawn from


class ModelDrafter(Drafter):
    """Drafts with a causal language model that has the tokenizer of the model it drafts for.

    Args:
        model: a loaded model that the Runner serves, in eval mode.
        tokenizer, target_tokenizer: of the two models; compared when both are given. Without them, the sizes of the
            vocabularies (which may be padded differently) and the end tokens are.
        least_chance: a draft ends before a token that is less likely than this, 0 to 1.
        lookup: up to so many tokens that stood behind the same words before are checked in a pass of the drafting
            model, when it drafts for one text alone; 0: none.

    Raises:
        DrafterError: another tokenizer.
        ValueError: ``least_chance`` or ``lookup`` out of range.
    """

    costly = True
    name = "model"

    def __init__(
        self,
        model: Any,
        *,
        tokenizer: Any = None,
        target_tokenizer: Any = None,
        least_chance: float = 0.3,
        lookup: int = 12,
    ):
        if not 0 <= least_chance <= 1:
            raise ValueError(f"least_chance={least_chance!r} is out of range: 0 to 1")
        if not 0 <= lookup <= 64:
            raise ValueError(f"lookup={lookup!r} is out of range: 0 to 64")
        self.model, self.least_chance, self.lookup = model, least_chance, lookup
        self._luck, self._turn = 1.0, 0  # looked up tokens that stood per pass; passes without any
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
        self._followers: dict[Text, Followers] = {}

    def prepare(self, model: Any, vocab_size: int, batch_size: int) -> None:
        """Compare the models, and make a Runner for the call."""
        if not self._compared:
            check_family(self.model, model, vocab_size)
        self._known = readable(self.model)
        self._held = positions_of(self.model)
        self._rows = BatchRows(self.model, batch_size)
        self._fed, self._settled, self._followers = {}, {}, {}

    def begin(self, text: Text) -> None:
        """A batch row for ``text``."""
        assert self._rows is not None
        self._rows.enter(text)
        self._fed[text], self._settled[text], self._followers[text] = [], 0, Followers()

    def end(self, text: Text) -> None:
        """Its batch row is free."""
        if text not in self._fed:
            return
        assert self._rows is not None
        del self._fed[text], self._settled[text], self._followers[text]
        self._rows.leave(text)

    def propose(self, texts: Sequence[Text], length: int, sampler: Sampler) -> list[Draft]:
        """Up to ``length`` tokens for each text, in as many passes or fewer."""
        lengths = [max(0, min(length, text.room, self._held - len(text.tokens))) for text in texts]
        drafts: _Drafts = {text: ([], []) for text in texts}
        rows = {text: self._pending(text) for text, most in zip(texts, lengths, strict=True) if most}
        # A token that the drafting model does not know ends its drafts.
        rows = {text: tokens for text, tokens in rows.items() if all(token < self._known for token in tokens)}
        going = {text: most for text, most in zip(texts, lengths, strict=True) if text in rows}
        ahead = 0
        while rows:
            guess = self._guess(rows, drafts, going, ahead)
            logits = self._pass(rows, guess)  # (texts, 1 + guess, vocab)
            following: dict[Text, list[int]] = {}
            stood = 0
            for stood in range(len(guess) + 1):
                following = self._drawn(logits[:, stood], list(rows), drafts, going, ahead, sampler)
                ahead += 1
                if list(following.values()) != [guess[stood : stood + 1]]:
                    break
            if guess:
                self._luck += 0.1 * (stood - self._luck)
                for text in following:  # the one that the guess was for
                    self._forget(text, len(self._fed[text]) - len(guess) + stood)
            rows = following
        return [Draft(tokens, torch.stack(law) if law else None, chance=0.7) for tokens, law in drafts.values()]

    def _guess(self, rows: dict[Text, list[int]], drafts: _Drafts, going: dict[Text, int], ahead: int) -> list[int]:
        """What may follow the only text that is drafted for."""
        if len(rows) != 1 or not self.lookup:
            return []
        (text,) = rows
        followers = self._followers[text]
        if ahead == 0:
            followers.read(text.tokens)
        if self._luck < _LUCK:
            self._turn += 1
            if self._turn % _AGAIN:
                return []
        guess = followers.after(drafts[text][0], min(self.lookup, going[text] - ahead - 1))
        return list(takewhile(lambda token: token < self._known, guess))

    def _drawn(
        self,
        logits: Tensor,
        texts: list[Text],
        drafts: _Drafts,
        going: dict[Text, int],
        ahead: int,
        sampler: Sampler,
    ) -> dict[Text, list[int]]:
        """Draw a token for each of ``texts`` from ``logits`` ``(texts, vocab)``; what goes on, and with which token."""
        tokens, sure, probabilities = sampler.draw(logits, texts, ahead)
        following: dict[Text, list[int]] = {}
        for i, (text, chance) in enumerate(zip(texts, sure.tolist(), strict=True)):
            # Decided before the draw is looked at, so that rejection stays exact.
            if chance < self.least_chance:
                continue
            drafts[text][0].append(tokens[i])
            if probabilities is not None:
                drafts[text][1].append(probabilities[i])
            if ahead + 1 < going[text] and tokens[i] < self._known:
                following[text] = [tokens[i]]
        return following

    def _pending(self, text: Text) -> list[int]:
        """Forget what was fed of rejected drafts; the tokens that are to be fed."""
        fed, tokens = self._fed[text], text.tokens
        same, most = self._settled[text], min(len(fed), len(tokens) - 1)
        while same < most and fed[same] == tokens[same]:
            same += 1
        same = min(same, most)
        self._settled[text] = len(tokens)
        self._forget(text, same)
        return tokens[same:]

    def _forget(self, text: Text, length: int) -> None:
        """Of what was fed, only the first ``length`` tokens stay."""
        assert self._rows is not None
        if length < len(self._fed[text]):
            self._rows.runner.rewind(self._rows.line[text], length)
            del self._fed[text][length:]

    def _pass(self, rows: dict[Text, list[int]], guess: list[int]) -> Tensor:
        """Feed tokens to some texts, and ``guess`` behind those of the only one: logits ``(texts, 1 + guess, vocab)``
        behind the last token of each, and behind those of the guess."""
        assert self._rows is not None
        runner, lines = self._rows.runner, self._rows.line
        first = min(lines[text] for text in rows)
        active = runner.active - first
        rows = {text: tokens + guess for text, tokens in rows.items()}
        width = max(map(len, rows.values()))
        # Lists, and one tensor of them all: a draft is many small passes, and each operation of torch counts.
        nothing = ([0] * width, [0] * width, [PADDING] * width)
        filled = [nothing] * active  # ids, positions and spans of each line
        for text, tokens in rows.items():
            begin, missing = len(self._fed[text]), width - len(tokens)
            places = [0] * missing + list(range(begin, begin + len(tokens)))
            filled[lines[text] - first] = ([0] * missing + tokens, places, [PADDING] * missing + [0] * len(tokens))
            self._fed[text] += tokens
        ids, position, span = torch.tensor(filled).unbind(1)  # each (active, width)
        plain = len(rows) == active and all(len(tokens) == width for tokens in rows.values())
        logits = runner.run(ids, Rows.clean(position, span), 1 + len(guess), plain=plain, first=first).logits
        runner.commit()
        asked = [lines[text] - first for text in rows]
        return logits if asked == list(range(active)) else logits[asked]
