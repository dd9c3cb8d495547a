"""Drafter: what speculative decoding asks of whoever proposes tokens.

A drafter never changes the text, only the time it takes: the model checks every token. It sees the texts as they grow,
and is told what became of its drafts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class DrafterError(ValueError):
    """A drafter that does not go together with the model, or a draft that is none; the message says what to change."""


@dataclass(eq=False)
class Text:
    """One text that is being written, as a drafter sees it; it may be a key of a dict.

    Attributes:
        index: of the prompt in the call. tokens: prompt and settled tokens; it grows, and is not to be changed.
        prompt_length: how many of them are the prompt. room: drafted tokens that could still be used.
        seed: of the noise of sampling.
    """

    index: int
    tokens: list[int]
    prompt_length: int
    room: int = 0
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Draft:
    """Tokens to be checked behind one text.

    Attributes:
        tokens: ids; none: no idea.
        probabilities: ``(tokens, vocab)``, what each token was drawn from, given those before it; None: the tokens
            were not drawn by chance. Only ``acceptance="rejection"`` reads it.
        bucket: drafts of one bucket share an estimate of how often they are accepted. chance: how often a token of this
            bucket is accepted if those before it are, before anything is known, 0 to 1.
        parents: of a tree, for each token the index of the one that it follows (a smaller one; -1: the text). None: a
            chain.
        ranks: of a tree, for each token which guess it is for its place, 0: the first; those of one rank are expected
            to be accepted equally often.
    """

    tokens: Sequence[int]
    probabilities: Tensor | None = None
    bucket: Hashable = 0
    chance: float = 0.5
    parents: tuple[int, ...] | None = None
    ranks: tuple[int, ...] = ()


class Sampler(Protocol):
    """Draws tokens for a drafter as the model draws its own, so that drafts are accepted as often as they can."""

    def draw(self, logits: Tensor, texts: Sequence[Text], ahead: int) -> tuple[list[int], Tensor, Tensor | None]:
        """One token for each of ``texts``, ``ahead`` tokens behind what is settled.

        Args:
            logits: ``(texts, vocab)``, of the drafter, on any device; its vocabulary may be padded otherwise.

        Returns:
            the tokens; float ``(texts,)``, the largest probability of each row; and with ``acceptance="rejection"``
            the probabilities ``(texts, vocab)`` that they were drawn from, else None.

        Raises:
            DrafterError: NaN or infinite logits.
        """
        ...

    def rank(
        self, logits: Tensor, texts: Sequence[Text], ahead: int, count: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """The ``count`` best tokens for each of ``texts``, in the order in which ``draw`` would take them, and how
        likely each is, both ``(texts, count)``; the arguments are those of ``draw``."""
        ...


class Drafter(ABC):
    """Proposes tokens. Subclass it, fill ``propose`` and pass an instance: ``generate(strategy="speculative",
    drafter=...)``. An instance may serve many calls. Those at the same time, from several threads for example, each get
    a shallow copy of it, in which lists, dicts and sets are copied too (or what ``__copy__`` makes), and ``prepare``
    begins anew there: a drafter is asked by one call at a time, but what copies share, such as a memory, must bear it.

    Attributes:
        costly: True: a draft takes so long that its length is to be chosen before it is made.
        independent: True: a drafted token does not depend on those drafted before it.
        model: that drafts, if there is one: what is known of its speed and acceptance outlives the drafter.
        name: of the drafter, in reports. note: what the report should say of this call, if anything.
    """

    costly: bool = False
    independent: bool = False
    model: Any = None
    name: str = ""
    note: str = ""

    @abstractmethod
    def propose(self, texts: Sequence[Text], length: int, sampler: Sampler) -> Sequence[Draft]:
        """A draft for each of ``texts``, at most ``length`` tokens; more than ``text.room`` are cut."""

    def prepare(self, model: Any, vocab_size: int, batch_size: int) -> None:
        """A call begins: ``model`` is to be drafted for, its logits are ``vocab_size`` wide, and up to ``batch_size``
        texts grow at the same time.

        Raises:
            DrafterError: this drafter cannot draft for the model.
        """
        return

    def begin(self, text: Text) -> None:
        """``text`` will be asked for from now on; it holds its prompt."""
        return

    def learn(self, text: Text, draft: Draft, accepted: int, chosen: Sequence[int]) -> None:
        """The model checked ``draft`` (which may be empty, or cut) behind ``text``, which is about to grow.

        Args:
            accepted: how many drafted tokens were accepted.
            chosen: the model's own token behind the text and behind each drafted token, wrong ones included; it
                may end at the first wrong one.
        """
        return

    def end(self, text: Text) -> None:
        """``text`` is finished. A call that was interrupted does not say so: the next ``prepare`` begins anew."""
        return
