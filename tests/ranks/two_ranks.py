"""One of two processes that share models over gloo, started by ``test_two_ranks.py``; the second is the slower one.

Arguments: the rank, and a folder with the models and for the answers. What each process writes goes to ``RANK.json``.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

RANK, PLACE = int(sys.argv[1]), Path(sys.argv[2])
os.environ |= {"RANK": str(RANK), "LOCAL_RANK": str(RANK), "WORLD_SIZE": "2", "HF_HUB_OFFLINE": "1"}

import torch  # noqa: E402
from torch import distributed  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList  # noqa: E402
from transformers.distributed import DistributedConfig  # noqa: E402
from transformers.utils import logging  # noqa: E402

import hf_hybrid  # noqa: E402

REPEATING = torch.tensor([[5, 9, 33, 7] * 5 + [5, 9]])
LENGTH = 40


def load(name: str, **options: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(PLACE / name, dtype=torch.float64, **options).eval()
    return hf_hybrid.enable(model)


def slowed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Passes take a random time, twice as long in the second process."""
    draw = random.Random(RANK)

    def later(*args: Any, **kwargs: Any) -> Any:
        time.sleep(draw.random() * 0.004 * (RANK + 1))
        return forward(*args, **kwargs)

    return later


class Clock(StoppingCriteria):
    """Stops after another number of calls in each process, as a clock would."""

    def __init__(self) -> None:
        self.left = 5 + 6 * RANK

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.left -= 1
        return torch.full((len(input_ids),), self.left <= 0)


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def tensor_parallel() -> dict[str, Any]:
    """The same prompt in both, the weights in halves."""
    model, whole, small = load("writer", distributed_config=DistributedConfig(tp_size=2)), load("writer"), load("small")
    model.model.forward = slowed(model.model.forward)
    found: dict[str, Any] = {"wanted": whole.generate(REPEATING, max_new_tokens=LENGTH, do_sample=False).tolist()}
    draft = {"strategy": "speculative", "max_new_tokens": LENGTH}
    for name, drafter in (("suffix", "suffix"), ("self", "self"), ("model", small)):
        found[name] = [model.generate(REPEATING, drafter=drafter, **draft).tolist() for _ in range(3)]
    torch.manual_seed(RANK)
    for strategy in ("speculative", "autoregressive"):
        options = {"strategy": strategy, "do_sample": True, "max_new_tokens": LENGTH}
        found[f"drawn by {strategy}"] = model.generate(REPEATING, **options).tolist()
    batch = REPEATING.repeat(2, 1)
    found["given seed"] = model.generate(batch, do_sample=True, seed=7, **draft).tolist()
    found["wanted seed"] = whole.generate(batch, do_sample=True, seed=7, **draft).tolist()
    found["stopped"] = model.generate(REPEATING, stopping_criteria=StoppingCriteriaList([Clock()]), **draft).tolist()
    model, whole = load("planner", distributed_config=DistributedConfig(tp_size=2)), load("planner")
    model.model.forward = slowed(model.model.forward)
    planned = {"strategy": "planned_diffusion", "max_new_tokens": LENGTH, "confidence_threshold": 0.2}
    for verify in (True, False):
        found[f"planned {verify}"] = model.generate(REPEATING, verify_spans=verify, **planned).tolist()
        found[f"wanted {verify}"] = whole.generate(REPEATING, verify_spans=verify, **planned).tolist()
    return found


def sharded() -> dict[str, Any]:
    """Another prompt in each, and answers of other lengths; the weights are gathered for every pass."""
    model, whole = load("writer"), load("writer")
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    model.model.forward = slowed(model.model.forward)
    prompt, length = REPEATING[:, RANK:], 9 + 25 * RANK
    found: dict[str, Any] = {"lengths": length}
    for strategy in ("autoregressive", "speculative", "block_diffusion"):
        options = {"strategy": strategy, "max_new_tokens": length, "return_dict_in_generate": True}
        rich = model.generate(prompt, return_past_key_values=True, **options)
        found[strategy] = [rich.sequences.tolist(), whole.generate(prompt, **options).sequences.tolist()]
    prompts = [prompt[0].tolist()] * (2 + RANK)
    answers = list(hf_hybrid.generate_many(model, prompts, strategy="autoregressive", max_new_tokens=6))
    found["many"] = [answer.tokens for answer in answers]
    alone = whole.generate(prompt, max_new_tokens=6, strategy="autoregressive")
    found["wanted many"] = [alone[0, prompt.shape[1] :].tolist()] * len(prompts)
    found["drafter"] = error_of(lambda: whole.generate(prompt, strategy="speculative", drafter=model))
    # Whole models, and a caller who asks the processes to wait for one another.
    found["asked"] = whole.generate(prompt, strategy="speculative", synced_gpus=True, max_new_tokens=length).tolist()
    return found


def main() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    distributed.init_process_group(
        "gloo", init_method=f"file://{PLACE / 'meeting'}", rank=RANK, world_size=2, timeout=timedelta(seconds=20)
    )
    found = {"tensor parallel": tensor_parallel(), "sharded": sharded()}
    (PLACE / f"{RANK}.json").write_text(json.dumps(found), encoding="utf-8")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
