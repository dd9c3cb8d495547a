"""``hf-hybrid generate --output`` and files that are not what they should be: nothing that they hold is lost.

Catches: a foreign file that is emptied because it has no line feed; answers appended to the file of the prompts, by two
runs at a time, or with other settings than those before them; one bad prompt that blocks a job; an answer that is
written twice because its line feed is missing; a model that is loaded for nothing.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hf_hybrid import locks
from hf_hybrid.cli.command import UsageError
from hf_hybrid.cli.job_files import ADDED, differences
from hf_hybrid.cli.locked import locked
from hf_hybrid.config import SETTING_NAMES
from tests.cli_for_tests import call

RECORDS = [{"id": n, "prompt": f"Area: {n} sq km", "note": None} for n in range(4)]
OPTIONS = ("--max-new-tokens", 6, "--do-sample", "--seed", 3, "--batch-size", 2)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def answer(folder: Path, prompts: Path, output: object, *more: object, code: int = 0) -> Any:
    named = ("generate", "--model", folder, "--input", prompts, "--output", output)
    return call(*named, *(more or OPTIONS), code=code)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


# What follows the last line feed.


FOREIGN = {
    "a document without a line feed": b'{"name":"package","dependencies":{"a":"1"}}',
    "one that begins like a prompt": b'{"id": 0, "prompt": "Area: 7',
    "a prompt with somebody's own answer": b'{"id": 0, "prompt": "Area: 0 sq km", "note": null, "text": "mine"}',
    "half of one": b'{"id": 0, "prompt": "Area: 0 sq km", "note": null, "text": "mi',
    "a text": "Zeilen ohne Ende \u2026".encode(),
    "bytes": bytes(range(256)).replace(b"\n", b""),
    "zeros": b"\0" * 4096,
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_file_of_others_is_left_byte_for_byte(folder: Path, prompts: Path, content: bytes) -> None:
    output = prompts.parent / "out.jsonl"
    output.write_bytes(content)
    said = answer(folder, prompts, output, code=2).stderr
    assert output.read_bytes() == content
    assert len(said.splitlines()) == 1 and str(output) in said and "another file" in said


def test_every_beginning_of_the_next_line_is_cut_off_and_written_again(folder: Path, prompts: Path) -> None:
    whole = prompts.parent / "whole.jsonl"
    answer(folder, prompts, whole)
    content = whole.read_bytes()
    second, third = (content.replace(b"\n", b"\0", n).index(b"\n") + 1 for n in (0, 1))
    fields = json.dumps(RECORDS[1]).encode()
    sizes = {1, 5, len(fields) - 1, len(fields) + 4, content.index(b'"text": ', second) + 9 - second}
    for size in sorted(sizes):
        assert size < third - second - 1
        cut = prompts.parent / f"cut{size}.jsonl"
        cut.write_bytes(content[: second + size])
        answer(folder, prompts, cut)
        assert [a["text"] for a in lines(cut)] == [a["text"] for a in lines(whole)]
        assert cut.read_bytes()[:second] == content[:second]


def test_an_answer_that_lacks_its_line_feed_alone_is_kept(folder: Path, prompts: Path) -> None:
    output = prompts.parent / "out.jsonl"
    answer(folder, prompts, output)
    content = output.read_bytes()
    for ends in (1, len(RECORDS)):
        output.write_bytes(b"\n".join(content.split(b"\n")[:ends]))
        assert f"({ends} were there before)" in answer(folder, prompts, output).stderr
        assert [a["text"] for a in lines(output)] == [json.loads(a)["text"] for a in content.splitlines()]
        assert output.read_bytes().startswith(b"\n".join(content.split(b"\n")[:ends]) + b"\n")


def test_what_stands_behind_the_last_answer_is_left(folder: Path, prompts: Path) -> None:
    output = prompts.parent / "out.jsonl"
    answer(folder, prompts, output)
    output.write_bytes(output.read_bytes() + b"my notes")
    before = output.read_bytes()
    assert "is not the beginning of answer 5" in answer(folder, prompts, output, code=2).stderr
    assert output.read_bytes() == before


# Which file.


@pytest.mark.parametrize("kind", ["same", "relative", "link", "hard link", "link to the input"])
def test_the_file_of_the_prompts_is_no_file_of_answers(
    folder: Path, prompts: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = prompts, prompts
    other = prompts.parent / "other.jsonl"
    if kind == "relative":
        monkeypatch.chdir(prompts.parent)
        (prompts.parent / "x").mkdir()
        output = Path("x/../prompts.jsonl")
    elif kind == "link":
        other.symlink_to(prompts)
        output = other
    elif kind == "hard link":
        other.hardlink_to(prompts)
        output = other
    elif kind == "link to the input":
        other.symlink_to(prompts)
        source = other
    for content in (prompts.read_bytes(), b'{"prompt": "no line feed"}'):
        prompts.write_bytes(content)
        assert "is the file of the prompts" in answer(folder, source, output, code=2).stderr
        assert prompts.read_bytes() == content


def test_a_copy_of_the_prompts_is_no_file_of_answers(folder: Path, prompts: Path) -> None:
    output = prompts.parent / "out.jsonl"
    shutil.copy(prompts, output)
    assert "does not say with which settings" in answer(folder, prompts, output, code=2).stderr
    assert output.read_bytes() == prompts.read_bytes()


def test_two_runs_at_a_time_are_one_too_many(folder: Path, prompts: Path) -> None:
    output = prompts.parent / "out.jsonl"
    link = prompts.parent / "link.jsonl"
    link.symlink_to(output)
    with locked(output):
        for name in (output, link):
            assert "another run is writing to" in answer(folder, prompts, name, code=2).stderr
            assert output.read_bytes() == b""
    answer(folder, prompts, link)
    assert len(lines(output)) == len(RECORDS)


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    program = "import sys, time; from pathlib import Path; from hf_hybrid.cli.locked import locked\n"
    program += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", program, output], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="another run"), locked(output):
            pass
        holder.send_signal(signal.SIGKILL)
    with locked(output) as file:
        file.write(b"mine")
    assert output.read_bytes() == b"mine"


def test_a_file_that_cannot_be_locked_is_written_and_it_is_said(
    folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locks.FileLock, "acquire", refused)
    output = prompts.parent / "out.jsonl"
    assert "cannot be locked" in answer(folder, prompts, output).stderr
    assert len(lines(output)) == len(RECORDS)


def test_nothing_is_left_of_a_run_that_wrote_nothing(folder: Path, prompts: Path) -> None:
    output = prompts.parent / "out.jsonl"
    answer(prompts.parent, prompts, output, code=1)  # no model
    assert not output.exists()
    output.touch()
    answer(prompts.parent, prompts, output, code=1)
    assert output.read_bytes() == b""  # it was there before


# With which settings.


CHANGED = {
    "strategy": (["--strategy", "autoregressive"], 'strategy: "planned_diffusion", now "autoregressive"'),
    "a setting": ([*OPTIONS, "--window-length", 4], "window_length: unset, now 4"),
    "a setting is off": ([*OPTIONS, "--span-fallback-confidence", "none"], "span_fallback_confidence: unset, now null"),
    "max_new_tokens": (["--max-new-tokens", 7], "max_new_tokens: 6, now 7"),
    "sampling": (["--max-new-tokens", 6], "do_sample: true, now false"),
    "temperature": ([*OPTIONS, "--temperature", 0.5], "temperature: unset, now 0.5"),
    "seed": ([*OPTIONS, "--seed", 4], "seed: 3, now 4"),
    "no seed": (["--do-sample", "--max-new-tokens", 6], "seed: 3, now unset"),
    "chat": ([*OPTIONS, "--chat"], "chat: false, now true"),
    "dtype": ([*OPTIONS, "--dtype", "bfloat16"], 'dtype: "float32", now "bfloat16"'),
}


@pytest.fixture(scope="module")
def begun(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts beside two of four answers."""
    path = tmp_path_factory.mktemp("begun") / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS[:2]))
    answer(folder, path, path.parent / "out.jsonl")
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


