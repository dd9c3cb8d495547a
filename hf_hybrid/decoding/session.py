"""Session: the canvases of one call from the first pass to the last."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_hybrid.core.canvas import Canvas
from hf_hybrid.decoding.call import Call
from hf_hybrid.decoding.criteria import Criteria
from hf_hybrid.decoding.loop import Loop
from hf_hybrid.decoding.output import Answer, DecodingError, GenerationReport
from hf_hybrid.decoding.prompts import UNKNOWN, Prompts
from hf_hybrid.decoding.writer import Shared, Way, Writer
from hf_hybrid.models.states import tokens_in


class Session:
    """One call: the writers of its answers, what was streamed, what was checked against the stopping criteria.

    Args:
        loop: makes the passes. way: how each answer is written.
        canvases: the first ones; a queue brings more (``answers``). input_ids: their prompts, as the host holds them.
    """

    def __init__(
        self,
        loop: Loop,
        way: Callable[[Canvas], Way],
        canvases: list[Canvas],
        input_ids: Tensor,
        criteria: Sequence[Any],
        call: Call,
    ):
        self.loop, self.way, self.canvases, self.input_ids, self.call = loop, way, canvases, input_ids, call
        self.context, self.runner, self.streamer = loop.context, loop.runner, call.streamer
        self.control = call.settings.return_control_tokens
        self.criteria = Criteria(criteria, None if call.queue is not None else len(canvases))
        self.streamed = 0
        self.checked: dict[int, int] = {}  # canvas -> how much of its text the criteria saw
        self.started: dict[int, float] = {}
        self.stored: dict[int, int] = {}  # canvas that is finished -> sequence of the Runner that holds its keys
        self.faults: dict[int, str] = {}  # canvas -> why it has no answer
        self.active: list[Writer] = []
        self.shared: dict[Way, Shared | None] = {}
        self._reports: dict[int, GenerationReport] = {}
        if self.streamer is not None and len(canvases) > 1:
            raise DecodingError(
                "a streamer shows one answer; call generate() with a batch of one, or without a streamer"
            )
        for canvas in canvases:
            self._register(canvas)

    def _register(self, canvas: Canvas) -> Writer:
        way = self.way(canvas)
        if way not in self.shared:
            self.shared[way] = way.writer.share(self.context, way.settings)
        report = self._reports[canvas.index] = GenerationReport(way.strategy)
        self.started[canvas.index] = time.perf_counter()
        canvas.line = len(self.active)
        self.active.append(way.writer(self.context, self.shared[way], canvas, report))
        return self.active[-1]

    def adopt(self, cache: Any, attention_mask: Tensor | None, cached: Sequence[int]) -> None:
        """Begin, with what the caller's cache holds of the prompts: ``cached`` tokens of each."""
        if tokens_in(cache):
            self.runner.adopt(cache, attention_mask)
        for writer, held in zip(self.active, cached, strict=True):
            self._begin(writer)
            if not writer.canvas.finished:
                writer.canvas.lanes[0].cached = held

    def _begin(self, writer: Writer) -> None:
        """Begin an answer. In a queue, what cannot be written for this prompt is no reason to lose the others."""
        canvas = writer.canvas
        try:
            self._check_rope(canvas)
            writer.begin()
        except DecodingError as error:
            if self.call.queue is None:
                raise
            self.faults[canvas.index] = str(error)
            canvas.finished = True

    def _check_rope(self, canvas: Canvas) -> None:
        """Refuse what would give a pass rotary factors that the host would not give it."""
        switch, one_text = self.context.switch, self.call.settings.one_text
        longest = len(canvas.prompt) + canvas.budget * (1 if one_text else 2)
        if switch is None or longest <= switch.positions or (one_text and self.runner.batch_size == 1):
            return
        if one_text and not switch.grows and all(len(c.prompt) > switch.positions for c in self.canvases):
            return
        how = "answer one prompt at a time" if one_text else "use strategy='autoregressive'"
        raise DecodingError(
            f"this model changes its rotary factors behind {switch.positions} positions, for all rows of a pass at "
            f"once; {how}, or let prompt and answer stay within them (max_new_tokens)"
        )

    def _reread(self) -> None:
        """Where the host reads the text anew, do the same."""
        switch = self.context.switch
        if switch is None or not switch.rereads or not self.call.settings.one_text:
            return
        for writer in self.active:
            lane = writer.canvas.lanes[0]
            if 0 < lane.cached <= switch.positions < len(lane.tokens):
                if min(lane.tokens) == UNKNOWN:
                    raise DecodingError(
                        f"behind {switch.positions} positions this model reads its text anew, and a part of it lies in "
                        "a cache alone; pass the whole text as input_ids"
                    )
                self.runner.rewind(writer.canvas.line, 0)
                lane.cached = 0

    def run(self) -> None:
        """Advance until every canvas is finished."""
        try:
            while self.active:
                self._step()
        finally:
            self._close()

    def answers(self, queue: Iterator[Canvas]) -> Iterator[Answer]:
        """Answers as they are finished; the place of each goes to the next canvas of ``queue``."""
        try:
            yield from self._answers(self._finished)  # those that could not begin
            while True:
                while len(self.active) < self.runner.batch_size and (canvas := next(queue, None)) is not None:
                    yield from self._answers(partial(self._enter, canvas))
                if not self.active:
                    self.runner.wait()
                    return
                yield from self._answers(self._step)
        finally:
            self._close()

    def _close(self) -> None:
        for shared in self.shared.values():
            if shared is not None:
                shared.close()

    def _answers(self, work: Callable[[], list[Canvas]]) -> Iterator[Answer]:
        """What ``work`` finishes, before anything else is done that may fail."""
        with torch.no_grad():  # not while the caller works with an answer
            finished = work()
        for canvas in finished:
            fault = self.faults.pop(canvas.index, None)
            tokens = [] if fault else canvas.confirmed(self.control)
            answer = Answer(canvas.index, tokens, self._report(canvas), fault)
            del self._reports[canvas.index]
            self.criteria.forget(canvas.index)
            for notes in (self.started, self.checked):
                notes.pop(canvas.index, None)
            yield answer

    def _step(self) -> list[Canvas]:
        """One pass; the canvases that it finished leave the batch."""
        self._reread()
        self.loop.advance(self.active)
        for writer in self.active:
            self._progress(writer)
        return self._finished()

    def _enter(self, canvas: Canvas) -> list[Canvas]:
        """Read the prompt of one more canvas, in a pass of its own: the others would be padded to its length."""
        line = self.runner.enter()
        writer = self._register(canvas)
        self._begin(writer)
        if not canvas.finished:
            self.loop.advance([writer], first=line)
            self._progress(writer)
        return self._finished()

    def _finished(self) -> list[Canvas]:
        done: list[Canvas] = []
        for line in range(len(self.active) - 1, -1, -1):
            writer = self.active[line]
            canvas, report = writer.canvas, writer.report
            if canvas.finished:
                if canvas.index not in self.faults:
                    writer.finished()
                moved = self.runner.leave(line)
                report.num_rows = int(self.runner.num_rows[moved])
                report.seconds["total"] = time.perf_counter() - self.started[canvas.index]
                self.active[line] = self.active[moved]
                self.active[line].canvas.line = line
                self.stored[canvas.index] = moved
                self.active.pop()
                done.append(canvas)
        return done

    def _progress(self, writer: Writer) -> None:
        """Stop where a criterion says so, and stream what was confirmed."""
        canvas, report = writer.canvas, writer.report
        canvas.clip()
        if canvas.cut == "length":
            spent = canvas.room <= 0
            why = f"at {canvas.budget} tokens" if spent else f"for want of positions: the model has {canvas.positions}"
            report.fallbacks.append(f"the answer was cut {why}")
        text = canvas.confirmed()  # a plan is no text: what is returned does not change where an answer ends
        if self.criteria and len(text) > self.checked.get(canvas.index, 0):
            self._check_criteria(canvas, text)
        text = canvas.confirmed(self.control)
        if text and report.seconds_to_first_text is None:
            report.seconds_to_first_text = time.perf_counter() - self.started[canvas.index]
        if self.streamer is None:
            return
        if len(text) > self.streamed:
            for token in text[self.streamed :]:  # one by one, as from the host: a streamer may know no other way
                self.streamer.put(torch.tensor([token]))
            self.streamed = len(text)
        if hasattr(self.streamer, "put_canvas"):  # for views: every lane, not only the text order
            self.streamer.put_canvas(canvas, self.context.mask)
        if hasattr(self.streamer, "put_draft") and not canvas.finished:
            whole = canvas.draft(self.context.mask)
            if len(whole) > self.streamed:
                self.streamer.put_draft(torch.tensor(whole[self.streamed :]))

    def _check_criteria(self, canvas: Canvas, text: list[int]) -> None:
        """The caller's criteria on every new confirmed token, in text order."""
        prompt, device = canvas.prompt if canvas.given is None else canvas.given, self.input_ids.device
        transcript, width = self.context.transcript, self.context.vocab_size
        scores = transcript.columns([canvas], False, 0, width)[1] if transcript is not None else None
        for count in range(self.checked.get(canvas.index, 0) + 1, len(text) + 1):
            ids, seen = torch.tensor([prompt + text[:count]], device=device), None if scores is None else scores[:count]
            stop = self.criteria.stop(ids, canvas.index, seen)
            # A criterion may ask the clock: of processes that read the same batch, the first one's counts.
            if self.runner.ranks.agreed(int(stop)):
                canvas.stop(count)
                break
        self.checked[canvas.index] = len(text)

    def sequences(self, pad: int) -> Tensor:
        """Prompts and texts, ``(batch, length)``, padded on the right."""
        texts = [canvas.confirmed(self.control) for canvas in self.canvases]
        longest = max(len(text) for text in texts)
        padded = torch.tensor([text + [pad] * (longest - len(text)) for text in texts], dtype=torch.long)
        return torch.cat([self.input_ids, padded.to(self.input_ids.device)], dim=1)

    def attention_mask(self, sequences: Tensor, prompts: Prompts) -> Tensor:
        """int64 ``(batch, width + new)``, 1: a token of the prompt (also one that only a cache knows) or the text."""
        new = sequences.shape[1] - self.input_ids.shape[1]
        mask = torch.zeros((len(self.canvases), prompts.width + new), dtype=torch.int64, device=sequences.device)
        for row, (canvas, prompt) in enumerate(zip(self.canvases, prompts.every, strict=True)):
            mask[row, prompt.columns] = 1
            mask[row, prompts.width : prompts.width + len(canvas.confirmed(self.control))] = 1
        return mask

    def layers(self, prompts: Prompts) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of prompts and texts, as ``Runner.layers`` gives them, in the order of the batch."""
        texts = [canvas.confirmed(self.control) for canvas in self.canvases]
        length = prompts.width + max(map(len, texts)) - 1
        reads: list[tuple[int, list[int]]] = []
        entries: list[tuple[int, list[int]]] = []
        for canvas, prompt, text in zip(self.canvases, prompts.every, texts, strict=True):
            columns = [*prompt.columns, *range(prompts.width, prompts.width + len(text))]
            columns = [column for column in columns if column < length]
            reads.append((self.stored[canvas.index], [*prompt.tokens, *text][: len(columns)]))
            entries.append((self.stored[canvas.index], columns))
        self.runner.catch_up(reads)
        return self.runner.layers(entries, length)

    def reports(self) -> list[GenerationReport]:
        """The reports in the order of the batch."""
        return [self._report(canvas) for canvas in self.canvases]

    def _report(self, canvas: Canvas) -> GenerationReport:
        report = self._reports[canvas.index]
        report.num_tokens, report.num_forwards = len(canvas.confirmed()), canvas.num_forwards
        report.ended = canvas.ended if canvas.num_forwards else ""
        return report
