"""``decode``: the one decoding callable that every route of ``generate()`` ends in. Ids in, ids out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from hf_hybrid.core.canvas import Canvas
from hf_hybrid.decoding.call import Call, Context
from hf_hybrid.decoding.criteria import own_criteria
from hf_hybrid.decoding.images import read_images, reads_images
from hf_hybrid.decoding.loop import Loop
from hf_hybrid.decoding.output import Answer, DecodingError, HybridGenerateOutput
from hf_hybrid.decoding.processors import Processors
from hf_hybrid.decoding.prompts import Prompts, check_inputs, foreign_keywords, outside_vocabulary, read_prompts
from hf_hybrid.decoding.session import Session
from hf_hybrid.decoding.transcript import Transcript
from hf_hybrid.decoding.writer import Way
from hf_hybrid.decoding.writers import WRITERS
from hf_hybrid.models.cached import causal_cache
from hf_hybrid.models.host import (
    CACHE,
    adoptable,
    fill,
    ordered_ids,
    position_table,
    rope_switch,
    taken_cache,
    unwrapped,
)
from hf_hybrid.models.opening import open_runner, runner_of
from hf_hybrid.models.probe import check_rows
from hf_hybrid.models.release import release_note
from hf_hybrid.models.runner import Runner
from hf_hybrid.models.vocabulary import readable, width_of

_UNSERVED = ("output_attentions", "output_hidden_states")


@torch.no_grad()
def decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    call: Call,
    **model_kwargs: Any,
) -> Tensor | HybridGenerateOutput | Iterator[Answer]:
    """Write answers behind prompts.

    Args:
        model: a model that the Runner serves.
        input_ids: int64 ``(batch, length)``, left-padded where ``attention_mask`` in ``model_kwargs`` is 0.
        logits_processor, stopping_criteria, generation_config: as the host prepared them.
        call: strategy, settings and partners.

    Returns:
        int64 ``(batch, length + new)``, padded on the right; a ``HybridGenerateOutput`` with
        ``return_dict_in_generate``; an iterator over answers with a queue.
    """
    try:
        return _decode(model, input_ids, logits_processor, stopping_criteria, generation_config, call, model_kwargs)
    except Exception as error:
        if note := release_note():  # whatever went wrong, that may be why
            error.add_note(note.strip())
        raise
    finally:  # a thread may be reading; the host has put the prompt by now
        if call.streamer is not None:
            call.streamer.end()


def _decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList | None,
    stopping_criteria: StoppingCriteriaList | None,
    generation_config: GenerationConfig | None,
    call: Call,
    model_kwargs: dict[str, Any],
) -> Tensor | HybridGenerateOutput | Iterator[Answer]:
    config = generation_config
    if logits_processor is None or stopping_criteria is None or config is None:
        raise DecodingError(
            "generate() handed over no logits_processor, stopping_criteria or generation_config; "
            f"an answer without them would be another one{release_note()}"
        )
    asked = [name for name in _UNSERVED if getattr(config, name, None)]
    if asked and config.return_dict_in_generate:
        raise DecodingError(f"{asked[0]}=True is not available with strategy={call.strategy!r}; leave it out")
    kind = runner_of(model, call.runner)
    _check_abilities(kind, call)
    images = call.settings.one_text and reads_images(model) and bool(foreign_keywords(model_kwargs))
    if images and call.queue is not None:
        raise DecodingError("generate_many() takes token ids, and no images; call generate() batch by batch")
    check_inputs(model, input_ids, model_kwargs, images=images)
    if call.cache is not None or call.settings.return_past_key_values:
        _check_cache(kind, model)
    if call.cache is not None:
        adoptable(call.cache)
    prompts = read_prompts(input_ids, model_kwargs, getattr(config, "_mask_length", None))
    criteria, bound, ends = own_criteria(stopping_criteria)
    size, capacity = len(prompts.every), _capacity(prompts.width, config)
    runner = open_runner(model, size, capacity=capacity, synced_gpus=call.synced_gpus, kind=call.runner)
    runner.vectors = prompts.vectors
    easel = _Easel(call, config, runner, bound - input_ids.shape[1], size)
    rows = range(size) if call.queue is None else call.queue.first
    canvases = [easel.canvas(row, prompt.tokens, prompt.given) for row, prompt in zip(rows, prompts.every, strict=True)]
    processors = Processors(
        logits_processor,
        verified=call.settings.exact,
        prompt_length=input_ids.shape[1],
        rows_per_prompt=config.num_return_sequences or 1,
        batch_size=len(canvases),
        one_text=call.settings.one_text,
        ends=ends,
    )
    transcript = _transcript(call, config)
    context = Context(
        runner,
        call,
        processors,
        bool(config.do_sample),
        ends,
        processors.min_new_tokens,
        width_of(model),
        transcript,
        rope_switch(model),
    )
    way = Way(call.strategy, WRITERS[call.strategy], call.settings)
    session = Session(Loop(context), lambda _: way, canvases, prompts.input_ids, criteria, call)
    cached = [prompt.cached for prompt in prompts.every]
    if images:
        cached = read_images(model, runner, input_ids, model_kwargs, prompts.every)
    session.adopt(None if images else taken_cache(model_kwargs), model_kwargs.get("attention_mask"), cached)
    known = [token for token in prompts.every[0].tokens if token >= 0] or [0]
    check_rows(model, known, len(canvases), one_by_one=call.settings.one_by_one, kind=call.runner)
    if call.queue is not None:
        if processors.needs_prefix:
            raise DecodingError("these logits processors know the rows of one batch; call generate() batch by batch")
        return session.answers(easel.canvas(row, list(prompt), None) for row, prompt in call.queue.more)
    session.run()
    # Like the host: without a token for padding, the first end token.
    pad = next(iter([*ordered_ids(config.pad_token_id), *ordered_ids(config.eos_token_id)]), 0)
    sequences = session.sequences(pad)
    cache = None
    if call.cache is not None or (config.return_dict_in_generate and config.use_cache is not False):
        cache = _cache(model, session, prompts, sequences, call)
    runner.wait()
    if not config.return_dict_in_generate:
        return sequences
    fields: dict[str, Any] = {CACHE: cache}
    if transcript is not None:
        width = context.vocab_size
        columns = transcript.columns(canvases, call.settings.return_control_tokens, pad, width)
        fields["logits"], fields["scores"] = columns
    return HybridGenerateOutput(sequences=sequences, report=session.reports(), **fields)  # type: ignore[arg-type]


def _check_abilities(runner: type[Runner], call: Call) -> None:
    """Refuse a strategy that needs more than the Runner of the model can do."""
    lacking = [name.replace("_", " ") for name in call.settings.abilities if not getattr(runner.abilities, name)]
    if lacking:
        raise DecodingError(
            f"strategy={call.strategy!r} needs {' and '.join(lacking)}, and {runner.__name__}, which runs this model, "
            "has none; use strategy='autoregressive', or strategy='speculative' with drafter='suffix'"
        )


def _check_cache(runner: type[Runner], model: Any) -> None:
    """Refuse a cache of the caller where the text of this model does not fit into one."""
    if not runner.abilities.host_cache:
        raise DecodingError(
            f"strategy= takes and returns no cache for {type(unwrapped(model)).__name__}, whose text is more than keys "
            "that can be taken over; pass the whole text as input_ids, without a cache"
        )


def _transcript(call: Call, config: GenerationConfig) -> Transcript | None:
    """What keeps logits and scores, None: they are not asked for."""
    logits, scores = (bool(getattr(config, name, None)) for name in ("output_logits", "output_scores"))
    if not (logits or scores) or not config.return_dict_in_generate:
        return None
    name = "output_scores" if scores else "output_logits"
    if call.queue is not None:
        raise DecodingError(f"{name}=True: an answer of generate_many() holds none; call generate() batch by batch")
    if not call.settings.exact:
        raise DecodingError(
            f"{name}=True needs tokens that the model decides one by one, and strategy={call.strategy!r} settles "
            "several at once here; leave it out, or use verify_spans=True (planned_diffusion) or another strategy"
        )
    return Transcript(logits=logits, scores=scores)


def _cache(model: Any, session: Session, prompts: Prompts, sequences: Tensor, call: Call) -> Any:
    """A host cache of prompt and text but for the last token: the Runner's own keys where they are those of one causal
    text, else made by one more pass, if the caller asked for it. A cache of the caller is filled."""
    past = call.cache
    if call.settings.one_text and session.runner.abilities.keys:
        cache = past if past is not None else DynamicCache()
        fill(cache, session.layers(prompts))
        return cache
    if past is None and not call.settings.return_past_key_values:
        return None
    mask = session.attention_mask(sequences, prompts)
    held = int(past.get_seq_length()) if past is not None else 0
    known = mask.shape[1] - sequences.shape[1]  # columns whose ids only the cache knows
    session.runner.ranks.others_go_on(True)
    return causal_cache(model, sequences[:, held - known :], mask, past)


class _Easel:
    """Makes the canvases of a call: what a prompt may hold, how long an answer may be, and its seed."""

    def __init__(self, call: Call, config: GenerationConfig, runner: Runner, budget: int, rows: int):
        seed = call.settings.seed
        if seed is None:
            seed = runner.ranks.agreed(int(torch.randint(2**62, ()).item())) if config.do_sample else 0
        if not isinstance(seed, int) and (len(seed) != rows or call.queue is not None):
            raise DecodingError(f"seed has {len(seed)} entries for {rows} sequences; give one for each, or one number")
        plain = call.settings.continue_final_message
        if not isinstance(plain, bool) and len(plain) != rows and call.queue is None:
            raise DecodingError(
                f"continue_final_message has {len(plain)} entries for {rows} sequences; give one for each, or one for "
                "all"
            )
        self.seed, self.plain = seed, plain
        self.budget = budget
        if self.budget < 1:
            raise DecodingError(f"max_length={config.max_length} leaves no room behind the prompt; use max_new_tokens")
        self.held = position_table(runner.model) or 1 << 40
        self.control = call.settings.return_control_tokens
        self.queue = call.queue

    def canvas(self, row: int, prompt: list[int], given: list[int] | None) -> Canvas:
        """The canvas of one prompt; ``given`` are its ids as the host holds them, None: the same."""
        if not 0 < len(prompt) < self.held:
            raise DecodingError(_full(prompt, self.held) or f"prompt {row} is empty; give it at least one token")
        seed = self.seed + row if isinstance(self.seed, int) else self.seed[row]
        budget, least = self.budget, None
        if self.queue is not None and self.queue.max_length is not None:
            budget = self.queue.max_length - len(prompt)
        if self.queue is not None and self.queue.min_length is not None:
            least = self.queue.min_length - len(prompt)
        plain = self.plain if isinstance(self.plain, bool) else self.plain[row]
        # Rotary positions go on, as in the host; a table of learned ones ends, and the answer with it.
        canvas = Canvas(row, seed, prompt, min(budget, self.held - len(prompt)), given=given, least=least)
        canvas.positions, canvas.control, canvas.plain = self.held, self.control, plain
        return canvas


def prompt_fault(model: Any, prompt: Sequence[int], max_length: int | None = None) -> str:
    """Why no answer can be written behind ``prompt``, which is not empty; an empty text: one can.

    Args:
        max_length: tokens of prompt and answer together, None: no bound of that kind.
    """
    size = readable(model)
    if not all(0 <= token < size for token in prompt):
        return outside_vocabulary(model)
    if max_length is not None and len(prompt) >= max_length:
        return f"max_length={max_length} leaves no room behind a prompt of {len(prompt)} tokens; use max_new_tokens"
    return _full(prompt, position_table(model) or 1 << 40)


def _full(prompt: Sequence[int], held: int) -> str:
    full = f"a prompt of {len(prompt)} tokens fills the {held} positions of the model; shorten it"
    return full if len(prompt) >= held else ""


def _capacity(prompt: int, config: GenerationConfig) -> int:
    """Slots to begin with: the prompt and a usual answer; the cache grows when that is not enough."""
    longest = config.max_length if config.max_length is not None else prompt + 256
    return prompt + max(0, min(int(longest) - prompt, 256)) + 64
