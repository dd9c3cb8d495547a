"""Runs the candidates on the same prompts, in the same process, prompt by prompt in a rotating order.

Time: wall-clock of the whole ``generate()`` call, prefill included, tokenization left out. Memory: see ``memory``.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_hybrid.evaluation.candidates import Candidate
from hf_hybrid.evaluation.coherence import Coherence, coherence
from hf_hybrid.evaluation.memory import peak_mb, reset_peak
from hf_hybrid.models.host import end_ids
from hf_hybrid.training.recipes.sheets import TestItem, contradictions, exact_match, score_fields


@dataclass(frozen=True)
class Measurement:
    """One answer of one candidate.

    Attributes:
        text: without special tokens. country: the group of the prompt. seconds: of the call, divided by the batch size.
        num_tokens: new tokens, the end token included. num_forwards, num_rows: passes, and rows in them.
        seconds_to_first_text: None when it was not observed. seconds_per_stage: empty for the host.
        peak_memory_mb: see ``memory``, in 2**20 bytes. fields_right, fields_total: lines of the answer.
        right: True: the text is the answer. extended, cut, fallen_back: parts that grew beyond their plan, were cut at
        their limit, or went on token by token. coherence: None when it was not asked for. contradictions, restated:
        facts that a part states differently than an earlier one, of those that it restates.
    """

    text: str
    country: str
    seconds: float
    num_tokens: int
    num_forwards: int
    num_rows: int
    seconds_to_first_text: float | None
    seconds_per_stage: dict[str, float]
    peak_memory_mb: float | None
    fields_right: int
    fields_total: int
    right: bool
    extended: int = 0
    cut: int = 0
    fallen_back: int = 0
    coherence: Coherence | None = None
    contradictions: int = 0
    restated: int = 0


@dataclass
class Run:
    """What was measured: ``measurements[name][i]`` belongs to ``items[i]``; ``interrupted``: True: not all prompts.

    ``batch_size``: prompts per call. ``temperature``: of sampling, 0: greedy.
    """

    candidates: tuple[Candidate, ...]
    items: list[TestItem] = field(default_factory=list)
    measurements: dict[str, list[Measurement]] = field(default_factory=dict)
    interrupted: bool = False
    batch_size: int = 1
    temperature: float = 0.0


def country_of(item: TestItem) -> str:
    """The country (or other group) that a prompt was drawn for; a second one in it is a random companion."""
    return item.sheet.groups[0] if item.sheet.groups else ""


def even_subset(items: Sequence[TestItem], count: int | None = None) -> list[TestItem]:
    """``count`` prompts (default: all), one of every country in turn, so that any prefix of them is even too."""
    if count is not None and not 1 <= count <= len(items):
        raise ValueError(f"{count} prompts were asked for; the split has 1 to {len(items)}")
    turns: dict[str, int] = {}
    keyed: list[tuple[int, int]] = []
    for number, item in enumerate(items):
        turn = turns[country_of(item)] = turns.get(country_of(item), -1) + 1
        keyed.append((turn, number))
    return [items[number] for _, number in sorted(keyed)][:count]


def measure(
    model: Any,
    tokenizer: Any,
    items: Sequence[TestItem],
    candidates: Sequence[Candidate],
    *,
    max_new_tokens: int = 512,
    batch_size: int = 1,
    read_back: bool = False,
    temperature: float = 0.0,
    progress: Callable[[str, str, int, int], None] | None = None,
    others: Mapping[str, Any] | None = None,
) -> Run:
    """Let every candidate answer every prompt.

    Before, every candidate answers the first prompt once without being measured. Ctrl-C ends the run; prompts that all
    candidates have answered are kept.

    Args:
        model: an enabled model (``hf_hybrid.enable``). tokenizer: pads on the left.
        batch_size: prompts per call; times are then divided by it.
        read_back: True: also measure how coherent the answers are, outside of the measured time.
        temperature: of sampling, with seed 0, so that equal texts stay equal among our strategies; 0: greedy.
        progress: called before every answer with ``"warming up"`` or ``"answering"``, the candidate, the number of
            answers written and of all answers.
        others: ``Candidate.dtype`` -> the same model in that type, for candidates that name one.
    """
    if not items or not candidates:
        raise ValueError("nothing to measure: give at least one prompt and one candidate")
    if len({c.name for c in candidates}) != len(candidates):
        raise ValueError("two candidates have the same name")
    known = others or {}
    missing = sorted({c.dtype for c in candidates if c.dtype is not None and c.dtype not in known})
    if missing:
        raise ValueError(f"no model in {', '.join(missing)}; give it in others=")
    models = {c.name: model if c.dtype is None else known[c.dtype] for c in candidates}
    none: dict[str, list[Measurement]] = {c.name: [] for c in candidates}
    run = Run(tuple(candidates), measurements=none, batch_size=batch_size, temperature=temperature)

    starts = range(0, len(items), batch_size)
    total = (1 + len(starts)) * len(candidates)
    begun = itertools.count()

    def write(stage: str, batch: Sequence[TestItem], candidate: Candidate, read_back: bool) -> list[Measurement]:
        if progress is not None:
            progress(stage, candidate.name, next(begun), total)
        return answer(models[candidate.name], tokenizer, batch, candidate, max_new_tokens, read_back, temperature)

    try:
        for candidate in candidates:
            write("warming up", items[:batch_size], candidate, False)
        for turn, start in enumerate(starts):
            batch = items[start : start + batch_size]
            first = turn % len(candidates)
            order = [*candidates[first:], *candidates[:first]]
            answers = {c.name: write("answering", batch, c, read_back) for c in order}
            for name, done in answers.items():
                run.measurements[name] += done
            run.items += batch
    except KeyboardInterrupt:
        run.interrupted = True
    # An interrupt between two of the lines above leaves lists of unequal length.
    finished = min([len(run.items), *map(len, run.measurements.values())])
    del run.items[finished:]
    for done in run.measurements.values():
        del done[finished:]
    return run


def answer(
    model: Any,
    tokenizer: Any,
    items: Sequence[TestItem],
    candidate: Candidate,
    max_new_tokens: int,
    read_back: bool = False,
    temperature: float = 0.0,
) -> list[Measurement]:
    """Let one candidate answer one batch of prompts."""
    encoded = tokenizer([item.sheet.prompt for item in items], return_tensors="pt", padding=len(items) > 1)
    inputs = {name: encoded[name].to(model.device) for name in ("input_ids", "attention_mask")}  # (batch, prompt)
    width = inputs["input_ids"].shape[1]
    options: dict[str, Any] = {"hf_hybrid": {}}  # the host, also where the checkpoint names a strategy
    clock = _FirstText() if candidate.strategy is None and len(items) == 1 else None
    if candidate.strategy is not None:
        options = {"strategy": candidate.strategy, **candidate.settings}
    elif clock is not None:
        options["streamer"] = clock
    options["do_sample"] = temperature > 0
    options["tokenizer"] = tokenizer  # of stop strings that the checkpoint names
    if temperature:
        options["temperature"] = temperature
        torch.manual_seed(0)  # of the host
        options |= {} if candidate.strategy is None else {"seed": 0}
    reset_peak(model.device)
    started = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, return_dict_in_generate=True, **options)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    seconds = time.perf_counter() - started
    peak = peak_mb(model.device)
    done: list[Measurement] = []
    for b, item in enumerate(items):
        new = _answer_tokens(output.sequences[b, width:], model, tokenizer)
        prompt = inputs["input_ids"][b, inputs["attention_mask"][b] > 0].tolist()
        first = clock.seconds(started) if clock is not None else None
        counts = _counts(output.report[b] if candidate.strategy is not None else None, new, len(prompt), first)
        text = tokenizer.decode(new, skip_special_tokens=True)
        right, total = score_fields(item.sheet, text)
        otherwise, again = contradictions(text)
        done.append(
            Measurement(
                text=text,
                country=country_of(item),
                seconds=seconds / len(items),
                num_tokens=len(new),
                peak_memory_mb=peak,
                fields_right=right,
                fields_total=total,
                right=exact_match(item.sheet, text),
                contradictions=otherwise,
                restated=again,
                coherence=coherence(model, prompt, new, _labels(item, tokenizer)) if read_back else None,
                **counts,
            )
        )
    return done


def _labels(item: TestItem, tokenizer: Any) -> set[tuple[int, ...]]:
    """Token ids of the headings of the sheet."""
    return {tuple(tokenizer(part.label, add_special_tokens=False)["input_ids"]) for part in item.sheet.parts}


class _FirstText:
    """A streamer that records when the first token behind the prompt came."""

    def __init__(self) -> None:
        self.calls, self.at = 0, None

    def put(self, value: Tensor) -> None:
        self.calls += 1
        if self.calls == 2:  # the first call holds the prompt
            self.at = time.perf_counter()

    def end(self) -> None:
        pass

    def seconds(self, started: float) -> float | None:
        return self.at - started if self.at is not None else None


def _answer_tokens(sequence: Tensor, model: Any, tokenizer: Any) -> list[int]:
    """Ids ``(new,)`` up to the first end token, it included; padding behind it left out."""
    ends = end_ids(model)
    ids: list[int] = sequence.tolist()
    stop = next((i + 1 for i, token in enumerate(ids) if token in ends), None)
    if stop is not None:
        return ids[:stop]
    while ids and ids[-1] == tokenizer.pad_token_id:
        ids.pop()
    return ids


def _counts(report: Any, new: list[int], prompt: int, first: float | None) -> dict[str, Any]:
    """Passes, rows, stages and what happened to the parts; for the host, which reports nothing, by arithmetic."""
    if report is None:  # plain greedy search: the prompt in one pass, then one row for every token but the last
        return {
            "num_forwards": len(new),
            "num_rows": prompt + max(len(new) - 1, 0),
            "seconds_to_first_text": first,
            "seconds_per_stage": {},
        }
    return {
        "num_forwards": report.num_forwards,
        "num_rows": report.num_rows,
        "seconds_to_first_text": report.seconds_to_first_text,
        "seconds_per_stage": dict(report.seconds),
        "extended": sum(span.extended for span in report.spans),
        "cut": sum(span.ended in ("limit", "length") for span in report.spans),
        "fallen_back": sum("token by token" in note for note in report.fallbacks),
    }
