"""Call and Context: what a call of ``generate()`` brings, and what writers work with while it is carried out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hf_hybrid.config import Settings
from hf_hybrid.core.plan import Plan
from hf_hybrid.core.tokens import ControlTokens
from hf_hybrid.decoding.processors import Processors
from hf_hybrid.decoding.transcript import Transcript
from hf_hybrid.models.host import RopeSwitch
from hf_hybrid.models.runner import Runner


@dataclass(frozen=True)
class Queue:
    """The prompts of ``generate_many``.

    Attributes:
        first: the number of each prompt of the batch that the host holds. more: number and ids of those that take the
        sequences which become free. max_length, min_length: tokens of a prompt and its answer together, None: the
        call counts new tokens, so that the prompt does not matter.
    """

    first: Sequence[int]
    more: Iterator[tuple[int, Sequence[int]]]
    max_length: int | None = None
    min_length: int | None = None


@dataclass(frozen=True)
class Call:
    """What the host drops on the way to a decoding callable, bound before.

    Attributes:
        strategy: a key of ``SETTINGS``. settings: its settings. streamer, tokenizer: the caller's, or None.
        plan: plans to carry out, one per round, instead of writing them. control: ids of mask and tags, None when the
        strategy needs none or the model has none. queue: of a stream of prompts, or None.
        drafter: a ``Drafter`` or a model for ``speculative``, None: the one that the settings name. cache: the
        caller's, to be filled, or None. synced_gpus: as in the host's ``generate()``. runner: the class of Runner to
        take, None: the one that serves the model.
    """

    strategy: str
    settings: Settings
    streamer: Any = None
    tokenizer: Any = None
    plan: Plan | Sequence[Plan] | None = None
    control: ControlTokens | None = None
    queue: Queue | None = None
    drafter: Any = None
    cache: Any = None
    synced_gpus: bool | None = None
    runner: type[Runner] | None = None


@dataclass(frozen=True)
class Context:
    """What the writers of one call work with.

    Attributes:
        runner: runs the passes. call: settings and partners. processors: the host's logits processors. sampling:
        False: greedy.
        ends: ids that end an answer. min_new_tokens: tokens before ``ends`` are allowed. vocab_size: width of the
        logits. transcript: keeps what the model said of every token, None: nobody asked.
        switch: where the model changes its rotary factors, None: nowhere.
    """

    runner: Runner
    call: Call
    processors: Processors
    sampling: bool
    ends: frozenset[int]
    min_new_tokens: int
    vocab_size: int
    transcript: Transcript | None = None
    switch: RopeSwitch | None = None

    @property
    def mask(self) -> int:
        """Id at open positions; 0 for a model without one, which then has no open positions."""
        control = self.call.control
        return control.noise.mask if control is not None else 0