@pytest.mark.parametrize(("options", "message"), CHANGED.values(), ids=CHANGED)
def test_other_settings_are_named_and_change_nothing(
    folder: Path, begun: Path, options: list[object], message: str
) -> None:
    output = begun.parent / "out.jsonl"
    before = output.read_bytes()
    said = answer(folder, begun, output, *options, code=2).stderr
    assert message in said and "was written with other settings" in said and output.read_bytes() == before


def test_another_model_is_refused_and_the_same_one_elsewhere_is_not(folder: Path, begun: Path, tmp_path: Path) -> None:
    shutil.copy(begun, tmp_path)
    output, elsewhere = tmp_path / "moved.jsonl", tmp_path / "model"
    shutil.copy(begun.parent / "out.jsonl", output)
    shutil.copytree(folder, elsewhere)
    weights = elsewhere / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    said = answer(elsewhere, tmp_path / begun.name, output, code=2).stderr
    assert "the files of the model" in said and f'model: "{folder}"' not in said
    weights.write_bytes(content)
    answer(elsewhere, tmp_path / begun.name, output, *OPTIONS, "--threads", 1, "--batch-size", 1)
    assert len(lines(output)) == len(RECORDS)


def test_names_of_settings_are_told_apart() -> None:
    taken = {"model", "files", "dtype", "chat", "strategy", "max_new_tokens", "do_sample", "temperature"}
    assert not taken & set(SETTING_NAMES)
    assert differences({"model": "a", "seed": None}, {"model": "b"}) == ['model: "a", now "b"', "seed: null, now unset"]
    assert differences({"model": "a", "files": "1"}, {"model": "b", "files": "1"}) == []


