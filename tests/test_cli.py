"""The command line: every command on a tiny checkpoint, its output without a terminal, its exit codes.

Bugs these tests catch: a setting that has no option, or an option that does not reach ``generate()``; colour codes in a
file; a traceback where a line is due, or none with --debug; 0 after an error; a race that
is timed while it is drawn; numbers lost after Ctrl-C; a sweep over the test countries; help that waits for torch.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from checkpoint_for_tests import read_checkpoint, write_checkpoint
from rich.console import Console
from typer.testing import CliRunner

import hf_hybrid
from hf_hybrid import checkpoints, evaluation
from hf_hybrid.cli import app
from hf_hybrid.cli.bench import group_table, kind_table, result_table
from hf_hybrid.cli.command import load
from hf_hybrid.cli.options import given_settings
from hf_hybrid.config import SETTING_NAMES, SETTINGS, SettingsError
from hf_hybrid.evaluation import Candidate, Measurement, Run, harness, results_of
from hf_hybrid.training import recipe as recipes
from hf_hybrid.training.recipes.sheets import Sheet, TestItem

COMMANDS = ("demo", "generate", "plan", "bench", "tune", "train", "export", "card")
FEW = (Candidate("host", None), Candidate("planned", "planned_diffusion", {"window_length": 4}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def call(*arguments: object, code: int = 0, stdin: str | None = None) -> Any:
    """The result of ``hf-hybrid`` with these arguments; it must exit with ``code`` and write no colour codes."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)
    assert result.exit_code == code, (result.output, result.exception)
    assert "\x1b" not in result.output
    return result


# Help and errors.


def test_help_explains_itself() -> None:
    text = call("--help").output
    assert all(command in text for command in COMMANDS) and "130 interrupted" in text
    for command in COMMANDS:
        assert "--debug" in call(command, "--help").output


def test_every_setting_is_an_option_with_its_help() -> None:
    text = " ".join(call("generate", "--help").output.split())
    for cls in SETTINGS.values():
        for field in fields(cls):
            assert f"--{field.name.replace('_', '-')}" in text
            assert field.metadata["help"].split()[0] in text


def test_help_and_wrong_usage_load_no_torch() -> None:
    program = (
        "import sys; from typer.testing import CliRunner; from hf_hybrid.cli import app\n"
        "for line in (['--help'], ['generate', '--help'], ['generate', 'a', '--only', '3'], ['generate', 'a', '--race',"
        " '-s', 'host'], ['generate', 'a', '--strategy', 'autoregressive', '--window-length', '4']):\n"
        "    result = CliRunner().invoke(app, line)\n"
        "    assert result.exit_code == (0 if '--help' in line else 2), result.output\n"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_front_door_opens_for_every_public_name() -> None:
    assert all(getattr(hf_hybrid, name) is not None for name in hf_hybrid.__all__)
    assert set(hf_hybrid.__all__) <= set(dir(hf_hybrid))
    assert set(hf_hybrid._HOME) == set(hf_hybrid.__all__) - {"__version__"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hf_hybrid.nothing  # type: ignore[attr-defined]


def test_version() -> None:
    assert call("--version").output == f"hf-hybrid {hf_hybrid.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Usage"),
        (["paint"], "paint"),
        (["generate"], "one prompt"),
        (["generate", "a", "--input", "b"], "one prompt"),
        (["generate", " "], "empty"),
        (["generate", "a", "--window-length", "0"], "window-length"),
        (["generate", "a", "--strategy", "magic"], "planned_diffusion"),
        (["generate", "a", "--temperature", "0.5"], "--do-sample"),
        (["generate", "a", "--do-sample", "--temperature", "0"], "above 0"),
        (["generate", "a", "--span-fallback-confidence", "low"], "none"),
        (["generate", "a", "--strategy", "autoregressive", "--window-length", "4"], "window_length"),
        (["generate", "a", "--strategy", "host", "--window-length", "4"], "window_length"),
        (["generate", "a", "--strategy", "autoregressive", "--race"], "leave it out"),
        (["demo", "--number", "99"], "held-out records"),
        (["bench", "--num-prompts", "99"], "the split has 13"),
        (["bench", "--json", "no/such/folder.json"], "no such folder"),
        (["bench", "--dtype", "float32,int8"], "float16"),
        (["bench", "--dtype", "float32,float32"], "each once"),
        (["bench", "--feedback", "--sweep"], "give one"),
        (["bench", "--test-set", "no.jsonl"], "--test-set"),
        (["train", "no.yaml"], "no recipe"),
    ],
)
def test_wrong_usage_is_exit_code_2(folder: Path, arguments: list[str], message: str) -> None:
    if arguments and arguments[0] in ("generate", "demo", "bench"):
        arguments = [*arguments, "--model", str(folder)]
    result = call(*arguments, code=2)
    assert message in result.output and "Traceback" not in result.output


