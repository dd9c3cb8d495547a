"""Two processes that share a model, one slower than the other, write what one process with the whole model writes.

Both run ``two_ranks.py``: a model in halves (tensor parallelism), and one whose weights are gathered for every pass
(FSDP2), over gloo.

Bugs these tests catch: draft lengths or products chosen by measured times, which differ between processes, so that a
collective gets tensors of two sizes and aborts; seeds drawn by each process; a stopping criterion that says yes in one
process alone; a process that is finished and makes no more passes while another waits for its weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoint_for_tests import favour
from models_for_tests import CONTROL, tiny

ROOT = Path(__file__).parents[2]
SECONDS = 300  # for a busy machine; on an idle one they take 15


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process wrote."""
    root = tmp_path_factory.mktemp("ranks")
    special = {
        "pad_token_id": 0,
        "eos_token_id": CONTROL.noise.end,
        "vocab_size": 62,
    }  # oldest hosts halve even heads alone
    tags = {
        "mask_token_id": CONTROL.noise.mask,
        "par": CONTROL.tags.par,
        "topic": CONTROL.tags.topic,
        "async": CONTROL.tags.async_,
        "sync": CONTROL.tags.sync,
        "spad": CONTROL.noise.filler,
        "lengths": [list(pair) for pair in CONTROL.tags.lengths],
        "depends": list(CONTROL.tags.depends),
    }
    tiny("llama", seed=26, num_hidden_layers=1, **special).save_pretrained(root / "small")
    for name in ("writer", "planner"):
        model = tiny("llama", seed=26, **special)
        model.config.hf_hybrid = tags
        if name == "planner":
            favour(
                model,
                {
                    CONTROL.tags.topic: 5.0,
                    CONTROL.tags.async_: 4.5,
                    CONTROL.tags.lengths[2][1]: 3.0,
                    CONTROL.noise.filler: 1.3,
                },
            )
        model.save_pretrained(root / name)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = str(Path(__file__).with_name("two_ranks.py"))
    processes = [
        subprocess.Popen([sys.executable, program, str(rank), str(root)], env=environment, stderr=subprocess.PIPE)
        for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=SECONDS)[1].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return [json.loads((root / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]


@pytest.fixture(scope="module")
def halves(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a model in halves, which both processes must have written alike."""
    assert found[0]["tensor parallel"] == found[1]["tensor parallel"]
    return found[0]["tensor parallel"]


@pytest.mark.parametrize("drafter", ["suffix", "self", "model"])
def test_drafts_of_a_model_in_halves(halves: dict[str, Any], drafter: str) -> None:
    assert halves[drafter] == [halves["wanted"]] * 3


def test_the_first_process_draws_the_seed(halves: dict[str, Any]) -> None:
    drawn = [halves[f"drawn by {strategy}"] for strategy in ("speculative", "autoregressive")]
    assert drawn[0] != drawn[1]  # two calls, two seeds
    assert halves["given seed"] == halves["wanted seed"]


def test_the_first_process_stops(halves: dict[str, Any]) -> None:
    assert len(halves["stopped"][0]) == 22 + 5


@pytest.mark.parametrize("verify", [True, False])
def test_plans_of_a_model_in_halves(halves: dict[str, Any], verify: bool) -> None:
    assert halves[f"planned {verify}"] == halves[f"wanted {verify}"]


@pytest.mark.parametrize("strategy", ["autoregressive", "speculative", "block_diffusion"])
def test_answers_of_unequal_length_with_gathered_weights(found: list[dict[str, Any]], strategy: str) -> None:
    answers = [rank["sharded"][strategy] for rank in found]
    assert all(ours == wanted for ours, wanted in answers)
    assert len(answers[0][0][0]) != len(answers[1][0][0])


def test_many_prompts_with_gathered_weights(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["sharded"]["many"] == rank["sharded"]["wanted many"]


def test_a_drafting_model_with_gathered_weights_is_refused(found: list[dict[str, Any]]) -> None:
    assert all("load it whole in every process" in rank["sharded"]["drafter"] for rank in found)


def test_synced_gpus_without_gathered_weights(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["sharded"]["asked"] == rank["sharded"]["speculative"][1]
