"""The run of the bench of drafting: what is timed, in which order, and what an interrupt leaves.

Bugs these tests catch: a method timed on tokens that another did not write; a warm-up that is counted; an order that
favours one method; a memory that is empty, or of another category, after an interrupt; flips counted per wrong token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from speculation_for_tests import SETTINGS, Letters

from benchmarks import speculation as task
from benchmarks.speculation import Bench, Journal, Method, Prompt, Written
from benchmarks.speculation.measure import _batches


class Scripted:
    """Methods that answer with letters of the prompt, and a log of their calls."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.log: list[tuple[str, str, int]] = []
        self.stop_at = stop_at

    def method(self, name: str, **options: Any) -> Method:
        def build(model: Any) -> Callable[[Any, int], list[Written]]:
            learned: list[int] = []

            def write(inputs: Any, limit: int) -> list[Written]:
                if self.stop_at is not None and len(self.log) >= self.stop_at:
                    raise KeyboardInterrupt
                rows = [row[row != 2].tolist() for row in inputs["input_ids"]]  # 2: padding
                self.log.append((name, "|".join("".join(map(chr, row)) for row in rows), limit))
                learned.append(len(learned))
                kept = float(len(learned)) if options.get("memory") else None
                return [Written((row * 9)[:limit], kept) for row in rows]

            return write

        return Method(name, build, **options)

    def bench(self, prompts: dict[str, list[str]], **options: Any) -> Bench:
        made = {c: [Prompt(c, text, text) for text in texts] for c, texts in prompts.items()}
        methods = (self.method("plain", batched=True), self.method("ours", batched=True))
        methods += (self.method("memory", memory=True),)
        model = SimpleNamespace(device=torch.device("cpu"), base_model=torch.nn.Identity())
        return Bench(model, Letters(), made, set(prompts) & {"edit"}, methods, **options)


WORDS = {"question": ["abcdefgh", "hgfedcbaxy"], "edit": [f"{word}ABCDEFGH" for word in "abcdefghij"]}


def test_methods_take_turns_and_none_is_asked_for_a_loop(tmp_path: Path) -> None:
    script = Scripted()
    bench = script.bench(WORDS, max_new_tokens=60, repeats=2)
    journal, told = Journal(tmp_path / "j", SETTINGS), []
    task.run(bench, journal, lambda: told.append(1))
    assert len(told) == bench.steps == 12 + 2 + 2 * (12 + 12 + 1)
    # The prompt is written again and again: the third repeat of its first eight letters ends the answer.
    references = {line["prompt"]: line for line in journal.of_kind("reference")}
    assert [len(references[p]["tokens"]) for p in ("abcdefgh", "hgfedcbaxy")] == [24, 28]
    assert [references[p]["left_out"] for p in ("abcdefgh", "hgfedcbaxy")] == [36, 32]
    assert next(call for call in script.log if call[1] == "abcdefgh") == ("plain", "abcdefgh", 60)
    timed = {limit for name, text, limit in script.log if text == "abcdefgh"} - {60, 8}
    assert timed == {24}
    line = journal.get(kind="answers", repeat=0, category="question", prompt="abcdefgh", second=False)
    assert line is not None and {name: len(a["tokens"]) for name, a in line["answers"].items()} == {
        "plain": 24,
        "ours": 24,
        "memory": 24,
    }
    assert all(answer["seconds"] > 0 and answer["difference"] is None for answer in line["answers"].values())
    firsts = [next(iter(line["answers"])) for line in journal.of_kind("answers") if not line["second"]]
    assert all(7 <= firsts.count(name) <= 9 for name in ("plain", "ours", "memory"))  # 24 lines, three methods


def test_the_memory_is_kept_for_a_category_and_a_repeat(tmp_path: Path) -> None:
    script = Scripted()
    journal = Journal(tmp_path / "j", SETTINGS)
    task.run(script.bench({"question": ["ab", "cd", "ef"], "code": ["gh"]}, repeats=2), journal)

    def calls(repeat: int, category: str, prompt: str, second: bool) -> float:
        line = journal.get(kind="answers", repeat=repeat, category=category, prompt=prompt, second=second)
        assert line is not None
        return line["answers"]["memory"]["accepted"]

    for repeat in (0, 1):  # the memory counts its calls, warm-ups included if there were any
        assert [calls(repeat, "question", p, False) for p in ("ab", "cd", "ef")] == [1, 2, 3]
        assert [calls(repeat, "question", p, True) for p in ("ab", "cd", "ef")] == [4, 5, 6]
        assert [calls(repeat, "code", "gh", second) for second in (False, True)] == [1, 2]
    second = journal.get(kind="answers", repeat=0, category="question", prompt="ab", second=True)
    assert second is not None and set(second["answers"]) == {"plain", "memory"}