# Prompts that cannot be answered.


LATER = {"messages": [{"role": "user", "content": "Area: 1"}, {"role": "assistant", "content": None}]}
NULL = {"messages": [{"role": "user", "content": None}]}


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("bad", "message"), [(NULL, "cannot read"), (LATER, "cannot read")])
def test_a_prompt_that_fails_gets_its_error_and_the_others_their_text(
    folder: Path, tmp_path: Path, bad: dict[str, Any], message: str, batch_size: int
) -> None:
    path, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    good = tmp_path / "good.jsonl"
    options = (*OPTIONS, "--batch-size", batch_size)
    good.write_text("".join(json.dumps(record) + "\n" for record in (RECORDS[0], RECORDS[0], RECORDS[1], RECORDS[2])))
    answer(folder, good, tmp_path / "expected.jsonl", *options)
    every = [bad, RECORDS[0], RECORDS[1], bad | {"text": "mine", "error": "mine"}, RECORDS[2], bad]
    path.write_text("".join(json.dumps(record) + "\n" for record in every))
    said = answer(folder, path, output, *options, code=1).stderr
    assert f"3 prompts of {path} have no answer" in said.splitlines()[-1]
    found = lines(output)
    assert [a["text"] is None for a in found] == [True, False, False, True, False, True]
    assert all(message in a["error"] for a in found if a["text"] is None)
    assert found[1]["error"] is None and found[1]["text"] == lines(tmp_path / "expected.jsonl")[1]["text"]
    assert list(found[3]) == [*bad, *ADDED]
    before = output.read_bytes()
    again = answer(folder, path, output, *options, code=1)  # it is still not done
    assert again.stderr.splitlines()[-1] == said.splitlines()[-1] and output.read_bytes() == before


