"""A recipe that trains in a second on made-up data: for the tests of whole runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_hybrid.training.examples import Example, Part
from hf_hybrid.training.recipe import read_recipe, run_recipe
from hf_hybrid.training.tasks import Source, Task
from tests.training_examples import TWO_STEPS

Change = Callable[[dict[str, Any]], Any]
"""What a test changes in the fields of a recipe."""


def counting_task(drawn: list[int]) -> Any:
    """Made-up data: a number in the prompt, two parts in the answer."""

    def draw(index: int) -> Example:
        drawn.append(index)
        n = 3 + index % 20
        return Example((n, n + 1), ((Part((30,), (n,)), Part((31,), (n + 1, n), depends=(0,))), (n,)))

    def write_test_set(path: Path) -> int:
        path.write_text("{}\n", encoding="utf-8")
        return 1

    def task(source: Source) -> Task:
        vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, 40)}
        raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        raw.pre_tokenizer = pre_tokenizers.Whitespace()
        special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
        return Task(PreTrainedTokenizerFast(tokenizer_object=raw, **special), draw, write_test_set)

    return task


def fields_of(folder: Path) -> dict[str, Any]:
    return {
        "name": "tiny",
        "task": "counting",
        "output_dir": str(folder / "runs"),
        "seed": 3,
        "model": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "rope_theta": 5e4,
        },
        "batches": {"num_rows": 64, "max_spans": 6, "forms": {"plain": 1, "dag": 1}, "block_lengths": {4: 1}},
        "training": dict(TWO_STEPS),
        "generation": {"do_sample": False, "max_new_tokens": 20, "hf_hybrid": {"strategy": "planned_diffusion"}},
    }


def written(folder: Path, data: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data), encoding="utf-8")
    return path


def run(folder: Path, change: Change = lambda data: None, **options: Any) -> Path:
    """Run the recipe of ``folder`` after ``change``."""
    data = fields_of(folder)
    change(data)
    return run_recipe(read_recipe(written(folder, data)), **options)


def put(section: str, **values: Any) -> Change:
    return lambda data: data[section].update(values)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
