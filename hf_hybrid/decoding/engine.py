"""``decode``: the one decoding callable that every route of ``generate()`` ends in. Ids in, ids out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from hf_hybrid.core.canvas import Canvas
from hf_hybrid.decoding.autoregressive import Autoregressive
from hf_hybrid.decoding.block_diffusion import BlockDiffusion
from hf_hybrid.decoding.output import Answer, DecodingError, HybridGenerateOutput
from hf_hybrid.decoding.planned_diffusion import PlannedDiffusion
from hf_hybrid.decoding.processors import Processors
from hf_hybrid.decoding.session import Session
from hf_hybrid.decoding.speculative import Speculative
from hf_hybrid.decoding.strategy import Call, Context, Strategy
from hf_hybrid.models.host import CACHE, ordered_ids, taken_cache, token_ids, trained_positions
from hf_hybrid.models.probe import check_rows
from hf_hybrid.models.runner import Runner, causal_cache
from hf_hybrid.models.vocabulary import width_of

STRATEGIES: dict[str, type[Strategy]] = {
    "autoregressive": Autoregressive,
    "block_diffusion": BlockDiffusion,
    "planned_diffusion": PlannedDiffusion,
    "speculative": Speculative,
}
"""Strategy name -> class."""

_UNSERVED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


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
    config = generation_config if generation_config is not None else model.generation_config
    asked = [name for name in _UNSERVED if getattr(config, name, None)]
    if asked and config.return_dict_in_generate:
        raise DecodingError(f"{asked[0]}=True is not available with strategy={call.strategy!r}; leave it out")
    prompts = _prompts(input_ids, model_kwargs.get("attention_mask"))
    runner = Runner(model, len(prompts), capacity=_capacity(prompts, config))
    easel = _Easel(call, config, model, input_ids.shape[1], len(prompts))
    padding = [row[: len(row) - len(prompt)] for row, prompt in zip(input_ids.tolist(), prompts, strict=True)]
    canvases = [easel.canvas(row, *pair) for row, pair in enumerate(zip(prompts, padding, strict=True))]
    ends = token_ids(config.eos_token_id)
    processors = Processors(
        logits_processor,
        verified=_verified(call),
        prompt_length=input_ids.shape[1],
        rows_per_prompt=config.num_return_sequences or 1,
    )
    context = Context(
        runner, call, processors, bool(config.do_sample), ends, processors.min_new_tokens, width_of(model)
    )
    strategy = STRATEGIES[call.strategy](context)
    session = Session(strategy, canvases, input_ids, stopping_criteria, call)
    session.adopt(taken_cache(model_kwargs), model_kwargs.get("attention_mask"))
    check_rows(model, prompts[0], len(prompts), one_by_one=call.strategy == "autoregressive")
    if call.queue is not None:
        if processors.needs_prefix:
            raise DecodingError("these logits processors know the rows of one batch; call generate() batch by batch")
        more = enumerate(call.queue, len(prompts))
        return session.answers(easel.canvas(row, list(prompt), []) for row, prompt in more)
    session.run()
    # Like the host: without a token for padding, the first end token.
    pad = next(iter([*ordered_ids(config.pad_token_id), *ordered_ids(config.eos_token_id)]), 0)
    sequences = session.sequences(pad)
    if not config.return_dict_in_generate:
        return sequences
    cache = None
    if call.settings.return_past_key_values:
        cache = causal_cache(model, sequences, session.attention_mask(sequences, prompts))
    return HybridGenerateOutput(sequences=sequences, report=session.reports(), **{CACHE: cache})  # type: ignore[arg-type]


def _prompts(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """The prompts without their padding."""
    if input_ids.ndim != 2 or input_ids.shape[1] == 0 or input_ids.shape[0] == 0:
        raise DecodingError(f"input_ids {tuple(input_ids.shape)}: an answer needs a prompt of at least one token")
    if attention_mask is None:
        return input_ids.tolist()
    ids, real = input_ids.tolist(), attention_mask.tolist()
    prompts: list[list[int]] = []
    for number, (row, mask) in enumerate(zip(ids, real, strict=True)):
        kept = [token for token, keep in zip(row, mask[-len(row) :], strict=True) if keep]
        if not kept:
            raise DecodingError(f"row {number} of the batch is all padding; give it a prompt of at least one token")
        if not mask[-1] or 0 in mask[mask.index(1) :]:
            raise DecodingError(
                f"row {number} of the batch is not padded on the left; "
                "set tokenizer.padding_side = 'left' and tokenize again"
            )
        prompts.append(kept)
    return prompts


class _Easel:
    """Makes the canvases of a call: what a prompt may hold, how long an answer may be, and its seed."""

    def __init__(self, call: Call, config: GenerationConfig, model: Any, width: int, rows: int):
        seed = call.settings.seed
        if seed is None:
            seed = int(torch.randint(2**62, ()).item()) if config.do_sample else 0
        if not isinstance(seed, int) and (len(seed) != rows or call.queue is not None):
            raise DecodingError(f"seed has {len(seed)} entries for {rows} rows; give one per row, or one number")
        self.seed = seed
        self.budget = int(config.max_length) - width
        if self.budget < 1:
            raise DecodingError(
                f"max_length={config.max_length} leaves no room behind a prompt of {width}; use max_new_tokens"
            )
        self.held = trained_positions(model) or 1 << 40

    def canvas(self, row: int, prompt: list[int], padding: list[int]) -> Canvas:
        """The canvas of one prompt; ``padding`` is what the host put in front of it."""
        if not 0 < len(prompt) < self.held:
            fault = f"a prompt of {len(prompt)} tokens fills the {self.held} positions of the model; shorten it"
            raise DecodingError(fault if prompt else f"prompt {row} is empty; give it at least one token")
        seed = self.seed + row if isinstance(self.seed, int) else self.seed[row]
        # The host only warns beyond the trained positions; here an answer ends with them.
        return Canvas(row, seed, prompt, min(self.budget, self.held - len(prompt)), padding=padding)


def _capacity(prompts: list[list[int]], config: GenerationConfig) -> int:
    """Slots to begin with: the prompt and a usual answer; the cache grows when that is not enough."""
    longest = max(len(prompt) for prompt in prompts)
    return longest + min(int(config.max_length) - longest, 256) + 64


def _verified(call: Call) -> bool:
    """True: every token comes from a clean row, so that processors see a true prefix."""
    if call.strategy in ("autoregressive", "speculative"):
        return True
    settings = call.settings
    if getattr(settings, "visibility", "") == "dense":
        return False
    return getattr(settings, "verify_spans", False) or getattr(settings, "span_decoding", "") == "autoregressive"
