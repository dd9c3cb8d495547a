"""The self-test: what ``hf_hybrid.check`` and ``hf-hybrid check`` say of models that work, that do not, and that lie.

Bugs these tests catch: a strategy that the self-test leaves out; a served model that is called wrong, or a broken one
exact; a refusal without a reason; a check that changes the model, its configs or the seed of torch; a prompt that never
leaves a window; a command that reads weights it does not need, or that exits with 0 when something is wrong.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, MambaConfig, MambaForCausalLM

import hf_hybrid
from hf_hybrid.config import SETTINGS
from hf_hybrid.evaluation.self_test import NEW, WAYS, _Trial
from hf_hybrid.models.cached import CachedRunner
from hf_hybrid.models.host import Unsupported, cache_argument
from hf_hybrid.models.layers import WHOLE
from tests.cli_for_tests import call
from tests.models_for_tests import WINDOW, hybrid, tiny

PLAIN = ("autoregressive", "speculative, chains", "speculative, trees")
TRAINED = ("speculative, self", "block_diffusion", "planned_diffusion")


def results(model: Any) -> dict[str, tuple[str, str]]:
    return {verdict.name: (verdict.result, verdict.reason) for verdict in hf_hybrid.check(model).verdicts}


def state(model: Any) -> Any:
    """What a check must not change."""
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        copy.deepcopy(model.config.to_dict()),
        copy.deepcopy(model.generation_config.to_dict()),
        (type(model), model.training, torch.get_rng_state().tolist(), sorted(vars(model))),
    )


def test_every_strategy_is_looked_at() -> None:
    assert {way.strategy for way in WAYS} == SETTINGS.keys()


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral window", "gemma3", "llama4"])
def test_a_plain_model(name: str) -> None:
    found = results(tiny(name))
    assert [found[way] for way in PLAIN] == [("exact", "")] * 3
    for way in TRAINED:
        result, reason = found[way]
        assert result == "refused" and "prepare_vocabulary(model, tokenizer)" in reason


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_model_that_plans(name: str) -> None:
    assert set(results(hybrid(name)).values()) == {("exact", "")}


def test_half_precision_is_no_fault() -> None:
    report = hf_hybrid.check(hybrid().to(torch.bfloat16))
    assert report.ok, report


def test_prompts_leave_the_window() -> None:
    trial = _Trial(tiny("gemma3"), 0)
    assert all(len(prompt) > 2 * WINDOW for prompt in trial.prompts)
    assert len(trial.prompts[0]) > len(trial.prompts[1]) and all(len(text) == NEW for text in trial.texts)


def test_a_model_that_is_refused() -> None:
    sizes: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    torch.manual_seed(1)
    found = results(MambaForCausalLM(MambaConfig(**sizes)).eval())
    # Nothing but drafts may be left out by a Runner of models with states.
    refused = [reason for result, reason in found.values() if result == "refused"]
    assert refused and all(len(reason) > 40 for reason in refused)
    assert not any(result == "not exact here" for result, _ in found.values())


def test_training_mode_and_no_model() -> None:
    with pytest.raises(Unsupported, match=r"training mode.*model\.eval\(\)"):
        hf_hybrid.check(tiny("llama").train())
    with pytest.raises(Unsupported, match="from_pretrained"):
        hf_hybrid.check("a folder")


@pytest.mark.parametrize("made", [lambda: tiny("llama"), hybrid])
def test_the_model_is_left_as_it_was(made: Any) -> None:
    model = made()
    model.generation_config.hf_hybrid = {"strategy": "planned_diffusion"}  # the host writes all the same
    before = state(model)
    assert hf_hybrid.check(model).ok
    after = state(model)
    assert before[1:] == after[1:]
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())


def test_a_process_where_it_is_installed() -> None:
    model = tiny("llama")
    model.generation_config.hf_hybrid = {"strategy": "planned_diffusion"}
    hf_hybrid.install()
    try:
        assert results(model)["speculative, trees"] == ("exact", "")
    finally:
        hf_hybrid.uninstall()


# Models that are broken on purpose.


def mean_of_all(_: nn.Module, args: Any) -> Any:
    return (args[0] + args[0].mean(dim=1, keepdim=True), *args[1:])


def test_a_hook_that_mixes_rows() -> None:
    model = tiny("llama")
    model.model.layers[0].register_forward_pre_hook(mean_of_all)
    found = results(model)
    for way in PLAIN[1:]:
        assert found[way][0] == "not exact here" and "other logits" in found[way][1]


class OtherWithCache(LlamaForCausalLM):
    """Its passes with a cache are not those without."""

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **kwargs: Any
    ) -> Any:
        if kwargs.get(cache_argument(self)) is not None and input_ids.shape[1] < 10:
            input_ids = (input_ids + input_ids.shape[1]) % 61
        return super().forward(input_ids, attention_mask, position_ids, **kwargs)


def test_a_class_whose_cached_passes_differ() -> None:
    host = tiny("llama")
    model = OtherWithCache(host.config).double().eval()
    model.load_state_dict(host.state_dict())
    found = results(model)
    for way in PLAIN[1:]:
        assert found[way] == ("not exact here", "6 tokens in one pass give other logits than one by one")


def test_rows_that_are_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = CachedRunner.commit
    monkeypatch.setattr(CachedRunner, "commit", lambda self, kept=None, spans=(): commit(self, None, spans))
    found = results(hybrid())
    assert found["autoregressive"] == ("exact", "")
    for way in (*PLAIN[1:], *TRAINED):
        assert found[way][0] == "not exact here" and "rejected rows" in found[way][1]


def test_spans_that_read_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    relate = CachedRunner.relate
    both = lambda self, row, span, sees: relate(self, row, span, [*sees, 1, 2])  # noqa: E731
    monkeypatch.setattr(CachedRunner, "relate", both)
    found = results(hybrid())
    assert found["speculative, chains"] == ("exact", "")
    assert "branches side by side" in found["speculative, trees"][1]
    assert "separate spans" in found["planned_diffusion"][1]


def test_windows_that_are_overlooked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_hybrid.models.cached.layers_of", lambda model: WHOLE)
    found = results(tiny("mistral window"))
    for way in PLAIN[1:]:
        assert found[way][0] == "not exact here" and "other logits" in found[way][1]


class Silent(LlamaForCausalLM):
    """Cannot write at all."""

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        raise KeyError("a name")


def test_a_model_with_which_the_host_cannot_write() -> None:
    with pytest.raises(Unsupported, match=r"the host's own generate\(\) fails with Silent \(KeyError"):
        hf_hybrid.check(Silent(tiny("llama").config).eval())


# The command.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checked") / "tiny"
    tiny("gemma3").float().save_pretrained(path)
    return path


def test_the_command_runs(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    shown = call("check", folder, "--run", "--json", out).output
    assert shown.count("exact") == 3 and "a mask token" in " ".join(shown.split())
    report = json.loads(out.read_text("utf-8"))
    assert report["ok"] and report["run"] and report["model"] == "Gemma3ForCausalLM"
    assert [verdict["name"] for verdict in report["verdicts"]] == [way.name for way in WAYS]


def test_the_command_reads_the_config_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    shown = call("check", tmp_path).output
    assert shown.count("served") == 3 and shown.count("refused") == 3


def test_the_command_says_that_it_is_wrong(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = CachedRunner.commit
    monkeypatch.setattr(CachedRunner, "commit", lambda self, kept=None, spans=(): commit(self, None, spans))
    assert "not exact here" in call("check", folder, "--run", code=1).output


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    assert "cannot load" in call("check", tmp_path / "nothing", code=1).output
