"""Recipes: what is refused before anything runs, and a whole run on a made-up task.

Catches: a misspelt field that is silently dropped (a model of another size is trained then), an error that does not
name its field, a result folder that does not load, settings lost on the way into ``generation_config.json``, a config
left in the state that training needs, and examples that repeat when gradients are accumulated.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import hf_hybrid
from benchmarks.data.tasks import EVERY_TASK
from hf_hybrid.models.vocabulary import control_tokens
from hf_hybrid.training import recipe as recipes
from hf_hybrid.training.recipe import RecipeError, build_model, read_recipe, read_task, run_recipe
from tests.recipes_for_tests import fields_of, written

ROOT = Path(__file__).parents[2]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown field": ({"nam": "x"}, r"recipe\.yaml: unknown field 'nam'; did you mean 'name'\?"),
    "far from any": ({"zzzz": 1}, "unknown field 'zzzz'; choose from batches, data, generation, model"),
    "missing field": ({"task": None}, "missing field 'task'"),
    "unknown task": ({"task": "countin"}, "unknown task 'countin'; choose one of jsonl, counting$"),
    "task of the checkout": ({"task": "factbook"}, "choose one of jsonl, counting; python -m benchmarks.train trains"),
    "task is a list": ({"task": ["counting"]}, "unknown task"),
    "model": ({"model": {"hiden_size": 8}}, r"model: unknown field 'hiden_size'; did you mean 'hidden_size'\?"),
    "vocabulary": ({"model": {"vocab_size": 8}}, "model: unknown field 'vocab_size'"),
    "batches": ({"batches": {"num_row": 8}}, r"batches: unknown field 'num_row'; did you mean 'num_rows'\?"),
    "training": ({"training": {"max_step": 8}}, r"training: unknown field 'max_step'; did you mean 'max_steps'\?"),
    "training seed": ({"training": {"max_steps": 8, "seed": 1}}, "training: unknown field 'seed'"),
    "data of a task without settings": ({"data": {"jsonl": "x"}}, "data: the task 'counting' has no settings here"),
    "data that is no mapping": ({"task": "jsonl", "data": "x.jsonl"}, "data: must be a mapping .* got 'x.jsonl'"),
    "no path": ({"task": "jsonl", "data": {}}, "data: jsonl is missing: path of the file"),
    "data": ({"task": "jsonl", "data": {"jsonl": "x", "list": "text"}}, "data: unknown setting 'list' .*'lists'"),
    "treatment": ({"task": "jsonl", "data": {"jsonl": "x", "lists": "no"}}, "lists='no': choose one of parallel"),
    "held out": ({"task": "jsonl", "data": {"jsonl": "x", "held_out": 0.9}}, "held_out=0.9 is out of range"),
    "no steps": ({"training": {}}, "training: missing field 'max_steps'"),
    "generation": ({"generation": {"do_sampl": True}}, r"unknown field 'do_sampl'; did you mean 'do_sample'\?"),
    "empty section": ({"batches": "none"}, r"batches: must be a mapping of fields to values .* got 'none'"),
    "seed": ({"seed": "x"}, "seed: 'x' must be a whole number"),
    "seed below": ({"seed": -1}, "seed: -1 must be a whole number from 0"),
    "seed is a switch": ({"seed": True}, "seed: True must be a whole number"),
    "output_dir": ({"output_dir": 5}, "output_dir: 5 must be the path of a folder"),
    "name leads out": ({"name": "../x"}, "name: '../x' must be the name of a folder in output_dir"),
    "name of a checkpoint": ({"name": "checkpoint-3"}, "name: 'checkpoint-3' must be the name"),
    "name is a number": ({"name": 7}, "name: 7 must be the name"),
    "size is a text": (
        {"model": {"hidden_size": "big"}},
        "model: hidden_size='big' must be a whole number of at least",
    ),
    "size 0": ({"model": {"num_hidden_layers": 0}}, "model: num_hidden_layers=0 must be a whole number of at least 1"),
    "heads": ({"model": {"hidden_size": 32, "num_attention_heads": 5}}, "model: .*not a multiple"),
    "theta": ({"model": {"rope_theta": "x"}}, "model: could not convert"),
    "activation": ({"model": {"rms_norm_eps": "x"}}, "model: .*rms_norm_eps"),
    "rows": ({"batches": {"num_rows": "many"}}, "batches: num_rows='many' must be a whole number"),
    "form": ({"batches": {"forms": {"plian": 1}}}, "batches: forms=.* must map some of plain, sparse, dag, dense"),
    "no weight": ({"batches": {"forms": {"plain": 0}}}, "batches: forms=.*one greater than 0"),
    "forms are a list": ({"batches": {"forms": ["plain"]}}, "batches: forms=.* must map"),
    "empty window": ({"batches": {"block_lengths": {0: 1}}}, "batches: block_lengths=.*lengths in tokens"),
    "steps 0": ({"training": {"max_steps": 0}}, "training: max_steps=0 must be a whole number of at least 1"),
    "steps": ({"training": {"max_steps": "many"}}, "training: max_steps='many' must be a whole number"),
    "half a step": ({"training": {"max_steps": 2.5}}, "training: max_steps=2.5 must be a whole number"),
    "rate": ({"training": {"max_steps": 2, "other_learning_rate": "1e-3"}}, "'1e-3' must be a number .*write 1.0e-3"),
    "switch": ({"training": {"max_steps": 2, "compile_objective": "no"}}, "compile_objective='no' must be true or"),
    "new tokens": ({"generation": {"max_new_tokens": -3}}, "generation: .*max_new_tokens"),
    "strategy": ({"generation": {"hf_hybrid": {"strategy": "fast"}}}, "generation: .*fast"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_recipes_are_refused(drawn: list[int], tmp_path: Path, case: str) -> None:
    changes, message = REFUSED[case]
    data = fields_of(tmp_path) | changes
    with pytest.raises(RecipeError, match=message):
        read_recipe(written(tmp_path, {k: v for k, v in data.items() if v is not None}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", r"recipe\.yaml: not valid YAML"),
        ("- name", r"a recipe is a mapping with the fields name, task"),
        ("", r"a recipe is a mapping with the fields"),
    ],
)
def test_files_that_are_no_recipes_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_recipe(written(tmp_path, text))


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 5000])
def test_bytes_that_are_no_recipe_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=r"recipe\.yaml: not valid YAML"):
        read_recipe(tmp_path / "recipe.yaml")


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"absent\.yaml: cannot be read"):
        read_recipe(tmp_path / "absent.yaml")


def test_the_recipes_of_the_repository_are_valid() -> None:
    found = sorted((ROOT / "recipes").glob("*.yaml"))
    assert found
    for path in found:
        recipe = read_recipe(path, EVERY_TASK)
        assert recipe.name and recipe.batches.num_rows > 0
    assert {"factbook", "wordnet"} == EVERY_TASK.keys() - recipes.TASKS.keys() == set(recipes.IN_THE_CHECKOUT)


def test_a_whole_run(drawn: list[int], tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, fields_of(tmp_path)))
    folder = run_recipe(recipe)
    assert folder == tmp_path / "runs" / "tiny"
    names = {path.name for path in folder.iterdir()}
    expected = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "test_set.jsonl"}
    assert names >= {*expected, "training.json", "tokenizer_config.json"}

    summary = json.loads((folder / "training.json").read_text())
    assert summary["recipe"] == "tiny" and summary["steps"] == 2
    assert [entry["step"] for entry in summary["history"]] == [1, 2]
    assert all(entry["clean_loss"] > 0 for entry in summary["history"])

    generation = json.loads((folder / "generation_config.json").read_text())
    assert "_from_model_config" not in generation
    assert generation["hf_hybrid"] == {"strategy": "planned_diffusion"} and generation["max_new_tokens"] == 20
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "bfloat16"
    assert config["use_cache"] is True  # the host's Trainer switches it off while it trains
    assert config["rope_parameters"]["rope_theta"] == 5e4 and config["tie_word_embeddings"]

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model) is LlamaForCausalLM and model.dtype == torch.bfloat16
    assert model.generation_config.hf_hybrid == {"strategy": "planned_diffusion"}
    control = control_tokens(model)
    assert (
        control is not None
        and control.noise.end == tokenizer.eos_token_id
        and control.noise.mask == tokenizer.mask_token_id
    )
    assert tokenizer.convert_tokens_to_ids("<async>") == control.tags.async_
    assert model.get_input_embeddings().weight.shape[0] >= len(tokenizer)
    ids = torch.tensor([[4, 5]])
    out = hf_hybrid.enable(model.float()).generate(ids)  # writes with the stored strategy
    assert out.shape[0] == 1 and 2 < out.shape[1] <= 22


def test_a_run_goes_on_from_its_last_checkpoint(drawn: list[int], tmp_path: Path) -> None:
    """A finished run has nothing left to do; ``resume=False`` begins anew."""
    recipe = read_recipe(written(tmp_path, fields_of(tmp_path)))
    run_recipe(recipe)
    weights = (tmp_path / "runs" / "tiny" / "model.safetensors").read_bytes()
    assert sorted(drawn) == [0, 1, 2, 3]
    drawn.clear()
    run_recipe(recipe)
    assert drawn == []
    assert (tmp_path / "runs" / "tiny" / "model.safetensors").read_bytes() == weights
    run_recipe(recipe, resume=False, max_steps=1)
    assert sorted(drawn) == [0, 1]
    assert (tmp_path / "runs" / "tiny" / "model.safetensors").read_bytes() != weights


def test_accumulated_batches_do_not_repeat_examples(drawn: list[int], tmp_path: Path) -> None:
    data = fields_of(tmp_path)
    data["training"] |= {"gradient_accumulation_steps": 2}
    run_recipe(read_recipe(written(tmp_path, data)))
    assert sorted(drawn) == list(range(8))  # 2 steps of 2 batches of 2


def test_build_model_is_a_function_of_the_seed(drawn: list[int], tmp_path: Path) -> None:
    data = fields_of(tmp_path)
    data["model"] |= {
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 2,
        "copy_heads": True,
    }
    recipe = read_recipe(written(tmp_path, data))
    tokenizers = [read_task(recipe).tokenizer for _ in range(2)]  # each gets its control tokens
    (one, control), (two, _) = (build_model(recipe, tokenizer) for tokenizer in tokenizers)
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert one.get_input_embeddings().weight is one.get_output_embeddings().weight  # type: ignore[union-attr]
    embedding = one.get_input_embeddings().weight  # (vocab, 256)
    assert torch.equal(embedding[:, 0], embedding[:1, 0].expand(len(embedding)))  # copy heads were set, for every token
    assert control.noise.mask == tokenizers[0].mask_token_id
