"""``hf-hybrid generate --output``: answers in the order of their prompts, whatever the batch size and however often the
run was interrupted.

Catches: answers written in the order in which they finish, a line that an interrupt cut in two and that stays, answers
to other prompts that are taken for ours, seeds that start anew after an interrupt, fields of the input that are lost.
"""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_for_tests import read_checkpoint
from rich.console import Console

import hf_hybrid
from hf_hybrid.cli.job_files import Job, plan_job, read_prompts, write_answers
from hf_hybrid.cli.jobs import answers_of
from tests.cli_for_tests import call

generate_module = sys.modules["hf_hybrid.cli.generate"]  # the package has a command of this name
RECORDS = [{"id": n, "prompt": f"Area: {n} sq km" + "\nForest: 2" * (n % 3)} for n in range(7)]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in RECORDS) + "\n\n")
    return path


def answer(folder: Path, prompts: Path, name: str, *more: object, code: int = 0) -> Any:
    output = prompts.parent / name
    options = ("--max-new-tokens", 12, "--do-sample", "--seed", 3, *more)
    return call("generate", "--model", folder, "--input", prompts, "--output", output, *options, code=code)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_stand_in_order_and_equal_single_calls(folder: Path, prompts: Path) -> None:
    model, tokenizer, *_ = read_checkpoint(folder, torch.float32)
    expected = []
    for number, record in enumerate(RECORDS):
        inputs = tokenizer(record["prompt"], return_tensors="pt")
        ids = model.generate(**inputs, strategy="planned_diffusion", max_new_tokens=12, do_sample=True, seed=3 + number)
        expected.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    for batch_size in (1, 3, 8):
        result = answer(folder, prompts, f"{batch_size}.jsonl", "--batch-size", batch_size)
        assert "7 answers in" in result.stderr and "tokens/s" in result.stderr
        written = lines(prompts.parent / f"{batch_size}.jsonl")
        assert [{"id": a["id"], "prompt": a["prompt"]} for a in written] == RECORDS
        assert [a["text"] for a in written] == expected
        assert all(a["report"]["num_forwards"] > 0 for a in written)


@pytest.mark.parametrize("after", [0, 1, 4])
def test_an_interrupted_run_goes_on(folder: Path, prompts: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(folder, prompts, "whole.jsonl")
    real = hf_hybrid.generate_many

    def interrupted(*arguments: Any, **options: Any) -> Iterator[Any]:
        for number, found in enumerate(real(*arguments, **options)):
            if number == after:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(hf_hybrid, "generate_many", interrupted)
    result = answer(folder, prompts, "cut.jsonl", "--batch-size", 1, code=130)
    assert f"{after} of 7 answers are in" in result.stderr and "goes on from there" in result.stderr
    monkeypatch.undo()
    output = prompts.parent / "cut.jsonl"
    assert (len(lines(output)) if output.exists() else 0) == after
    with output.open("a") as file:
        file.write(json.dumps(RECORDS[after], ensure_ascii=False)[:-5])  # the next line was cut in two
    result = answer(folder, prompts, "cut.jsonl", "--batch-size", 2)
    assert [a["text"] for a in lines(output)] == [a["text"] for a in lines(prompts.parent / "whole.jsonl")]
    before = output.read_bytes()
    result = answer(folder, prompts, "cut.jsonl")
    assert "0 answers" in result.stderr and output.read_bytes() == before


def test_strings_and_chats_are_prompts_too(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text('"Area: 1"\n{"messages": [{"role": "user", "content": "Area: 1"}]}\n')
    answer(folder, path, "out.jsonl")
    text, chat = lines(tmp_path / "out.jsonl")
    assert text["prompt"] == "Area: 1" and chat["messages"][0]["content"] == "Area: 1"
    assert "text" in text and "text" in chat


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('\n{"prompt": ', "line 2: not JSON"),
        ('{"text": "a"}\n', 'line 1: give {"prompt": "..."}'),
        ('{"prompt": " "}\n', "line 1: the prompt must be a text"),
        ('{"messages": [1]}\n', "line 1: messages must be a list"),
        ('{"messages": []}\n', "line 1: messages must be a list"),
        ('{"messages": [{"role": 5, "content": "a"}]}\n', "line 1: messages must be a list"),
        ('{"messages": [{"role": "user", "content": 5}]}\n', "line 1: messages must be a list"),
        ('{"prompt": "half a sign: \\ud800"}\n', "line 1: holds what cannot be written as UTF-8"),
        ("\n", "holds no prompts"),
    ],
)
def test_a_wrong_prompt_is_found_before_the_run(folder: Path, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "wrong.jsonl"
    path.write_text(content)
    assert message in answer(folder, path, "out.jsonl", code=2).stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_a_line_that_is_no_text_is_named_and_the_rest_goes_on(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "bytes.jsonl"
    path.write_bytes(b'\xef\xbb\xbf"Area: 1"\r\n{"prompt": "Area: \xff"}\r\n"Area: 3"\r\n')
    result = answer(folder, path, "out.jsonl", code=1)
    assert "line 2: not UTF-8" in result.stderr and "1 lines of" in result.stderr
    assert [a["prompt"] for a in lines(tmp_path / "out.jsonl")] == ["Area: 1", "Area: 3"]


@pytest.mark.parametrize("record", [{"prompt": "Area: 1\u2028\u0085Forest: 2"}, {"prompt": "Area: 1", "text": "mine"}])
def test_answers_to_any_record_are_found_again(folder: Path, tmp_path: Path, record: dict[str, str]) -> None:
    path = tmp_path / "prompts.jsonl"
    both = [json.dumps(r, ensure_ascii=False) + "\n" for r in (record, {"prompt": "Area: 2"})]
    path.write_text("".join(both), encoding="utf-8")
    answer(folder, path, "out.jsonl")
    before = (tmp_path / "out.jsonl").read_bytes()
    assert "(2 were there before)" in " ".join(answer(folder, path, "out.jsonl").stderr.split())
    assert (tmp_path / "out.jsonl").read_bytes() == before and before.count(b"\n") == 2


def test_answers_to_other_prompts_are_not_touched(folder: Path, prompts: Path) -> None:
    output = prompts.parent / "other.jsonl"
    for content, message in (
        ('{"id": 5, "prompt": "x", "text": "y"}\n', "line 1 is no answer to prompt 1"),
        ("hello\n", "line 1 is no answer to prompt 1"),
        (json.dumps({**RECORDS[0], "text": "y"}) + "\n", "line 1 does not say with which settings"),
    ):
        output.write_text(content)
        assert message in answer(folder, prompts, "other.jsonl", code=2).stderr
        assert output.read_text() == content


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hello", "--output", "x"], "--output needs --input"),
        (["--input", "{prompts}", "--output", "x", "--json"], "leave --json and"),
        (["--input", "{prompts}", "--output", "x", "--strategy", "host"], "needs a strategy"),
        (["--input", "{prompts}", "--output", "/nowhere/x"], "no such folder"),
    ],
)
def test_options_that_do_not_go_together(folder: Path, prompts: Path, arguments: list[str], message: str) -> None:
    named = [argument.format(prompts=prompts) for argument in arguments]
    assert message in call("generate", "--model", folder, *named, code=2).stderr


