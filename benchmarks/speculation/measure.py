"""Runs all methods on the same prompts in one process, interleaved prompt by prompt, and keeps a journal.

Before a prompt is timed, plain greedy decoding answers it once. That answer is the reference: every method is asked for
exactly as many tokens as it has (up to its end, or to where it loops). So no method is timed on a loop, and none writes
on behind the end of the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.speculation.checks import difference, loop_free_length
from benchmarks.speculation.journal import Journal, Record
from benchmarks.speculation.methods import Method, Writer, Written, padded
from benchmarks.speculation.prompts import Prompt, token_ids
from hf_hybrid.evaluation.memory import peak_mb, reset_peak

WARM_UP_TOKENS = 8
BATCH = 8
Progress = Callable[[], None]


@dataclass(frozen=True)
class Bench:
    """What is measured.

    Attributes:
        model: enabled, in eval mode. tokenizer: of it. prompts: category -> its prompts. copying: categories whose
        prompts are answered in batches too. methods: available ones, plain decoding first. max_new_tokens: longest
        answer. repeats: of everything.
    """

    model: Any
    tokenizer: Any
    prompts: dict[str, list[Prompt]]
    copying: set[str]
    methods: tuple[Method, ...]
    max_new_tokens: int = 96
    repeats: int = 3

    @property
    def steps(self) -> int:
        """Number of records in a complete journal, and of calls of ``progress``."""
        names = [(category, prompt.name) for category, prompts in self.prompts.items() for prompt in prompts]
        second = len(names) if any(method.memory for method in self.methods) else 0
        batches = len(_batches(self, dict.fromkeys(self._copying(), 0)))
        alike = len(_batches(self, dict.fromkeys(names, 0), rest=True))
        return len(names) + alike + self.repeats * (len(names) + second + batches)

    def _copying(self) -> list[tuple[str, str]]:
        return [(c, p.name) for c, prompts in self.prompts.items() if c in self.copying for p in prompts]


def run(bench: Bench, journal: Journal, progress: Progress = lambda: None) -> None:
    """Measure what is not in the journal yet; Ctrl-C leaves every finished prompt in it.

    Args:
        progress: is called after every record, also for those that the journal has already.
    """
    for category, prompts in bench.prompts.items():
        for prompt in prompts:
            if journal.get(kind="reference", category=category, prompt=prompt.name) is None:
                journal.append(_reference(bench, prompt))
            progress()
    _all_flips(bench, journal, progress)
    for repeat in range(bench.repeats):
        for category, prompts in bench.prompts.items():
            _category(bench, journal, repeat, category, prompts, progress)
        _all_batches(bench, journal, repeat, progress)


def _reference(bench: Bench, prompt: Prompt) -> Record:
    """Plain greedy decoding, cut where it loops."""
    ids = token_ids(bench.tokenizer, prompt)
    tokens = bench.methods[0].build(bench.model)(_inputs(bench, [ids]), bench.max_new_tokens)[0].tokens
    limit = loop_free_length(tokens)
    about = {"kind": "reference", "category": prompt.category, "prompt": prompt.name}
    return {**about, "ids": ids, "tokens": tokens[:limit], "left_out": len(tokens) - limit}


def _category(
    bench: Bench, journal: Journal, repeat: int, category: str, prompts: Sequence[Prompt], progress: Progress
) -> None:
    """Every prompt by every method; then once more by those that remember, beside plain decoding."""
    writers = {method.name: method.build(bench.model) for method in bench.methods}
    remembering = [method for method in bench.methods if method.memory]
    passes = [(False, bench.methods)]
    if remembering:
        passes.append((True, (bench.methods[0], *remembering)))
    warm = False
    for second, methods in passes:
        for turn, prompt in enumerate(prompts):
            about = {"kind": "answers", "repeat": repeat, "category": category, "prompt": prompt.name}
            about["second"] = second
            reference = journal.get(kind="reference", category=category, prompt=prompt.name)
            assert reference is not None  # the references were written before
            inputs = _inputs(bench, [reference["ids"]])
            if journal.get(**about) is not None:
                for method in remembering:  # what a run before the interrupt had learned
                    writers[method.name](inputs, len(reference["tokens"]))
                progress()
                continue
            if not warm:
                for method in methods:
                    if not method.memory:
                        writers[method.name](inputs, WARM_UP_TOKENS)
                warm = True
            first = (turn + repeat) % len(methods)
            answers: dict[str, Record] = {}
            for method in (*methods[first:], *methods[:first]):
                written, numbers = _timed(bench.model, writers[method.name], inputs, len(reference["tokens"]))
                answers[method.name] = _answer(bench, reference, written[0], numbers)
            journal.append({**about, "answers": answers})
            progress()


def _answer(bench: Bench, reference: Record, written: Written, numbers: Record) -> Record:
    return {**numbers, "difference": _judged(bench, reference, written.tokens), **asdict(written)}


def _judged(bench: Bench, reference: Record, tokens: list[int]) -> Record | None:
    """Where ``tokens`` differ from the reference; None: nowhere."""
    found = difference(bench.model, reference["ids"], tokens, reference["tokens"])
    return asdict(found) if found is not None else None


def _batches(bench: Bench, lengths: dict[tuple[str, str], int], rest: bool = False) -> list[list[tuple[str, str]]]:
    """Prompts in batches of eight, those of similar answers together, so that no sequence goes on for long behind its
    own end.

    Args:
        rest: True: what is left over is a batch too, if it is more than one; False: the shortest are left out, since a
            batch is as long as its shortest answer, and reading the prompts would be most of its time.
    """
    if not any(method.batched for method in bench.methods):
        return []
    order = sorted(lengths, key=lambda name: (lengths[name], name))
    order, least = (order, 2) if rest else (order[len(order) % BATCH :], BATCH)
    return [order[start : start + BATCH] for start in range(0, len(order) - least + 1, BATCH)]


def _all_flips(bench: Bench, journal: Journal, progress: Progress) -> None:
    """Answer all prompts in batches of eight and compare with the references, which were written one at a time.

    This says how often another order of the same sums alone changes a token, for the host and for us. Nothing is timed.
    """
    records = {(record["category"], record["prompt"]): record for record in journal.of_kind("reference")}
    methods = [method for method in bench.methods if method.batched]
    for number, names in enumerate(
        _batches(bench, {name: len(record["tokens"]) for name, record in records.items()}, True)
    ):
        if journal.get(kind="flips", prompt=number) is None:
            own = [records[name] for name in names]
            lengths = [len(record["tokens"]) for record in own]
            inputs, limit = _inputs(bench, [record["ids"] for record in own]), max(lengths)
            answers = {
                method.name: [
                    _judged(bench, record, written.tokens[: len(record["tokens"])])
                    for record, written in zip(own, method.build(bench.model)(inputs, limit), strict=True)
                ]
                for method in methods
            }
            names_of = [list(name) for name in names]
            journal.append(
                {"kind": "flips", "prompt": number, "rows": names_of, "lengths": lengths, "differences": answers}
            )
        progress()


def _all_batches(bench: Bench, journal: Journal, repeat: int, progress: Progress) -> None:
    """The copying prompts, eight at a time, by the methods that write batches."""
    records = {(record["category"], record["prompt"]): record for record in journal.of_kind("reference")}
    lengths = {name: len(record["tokens"]) for name, record in records.items() if name[0] in bench.copying}
    methods = [method for method in bench.methods if method.batched]
    writers = {method.name: method.build(bench.model) for method in methods}
    for number, names in enumerate(_batches(bench, lengths)):
        about = {"kind": "batch", "repeat": repeat, "prompt": number}
        if journal.get(**about) is None:
            prompts = [records[name]["ids"] for name in names]
            limit = min(lengths[name] for name in names)  # the shortest: no sequence is timed on a loop
            first = (number + repeat) % len(methods)
            answers = {
                method.name: _batch(bench, writers[method.name], prompts, limit, compare=repeat == 0)
                for method in (*methods[first:], *methods[:first])
            }
            journal.append({**about, "rows": [list(name) for name in names], "limit": limit, "answers": answers})
        progress()


def _batch(bench: Bench, write: Writer, prompts: Sequence[Sequence[int]], limit: int, compare: bool) -> Record:
    """One batch by one method; ``compare``: True: every sequence also alone, judged where the two differ."""
    inputs = _inputs(bench, prompts)
    write(inputs, WARM_UP_TOKENS)
    written, numbers = _timed(bench.model, write, inputs, limit)
    numbers["tokens"] = [answer.tokens for answer in written]
    if compare:
        alone = [write(_inputs(bench, [ids]), limit)[0].tokens for ids in prompts]
        found = [
            difference(bench.model, ids, answer.tokens, single)
            for ids, answer, single in zip(prompts, written, alone, strict=True)
        ]
        numbers["differences"] = [asdict(one) if one is not None else None for one in found]
    return numbers


def _inputs(bench: Bench, prompts: Sequence[Sequence[int]]) -> Any:
    pad = bench.tokenizer.pad_token_id
    return padded(prompts, pad if pad is not None else 0, bench.model.device)


def _timed(model: Any, write: Writer, inputs: Any, limit: int) -> tuple[list[Written], Record]:
    """Write answers; also gives ``seconds``, ``passes`` (None: the model was not called as a whole) and peak memory."""
    reset_peak(model.device)
    with _counted(model) as calls:
        started = time.perf_counter()
        written = write(inputs, limit)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        seconds = time.perf_counter() - started
    return written, {"seconds": seconds, "passes": len(calls) or None, "peak_memory_mb": peak_mb(model.device)}


@contextmanager
def _counted(model: Any) -> Iterator[list[None]]:
    """A list that grows by one for every pass through the layers of the model."""
    calls: list[None] = []

    def count(*_: Any) -> None:
        calls.append(None)

    count.row_by_row = True  # type: ignore[attr-defined]  # so that no strategy tries the model out because of it
    hook = model.base_model.register_forward_pre_hook(count)
    try:
        yield calls
    finally:
        hook.remove()
