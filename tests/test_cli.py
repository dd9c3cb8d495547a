"""The command line: help, wrong usage, exit codes, and ``generate`` on a tiny checkpoint.

Bugs these tests catch: a setting that has no option, or an option that does not reach ``generate()``; colour codes in a
file; a traceback where a line is due, or none with --debug; 0 after an error; help that waits for torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from checkpoint_for_tests import read_checkpoint

import hf_hybrid
from hf_hybrid import checkpoints
from hf_hybrid.cli.command import load
from hf_hybrid.cli.options import given_settings
from hf_hybrid.config import SETTING_NAMES, SETTINGS, SettingsError
from tests.cli_for_tests import call

COMMANDS = ("demo", "generate", "plan", "check", "bench", "tune", "train", "export", "card")


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
    model, _, path = load(folder.name)
    assert path == folder and model.dtype == torch.float32 and not model.training


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
