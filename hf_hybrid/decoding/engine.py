"""``decode``: the one decoding callable that every route of ``generate()`` ends in. Ids in, ids out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from hf_hybrid.core.canvas import Canvas
from hf_hybrid.decoding.autoregressive import Autoregressive
from hf_hybrid.decoding.block_diffusion import BlockDiffusion
from hf_hybrid.decoding.output import GenerationReport, HybridGenerateOutput
from hf_hybrid.decoding.planned_diffusion import PlannedDiffusion
from hf_hybrid.decoding.processors import Processors
from hf_hybrid.decoding.strategy import Call, Context, DecodingError, Strategy
from hf_hybrid.models.runner import Runner, causal_cache

STRATEGIES: dict[str, type[Strategy]] = {
    "autoregressive": Autoregressive,
    "block_diffusion": BlockDiffusion,
    "planned_diffusion": PlannedDiffusion,
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
) -> Tensor | HybridGenerateOutput:
    """Write answers behind prompts.

    Args:
        model: a model that the Runner serves.
        input_ids: int64 ``(batch, length)``, left-padded where ``attention_mask`` in ``model_kwargs`` is 0.
        logits_processor, stopping_criteria, generation_config: as the host prepared them.
        call: strategy, settings and partners.

    Returns:
        int64 ``(batch, length + new)``, padded on the right; a ``HybridGenerateOutput`` with
        ``return_dict_in_generate``.
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
) -> Tensor | HybridGenerateOutput:
    config = generation_config if generation_config is not None else model.generation_config
    asked = [name for name in _UNSERVED if getattr(config, name, None)]
    if asked and config.return_dict_in_generate:
        raise DecodingError(f"{asked[0]}=True is not available with strategy={call.strategy!r}; leave it out")
    prompts = _prompts(input_ids, model_kwargs.get("attention_mask"))
    runner = Runner(model, len(prompts), capacity=_capacity(prompts, config))
    canvases = _canvases(prompts, call, config, model, input_ids)
    ends = _ids(config.eos_token_id)
    processors = Processors(
        logits_processor,
        verified=_verified(call),
        prompt_length=input_ids.shape[1],
        rows_per_prompt=config.num_return_sequences or 1,
    )
    vocab_size = int(model.get_output_embeddings().weight.shape[0])
    context = Context(runner, call, processors, bool(config.do_sample), ends, processors.min_new_tokens, vocab_size)
    strategy = STRATEGIES[call.strategy](context)
    session = _Session(strategy, canvases, input_ids, stopping_criteria, call)
    session.adopt(model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask"))
    with _inference(model):
        session.run()
    pad = config.pad_token_id if config.pad_token_id is not None else min(ends, default=0)
    sequences = session.sequences(int(pad if not isinstance(pad, Tensor) else pad.flatten()[0]))
    if not config.return_dict_in_generate:
        return sequences
    cache = None
    if call.settings.return_past_key_values:
        cache = causal_cache(model, sequences, session.attention_mask(sequences, prompts))
    return HybridGenerateOutput(sequences=sequences, past_key_values=cache, report=session.finish_reports())


class _Session:
    """One call: canvases, what was streamed, what was checked against the stopping criteria."""

    def __init__(
        self,
        strategy: Strategy,
        canvases: list[Canvas],
        input_ids: Tensor,
        criteria: StoppingCriteriaList | None,
        call: Call,
    ):
        self.strategy, self.canvases, self.input_ids, self.call = strategy, canvases, input_ids, call
        self.runner, self.streamer = strategy.runner, call.streamer
        self.control = call.settings.return_control_tokens
        native = (MaxLengthCriteria, EosTokenCriteria)
        self.criteria = StoppingCriteriaList([c for c in criteria or () if not isinstance(c, native)])
        self.streamed = 0
        self.checked = dict.fromkeys(range(len(canvases)), 0)
        self.started = time.perf_counter()
        if self.streamer is not None and len(canvases) > 1:
            raise DecodingError(
                "a streamer shows one answer; call generate() with a batch of one, or without a streamer"
            )
        for canvas in canvases:
            strategy.reports[canvas.row] = GenerationReport(call.strategy)

    def adopt(self, cache: Any, attention_mask: Tensor | None) -> None:
        """Take over the caller's cache of the prompt's beginning, if it holds any."""
        length = int(cache.get_seq_length()) if cache is not None else 0
        if cache is not None and length > 0:
            if length >= self.input_ids.shape[1]:
                raise DecodingError(
                    f"past_key_values hold {length} tokens and input_ids {self.input_ids.shape[1]}; "
                    "pass the whole text so far as input_ids, at least one token longer than the cache"
                )
            self.runner.adopt(cache, attention_mask)
        for line, canvas in enumerate(self.canvases):
            self.strategy.begin(canvas, line)
            padding = self.input_ids.shape[1] - len(canvas.prompt)
            canvas.lanes[0].cached = max(0, length - padding)

    def run(self) -> None:
        """Advance until every canvas is finished; finished ones leave the batch."""
        active = list(self.canvases)
        while active:
            self.strategy.advance(active)
            for canvas in active:
                self._progress(canvas)
            for line in range(len(active) - 1, -1, -1):
                if active[line].finished:
                    self._leave(active, line)

    def _leave(self, active: list[Canvas], line: int) -> None:
        canvas = active[line]
        self.strategy.finished(canvas)
        moved = self.runner.leave(line)
        report = self.strategy.reports[canvas.row]
        report.num_rows = int(self.runner.num_rows[moved])
        report.seconds["total"] = time.perf_counter() - self.started
        active[line] = active[moved]
        active.pop()

    def _progress(self, canvas: Canvas) -> None:
        """Stop where a criterion says so, and stream what was confirmed."""
        report = self.strategy.reports[canvas.row]
        if canvas.clip():
            report.fallbacks.append(f"the answer was cut at {canvas.budget} tokens")
        text = canvas.confirmed(self.control)
        if self.criteria and len(text) > self.checked[canvas.row]:
            self._check_criteria(canvas, text)
            text = canvas.confirmed(self.control)
        if text and report.seconds_to_first_text is None:
            report.seconds_to_first_text = time.perf_counter() - self.started
        if self.streamer is None:
            return
        if len(text) > self.streamed:
            self.streamer.put(torch.tensor(text[self.streamed :]))
            self.streamed = len(text)
        if hasattr(self.streamer, "put_canvas"):  # for views: every lane, not only the text order
            self.streamer.put_canvas(canvas, self.strategy.mask_token)
        if hasattr(self.streamer, "put_draft") and not canvas.finished:
            whole = canvas.draft(self.strategy.mask_token)
            if len(whole) > self.streamed:
                self.streamer.put_draft(torch.tensor(whole[self.streamed :]))

    def _check_criteria(self, canvas: Canvas, text: list[int]) -> None:
        """The host's criteria on every new confirmed token, in text order."""
        prompt = self.input_ids[canvas.row]
        for count in range(self.checked[canvas.row] + 1, len(text) + 1):
            ids = torch.cat([prompt, torch.tensor(text[:count], device=prompt.device)]).unsqueeze(0)  # (1, length)
            if bool(self.criteria(ids, None).any()):  # type: ignore[arg-type]
                canvas.stop, canvas.finished = count, True
                for lane in canvas.lanes:
                    if not lane.done:
                        lane.finish("stop")
                break
        self.checked[canvas.row] = len(text)

    def sequences(self, pad: int) -> Tensor:
        """Prompts and texts, ``(batch, length)``, padded on the right."""
        texts = [canvas.confirmed(self.control) for canvas in self.canvases]
        longest = max(len(text) for text in texts)
        padded = torch.tensor([text + [pad] * (longest - len(text)) for text in texts], dtype=torch.long)
        return torch.cat([self.input_ids, padded.to(self.input_ids.device)], dim=1)

    def attention_mask(self, sequences: Tensor, prompts: Sequence[Sequence[int]]) -> Tensor:
        """int64, the shape of ``sequences``, 1: a token of the prompt or the text."""
        mask = torch.zeros_like(sequences)
        width = self.input_ids.shape[1]
        for row, (canvas, prompt) in enumerate(zip(self.canvases, prompts, strict=True)):
            mask[row, width - len(prompt) : width + len(canvas.confirmed(self.control))] = 1
        return mask

    def finish_reports(self) -> list[GenerationReport]:
        """The reports in the order of the batch."""
        reports: list[GenerationReport] = []
        for canvas in self.canvases:
            report = self.strategy.reports[canvas.row]
            report.num_tokens = len(canvas.confirmed())
            report.num_forwards = canvas.num_forwards
            reports.append(report)
        return reports


def _inference(model: Any) -> Any:
    """``inference_mode``: small operations cost a twentieth of a pass less than under ``no_grad``, in which the host
    calls us. Not for tensor subclasses (sharded or quantised weights), which it does not serve everywhere."""
    plain = all(type(parameter) in (Tensor, torch.nn.Parameter) for parameter in model.parameters())
    return torch.inference_mode() if plain else nullcontext()


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


def _canvases(
    prompts: list[list[int]], call: Call, config: GenerationConfig, model: Any, input_ids: Tensor
) -> list[Canvas]:
    width = input_ids.shape[1]
    seed = call.settings.seed
    if seed is None:
        seed = int(torch.randint(2**62, ()).item()) if config.do_sample else 0
    seeds = [seed + row for row in range(len(prompts))] if isinstance(seed, int) else seed
    if len(seeds) != len(prompts):
        raise DecodingError(f"seed has {len(seeds)} entries for {len(prompts)} rows; give one per row, or one number")
    budget = int(config.max_length) - width
    if budget < 1:
        raise DecodingError(
            f"max_length={config.max_length} leaves no room behind a prompt of {width}; use max_new_tokens"
        )
    held = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 1 << 40
    padding = input_ids.tolist()
    canvases: list[Canvas] = []
    for row, (prompt, row_seed) in enumerate(zip(prompts, seeds, strict=True)):
        if len(prompt) >= held:
            raise DecodingError(f"a prompt of {len(prompt)} tokens fills the {held} positions of the model; shorten it")
        # The host only warns beyond the trained positions; here an answer ends with them.
        bound = min(budget, held - len(prompt))
        canvases.append(Canvas(row, row_seed, prompt, bound, padding=padding[row][: width - len(prompt)]))
    return canvases


def _capacity(prompts: list[list[int]], config: GenerationConfig) -> int:
    """Slots to begin with: the prompt and a usual answer; the cache grows when that is not enough."""
    longest = max(len(prompt) for prompt in prompts)
    return longest + min(int(config.max_length) - longest, 256) + 64


def _verified(call: Call) -> bool:
    """True: every token comes from a clean row, so that processors see a true prefix."""
    if call.strategy == "autoregressive":
        return True
    settings = call.settings
    if getattr(settings, "visibility", "") == "dense":
        return False
    return getattr(settings, "verify_spans", False) or getattr(settings, "span_decoding", "") == "autoregressive"


def _ids(value: Any) -> frozenset[int]:
    """A token id, a list of them or a tensor, as a set; empty for None."""
    if value is None:
        return frozenset()
    if isinstance(value, Tensor):
        value = value.flatten().tolist()
    return frozenset([value] if isinstance(value, int) else [int(v) for v in value])