@pytest.mark.parametrize("stop_at", [3, 20, 41, 70])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(stop_at: int, tmp_path: Path) -> None:
    def texts(journal: Journal) -> list[Any]:
        drop = ("seconds", "peak_memory_mb")
        lines = [line for kind in ("reference", "flips", "answers", "batch") for line in journal.of_kind(kind)]
        return [
            {**line, "answers": {n: {k: v for k, v in a.items() if k not in drop} for n, a in line["answers"].items()}}
            if "answers" in line
            else line
            for line in lines
        ]

    whole = Journal(tmp_path / "whole", SETTINGS)
    task.run(Scripted().bench(WORDS, repeats=1), whole)
    with pytest.raises(KeyboardInterrupt):
        task.run(Scripted(stop_at).bench(WORDS, repeats=1), Journal(tmp_path / "cut", SETTINGS))
    cut, again = Journal(tmp_path / "cut", SETTINGS), Scripted()
    done = len(cut.records)
    told: list[int] = []
    bench = again.bench(WORDS, repeats=1)
    task.run(bench, cut, lambda: told.append(1))
    assert texts(cut) == texts(whole) and len(told) == bench.steps
    assert len(whole.records) > done


def test_batches_hold_answers_of_similar_length_and_are_compared_row_by_row(tmp_path: Path) -> None:
    script = Scripted()
    bench = script.bench(WORDS, max_new_tokens=60, repeats=2)
    journal = Journal(tmp_path / "j", SETTINGS)
    task.run(bench, journal)
    first, second = journal.of_kind("batch")
    assert len(first["rows"]) == 8 and set(first["answers"]) == {"plain", "ours"}
    assert first["limit"] == min(len(r["tokens"]) for r in journal.of_kind("reference") if r["category"] == "edit")
    assert all(category == "edit" for category, _ in first["rows"])
    assert first["answers"]["ours"]["differences"] == [None] * 8
    assert "differences" not in second["answers"]["ours"]  # once is enough
    results = {result.method: result for result in task.batch_results(journal)}
    assert (results["ours"].rows, results["ours"].equal, results["ours"].right) == (8, 8, 8)


def test_the_shortest_answers_fill_no_batch() -> None:
    bench = Scripted().bench(WORDS)
    lengths = {("edit", str(n)): 5 * n for n in range(19)}
    one, two = _batches(bench, lengths)
    assert [name for _, name in one + two] == [str(n) for n in range(3, 19)]
    every = _batches(bench, lengths, rest=True)
    assert [len(names) for names in every] == [8, 8, 3] and every[0][0] == ("edit", "0")


def test_a_flip_is_counted_per_compared_token(tmp_path: Path) -> None:
    """Ours parts from the references in batches alone; behind the first token that differs nothing is compared."""
    script = Scripted()
    bench = script.bench(WORDS, max_new_tokens=60, repeats=1)

    def build(model: Any) -> Callable[[Any, int], list[Written]]:
        write = script.method("ours").build(model)

        def flipping(inputs: Any, limit: int) -> list[Written]:
            rows = write(inputs, limit)
            if len(rows) > 1:
                rows[1].tokens[5] += 1
            return rows

        return flipping

    flipping = Method("ours", build, batched=True)
    deficits = {"token_deficit": 1.0, "reference_deficit": 0.0, "largest_deficit": 1.0, "right": False}
    found = task.Difference(5, **deficits)  # type: ignore[arg-type]
    journal = Journal(tmp_path / "j", SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        judge = "benchmarks.speculation.measure.difference"
        patch.setattr(judge, lambda model, prompt, answer, reference: found if answer != reference else None)
        task.run(replace(bench, methods=(bench.methods[0], flipping)), journal)
    lengths = [length for line in journal.of_kind("flips") for length in line["lengths"]]
    assert [len(line["rows"]) for line in journal.of_kind("flips")] == [8, 4]  # every prompt, the rest too
    plain, ours = task.flip_results(journal)
    assert (plain.method, plain.rows, plain.flips, plain.per_10000) == ("plain", 12, 0, 0.0)
    assert plain.tokens == sum(lengths)
    assert (ours.rows, ours.flips, ours.wrong) == (12, 2, 2)
    assert ours.tokens == sum(lengths) - lengths[1] - lengths[9] + 2 * 6
    assert ours.per_10000 == pytest.approx(2e4 / ours.tokens)