def test_a_broken_line_is_named_and_the_rest_goes_on(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"id": 1, "prompt": "Area: 1"}\n{"prompt": \n\n[3]\n{"id": 2, "prompt": "Area: 2"}\n')
    for _ in range(2):  # the second run finds everything answered, and says the same
        result = answer(folder, path, "out.jsonl", code=1)
        assert "line 2: not JSON" in result.stderr and "line 4: give" in result.stderr
        assert "2 lines of" in result.stderr.splitlines()[-1]
        assert [a["id"] for a in lines(tmp_path / "out.jsonl")] == [1, 2]


class Full:
    """A file on a disk that takes ``room`` more lines and half of the next."""

    def __init__(self, file: Any, room: int):
        self.file, self.room = file, room

    def write(self, line: bytes) -> None:
        self.room -= 1
        if self.room < 0:
            self.file.write(line[: len(line) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        self.file.write(line)

    def flush(self) -> None:
        self.file.flush()

    def truncate(self, size: int) -> None:
        self.file.truncate(size)


def test_a_full_disk_loses_nothing_and_the_model_goes_on(folder: Path, prompts: Path) -> None:
    answer(folder, prompts, "whole.jsonl")
    model, tokenizer, *_ = read_checkpoint(folder, torch.float32)
    output, options = prompts.parent / "full.jsonl", {"max_new_tokens": 12, "do_sample": True, "seed": 3}
    options |= {"strategy": "planned_diffusion"}
    said = Console(file=io.StringIO(), width=200)

    def write(room: int) -> Job:
        with output.open("a+b") as file:
            job = plan_job(read_prompts(prompts)[0], output, file, options)
            answers = answers_of(model, tokenizer, job, False, 2, options)
            write_answers(job, Full(file, room), answers, said)  # type: ignore[arg-type]
        return job

    with pytest.raises(OSError, match="No space left"):
        write(2)
    assert "2 of 7 answers are in" in said.file.getvalue()  # type: ignore[attr-defined]
    assert len(output.read_text().splitlines()) == 3  # two, and half a line
    assert write(99).done == 2  # the same model
    assert [a["text"] for a in lines(output)] == [a["text"] for a in lines(prompts.parent / "whole.jsonl")]


def test_answers_go_into_an_ordinary_file(folder: Path, prompts: Path) -> None:
    for target in ("/dev/full", prompts.parent):
        arguments = ("generate", "--model", folder, "--input", prompts, "--output", target)
        assert "ordinary file" in call(*arguments, code=2).stderr


@pytest.mark.parametrize("kind", ["full", "closed"])
def test_an_answer_that_cannot_be_printed_is_one_line(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = {"full": OSError(errno.ENOSPC, "No space left on device"), "closed": BrokenPipeError()}
    model, tokenizer, *_ = read_checkpoint(folder, torch.float32)
    monkeypatch.setattr(generate_module, "load", lambda *a: (model, tokenizer, folder))
    flags = ("generate", "Area: 5", "--max-new-tokens", 12)
    before = call(*flags).stdout

    def broken(*arguments: Any, **options: Any) -> None:
        raise faults[kind]

    with monkeypatch.context() as patch:
        patch.setattr("transformers.generation.streamers.print", broken, raising=False)
        patch.setattr(os, "dup2", lambda *a: None)  # the runner's own output stays open
        result = call(*flags, code=1)
    assert "Traceback" not in result.output and result.stdout == ""
    assert ("No space left" in result.stderr) == (kind == "full")
    assert call(*flags).stdout == before  # the model is as it was


def test_help_that_cannot_be_written_is_one_line() -> None:
    program = "from hf_hybrid.cli import main; main()"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", program, "--help"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error:") and len(done.stderr.splitlines()) == 1
