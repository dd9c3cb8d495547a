"""``hf-hybrid bench``, ``tune`` and ``demo`` on a tiny checkpoint, without a terminal.

Bugs these tests catch: numbers lost after Ctrl-C; a sweep over the test countries; a sweep that writes into the
checkpoint; settings that are kept though they lose something; tables wider than a terminal; a race that is timed while
it is drawn.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from hf_hybrid import evaluation
from hf_hybrid.cli.bench import group_table, kind_table, result_table
from hf_hybrid.evaluation import Candidate, Measurement, Run, harness, results_of
from hf_hybrid.training.recipes.sheets import Sheet, TestItem
from tests.cli_for_tests import call

FEW = (Candidate("host", None), Candidate("planned", "planned_diffusion", {"window_length": 4}))


# bench.


def test_bench_prints_a_table_and_writes_json(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "CANDIDATES", FEW)
    file = tmp_path / "numbers.json"
    flags = ["--model", folder, "--num-prompts", 2, "--max-new-tokens", 8]
    text = call("bench", *flags, "--json", file).output
    assert "host*" in text and "planned" in text and "2 prompts, 2 countries (test)" in text
    content = json.loads(file.read_text())
    assert content["num_prompts"] == 2 and content["results"][1]["settings"]["window_length"] == 4
    assert [r["strategy"] for r in content["results"]] == ["host", "planned_diffusion"]
    assert max(map(len, text.splitlines())) <= 80


def test_bench_measures_the_feedback_rules_in_two_types(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "FEEDBACK", FEW)
    file = tmp_path / "numbers.json"
    flags = ["--feedback", "--dtype", "float32,bfloat16", "--num-prompts", 2, "--max-new-tokens", 8]
    text = call("bench", "--model", folder, *flags, "--json", file).output
    content = json.loads(file.read_text())
    assert [r["name"] for r in content["results"]] == ["host", "planned", "host bf16", "planned bf16"]
    assert [r["baseline"] for r in content["results"]] == [True, False, True, False]
    assert text.count("host*") == 2 and "\nbfloat16:" in text
    assert content["device"]["dtype"] == "float32" and isinstance(content["device"]["bfloat16_units"], list)
    assert sum(group["num_prompts"] for group in content["groups"]) == 2


def test_kinds_stand_in_a_table_of_their_own() -> None:
    def kind(name: str, parts: list[int] | None, rate: float) -> dict[str, Any]:
        row = {"name": "planned_unverified", "tokens_per_second": rate}
        return {"kind": name, "parts": parts, "num_prompts": 9, "results": [row]}

    out = Console(file=io.StringIO(), width=80)
    out.print(kind_table([kind("independent parts", [4, 8], 61.6), kind("text behind the parts", None, 40.2)]))
    text = " ".join(out.file.getvalue().split())  # type: ignore[attr-defined]
    assert "tokens per second" in text and "4-8 parts" in text and "planned_unverified 62 40" in text


def test_groups_stand_in_a_table_of_their_own() -> None:
    def group(count: int, speedup: float | None) -> dict[str, Any]:
        row = {"name": "planned_unverified", "speedup": speedup, "answer_exact_match": 0.5}
        return {"dependent_parts": count, "num_prompts": 7, "results": [row]}

    out = Console(file=io.StringIO(), width=80)
    out.print(group_table([group(0, 4.5), group(1, None)]))
    lines = out.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0].strip() == "by parts that read other parts" and max(map(len, lines)) <= 80
    assert lines[1].split() == ["candidate", "0", "(7", "prompts)", "right", "1", "(7", "prompts)", "right"]
    assert lines[2].split() == ["planned_unverified", "4.50", "50.0", "-", "50.0"]


def test_a_sweep_is_done_on_the_development_countries(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "SWEEP", FEW)
    before = {file: file.read_bytes() for file in folder.iterdir()}
    common = ("--model", folder, "--num-prompts", 1, "--max-new-tokens", 8)
    text = call("bench", "--sweep", "--plot", tmp_path / "sweep.png", *common).output
    assert "(dev)" in text and (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert before == {file: file.read_bytes() for file in folder.iterdir()}  # nothing goes into the checkpoint
    for wrong in (tmp_path / "sweep.txt", tmp_path / "nowhere" / "sweep.png"):
        assert "give a .png or .svg file" in call("bench", "--plot", wrong, code=2).stderr


# Tune.


def swept(name: str, seconds: float, equal: float | None, right: float, **settings: Any) -> dict[str, Any]:
    strategy = "block_diffusion" if name.startswith("block") else "planned_diffusion"
    numbers = {"seconds_per_answer": seconds, "equal_share": equal, "answer_exact_match": right}
    return {"name": name, "strategy": strategy, "settings": settings, **numbers}


def test_tune_takes_the_fastest_of_the_good_ones(tmp_path: Path) -> None:
    verified = {"draft_threshold": 0.5, "plan_window": 4}
    results = [
        swept("spans", 0.1, None, 0.9, window_length=1, **verified),
        swept("verified a", 0.4, 1.0, 0.9, window_length=4, **verified),
        swept("verified b", 0.3, 1.0, 0.9, window_length=8, **verified),
        swept("verified c", 0.2, 0.9, 0.9, window_length=9, **verified),
        swept("block a", 0.3, None, 0.95, window_length=6, confidence_threshold=0.9),
        swept("block b", 0.2, None, 0.945, window_length=7, confidence_threshold=0.9),
        swept("block c", 0.1, None, 0.8, window_length=8, confidence_threshold=0.9),
    ]
    numbers, config = tmp_path / "sweep.json", tmp_path / "generation_config.json"
    numbers.write_text(json.dumps({"results": results}))
    before = {"eos_token_id": 1, "hf_hybrid": {"planned_diffusion": {"max_span_extension": 9.0, "window_length": 2}}}
    config.write_text(json.dumps(before))
    assert "window_length=8" in call("tune", tmp_path, numbers, "--dry-run").output
    assert json.loads(config.read_text()) == before
    assert "written to" in call("tune", tmp_path, numbers).output
    after = json.loads(config.read_text())
    assert after.pop("hf_hybrid") == {
        "planned_diffusion": {"max_span_extension": 9.0, "window_length": 8, **verified},
        "block_diffusion": {"window_length": 7, "confidence_threshold": 0.9},
    }
    assert after == {"eos_token_id": 1}


@pytest.mark.parametrize(("seconds", "chosen"), [(0.205, 9), (0.21, 8)])
def test_tune_keeps_what_stands_within_the_noise(tmp_path: Path, seconds: float, chosen: int) -> None:
    verified = {"draft_threshold": 0.5, "plan_window": 4}
    results = [
        swept("verified default", seconds, 1.0, 0.9, window_length=9, **verified),
        swept("verified b", 0.2, 1.0, 0.9, window_length=8, **verified),
    ]
    numbers = tmp_path / "sweep.json"
    numbers.write_text(json.dumps({"results": results}))
    (tmp_path / "generation_config.json").write_text("{}")
    assert f"window_length={chosen}," in call("tune", tmp_path, numbers, "--dry-run").output


def test_tune_changes_nothing_it_cannot_read(tmp_path: Path) -> None:
    numbers, config = tmp_path / "sweep.json", tmp_path / "generation_config.json"
    config.write_text("{}")
    odd = swept("verified a", 0.4, 1.0, 0.9, window_length=-4, draft_threshold=0.5, plan_window=4)
    for content, code in (("{}", 2), ("nothing", 2), (json.dumps({"results": [odd]}), 2)):
        numbers.write_text(content)
        assert "error:" in call("tune", tmp_path, numbers, code=code).stderr
        assert config.read_text() == "{}"
    numbers.write_text(json.dumps({"results": []}))
    assert "has no settings of it" in call("tune", tmp_path, numbers).output


def interrupted_after(monkeypatch: pytest.MonkeyPatch, answers: int) -> None:
    """Ctrl-C instead of answer number ``answers``."""
    answer, count = harness.answer, iter(range(answers))

    def limited(*arguments: Any) -> Any:
        if next(count, None) is None:
            raise KeyboardInterrupt
        return answer(*arguments)

    monkeypatch.setattr(harness, "answer", limited)


@pytest.mark.parametrize(("answers", "finished"), [(1, 0), (7, 2)])  # two candidates, and a warm-up of each
def test_an_interrupted_bench_keeps_its_numbers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: int, finished: int
) -> None:
    monkeypatch.setattr(evaluation, "CANDIDATES", FEW)
    interrupted_after(monkeypatch, answers)
    file = tmp_path / "numbers.json"
    text = call("bench", "--model", folder, "--max-new-tokens", 4, "--json", file, code=130).output
    assert "(interrupted)" in text and json.loads(file.read_text())["num_prompts"] == finished


def test_the_table_of_the_longest_names_fits_into_80_columns() -> None:
    def one(country: str) -> Measurement:
        return Measurement("t", country, 12.3456, 500, 456, 9, 0.1, {}, None, 9, 9, True)

    named = sorted({c.name: c for c in (*evaluation.CANDIDATES, *evaluation.SWEEP)}.values(), key=lambda c: len(c.name))
    table = evaluation.in_types(named[:1] + named[-3:], ("float32", "bfloat16"))
    rows = {c.name: [one("A"), one("B")] for c in table}
    items = [TestItem(c, "test", Sheet("p", ("t",), (c,))) for c in "AB"]
    out = Console(file=io.StringIO(), width=80)
    out.print(result_table(results_of(Run(table, items, rows))))
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text and "100-100" in text and "12.346" in text
    assert all(text.count(candidate.name) == 2 for candidate in table[1:4]) and "bfloat16:" in text


# demo.


def test_demo_without_a_terminal_is_plain_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = call("demo", "--model", folder, "--number", 2, "--max-new-tokens", 40).output
    for part in ("The record (test-001, ", "The plan:", "The answer:", "planned_verified", "same text?", "right?"):
        assert part in text
    interrupted_after(monkeypatch, 3)
    assert "interrupted" in call("demo", "--model", folder, "--max-new-tokens", 4, code=130).output


def test_the_picture_shows_every_race_on_one_clock(folder: Path, tmp_path: Path) -> None:
    call("demo", "--model", folder, "--max-new-tokens", 40, "--svg", tmp_path / "demo.svg", "--slower", 100)
    root = ElementTree.parse(tmp_path / "demo.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    frames = root.findall(f"{space}g")
    spans: list[tuple[float, float]] = []
    for frame in frames:
        change = frame.find(f"{space}animate")
        assert change is not None and frame.get("visibility") == "hidden"
        times = [float(time) for time in change.attrib["keyTimes"].split(";")]
        values = change.attrib["values"].split(";")
        assert len(times) == len(values) and times == sorted(times) and times[0] == 0
        shown = [time for time, value in zip(times, values, strict=True) if value == "visible"]
        ends = [time for time, value in zip(times, values, strict=True) if value == "hidden" and time > 0]
        assert len(shown) == 1
        spans.append((shown[0], ends[-1] if ends else 1.0))
    assert spans[0][0] == 0 and sum(begin == 0 for begin, _ in spans) == 2, "two films begin at once"
    assert [end for _, end in spans].count(1.0) == 2, "and stay until the end"
    assert all(begin < end for begin, end in spans)
    text = "".join(root.itertext())
    assert "planned diffusion" in text and "token by token" in text and "pass 1" in text


def test_demo_takes_a_record_of_ones_own(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("Country: Mine\nArea: 5\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bytes.txt").write_bytes(b"Country: \xff\xfe\n")
    for command, option in (("demo", "--prompt"), ("generate", "--input")):
        told = call(command, "--model", folder, option, tmp_path / "bytes.txt", code=1).output
        assert "bytes.txt is no text in UTF-8" in " ".join(told.split())
    text = call("demo", "--model", folder, "--prompt", tmp_path / "mine.txt", "--max-new-tokens", 16).output
    assert "Country: Mine" in text and "held out" not in text
    call("demo", "--model", folder, "--prompt", tmp_path / "empty.txt", code=2)
    assert "mine.txt" not in call("demo", "--model", folder, "--prompt", tmp_path / "none.txt", code=1).output
