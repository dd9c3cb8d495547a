"""Logits processors: the plan grammar as one, and the host's list split for rows that are written in parallel."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process

from hf_hybrid.core.grammars import Grammar, PlanState
from hf_hybrid.core.plan import Plan, PlanError
from hf_hybrid.decoding.copies import name_of, own_copy
from hf_hybrid.models.host import token_ids


class ProcessorError(ValueError):
    """A logits processor that cannot do its work here; the message says what to change."""


class _Row(NamedTuple):
    """What was read of one row. ``then``: what limits its next token, the grammar, ``eos`` alone, or nothing."""

    state: PlanState
    then: Literal["grammar", "eos", "anything"]


_START = _Row(PlanState(), "grammar")


class PlanLogitsProcessor(LogitsProcessor):
    """Makes the host's own ``generate()`` write a text and a plan, or a text alone, within the grammar's caps.

    Once the plan is complete only ``eos`` is left, for the host writes no spans in parallel; ``read_plan`` reads the
    plan back. Needs nothing but the host::

        grammar = grammar_of(control_tokens(model), model.config.vocab_size)
        processor = PlanLogitsProcessor(grammar, ids.shape[1], max_new_tokens=200)
        out = model.generate(ids, max_new_tokens=200, logits_processor=LogitsProcessorList([processor]))
        plan = PlanLogitsProcessor.read_plan(out[0], grammar, ids.shape[1])

    ``ids`` end with ``grammar.switch``. Where other processors ban everything that the grammar allows
    (``min_new_tokens`` bans ``eos``), the grammar wins. A call advances the grammar over the new tokens only, whatever
    order the rows come in (beams); a prefix that it has not seen is read anew.

    Args:
        grammar: tags, width of the logits and caps.
        prompt_length: positions of the prompt, padding included; what is there is never read as a tag.
        max_rounds: 0 forbids a plan; more than one means one, the answer ends with its first plan.
        max_new_tokens: the ``max_new_tokens`` of the call: a plan is opened only if it and its parts fit, and the last
            token is an ``eos``. None: no bound, and the host may cut a plan off.

    Raises:
        ProcessorError: a negative ``prompt_length``, or a grammar without ``vocab_size``; when called, ids shorter
            than the prompt or logits of another width than the grammar's.
    """

    supports_continuous_batching = False

    def __init__(
        self,
        grammar: Grammar,
        prompt_length: int,
        *,
        max_rounds: int = 1,
        max_new_tokens: int | None = None,
    ):
        if prompt_length < 0:
            raise ProcessorError(f"prompt_length={prompt_length} must not be negative; pass input_ids.shape[1]")
        if grammar.vocab_size is None:
            raise ProcessorError("the grammar has no width; build it with vocab_size=model.config.vocab_size")
        self.grammar, self.prompt_length = grammar, prompt_length
        self.max_rounds, self.max_new_tokens = max_rounds, max_new_tokens
        self._rows: list[_Row] = []
        self._known: dict[tuple[int, ...], _Row] = {}  # new tokens of a row of the last call -> what was read
        self._anything = torch.ones(grammar.vocab_size, dtype=torch.bool)  # (vocab,), True: may follow
        self._end = torch.zeros(grammar.vocab_size, dtype=torch.bool)  # (vocab,), True: may follow
        self._end[grammar.end] = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores ``(batch, vocab)`` with ``-inf`` for what may not follow ``input_ids`` ``(batch, length)``."""
        if input_ids.shape[1] < self.prompt_length:
            raise ProcessorError(
                f"{input_ids.shape[1]} ids, fewer than prompt_length={self.prompt_length}; "
                "make a new PlanLogitsProcessor for every prompt length"
            )
        if scores.shape[1] != self.grammar.vocab_size:
            raise ProcessorError(
                f"the logits are {scores.shape[1]} wide and the grammar {self.grammar.vocab_size}; "
                "build it with vocab_size=model.config.vocab_size"
            )
        new = [tuple(ids) for ids in input_ids[:, self.prompt_length :].tolist()]
        self._rows = [self._read(ids) for ids in new]
        self._known = dict(zip(new, self._rows, strict=True))
        room = None if self.max_new_tokens is None else self.max_new_tokens - (input_ids.shape[1] - self.prompt_length)
        allowed = torch.stack([self._allowed(row, room) for row in self._rows]).to(scores.device)  # (batch, vocab)
        left = scores.masked_fill(~allowed, -torch.inf)
        barred = (left.amax(dim=-1, keepdim=True) == -torch.inf) & allowed  # True: others banned all that may follow
        return left.masked_fill(barred, 0.0)

    def state(self, row: int) -> PlanState:
        """Where sequence ``row`` of the last call was, one token before the end of what ``generate()`` returned."""
        return self._rows[row].state

    @staticmethod
    def read_plan(ids: Sequence[int] | Tensor, grammar: Grammar, prompt_length: int) -> Plan | None:
        """The first plan in ``ids`` ``(length,)`` behind the prompt; None: no complete plan that the grammar reads."""
        new = [int(token) for token in ids[prompt_length:]]
        end = new.index(grammar.end) if grammar.end in new else len(new)
        try:
            state, _ = grammar.parse(new[:end])
        except PlanError:
            return None
        return state.plan if state.stage == "written" else None

    def _read(self, ids: tuple[int, ...]) -> _Row:
        known = next((n for n in (len(ids), len(ids) - 1) if ids[:n] in self._known), 0)
        row = self._known[ids[:known]] if known else _START
        for token in ids[known:]:
            row = self._advance(row, token)
        return row

    def _advance(self, row: _Row, token: int) -> _Row:
        if token == self.grammar.end or row.then == "anything":
            return row._replace(then="anything")
        if row.then == "eos":
            return row
        try:
            state = self.grammar.advance(row.state, token)
        except PlanError:
            # Beams of probability zero hold such tokens, and so does a row in which another processor had its way.
            return row._replace(then="eos")
        return _Row(state, "eos" if state.stage == "written" else "grammar")

    def _allowed(self, row: _Row, room: int | None) -> Tensor:
        """bool ``(vocab,)``, True: may follow."""
        if row.then == "anything":
            return self._anything
        if row.then == "eos" or (row.state.stage == "text" and room is not None and room <= 1):
            return self._end
        return self.grammar.allowed(row.state, self.max_rounds > 0, room)


