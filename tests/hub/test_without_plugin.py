"""The matrix of the docs: with the plugin and without it, each way of loading writes the same tokens by each strategy.

The column "no plugin" runs in another process, in which ``hf_hybrid`` cannot be imported.

Bugs these tests catch: a copy that needs the package, or that decodes otherwise than the package; a stored strategy, a
seed, a streamer or a plan that the entry of the repository loses; a copy that runs although the package is there; text
without trust that is not the host's; a speculative repository that changes the text of a model, or never drafts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_for_tests import read_checkpoint
from models_for_tests import tiny
from transformers import AutoModelForCausalLM, TextStreamer, pipeline

import hf_hybrid
from hf_hybrid import routing
from hf_hybrid.checkpoints import bundled
from hf_hybrid.config import SETTINGS
from hf_hybrid.hub.exporting import export_model, export_speculative
from hf_hybrid.training.recipe import TEST_SET
from hf_hybrid.training.recipes.sheets import read_test_set

LENGTH = 80
REPEATING = [[3, 7, 9, 2, 11, 3, 7, 9, 2, 11, 3, 7, 9, 2]]
ROOT = Path(__file__).parents[2]
MADE = bundled("hybrid-pocket")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``hybrid-repo``: a whole repository that names planned_diffusion; ``speculative``: one without weights."""
    root = tmp_path_factory.mktemp("repositories")
    model, tokenizer, _ = read_checkpoint(MADE, torch.float64)
    export_model(model, root / "hybrid-repo", tokenizer=tokenizer, source=MADE, strategy="planned_diffusion")
    export_speculative(root / "speculative")
    for name in ("llama", "gpt2"):
        tiny(name, eos_token_id=40, pad_token_id=0).save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Two prompts of unequal length whose answers have several parts."""
    items = [item for item in read_test_set(MADE / TEST_SET) if len(item.sheet.parts) > 2]
    chosen = sorted((item.sheet.prompt for item in items), key=len)
    return [chosen[0], chosen[10]]


@pytest.fixture(scope="module")
def results(root: Path, texts: list[str]) -> dict[str, Any]:
    """What a process without the package wrote."""
    jobs = {
        "hybrid": {
            "folder": str(root / "hybrid-repo"),
            "texts": texts,
            "length": LENGTH,
            "strategies": list(SETTINGS),
        },
        "speculative": {
            "folder": str(root / "speculative"),
            "models": {name: str(root / name) for name in ("llama", "gpt2")},
            "prompt": REPEATING,
            "length": 100,
        },
    }
    (root / "jobs.json").write_text(json.dumps(jobs))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(root / "modules")}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, str(ROOT / "tests" / "hub" / "without_plugin.py"), "jobs.json", "results.json"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((root / "results.json").read_text())


@pytest.fixture(scope="module")
def absent(results: dict[str, Any]) -> dict[str, Any]:
    """Of it, what the whole repository wrote."""
    return results["hybrid"]


@pytest.fixture(scope="module")
def plugin(root: Path) -> tuple[Any, Any]:
    """Model and tokenizer of the whole repository, as the package loads them."""
    return read_checkpoint(root / "hybrid-repo", torch.float64)[:2]


@pytest.mark.parametrize("strategy", SETTINGS)
@pytest.mark.parametrize("sampled", [False, True])
def test_from_pretrained(
    plugin: tuple[Any, Any], texts: list[str], absent: dict[str, Any], strategy: str, sampled: bool
) -> None:
    model, tokenizer = plugin
    encoded = tokenizer(texts, return_tensors="pt", padding=True)
    drawn = {"do_sample": True, "seed": 5} if sampled else {}
    wanted = model.generate(**encoded, strategy=strategy, max_new_tokens=LENGTH, **drawn).tolist()
    assert absent["sampled" if sampled else "from_pretrained"][strategy] == wanted
    assert wanted[0][encoded.input_ids.shape[1] :] != wanted[1][encoded.input_ids.shape[1] :]  # the prompts matter


@pytest.mark.parametrize("strategy", SETTINGS)
def test_pipeline(plugin: tuple[Any, Any], texts: list[str], absent: dict[str, Any], strategy: str) -> None:
    model, tokenizer = plugin
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    record = pipe(texts[0], strategy=strategy, max_new_tokens=LENGTH, do_sample=False, return_tensors=True)
    assert absent["pipeline"][strategy] == record[0]["generated_token_ids"]


def test_the_stored_strategy_and_its_extras(
    plugin: tuple[Any, Any], texts: list[str], absent: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = plugin
    single = tokenizer(texts[:1], return_tensors="pt")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    rich = model.generate(**single, max_new_tokens=LENGTH, return_dict_in_generate=True, streamer=streamer)
    assert absent["default"] == absent["from_pretrained"]["planned_diffusion"]
    assert absent["assisted"] == absent["from_pretrained"]["autoregressive"]
    assert absent["positional"] == rich.sequences.tolist()
    assert absent["streamed"].strip() == capsys.readouterr().out.strip()
    labels = [list(span.label) for span in rich.report[0].spans]
    assert labels and absent["report"]["labels"] == labels and absent["report"]["strategy"] == "planned_diffusion"
    assert absent["report"]["same plan"] == rich.sequences.tolist()
    assert "choose one of autoregressive" in absent["unknown"]


def test_without_trust_the_host_writes(texts: list[str], absent: dict[str, Any]) -> None:
    model, tokenizer, _ = read_checkpoint(MADE, torch.float64)
    hf_hybrid.disable(model)
    encoded = tokenizer(texts, return_tensors="pt", padding=True)
    wanted = model.generate(**encoded, max_new_tokens=LENGTH, do_sample=False).tolist()
    assert absent["host"] == wanted
    assert "strategy" in absent["without trust"]  # the host's own complaint about an argument it does not know


def test_with_the_plugin_its_code_runs(root: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = read_checkpoint(root / "hybrid-repo", torch.float64)[1]
    model = AutoModelForCausalLM.from_pretrained(root / "hybrid-repo", dtype=torch.float64, trust_remote_code=True)
    asked: list[str | None] = []
    original = routing.host_arguments

    def host_arguments(model: Any, arguments: Any, strategy: str | None, plan: Any) -> dict[str, Any]:
        asked.append(strategy)
        return original(model, arguments, strategy, plan)

    monkeypatch.setattr(routing, "host_arguments", host_arguments)
    single = tokenizer(texts[:1], return_tensors="pt")
    model.generate(**single, strategy="block_diffusion", max_new_tokens=4)
    model.generate(**single, max_new_tokens=4)
    assert asked == ["block_diffusion", None]
    copied = [name for name in sys.modules if name.startswith("transformers_modules.") and name.endswith(".routing")]
    assert not copied
    # enable() replaces the repository's function, and a copy of the model stays enabled.
    assert "generate" in vars(model) and "generate" not in vars(hf_hybrid.enable(model))


def test_the_speculative_repository_keeps_the_text(results: dict[str, Any]) -> None:
    for name, found in results["speculative"].items():
        assert found["ours"] == found["plain"], name
        assert found["strategy"] == "speculative"
        # Something was drafted and accepted: untrained models soon repeat themselves.
        assert found["passes"] < len(found["plain"][0]) - len(REPEATING[0]), name
