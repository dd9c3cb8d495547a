"""``hf-hybrid plan`` and ``generate --plan``: a plan goes out as JSON and comes back.

Catches: numbers of parts that count from 0 on one side and from 1 on the other, labels that lose their line end, texts
that are kept when they should be written, edits that are silently ignored.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_for_tests import read_checkpoint

from hf_hybrid import Plan, Span
from hf_hybrid.cli.command import UsageError
from hf_hybrid.cli.plan import as_json, from_json, plans_to_write, read_plan_file
from tests.cli_for_tests import call

PART: dict[str, Any] = {"label": "Area", "length": 16, "depends": []}


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return read_checkpoint(folder, torch.float32)[1]


def ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_json_and_back(tokenizer: Any) -> None:
    spans = (
        Span(ids(tokenizer, "Area\n"), 16, (), ids(tokenizer, "1 sq km\n")),
        Span(ids(tokenizer, "Forest\n"), 8, (0,)),
    )
    plans = [Plan(spans, ids(tokenizer, "Title\n")), Plan(spans[:1])]
    data = json.loads(json.dumps(as_json(plans, tokenizer)))
    assert data["rounds"][0]["lead"] == "Title\n"
    assert data["rounds"][0]["parts"][1] == {"label": "Forest\n", "length": 8, "depends": [1]}
    assert from_json(data, tokenizer) == plans


def test_plan_prints_what_generate_carries_out(folder: Path, tmp_path: Path) -> None:
    common = ("--model", folder, "Area: 1", "--max-new-tokens", 60)
    printed = json.loads(call("plan", *common).stdout)
    assert set(printed) == {"rounds"} and all("text" not in p for r in printed["rounds"] for p in r["parts"])
    path = tmp_path / "plan.json"
    edited = {"rounds": [{"lead": "Area", "parts": [PART, {**PART, "text": "Forest", "depends": [1]}]}]}
    path.write_text(json.dumps(edited))
    report = json.loads(call("generate", *common, "--plan", path, "--json").stdout)
    assert report["text"].startswith("AreaArea") and report["text"].rstrip().count("Forest") >= 1
    assert [(p["length"], p["depends"]) for p in report["plan"]["rounds"][0]["parts"]] == [(16, []), (16, [1])]
    spans = report["report"]["spans"]
    assert spans[1]["ended"] == "given" and spans[1]["passes"] == 0 and spans[0]["passes"] > 0


def test_only_reopens_a_part_and_what_depends_on_it(tmp_path: Path, tokenizer: Any) -> None:
    texts = [{**PART, "text": "Area"}, {**PART, "text": "Area", "depends": [1]}, {**PART, "text": "Area"}]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"rounds": [{"parts": texts}, {"parts": texts}]}))

    def opened(only: str | None) -> list[list[bool]]:
        return [
            [span.text is None for span in plan.spans] for plan in plans_to_write(read_plan_file(path), only, tokenizer)
        ]

    kept = [False, False, False]
    assert opened(None) == [kept, kept]
    assert opened("1") == [[True, True, False], kept] and opened("3") == [[False, False, True], kept]
    assert opened("2.2") == [kept, [False, True, False]]
    for only, message in (("4", "no part 4"), ("3.1", "2 rounds"), ("x", "number of a part"), ("0", "no part 0")):
        with pytest.raises(UsageError, match=message):
            opened(only)
    path.write_text(json.dumps({"rounds": [{"parts": [PART, PART]}]}))
    with pytest.raises(UsageError, match="has no texts"):
        opened("1")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "a plan has the form"),
        ({"rounds": [{}]}, "round 1 has no parts"),
        ({"rounds": [{"parts": [{"length": 3}]}]}, "round 1, part 1 needs a label"),
        ({"rounds": [{"parts": ["Area"]}]}, "round 1, part 1 needs a label"),
        ({"rounds": [{"parts": [{**PART, "size": 3}]}]}, "not \\['size'\\]"),
        ({"rounds": [{"parts": [{**PART, "length": "3"}]}]}, "length is a number"),
        ({"rounds": [{"parts": [{**PART, "depends": ["a"]}]}]}, "depends a list of part numbers"),
        ({"rounds": [{"parts": [{**PART, "text": 3}]}]}, "text must be a text"),
        ({"rounds": [{"parts": [PART], "lead": 3}]}, "lead must be a text"),
    ],
)
def test_a_wrong_plan_names_the_place(data: Any, message: str, tokenizer: Any) -> None:
    with pytest.raises(UsageError, match=message):
        from_json(data, tokenizer)


def test_options_that_do_not_go_together(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("{")
    for arguments, message in (
        (["--only", 1], "--only needs --plan"),
        (["--plan", path, "--strategy", "autoregressive"], "--plan needs --strategy planned_diffusion"),
        (["--plan", path], "not JSON"),
        (["--plan", path, "--input", path, "--output", path], "leave --json and --plan out"),
    ):
        prompt = [] if "--output" in arguments else ["Area: 1"]
        assert message in call("generate", "--model", folder, *prompt, *arguments, code=2).stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100000, "not JSON"),
        (b"\xff\xfe", "not JSON"),
        ({"rounds": [{"parts": [PART]}], "round": 1}, "a plan has the form"),
        ({"rounds": [{"parts": [PART], "leed": "x"}]}, "round 1 may have lead and parts, not ['leed']"),
        ({"rounds": [{"parts": [{**PART, "length": True}]}]}, "length is a number"),
        ({"rounds": [{"parts": [{**PART, "length": float("nan")}]}]}, "length is a number"),
        ({"rounds": [{"parts": [{**PART, "length": -3}]}]}, "length -3, outside 1 to"),
        ({"rounds": [{"parts": [{**PART, "length": 10**30}]}]}, "outside 1 to"),
        ({"rounds": [{"parts": [{**PART, "depends": [2]}, {**PART, "depends": [1]}]}]}, "form a cycle"),
        ({"rounds": [{"parts": [{**PART, "depends": [1]}]}]}, "form a cycle"),
        ({"rounds": [{"parts": [{**PART, "depends": [7]}]}]}, "depends on part 7; the round has parts 1 to 1"),
        ({"rounds": [{"parts": [{**PART, "label": "<topic>"}]}]}, "holds a control token"),
        ({"rounds": [{"parts": [{**PART, "label": ""}]}]}, "has no label"),
        ({"rounds": [{"parts": [{**PART, "text": "<sync/>"}]}]}, "holds a control token"),
        ({"rounds": [{"parts": [PART] * 17}]}, "more than max_parts=16"),
        ({"rounds": [{"parts": [PART] * 100000}]}, "no plan may have more than 256"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_one_line(
    content: Any, message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer, *_ = read_checkpoint(folder, torch.float32)
    monkeypatch.setattr(sys.modules["hf_hybrid.cli.generate"], "load", lambda *a: (model, tokenizer, folder))
    path = tmp_path / "plan.json"
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(raw if isinstance(raw, bytes) else json.dumps(raw).encode())
    result = call("generate", "Area: 1", "--plan", path, code=2)
    assert message in result.stderr and len(result.stderr.splitlines()) == 1 and result.stdout == ""
    path.write_text(json.dumps({"rounds": [{"parts": [{**PART, "text": "Forest"}]}]}))
    assert "Forest" in call("generate", "Area: 1", "--plan", path).stdout  # the model goes on


def test_parts_move_behind_what_they_depend_on(tokenizer: Any) -> None:
    parts = [{**PART, "depends": [2]}, {**PART, "label": "Forest"}]
    (plan,) = plans_to_write({"rounds": [{"parts": parts}]}, None, tokenizer)
    assert [(span.label, span.depends) for span in plan.spans] == [
        (ids(tokenizer, "Forest"), ()),
        (ids(tokenizer, "Area"), (0,)),
    ]
