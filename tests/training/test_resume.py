"""Going on: only with the same recipe and data.

Catches: old weights behind a new tokenizer, with exit code 0; a harmless change that costs a run.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoint_for_tests import write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from hf_hybrid.training import recipe as recipes
from hf_hybrid.training.inputs import INPUTS, ResumeError
from hf_hybrid.training.tasks import Source, Task
from tests.recipes_for_tests import Change, contents, counting_task, put, run

CHANGED: dict[str, tuple[Change, str]] = {
    "seed": (lambda data: data.update(seed=4), "seed was 3 and is 4"),
    "size": (put("model", hidden_size=64), "model.hidden_size was 32 and is 64"),
    "default left": (put("model", rms_norm_eps=0.5), "model.rms_norm_eps was 1e-06 and is 0.5"),
    "batches": (put("batches", num_rows=72), "batches.num_rows was 64 and is 72"),
    "nested": (put("batches", block_lengths={2: 1}), r"batches.block_lengths was \{'4': 1\} and is \{'2': 1\}"),
    "rate": (put("training", other_learning_rate=1e-4), "training.other_learning_rate was 0.003 and is 0.0001"),
    "longer": (put("training", max_steps=3), "training.max_steps was 2 and is 3"),
    "shorter": (put("training", max_steps=1), "training.max_steps was 2 and is 1"),
    "two": (
        lambda data: (data.update(seed=5), put("training", warmup=9)(data)),
        "seed was 3 .*; training.warmup was 20",
    ),
}


@pytest.mark.parametrize("case", CHANGED)
def test_another_recipe_does_not_go_on(drawn: list[int], tmp_path: Path, case: str) -> None:
    change, message = CHANGED[case]
    run(tmp_path)
    before = contents(tmp_path / "runs")
    with pytest.raises(ResumeError, match=rf"checkpoint-2 was trained from something else: .*{message}.*--no-resume"):
        run(tmp_path, change)
    assert contents(tmp_path / "runs") == before
    drawn.clear()
    run(tmp_path, change, resume=False)
    assert drawn


UNCHANGED: dict[str, Change] = {
    "nothing": lambda data: None,
    "name": lambda data: data.update(name="renamed"),
    "generation": put("generation", max_new_tokens=9),
    "logging and saving": put("training", logging_steps=2, save_minutes=1, save_total_limit=3),
    "workers": put("training", dataloader_num_workers=1),
    "a default written out": lambda data: (put("training", warmup=20)(data), put("model", attention_bias=False)(data)),
    "a whole number as a fraction": put("training", warmup=20.0),
}


@pytest.mark.parametrize("case", UNCHANGED)
def test_what_the_weights_do_not_depend_on_may_change(drawn: list[int], tmp_path: Path, case: str) -> None:
    first = (run(tmp_path) / "model.safetensors").read_bytes()
    drawn.clear()
    again = run(tmp_path, UNCHANGED[case])
    assert drawn == [] and (again / "model.safetensors").read_bytes() == first


def test_max_steps_of_the_call_count(drawn: list[int], tmp_path: Path) -> None:
    run(tmp_path, max_steps=1)
    with pytest.raises(ResumeError, match=r"training.max_steps was 1 and is 2"):
        run(tmp_path)
    drawn.clear()
    run(tmp_path, max_steps=1)
    assert drawn == []


def test_a_checkpoint_that_does_not_say_is_refused(drawn: list[int], tmp_path: Path) -> None:
    run(tmp_path)
    inputs = tmp_path / "runs" / "checkpoint-2" / INPUTS
    for text in ("{", "[]", "{}", '{"recipe": []}'):
        inputs.write_text(text)
        with pytest.raises(ResumeError, match=r"does not say from which recipe and data .*--no-resume"):
            run(tmp_path)
    inputs.unlink()
    with pytest.raises(ResumeError, match="does not say"):
        run(tmp_path)


# Data, tokenizer, teacher.


def samples(path: Path, *texts: str) -> None:
    answer = "# T\n## Leaf\nthe leaves of a {}\n## Cup\nhot water, see Leaf\n"
    lines = [json.dumps({"prompt": f"p{n}", "answer": answer.format(text)}) for n, text in enumerate(texts)]
    path.write_text("\n".join(lines), encoding="utf-8")


WORDS = ("bush", "tree", "herb", "fern", "palm", "reed", "vine", "moss")


def on_lines(path: Path, **more: Any) -> Change:
    """The recipe on a file of samples."""

    def change(data: dict[str, Any]) -> None:
        data.update(task="jsonl", data={"jsonl": str(path), "vocab_size": 600, "held_out": 0.2, **more})
        data["batches"].update(num_rows=200, max_spans=12)

    return change


def test_other_data_do_not_go_on(tmp_path: Path) -> None:
    data = tmp_path / "own.jsonl"
    samples(data, *WORDS)
    run(tmp_path, on_lines(data))
    before = contents(tmp_path / "runs")
    # The same samples elsewhere, and another way of measuring, are the same data.
    data.rename(tmp_path / "moved.jsonl")
    data = tmp_path / "moved.jsonl"
    data.write_bytes(b"\n" + data.read_bytes() + b"\n\n")
    run(tmp_path, on_lines(data, open_answers=True))
    kept = contents(tmp_path / "runs")
    assert kept["tiny/model.safetensors"] == before["tiny/model.safetensors"]
    samples(data, *WORDS[:-1], "rush")  # as long as before
    with pytest.raises(ResumeError, match=r"something else: the data are others .*; the tokenizer is another"):
        run(tmp_path, on_lines(data))
    samples(data, *WORDS, "rush")
    with pytest.raises(ResumeError, match=r"the data are others \(then 6 to train on, 2 held .*; now 7 to train on"):
        run(tmp_path, on_lines(data))
    samples(data, *reversed(WORDS))
    with pytest.raises(ResumeError, match="the data are others"):
        run(tmp_path, on_lines(data))
    samples(data, *WORDS)
    with pytest.raises(ResumeError, match=r"data.held_out was 0.2 and is 0.3"):
        run(tmp_path, on_lines(data, held_out=0.3))
    assert contents(tmp_path / "runs") == kept


def test_another_tokenizer_does_not_go_on(drawn: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path)

    def task(source: Source) -> Task:
        made = counting_task([])(source)
        text = made.tokenizer.backend_tokenizer.to_str().replace('"w7":7', '"other":7')
        special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
        other = PreTrainedTokenizerFast(
            tokenizer_object=type(made.tokenizer.backend_tokenizer).from_str(text), **special
        )
        return Task(other, made.draw, made.write_test_set)

    monkeypatch.setitem(recipes.TASKS, "counting", task)
    with pytest.raises(ResumeError, match="something else: the tokenizer is another"):
        run(tmp_path)


def test_another_teacher_does_not_go_on(tmp_path: Path) -> None:
    teacher = write_checkpoint(tmp_path / "teacher")
    data = tmp_path / "own.jsonl"
    samples(data, *WORDS)

    def change(teacher_folder: Path) -> Change:
        def on_teacher(fields: dict[str, Any]) -> None:
            on_lines(data)(fields)
            fields["teacher"] = {"checkpoint": str(teacher_folder), "share": 0.5}
            fields["model"]["max_position_embeddings"] = 512

        return on_teacher

    run(tmp_path, change(teacher))
    shutil.copytree(teacher, tmp_path / "copy")
    run(tmp_path, change(tmp_path / "copy"))  # the same one elsewhere
    weights = load_file(teacher / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ResumeError, match="something else: the weights of the teacher are others"):
        run(tmp_path, change(teacher))
    (teacher / "model.safetensors").write_bytes((teacher / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match="teacher: cannot load"):
        run(tmp_path, change(teacher))


def test_a_recipe_says_what_its_checkpoints_hold(drawn: list[int], tmp_path: Path) -> None:
    run(tmp_path)
    said = json.loads((tmp_path / "runs" / "checkpoint-2" / INPUTS).read_text())
    assert said["recipe"]["model.hidden_size"] == 32 and said["recipe"]["training.max_steps"] == 2
    assert not {"training.logging_steps", "training.use_cpu", "generation.do_sample", "name"} & set(said["recipe"])
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["training"]["logging_steps"] == 1
