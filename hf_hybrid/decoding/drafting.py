"""Drafting: whether to ask the drafter, and how much of what it drafts is checked.

Both follow from the cost model and from how often drafts were accepted (`hf_hybrid.decoding.draft_length`), and change
time alone. What a draft does to a lane is `hf_hybrid.decoding.writers.speculative`.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import partial

import torch

from hf_hybrid.config import SpeculativeSettings
from hf_hybrid.decoding.branches import BranchError, as_tree, depth, pruned, standing
from hf_hybrid.decoding.call import Context
from hf_hybrid.decoding.draft_length import Acceptance, DraftLength, acceptance_of_text, experience_of
from hf_hybrid.decoding.drafters.drafter import Draft, Drafter, DrafterError, Text
from hf_hybrid.decoding.drafters.lease import Lease
from hf_hybrid.decoding.drafters.model import ModelDrafter
from hf_hybrid.decoding.drafters.self_speculative import SelfDrafter
from hf_hybrid.decoding.drafters.suffix import SuffixDrafter
from hf_hybrid.decoding.output import DecodingError
from hf_hybrid.decoding.sampling import DraftSampler
from hf_hybrid.models.cost_model import GuessedCosts, cost_model_of
from hf_hybrid.models.vocabulary import readable

NO_DRAFT = Draft(())
_ONE_BY_ONE = "this model reads one token a pass behind its prompt, so that a draft would take as long as its tokens"
_GUESS = 0.25
"""Of a drafter whose passes may not be measured: what a drafted token takes, in units of a pass of one row."""


class Drafting:
    """The drafter of a call, and what is known of its drafts.

    Args:
        context: of the call. settings: of the strategy. rejecting: True: exact rejection; the length of a draft then
            changes the text (not its law), so that time may not choose it.

    Attributes:
        drafter: asked before every pass. window: open positions that it wants behind the text; 0: none.
        timed: True: what passes and drafts take is measured; False: guessed.
        adaptive: True: lengths follow from the cost model and acceptance. probing: True: the coming pass drafts only to
            see whether it pays. broken: why drafting is switched off for the rest of the call; empty: it is not.
    """

    def __init__(self, context: Context, settings: SpeculativeSettings, rejecting: bool):
        runner = context.runner
        self.settings, self.rejecting, self.ends = settings, rejecting, context.ends
        self.width, self.readable = context.vocab_size, max(context.vocab_size, readable(runner.model))
        self.adaptive = settings.adaptive and not rejecting
        self._lease = Lease(_drafter_of(context, settings))
        self.drafter = self._lease.drafter
        self.drafter.prepare(runner.model, context.vocab_size, runner.batch_size)
        self.window = self.drafter.window if isinstance(self.drafter, SelfDrafter) else 0
        self.sampler = DraftSampler(
            context.processors, context.vocab_size, runner.device, sampling=context.sampling, rejection=rejecting
        )
        kind = runner.kind
        # Processes that share the model must choose alike, and no two measure the same.
        self.timed = not runner.ranks.shared
        self.costs = (
            cost_model_of(runner.model, runner.device, runner.dtype, kind) if self.timed else GuessedCosts(kind)
        )
        self.lengths = DraftLength(self.costs.seconds)
        self.known = experience_of(self.drafter, runner.model, (str(runner.device), runner.dtype, self.timed))
        self.own: dict[int, Acceptance] = {}  # canvas -> what was accepted of its drafts
        self._read: set[int] = set()  # canvases whose prompt the drafter has read, for a first draft
        self.draft_seconds = 0.0  # of the drafts for the coming pass
        self.probing = False
        self.broken = "" if runner.abilities.drafts else _ONE_BY_ONE

    @property
    def name(self) -> str:
        """Of the drafter, for reports and errors."""
        return self.drafter.name or type(self.drafter).__name__

    def begin(self, text: Text) -> None:
        """A text begins, of which nothing is known."""
        self.own[text.index] = acceptance_of_text(self.drafter.costly)
        self.drafter.begin(text)

    def close(self) -> None:
        """The call is over, or was broken off."""
        self._lease.end()

    def forget(self, index: int) -> None:
        """The text of that index will not be asked for again."""
        self.own.pop(index, None)
        self._read.discard(index)

    # What is drafted.

    def rest(self) -> None:
        """The coming pass has no drafts."""
        self.probing, self.draft_seconds = False, 0.0

    def ask(self, texts: Sequence[Text], rows: Sequence[int]) -> tuple[Sequence[Draft], int]:
        """A draft for every text, and how much of each is worth a check.

        Args:
            rows: clean rows of each text in the coming pass without a draft.
        """
        self.rest()
        length = min(self.settings.draft_length, max(text.room for text in texts))
        none = [NO_DRAFT] * len(texts)
        if self.broken or length == 0:
            return none, 0
        if self.adaptive and self.drafter.costly:
            guesses = [self._chances(text, Draft(range(min(length, text.room)), chance=0.7)) for text in texts]
            length, self.probing = self.lengths.choose(rows, guesses, self.known.seconds_per_token, self.known.offered)
            if length == 0:
                return none, 0
        try:
            drafts = self._made(texts, length)
        except DrafterError as error:
            self.broken = str(error)
            return none, 0
        if any(draft.parents is not None for draft in drafts) and not self.rejecting:
            return drafts, self._nodes(texts, drafts, rows)
        if self.adaptive and not self.drafter.costly:
            cut = [Draft(d.tokens[: t.room], None, d.bucket, d.chance) for d, t in zip(drafts, texts, strict=True)]
            chances = [self._chances(text, draft) for text, draft in zip(texts, cut, strict=True)]
            length, self.probing = self.lengths.choose(rows, chances)
        return drafts, length

    def _made(self, texts: Sequence[Text], length: int) -> Sequence[Draft]:
        """Ask the drafter, and note what that took."""
        started, self.sampler.places = time.perf_counter(), 0
        drafts = self.drafter.propose(texts, length, self.sampler)
        self.draft_seconds = time.perf_counter() - started
        # A place that was drawn and not drafted took its time too.
        places = max(self.sampler.places, *map(depth, drafts)) if drafts else 0
        if not self.timed:
            self.draft_seconds = _GUESS * places if self.drafter.costly else 0.0
        if len(drafts) != len(texts):
            raise DecodingError(f"{self.name}: {len(drafts)} drafts for {len(texts)} texts; give one for each")
        drafts = [self._written(draft) for draft in drafts]
        asked = {text.index for text in texts}
        if asked <= self._read:  # else a prompt was read for it
            self.known.note_made(self.draft_seconds, places, sum(bool(d.tokens) for d in drafts) / len(drafts))
        self._read |= asked
        return drafts

    def _written(self, draft: Draft) -> Draft:
        """``draft``, checked; a chain ends in front of an id that the model reads and cannot write (a placeholder of an
        image, say): a copy of a prompt may hold some, and none of them is ever accepted."""
        if any(type(token) is not int or not 0 <= token < self.readable for token in draft.tokens):
            raise DecodingError(
                f"{self.name} drafted {list(draft.tokens)}; a draft holds token ids (int) from 0 to {self.width - 1}"
            )
        stop = next((i for i, token in enumerate(draft.tokens) if token >= self.width), None)
        if stop is None or draft.parents is not None:  # a tree: ``pruned``
            return draft
        law = None if draft.probabilities is None else draft.probabilities[:stop]
        return replace(draft, tokens=list(draft.tokens[:stop]), probabilities=law)

    def _nodes(self, texts: Sequence[Text], drafts: Sequence[Draft], rows: Sequence[int]) -> int:
        """How many tokens of each tree are worth a check; those that come first are the likeliest."""
        if not self.adaptive:
            return 1 << 30
        chances: list[list[float]] = []
        for text, draft in zip(texts, drafts, strict=True):
            whole = self.pruned(as_tree(draft), 1 << 30, text.room)
            chances.append(standing(as_tree(whole), partial(self._of_bucket, text)))
        count, probing = self.lengths.choose_nodes(rows, chances)
        # Probes were allowed before the draft was made.
        count, self.probing = (1, True) if self.probing and not count else (count, self.probing or probing)
        return count

    def pruned(self, draft: Draft, count: int, room: int) -> Draft:
        """The first ``count`` tokens of a tree, at most ``room`` deep, checked."""
        try:
            return pruned(draft, count, room, self.ends, self.width)
        except BranchError as error:
            raise DecodingError(f"{self.name}: {error}") from error

    def window_pays(self, texts: int) -> bool:
        """True: the coming pass should carry windows, because what they draft pays, or to see whether it does.

        Args:
            texts: how many the pass is over.
        """
        drafter = self.drafter
        if not isinstance(drafter, SelfDrafter):
            return False
        plain = self.lengths.cost(texts)
        carried = self.lengths.cost(round(texts * (drafter.window + drafter.written)))
        pays = drafter.written * plain >= carried
        if not pays and not self.probing:
            self.probing = self.lengths.may_lose(2 * (carried - plain))  # one pass drafts, the next one checks
        return pays or self.probing

    def _of_bucket(self, text: Text, bucket: Draft, length: int) -> list[float]:
        """For so many depths, how likely a token of that bucket is accepted if those before it are."""
        return self.own[text.index].refined(
            bucket.bucket, self.known.acceptance.chances(bucket.bucket, bucket.chance, length)
        )

    def _chances(self, text: Text, draft: Draft) -> list[float]:
        """For each drafted token, how likely it is accepted if those before it are: of this text, of all, as
        claimed."""
        return self._of_bucket(text, draft, min(len(draft.tokens), self.settings.draft_length))

    # What became of it.

    def note(self, index: int, bucket: Hashable, length: int, accepted: int) -> None:
        """``accepted`` of ``length`` tokens drafted for text ``index`` were accepted."""
        for acceptance in (self.known.acceptance, self.own[index]):
            acceptance.note(bucket, length, accepted)

    def note_one(self, index: int, bucket: Hashable, depth: int, accepted: bool) -> None:
        """One token at ``depth`` of a tree for text ``index`` was checked, behind accepted ones."""
        for acceptance in (self.known.acceptance, self.own[index]):
            acceptance.note_one(bucket, depth, accepted)

    def measured(self, texts: int, rows: int, written: float, seconds: float) -> None:
        """A pass over ``texts``, of ``rows`` rows in all, took ``seconds`` and wrote ``written`` tokens per text."""
        if not self.timed:
            seconds = self.costs.seconds(rows)
        self.costs.note(rows, seconds)
        self.lengths.note(self.draft_seconds + seconds, self.probing, self.costs.seconds(texts), written)


def _drafter_of(context: Context, settings: SpeculativeSettings) -> Drafter:
    """The drafter of the call, or the one that the settings name."""
    partner, control = context.call.drafter, context.call.control
    if isinstance(partner, Drafter):
        return partner
    if isinstance(partner, torch.nn.Module):
        return ModelDrafter(partner)
    if partner is None and settings.drafter == "suffix":
        return SuffixDrafter()
    if partner is None and control is not None:
        return SelfDrafter(control.noise, settings.window_length)
    if partner is None:
        raise DecodingError(
            "drafter='self' needs a mask token, and the model has none; take drafter='suffix', or add one with "
            "hf_hybrid.prepare_vocabulary(model, tokenizer) and train it"
        )
    kind = partner.__name__ if isinstance(partner, type) else type(partner).__name__
    raise DecodingError(
        f"drafter={kind}: give 'suffix', 'self', a causal model of transformers or a "
        "hf_hybrid.Drafter" + (f"; an object, {kind}(...), not the class" if isinstance(partner, type) else "")
    )
