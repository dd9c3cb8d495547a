"""Session: the canvases of one call from the first pass to the last."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from hf_hybrid.core.canvas import Canvas
from hf_hybrid.decoding.output import Answer, DecodingError, GenerationReport
from hf_hybrid.decoding.strategy import Call, Strategy


class Session:
    """One call: canvases, what was streamed, what was checked against the stopping criteria.

    Args:
        canvases: the first ones; a queue brings more (``answers``). input_ids: their prompts, as the host holds them.
    """

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
        self.checked: dict[int, int] = {}  # canvas -> how much of its text the criteria saw
        self.started: dict[int, float] = {}
        self.active: list[Canvas] = []
        if self.streamer is not None and len(canvases) > 1:
            raise DecodingError(
                "a streamer shows one answer; call generate() with a batch of one, or without a streamer"
            )
        for canvas in canvases:
            self._register(canvas)

    def _register(self, canvas: Canvas) -> None:
        self.strategy.reports[canvas.row] = GenerationReport(self.call.strategy)
        self.started[canvas.row] = time.perf_counter()
        self.active.append(canvas)

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
        """Advance until every canvas is finished."""
        try:
            while self.active:
                self._step()
        finally:
            self.strategy.release()

    def answers(self, queue: Iterator[Canvas]) -> Iterator[Answer]:
        """Answers as they are finished; the batch row of each goes to the next canvas of ``queue``."""
        try:
            while self.active:
                yield from self._answers(self._step)
                while len(self.active) < self.runner.batch_size and (canvas := next(queue, None)) is not None:
                    yield from self._answers(partial(self._enter, canvas))
        finally:
            self.strategy.release()

    def _answers(self, work: Callable[[], list[Canvas]]) -> Iterator[Answer]:
        """What ``work`` finishes, before anything else is done that may fail."""
        with torch.no_grad():  # not while the caller works with an answer
            finished = work()
        for canvas in finished:
            answer = Answer(canvas.row, canvas.confirmed(self.control), self._report(canvas))
            self.strategy.forget(canvas)
            for notes in (self.started, self.checked):
                notes.pop(canvas.row, None)
            yield answer

    def _step(self) -> list[Canvas]:
        """One pass; the canvases that it finished leave the batch."""
        self.strategy.advance(self.active)
        for canvas in self.active:
            self._progress(canvas)
        return self._finished()

    def _enter(self, canvas: Canvas) -> list[Canvas]:
        """Read the prompt of one more canvas, in a pass of its own: the others would be padded to its length."""
        line = self.runner.enter()
        self._register(canvas)
        self.strategy.begin(canvas, line)
        self.strategy.advance([canvas], first=line)
        self._progress(canvas)
        return self._finished()

    def _finished(self) -> list[Canvas]:
        done: list[Canvas] = []
        for line in range(len(self.active) - 1, -1, -1):
            canvas = self.active[line]
            if canvas.finished:
                self.strategy.finished(canvas)
                moved = self.runner.leave(line)
                report = self.strategy.reports[canvas.row]
                report.num_rows = int(self.runner.num_rows[moved])
                report.seconds["total"] = time.perf_counter() - self.started[canvas.row]
                self.active[line] = self.active[moved]
                self.active.pop()
                done.append(canvas)
        return done

    def _progress(self, canvas: Canvas) -> None:
        """Stop where a criterion says so, and stream what was confirmed."""
        report = self.strategy.reports[canvas.row]
        if canvas.clip():
            report.fallbacks.append(f"the answer was cut at {canvas.budget} tokens")
        text = canvas.confirmed(self.control)
        if self.criteria and len(text) > self.checked.get(canvas.row, 0):
            self._check_criteria(canvas, text)
            text = canvas.confirmed(self.control)
        if text and report.seconds_to_first_text is None:
            report.seconds_to_first_text = time.perf_counter() - self.started[canvas.row]
        if self.streamer is None:
            return
        if len(text) > self.streamed:
            for token in text[self.streamed :]:  # one by one, as from the host: a streamer may know no other way
                self.streamer.put(torch.tensor([token]))
            self.streamed = len(text)
        if hasattr(self.streamer, "put_canvas"):  # for views: every lane, not only the text order
            self.streamer.put_canvas(canvas, self.strategy.mask_token)
        if hasattr(self.streamer, "put_draft") and not canvas.finished:
            whole = canvas.draft(self.strategy.mask_token)
            if len(whole) > self.streamed:
                self.streamer.put_draft(torch.tensor(whole[self.streamed :]))

    def _check_criteria(self, canvas: Canvas, text: list[int]) -> None:
        """The host's criteria on every new confirmed token, in text order."""
        prompt, device = [*canvas.padding, *canvas.prompt], self.input_ids.device
        for count in range(self.checked.get(canvas.row, 0) + 1, len(text) + 1):
            ids = torch.tensor([prompt + text[:count]], device=device)  # (1, length)
            try:
                stop = bool(self.criteria(ids, None).any())  # type: ignore[arg-type]
            except IndexError as error:
                if len(self.canvases) == 1:
                    raise
                raise DecodingError(
                    "a stopping criterion looks at all rows of a batch at once, and answers end one by one here; "
                    "call generate() with a batch of one"
                ) from error
            if stop:
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

    def reports(self) -> list[GenerationReport]:
        """The reports in the order of the batch."""
        return [self._report(canvas) for canvas in self.canvases]

    def _report(self, canvas: Canvas) -> GenerationReport:
        report = self.strategy.reports[canvas.row]
        report.num_tokens, report.num_forwards = len(canvas.confirmed()), canvas.num_forwards
        return report