_LENGTH_ONLY = ("MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor")
_PREFIX_FREE = (
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TopHLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "SuppressTokensLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
)
_BIASES = ("SequenceBiasLogitsProcessor", "NoBadWordsLogitsProcessor")


def _is(processor: object, *names: str) -> bool:
    """True: exactly one of these classes of the host; what a subclass reads is not known. Not every version has all."""
    return any(type(processor) is getattr(logits_process, name, None) for name in names)


def _prefix_free(processor: Any) -> bool:
    """True: reads the scores alone, each row by itself."""
    if _is(processor, *_BIASES):
        return all(len(sequence) == 1 for sequence in processor.sequence_bias)
    return _is(processor, *_PREFIX_FREE)


def _lifts_bans(processor: Any) -> bool:
    """True: may turn ``-inf`` into a large negative number."""
    if _is(processor, "InfNanRemoveLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor"):
        return True
    return _is(processor, *_PREFIX_FREE) and getattr(processor, "filter_value", -torch.inf) != -torch.inf


class Processors:
    """The host's list of logits processors, for rows of which several are written at once.

    A processor that reads a prefix sees one sequence at a time. One that is not the host's may have parameters or keep
    a state for each sequence of the batch: it is called at the sequence's own index in a batch of full height (all of
    it that sequence), and each sequence has a copy of it, the first one the object itself.

    Whatever its class, an id that comes in as ``-inf`` is only let in again by a processor that forces a token.

    Args:
        host: what the host hands to a decoding loop; the order is kept.
        verified: False: positions are settled without a true prefix (unverified diffusion).
        prompt_length: positions of the host's prompt, padding included.
        rows_per_prompt: the call's ``num_return_sequences``. batch_size: sequences of the batch.
        one_text: True: a sequence is one text, without parts that grow at the same time.
        ends: ids that end an answer; None: those that the processors of a least length ban.

    Attributes:
        min_new_tokens: new tokens before ``eos`` may be written. The processors that say so are in neither method
            below: they need the length alone, so the strategy bans ``eos`` itself. One that bans other ids is not
            among them.
        needs_prefix: True: at least one processor reads the tokens before the one it scores. Every class does that is
            not known to do without.
        trivial: True: nothing to do, ``min_new_tokens`` included.

    Raises:
        ProcessorError: a processor that needs a prefix without ``verified``.
        DecodingError: several texts, and a processor that cannot be copied.
    """

    def __init__(
        self,
        host: LogitsProcessorList | None,
        *,
        verified: bool,
        prompt_length: int,
        rows_per_prompt: int = 1,
        batch_size: int = 1,
        one_text: bool = False,
        ends: frozenset[int] | None = None,
    ):
        every: list[Any] = list(host or ())
        least = [p for p in every if _is(p, *_LENGTH_ONLY) and ends in (None, token_ids(p.eos_token_id))]
        self._all = [p for p in every if p not in least]
        self._free = [p for p in self._all if _prefix_free(p)]
        self._rows_per_prompt, self._height = rows_per_prompt, batch_size
        self._copied = batch_size > 1 or not one_text
        self._lists: dict[tuple[int, int], list[Any]] = {}
        self.min_new_tokens: int = max([0, *(_min_new_tokens(p, prompt_length) for p in least)])
        self.needs_prefix: bool = len(self._free) < len(self._all)
        self.trivial: bool = not self._all and self.min_new_tokens == 0
        if self.needs_prefix and not verified:
            names = ", ".join(dict.fromkeys(name_of(p) for p in self._all if not _prefix_free(p)))
            raise ProcessorError(
                f"{names}: needs the text before every token, which unverified diffusion does not have; use "
                "verify_spans=True (planned_diffusion) or strategy='autoregressive', or drop the processor"
            )
        self._untouched = [self._copy(p) for p in self._all]

    def batched(self, scores: Tensor) -> Tensor:
        """Scores ``(n, vocab)`` behind the processors that read the scores alone; ``n`` rows of any position."""
        ids = torch.empty((len(scores), 0), dtype=torch.long, device=scores.device)  # (n, 0), nobody reads it
        return _apply(self._free, ids, scores)

    def in_order(self, prefix: Tensor, scores: Tensor, row: int = 0, lane: int = 0) -> Tensor:
        """Scores ``(1, vocab)`` behind the whole list, as the host would have them for this row of its batch.

        To be called once per emitted token, from left to right: some processors count their calls.

        Args:
            prefix: ids ``(1, length)`` as the host holds them, so with the padding on the left: penalties skip it by
                its length, and forced and suppressed tokens count it.
            scores: ``(1, vocab)``.
            row: of the host's batch; processors that know its rows are narrowed to this one.
            lane: separates texts of one row that grow at the same time, for processors that remember the last call.
        """
        key = (row, lane)
        if key not in self._lists:
            prompt = row // self._rows_per_prompt
            own = map(self._copy, self._untouched) if self._lists else self._all
            self._lists[key] = [self._narrowed(processor, row, prompt) for processor in own]
        return _apply(self._lists[key], prefix, scores)

    def _copy(self, processor: Any) -> Any:
        """A processor with a state of its own. Lanes of one sequence have one each too."""
        return own_copy(processor) if self._copied and not _is_native(processor) else processor

    def _narrowed(self, processor: Any, row: int, prompt: int) -> Any:
        """A processor for one sequence alone: the host's are cut down to it, others called at its index."""
        if _is_native(processor):
            return _for_row(processor, row, prompt)
        return _AtIndex(processor, row, self._height) if self._height > 1 else processor


