"""A bench result and a checkpoint folder whose numbers are like no others: a number in a card has one source."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def result(name: str, number: Any, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "strategy": name,
        "settings": {},
        "baseline": False,
        "seconds_per_answer": number(),
        "speedup": number(),
        "speedup_interval": [number(), number()],
        "speedup_prompts": int(number()),
        "speedup_all": number(),
        "tokens_per_forward": number(),
        "num_forwards": number(),
        "seconds_to_first_text": None,
        "field_exact_match": number(),
        "answer_exact_match": number(),
        "answer_exact_match_interval": [number(), number()],
        "equal_to": None,
        "equal_share": None,
        **more,
    }


def group(count: int, names: list[str], number: Any) -> dict[str, Any]:
    return {
        "dependent_parts": count,
        "num_prompts": int(number()),
        "results": [
            {
                "name": name,
                "speedup": number(),
                "speedup_prompts": int(number()),
                "answer_exact_match": number(),
            }
            for name in names
        ],
    }


def bench_results() -> dict[str, Any]:
    """A run of two candidates: 130.1234, 147.1234, ..., shares too. Nobody types such numbers, rounded or not."""
    steps = itertools.count(130, 17)

    def number() -> float:
        return next(steps) + 0.1234

    return {
        "command": "hf-hybrid bench --num-prompts 91001",
        "commit": "abc91002",
        "versions": {"torch": "91.003", "hf_hybrid": "91.004"},
        "device": {"type": "cpu", "processor": "Abacus 91005", "threads": 91006, "dtype": "float91007"},
        "num_prompts": 91008,
        "batch_size": 91009,
        "shape": {
            "countries": 91010,
            "prompt_tokens": 91011.0,
            "answer_tokens": 91012.0,
            "parts": 91013.0,
            "longest_to_mean_part": 91.014,
        },
        "groups": [group(91015, ["host", "verified"], number), group(91016, ["host", "verified"], number)],
        "results": [
            result("host", number, baseline=True),
            result("verified", number, equal_to="host", equal_share=0.91017),
        ],
        "pass_costs": [{"written": 91018, "rows": 91019, "runner_ms": 91.02, "forward_ms": 91.03, "ratio": 91.04}],
    }


def write_results(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({**bench_results(), **changes}))
    return path


def write_tiny_folder(folder: Path, **config: Any) -> Path:
    """A folder like that of a checkpoint: 1.5 million parameters in two files, a record of its training."""
    folder.mkdir()
    save_file({"a": torch.zeros(1000, 1500)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(500)}, folder / "model-00002-of-00002.safetensors")
    record = {"mask_token_id": 91101, "par": 91102, "topic": 91103}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hf_hybrid": record, **config}))
    history = [{"clean_loss": 91.105, "noisy_loss": 91.106, "step": 91108}, {"train_loss": 91.107}]
    (folder / "training.json").write_text(json.dumps({"recipe": "tiny", "steps": 91100, "history": history}))
    return folder


Known = float | str


def numbers_in(value: Any) -> list[Known]:
    """Every number of a JSON value; those inside its strings as they are written there."""
    if isinstance(value, dict):
        return [number for key, item in value.items() for number in (*numbers_in(key), *numbers_in(item))]
    if isinstance(value, list):
        return [number for item in value for number in numbers_in(item)]
    if isinstance(value, str):
        return [*re.findall(r"\d+(?:\.\d+)?", value)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def shown_in(text: str) -> list[str]:
    """Every number of a Markdown text outside of code blocks; the level of the intervals is the code's, not a run's."""
    prose = re.sub(r"```.*?```", "", text, flags=re.S).replace("95 % intervals", "intervals")
    return [number.replace(",", "") for number in re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", prose)]


def unmeasured(text: str, known: Sequence[Known]) -> list[str]:
    """The numbers of a text that are not those of ``known``, rounded as they are shown, or a hundred times them."""

    def measured(number: str) -> bool:
        digits = len(number.partition(".")[2])
        return any(
            number == value
            if isinstance(value, str)
            else number in (f"{value:.{digits}f}", f"{100 * value:.{digits}f}")
            for value in known
        )

    return [number for number in shown_in(text) if not measured(number)]
