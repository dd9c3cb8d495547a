"""lm-eval as it comes: ``--model hf`` with ``--gen_kwargs strategy=...``, on tasks of local files.

Bugs these tests catch: arguments of lm-eval that ``generate()`` does not take; a strategy that is named and not used;
stop strings that are lost; likelihoods of one way of writing under the name of another.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_for_tests import favour, write_checkpoint
from lm_eval import simple_evaluate
from lm_eval._cli import HarnessCLI
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from typer.testing import CliRunner

import hf_hybrid
from hf_hybrid import mixin, routing
from hf_hybrid.cli import app
from hf_hybrid.config import SETTINGS
from hf_hybrid.evaluation.likelihoods import LikelihoodError, no_pretended_likelihoods, strategy_in

TASKS = Path(__file__).parent / "tasks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and the tasks with their data."""
    root = write_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    data = root / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Exports: {x}", "answer": x}) + "\n" for x in ("rice", "iron")))
    (root / "tasks").mkdir()
    for task in TASKS.glob("*.yaml"):
        (root / "tasks" / task.name).write_text(task.read_text().replace("DATA", str(data)))
    return root


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The strategies that were carried out, in order."""
    seen: list[Any] = []
    original = routing.decode

    def decode(*args: Any, call: Any, **kwargs: Any) -> Any:
        seen.append(call.strategy)
        return original(*args, call=call, **kwargs)

    monkeypatch.setattr(routing, "decode", decode)
    yield seen


def evaluate(model: Any, folder: Path, task: str, gen_kwargs: str | None, batch_size: int = 1) -> Any:
    lm = HFLM(pretrained=model, tokenizer=hf_hybrid.AutoHybridTokenizer.from_pretrained(folder), batch_size=batch_size)
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    return simple_evaluate(lm, tasks=[task], gen_kwargs=gen_kwargs, task_manager=manager, bootstrap_iters=0)


def load(folder: Path) -> Any:
    return hf_hybrid.AutoHybridModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def answers(results: Any) -> list[str]:
    return [sample["resps"][0][0] for sample in results["samples"]["hf_hybrid_lines"]]


def test_generation_tasks(folder: Path, calls: list[Any]) -> None:
    model = load(folder)
    tokens = hf_hybrid.control_tokens(model)
    assert tokens is not None
    favour(
        model, dict.fromkeys((*tokens.noise.banned, tokens.noise.end), -50.0)
    )  # ordinary text, so that there is some to compare
    host = answers(evaluate(model, folder, "hf_hybrid_lines", None))
    assert calls == [] and all(host)
    for strategy in SETTINGS:
        results = evaluate(model, folder, "hf_hybrid_lines", f"strategy={strategy}")
        assert calls[-2:] == [strategy] * 2 and "exact_match,none" in results["results"]["hf_hybrid_lines"]
        if strategy in ("autoregressive", "speculative"):
            assert answers(results) == host


def test_likelihood_tasks_are_refused_under_diffusion(folder: Path) -> None:
    model = load(folder)
    plain = evaluate(model, folder, "hf_hybrid_choices", None)["results"]["hf_hybrid_choices"]
    for strategy in ("planned_diffusion", "block_diffusion"):
        with no_pretended_likelihoods(strategy), pytest.raises(LikelihoodError, match=f"{strategy}' has no likelihood"):
            evaluate(model, folder, "hf_hybrid_choices", f"strategy={strategy}")
    with no_pretended_likelihoods("speculative"):
        assert evaluate(model, folder, "hf_hybrid_choices", None)["results"]["hf_hybrid_choices"] == plain
    model.generation_config.hf_hybrid = {"strategy": "planned_diffusion"}
    with no_pretended_likelihoods(None), pytest.raises(LikelihoodError, match="autoregressive writing"):
        evaluate(model, folder, "hf_hybrid_choices", None)
    evaluate(model, folder, "hf_hybrid_choices", None)  # behind the guard lm-eval is as it was


@pytest.mark.parametrize("task", ["hf_hybrid_lines", "hf_hybrid_choices"])
def test_the_command(folder: Path, task: str, calls: list[Any]) -> None:
    """A model by name, as at a terminal: nothing of ours but the first word."""
    arguments = ["lm-eval", "--model", "hf", "--model_args", f"pretrained={folder},dtype=float32", "--tasks", task]
    arguments += ["--include_path", str(folder / "tasks"), "--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, "--gen_kwargs", "strategy=planned_diffusion"])
    if task == "hf_hybrid_lines":
        assert result.exit_code == 0, (result.output, result.exception)
        assert calls == ["planned_diffusion"] * 2 and "exact_match" in result.output
    else:
        assert result.exit_code == 1 and "has no likelihood that one pass gives" in result.output
    assert mixin._installed is None


def test_the_strategy_is_found_in_every_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    def parsed(arguments: list[str]) -> str | None:
        monkeypatch.setattr("sys.argv", ["lm-eval", *arguments])
        return strategy_in(HarnessCLI().parse_args())

    for given in (
        ["--gen_kwargs", "strategy=speculative"],
        ["--gen_kwargs", "temperature=0,strategy=speculative,window_length=4"],
        ["--tasks", "a", "--gen_kwargs", "temperature=0", "strategy=speculative", "--device", "cpu"],
        ["run", "--gen_kwargs=strategy=speculative"],
        ["--gen_kwargs", '{"strategy": "speculative"}'],
    ):
        assert parsed(given) == "speculative"
    assert parsed(["--model_args", "strategy=speculative", "--gen_kwargs", "num_assistant_tokens_strategy=x"]) is None
    assert parsed(["--model_args", "strategy=speculative"]) is None
    assert parsed(["ls", "tasks"]) is None
    with pytest.raises(LikelihoodError, match="choose one of"), no_pretended_likelihoods("plan"):
        pass


def test_batches_are_answered_like_batches_of_one(folder: Path) -> None:
    """lm-eval's stopping criterion keeps a state for each sequence of a batch: each has a copy of it."""
    model = load(folder)
    for strategy in ("autoregressive", "planned_diffusion"):
        one, two = (
            answers(evaluate(model, folder, "hf_hybrid_lines", f"strategy={strategy}", batch_size=size))
            for size in (1, 2)
        )
        assert one == two