def test_a_chat_without_a_template_is_wrong_usage_for_all_and_an_error_for_one(folder: Path, tmp_path: Path) -> None:
    plain = shutil.copytree(folder, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    path, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    path.write_text('"Area: 1"\n{"messages": [{"role": "user", "content": "Area: 1"}]}\n')
    assert "no chat template" in answer(plain, path, output, *OPTIONS, "--chat", code=2).stderr
    assert not output.exists()
    answer(plain, path, output, code=1)
    assert [bool(a["error"]) for a in lines(output)] == [False, True]


def test_lines_that_are_none_and_prompts_that_fail_are_both_counted(folder: Path, tmp_path: Path) -> None:
    path, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    path.write_text("\n".join([json.dumps(NULL), "[]", '"Area: 1"']))
    last = answer(folder, path, output, code=1).stderr.splitlines()[-1]
    assert "1 lines of" in last and "1 prompts of" in last and len(lines(output)) == 2


# An impatient user.


def test_a_job_that_is_done_loads_no_model(folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = prompts.parent / "out.jsonl"
    answer(folder, prompts, output)
    before = output.read_bytes()
    monkeypatch.setattr("hf_hybrid.cli.jobs.load", lambda *a: pytest.fail("loaded"))
    assert "0 answers" in answer(folder, prompts, output).stderr and output.read_bytes() == before


def test_numbers_that_are_none_are_found_again(folder: Path, tmp_path: Path) -> None:
    path, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"prompt": "Area: 1", "score": NaN, "hf": {"b": 1, "a": [true, 1, 1.0]}}\n')
    answer(folder, path, output)
    assert "(1 were there before)" in answer(folder, path, output).stderr


@pytest.mark.parametrize("content", [b"", b"\n", b"\r\n \r\n", b"\xef\xbb\xbf"])
def test_no_prompts_are_wrong_usage(folder: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    assert "holds no prompts" in answer(folder, path, tmp_path / "out.jsonl", code=2).stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_one_line_and_lines_that_end_as_on_windows(folder: Path, tmp_path: Path) -> None:
    path, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    path.write_bytes(b'"Area: 1"\r\n\r\n{"prompt": "Area: 2"}')
    answer(folder, path, output)
    assert [a["prompt"] for a in lines(output)] == ["Area: 1", "Area: 2"]
    output.write_bytes(output.read_bytes().replace(b"\n", b"\r\n"))  # an editor
    assert "(2 were there before)" in answer(folder, path, output).stderr


@pytest.mark.parametrize("target", ["folder", "/dev/null", "/dev/full", "", "nowhere/out.jsonl"])
def test_what_is_no_file_is_no_output(folder: Path, prompts: Path, target: str) -> None:
    output = prompts.parent / target if target in ("folder", "nowhere/out.jsonl") else target
    (prompts.parent / "folder").mkdir()
    said = answer(folder, prompts, output, code=2).stderr
    assert len(said.splitlines()) == 1 and ("ordinary file" in said or "no such folder" in said)


@pytest.mark.parametrize("target", ["folder", "nowhere.jsonl"])
def test_what_is_no_file_is_no_input(folder: Path, tmp_path: Path, target: str) -> None:
    (tmp_path / "folder").mkdir()
    said = answer(folder, tmp_path / target, tmp_path / "out.jsonl", code=1).stderr
    assert len(said.splitlines()) == 1 and target in said and not (tmp_path / "out.jsonl").exists()


def test_ctrl_c_keeps_what_was_answered(folder: Path, tmp_path: Path) -> None:
    path, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(f'"Area: {n} sq km"\n' for n in range(2000)))
    program = "from hf_hybrid.cli import main; main()"
    arguments = ["generate", "--model", folder, "--input", path, "--output", output, *map(str, OPTIONS)]
    with subprocess.Popen([sys.executable, "-c", program, *arguments], stderr=subprocess.PIPE, text=True) as run:
        while not (output.exists() and output.read_bytes().count(b"\n") >= 3) and run.poll() is None:
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        said = run.communicate()[1]
    assert run.returncode == 130 and said.splitlines()[-1] == "interrupted"
    content = output.read_bytes()
    found = lines(output)
    assert content.endswith(b"\n") and f"{len(found)} of 2000 answers are in {output}" in said
    assert [a["prompt"] for a in found] == [f"Area: {n} sq km" for n in range(len(found))] and len(found) >= 3
    path.write_text("".join(f'"Area: {n} sq km"\n' for n in range(len(found) + 2)))
    answer(folder, path, output)
    assert output.read_bytes().startswith(content) and len(lines(output)) == len(found) + 2