def test_an_error_is_one_line_and_with_debug_a_traceback(tmp_path: Path) -> None:
    result = call("generate", "a", "--model", tmp_path, code=1)
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: cannot load") and "hybrid-pocket" in result.stderr
    assert "Traceback" in call("generate", "a", "--model", tmp_path, "--debug", code=1).output


def test_bundled_checkpoints_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(checkpoints.CheckpointError, match="hybrid-pocket"):
        checkpoints.bundled("nothing")
    monkeypatch.setitem(checkpoints.BUNDLED, "ghost", "listed, but not there")
    with pytest.raises(checkpoints.CheckpointError, match="missing from this installation"):
        checkpoints.bundled("ghost")


def test_a_bundled_name_is_loaded_from_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(checkpoints.BUNDLED, folder.name, "a link for this test")
    monkeypatch.setattr(checkpoints, "__file__", str(folder.parent / "__init__.py"))
    assert checkpoints.bundled(folder.name) == folder
    model, _, place = load(folder.name)
    assert place == folder and model.dtype == torch.float32 and not model.training


# generate.


def test_generate_writes_the_text_of_the_model(folder: Path) -> None:
    model, tokenizer, items = read_checkpoint(folder, torch.float32)
    prompt = items[0].sheet.prompt
    encoded = tokenizer(prompt, return_tensors="pt")
    ids, settings = encoded["input_ids"], {"window_length": 4, "verify_spans": False}  # ids (1, prompt)
    want = model.generate(ids, strategy="planned_diffusion", max_new_tokens=24, do_sample=False, **settings)
    text = tokenizer.decode(want[0, ids.shape[1] :], skip_special_tokens=True)
    flags = ["--model", folder, "--max-new-tokens", 24, "--window-length", 4, "--no-verify-spans"]
    content = json.loads(call("generate", prompt, *flags, "--json").output)
    assert content["text"] == text and content["report"]["strategy"] == "planned_diffusion"
    (only_round,) = content["plan"]["rounds"]
    assert [len(only_round["parts"]), only_round["parts"][0].keys()] == [
        len(content["report"]["spans"]),
        {"label", "depends", "length"},
    ]
    assert call("generate", prompt, *flags).output.rstrip() == text.rstrip()


@pytest.mark.parametrize("drafter", ["suffix", "self"])
def test_generate_speculatively(folder: Path, drafter: str) -> None:
    flags = ["generate", "Area: 5 Area: 5", "--model", folder, "--max-new-tokens", 16, "--json"]
    plain = json.loads(call(*flags, "--strategy", "autoregressive").output)
    content = json.loads(call(*flags, "--strategy", "speculative", "--drafter", drafter, "--no-adaptive").output)
    # Untrained weights in float32: a tie would be a chance of one in a million.
    assert content["text"] == plain["text"] and content["report"]["drafting"]["drafter"] == drafter
    assert plain["report"]["drafting"] is None