class _AtIndex:
    """A processor that is called for one sequence of a batch, at its index in a batch of full height."""

    def __init__(self, processor: Any, index: int, height: int):
        self._processor, self._index, self._height = processor, index, height

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        wide = scores.repeat(self._height, 1)  # (height, vocab), for it may be written to
        return self._processor(ids.expand(self._height, -1), wide)[self._index : self._index + 1]


def _is_native(processor: object) -> bool:
    """True: exactly a class of the host."""
    return _is(processor, type(processor).__name__)


def _apply(processors: Sequence[Callable[[Any, Any], Tensor]], ids: Tensor, scores: Tensor) -> Tensor:
    given = scores
    for processor in processors:
        before, scores = scores, processor(ids, scores)
        if _lifts_bans(processor):
            # Only what is still banned: a token that was forced in between stays.
            scores = scores.masked_fill((given == -torch.inf) & (before == -torch.inf), -torch.inf)
    return scores


def _min_new_tokens(processor: Any, prompt_length: int) -> int:
    if _is(processor, "MinLengthLogitsProcessor"):
        return processor.min_length - prompt_length
    return processor.prompt_length_to_skip + processor.min_new_tokens - prompt_length


def _for_row(processor: Any, row: int, prompt: int) -> Any:
    """``processor`` for one row alone: what the host's classes know about the rows of their batch, or remember of the
    last call, cut down to ``row`` and its ``prompt``. Other classes are left as they are."""
    prompts = slice(prompt, prompt + 1)
    if _is(processor, "RepetitionPenaltyLogitsProcessor"):
        ignored = getattr(processor, "prompt_ignore_length", None)  # int, None or the padding of every row (batch,)
        return (
            _with(processor, prompt_ignore_length=ignored[row : row + 1]) if isinstance(ignored, Tensor) else processor
        )
    if _is(processor, "EncoderRepetitionPenaltyLogitsProcessor"):
        return _with(processor, encoder_input_ids=processor.encoder_input_ids[prompts])
    if _is(processor, "EncoderNoRepeatNGramLogitsProcessor"):
        return _with(processor, batch_size=1, generated_ngrams=processor.generated_ngrams[prompts])
    if _is(processor, "PrefixConstrainedLogitsProcessor"):
        allowed = processor._prefix_allowed_tokens_fn
        return _with(processor, _prefix_allowed_tokens_fn=lambda _, ids: allowed(row, ids))
    if _is(processor, "UnbatchedClassifierFreeGuidanceLogitsProcessor"):
        context = processor.unconditional_context.items()
        own = {name: value[prompts] if isinstance(value, Tensor) else value for name, value in context}
        return _with(processor, unconditional_context=own)
    if _is(processor, "SynthIDTextWatermarkLogitsProcessor"):
        return _with(processor, state=None)
    return processor


def _with(processor: Any, **attributes: Any) -> Any:
    changed = copy.copy(processor)
    for name, value in attributes.items():
        setattr(changed, name, value)
    return changed