def test_generate_reads_a_prompt_from_anywhere(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Area: 5\n")
    flags = ["--model", folder, "--max-new-tokens", 12, "--strategy", "autoregressive"]
    texts = [
        call("generate", "Area: 5", *flags).output,
        call("generate", "-", *flags, stdin="Area: 5\n").output,
        call("generate", "--input", tmp_path / "prompt.txt", *flags).output,
    ]
    assert texts[0] == texts[1] == texts[2] != ""
    assert call("generate", "Area: 5", "--chat", *flags).output == texts[0]  # the template puts the same marks


def test_sampling_is_repeatable_by_its_seed(folder: Path) -> None:
    def text(seed: int, strategy: str) -> str:
        flags = ["--model", folder, "--max-new-tokens", 12, "--do-sample", "--temperature", 2.0]
        return call("generate", "Area: 5", *flags, "--seed", seed, "--strategy", strategy).output

    for strategy in ("autoregressive", "host"):
        assert text(1, strategy) == text(1, strategy) != text(2, strategy)


def test_the_host_has_no_report(folder: Path) -> None:
    flags = ["--model", folder, "--max-new-tokens", 6, "--strategy", "host", "--json"]
    content = json.loads(call("generate", "Area: 5", *flags).output)
    assert content["plan"] is None and content["report"] is None
    assert content["text"].rstrip() == call("generate", "Area: 5", *flags[:-1]).output.rstrip()


def test_none_switches_a_setting_off_and_unset_is_not_passed() -> None:
    assert given_settings({"span_fallback_confidence": "none", "seed": None, "commit": "block"}) == {
        "span_fallback_confidence": None,
        "commit": "block",
    }
    assert given_settings({"span_fallback_confidence": "0.5"}) == {"span_fallback_confidence": 0.5}
    with pytest.raises(SettingsError, match="none"):
        given_settings({"span_fallback_confidence": "half"})
    assert set(given_settings(dict.fromkeys(SETTING_NAMES, 1))) == SETTING_NAMES


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
    place = ("--model", folder, "--num-prompts", 1, "--max-new-tokens", 8)
    text = call("bench", "--sweep", "--plot", tmp_path / "sweep.png", *place).output
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


# train.


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """A recipe whose output folder holds one whole checkpoint and one that is not."""
    output = tmp_path / "out"
    for step, whole in ((7, True), (9, False)):
        (output / f"checkpoint-{step}").mkdir(parents=True)
        if whole:
            (output / f"checkpoint-{step}" / "complete").touch()
    path = tmp_path / "small.yaml"
    path.write_text(
        f"name: small\ntask: jsonl\ndata: {{jsonl: own.jsonl}}\noutput_dir: {output}\nseed: 0\n"
        "model: {}\nbatches: {}\ntraining: {max_steps: 9}\ngeneration: {}\n"
    )
    return path


def trained(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Path]) -> None:
    monkeypatch.setattr(recipes, "run_recipe", run)


def test_train_passes_its_options_on(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def run(recipe: recipes.Recipe, **options: Any) -> Path:
        seen.update(options, name=recipe.name)
        return recipe.output_dir / recipe.name

    trained(monkeypatch, run)
    assert str(recipe_file.parent / "out" / "small") in call("train", recipe_file).output
    assert callable(seen.pop("tell"))
    assert seen == {"name": "small", "resume": True, "max_steps": None}
    call("train", recipe_file, "--no-resume", "--max-steps", 3)
    assert callable(seen.pop("tell"))
    assert seen == {"name": "small", "resume": False, "max_steps": 3}


def test_train_check_shows_what_a_file_holds(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = recipe_file.parent / "own.jsonl"
    answer = "# T\n## Leaf\nthe leaves of a bush\n## Cup\nhot water, see Leaf\n"
    rows = [json.dumps({"prompt": f"p{n}", "answer": answer}) for n in range(8)]
    data.write_text("\n".join([*rows, "{", "{"]))
    recipe = recipe_file.read_text().replace("own.jsonl", f"{data}, vocab_size: 600")
    recipe_file.write_text(recipe)
    trained(monkeypatch, lambda *_, **__: pytest.fail("--check trained"))
    result = call("train", recipe_file, "--check")
    assert result.stderr.splitlines()[:2] == [
        "8 samples, 8 of them with a plan: 16 parts, 8 of which read earlier parts",
        "2 left out: not JSON (lines 9, 10)",
    ]
    assert result.stdout.splitlines()[-3:] == [
        r'text: "# T\n"',
        r'part 1: "## Leaf\n" | "the leaves of a bush\n"',
        r'part 2 (reads 1): "## Cup\n" | "hot water, see Leaf\n"',
    ]
    data.write_text("{}\n")
    assert "too few samples to train on" in call("train", recipe_file, "--check", code=1).stderr


def test_an_interrupted_training_says_how_to_go_on(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(recipe: recipes.Recipe, **options: Any) -> Path:
        raise KeyboardInterrupt

    trained(monkeypatch, run)
    text = call("train", recipe_file, "--max-steps", 30, code=130).output
    assert "checkpoint-7" in text and f"hf-hybrid train {recipe_file} --max-steps 30" in text
    (recipe_file.parent / "out" / "checkpoint-7" / "complete").unlink()
    assert "before the first checkpoint" in call("train", recipe_file, code=130).output


def test_a_wrong_recipe_is_one_line(recipe_file: Path) -> None:
    recipe_file.write_text(recipe_file.read_text().replace("seed", "sed"))
    result = call("train", recipe_file, code=1)
    assert "did you mean 'seed'" in result.stderr and len(result.stderr.splitlines()) == 1
