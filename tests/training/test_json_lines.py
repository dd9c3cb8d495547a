"""A user's own file: what is read, what is left out and said, and a whole run from the file to a model that writes.

Catches: a broken line that stops the run or vanishes without a word, wrong line numbers, tags in a user's text that
become control tokens, an answer whose tokens are not its bytes, a plan that is not the one that was given, held-out
prompts that are trained on, samples that fit into no batch, and epochs that repeat or forget a sample.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from hf_hybrid import AutoHybridModelForCausalLM
from hf_hybrid.core.grammars import grammar_of
from hf_hybrid.core.grammars.native import PlanTags
from hf_hybrid.core.tokens import ControlTokens
from hf_hybrid.training.examples import Example, Part
from hf_hybrid.training.layout import lay_out
from hf_hybrid.training.recipe import TEST_SET, RecipeError, read_recipe, read_task, run_recipe
from hf_hybrid.training.recipes import json_lines
from hf_hybrid.training.recipes.json_lines import JsonLinesData, ShuffledEpochs, collect, held_out_items, split_samples
from hf_hybrid.training.recipes.sheets import SheetPart, exact_match, read_test_set, score_fields, write_items
from hf_hybrid.training.recipes.tokenizer import SheetEncoder, build_tokenizer
from hf_hybrid.training.tasks import TaskError
from tests.training.test_annotate import FRAGMENTS
from tests.training_examples import TWO_STEPS

DATA = JsonLinesData(jsonl="unused")
ANSWER = "# Tea\n\n## Leaf\ngreen leaves of a bush\n\n## Cup\nhot water and leaves\n\n## Summary\nleaves in a cup\n"


def make_file(path: Path, lines: list[Any]) -> Path:
    """Objects as JSON, bytes as they are."""
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(raw) + b"\n")
    return path


def sample(**changes: Any) -> dict[str, Any]:
    return {"prompt": "Tea?", "answer": ANSWER} | changes


BROKEN: dict[str, tuple[Any, str]] = {
    "no json": (b'{"prompt": "x", ', "not JSON"),
    "deep": (b"[" * 5000, "not JSON"),
    "bytes": (b'{"prompt": "\xff"}', "not UTF-8"),
    "a list": (["prompt"], "not a JSON object"),
    "no prompt": ({"answer": "x"}, "no field 'prompt'"),
    "no answer": ({"prompt": "x"}, "no field 'answer'"),
    "a number": (sample(answer=3), "'answer' is not a text"),
    "empty": (sample(prompt=" \n"), "'prompt' is empty"),
    "surrogate": (b'{"prompt": "x", "answer": "\\ud800"}', "'answer' holds half a character (a lone surrogate)"),
    "too long": (b" " * 1_000_001 + b"{}", "longer than 1000000 bytes"),
    "plan": (sample(plan={"label": "x"}), "'plan' is not a list of {label, depends}"),
    "empty plan": (sample(plan=[]), "'plan' is not a list of {label, depends}"),
    "field": (
        sample(plan=[{"label": "## Leaf", "length": 8}]),
        "a part of 'plan' has no label, or fields other than label and depends",
    ),
    "order": (
        sample(plan=[{"label": "## Cup"}, {"label": "## Leaf"}]),
        "a label of 'plan' is not in the answer behind the one before it",
    ),
    "later": (
        sample(plan=[{"label": "## Leaf", "depends": [1]}]),
        "'depends' of a part of 'plan' is not a list of earlier parts, counted from 1",
    ),
    "true": (
        sample(plan=[{"label": "## Leaf"}, {"label": "## Cup", "depends": [True]}]),
        "'depends' of a part of 'plan' is not a list of earlier parts, counted from 1",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_lines_are_counted_by_kind_and_named(tmp_path: Path, case: str) -> None:
    line, kind = BROKEN[case]
    found = collect(make_file(tmp_path / "x.jsonl", [sample(), line, b"  ", sample(), line]), DATA)
    assert [s.line for s in found.samples] == [1, 4]
    assert found.malformed == {kind: [2, 5]}
    assert found.report() == [
        "2 samples, 2 of them with a plan: 6 parts, 2 of which read earlier parts",
        f"2 left out: {kind} (lines 2, 5)",
    ]


def test_a_report_names_the_first_lines(tmp_path: Path) -> None:
    path = make_file(tmp_path / "x.jsonl", [b"\xef\xbb\xbf" + json.dumps(sample()).encode(), [], *[b"{"] * 9])
    assert collect(path, DATA).report()[1:] == [
        "9 left out: not JSON (lines 3, 4, 5, 6, 7, ...)",
        "1 left out: not a JSON object (line 2)",
    ]


def test_a_plan_of_its_own_replaces_the_annotation(tmp_path: Path) -> None:
    plan = [{"label": "green"}, {"label": "## Cup\n", "depends": [1]}, {"label": "leaves in", "depends": [2, 1, 2]}]
    (found,) = collect(make_file(tmp_path / "x.jsonl", [sample(plan=plan)]), DATA).samples
    text = ANSWER.index("green")
    parts = (
        SheetPart("green", " leaves of a bush\n\n"),
        SheetPart("## Cup\n", "hot water and leaves\n\n## Summary\n", (0,)),
        SheetPart("leaves in", " a cup\n", (0, 1)),
    )
    assert found.sheet.pieces == (ANSWER[:text], parts)
    assert found.sheet.answer == ANSWER and found.sheet.prompt == "Tea?" and not found.sheet.open


TAGS = PlanTags(par=5, topic=6, async_=7, sync=8, lengths=((8, 10), (256, 25)), depends=tuple(range(26, 34)))
CONTROL = ControlTokens.of(mask=2, end=1, filler=9, tags=TAGS)


def strip_tags(tokens: list[int], example: Example) -> list[int]:
    """The answer from the rows of a planned example: what is between ``<par>`` and the end, without tags and
    without the labels that the plan names."""
    kept: list[int] = []
    in_label = False
    for token in tokens[len(example.prompt) :]:
        if token == TAGS.topic:
            in_label = True
        elif in_label:
            in_label = token not in (10, 25)
        elif token not in CONTROL.noise.banned:
            kept.append(token)
    return kept


def test_without_its_tags_a_sample_is_its_answer_byte_for_byte(tmp_path: Path) -> None:
    rng = random.Random(3)
    answers = ["".join(rng.choices(FRAGMENTS, k=rng.randint(1, 40))) + "." for _ in range(300)]
    answers += [ANSWER, ANSWER * 3, "<topic>x<len:8><async>\n\n<eos> y <|assistant|>", "- **a:** b\n" * 40]
    path = make_file(tmp_path / "x.jsonl", [{"prompt": "<par> p", "answer": answer} for answer in answers])
    found = collect(path, JsonLinesData(jsonl="unused", shortest_parts=0))
    assert not found.malformed
    tokenizer = build_tokenizer(answers, (), 700, fewer=True)
    assert {CONTROL.noise.mask: "<mask>", CONTROL.noise.filler: "<spad>", 10: "<len:8>", 26: "<dep:1>"} == {
        i: tokenizer.convert_ids_to_tokens(i) for i in (CONTROL.noise.mask, CONTROL.noise.filler, 10, 26)
    }
    encode = SheetEncoder(tokenizer)
    planned = 0
    for answer, one in zip(answers, found.samples, strict=True):
        example = encode(one.sheet)
        assert not {*CONTROL.noise.banned, CONTROL.noise.end} & {*example.answer, *example.prompt[1:-1]}
        layout = lay_out(example, "dag", grammar_of(CONTROL), random.Random(0))
        assert strip_tags(layout.tokens, example) == list(example.answer)
        decoded = tokenizer.decode(strip_tags(layout.tokens, example), skip_special_tokens=False)
        assert decoded.encode() == answer.encode()
        assert example.planned_rows == len(layout.tokens) and example.planned_spans == len(layout.depends)
        planned += bool(example.rounds)
        assert all(len(part.label) <= 16 for parts in example.rounds for part in parts)
    assert planned > 50


def test_a_long_label_goes_on_in_the_text() -> None:
    label = "word " * 30
    tokenizer = build_tokenizer(["a word "], (), 600, fewer=True)
    sheet = json_lines.Sheet("p", ((SheetPart(label, "x"), SheetPart("b", "y", (0,))),), ())
    (parts,) = SheetEncoder(tokenizer)(sheet).rounds
    assert isinstance(parts[0], Part) and len(parts[0].label) == 16 and parts[1].depends == (0,)
    assert tokenizer.decode(parts[0].label + parts[0].text) == label + "x"


def test_held_out_prompts_stand_apart(tmp_path: Path) -> None:
    lines = [sample(prompt=f"p{n % 50}", answer=f"{n} {ANSWER}") for n in range(100)]
    samples = collect(make_file(tmp_path / "x.jsonl", lines), DATA).samples
    training, held_out = split_samples(samples, 0.1, seed=1)
    assert sorted(s.line for s in [*training, *held_out]) == list(range(1, 101))
    assert len({s.sheet.prompt for s in held_out}) == 5 and len(held_out) == 10
    assert not {s.sheet.prompt for s in held_out} & {s.sheet.prompt for s in training}
    assert split_samples(samples, 0.1, seed=2)[1] != held_out
    assert split_samples(samples, 0.0, seed=1) == (samples, [])
    assert len(split_samples(samples[:3], 0.05, seed=1)[0]) == 2  # two are left to train on
    path = tmp_path / TEST_SET
    assert write_items(path, held_out_items(held_out)) == 5
    items = read_test_set(path)
    assert Counter(item.split for item in items) == {"test": 3, "dev": 2}
    assert items[0].sheet.groups == (f"line {min(s.line for s in held_out)}",) and items[0].kind == "groups"


def test_an_open_sheet_is_scored_by_its_parts() -> None:
    parts = (SheetPart("## A\n", "x\n"), SheetPart("## B\n", "y\n"), SheetPart("## C\n", "z\n"))
    sheet = json_lines.Sheet("p", ("t", parts), (), open=True)
    assert exact_match(sheet, "other ## A\nq## B\nr\n## C\n") and score_fields(sheet, sheet.answer) == (3, 3)
    assert not exact_match(sheet, "## A\n## B\n") and score_fields(sheet, "## A\n## B\n") == (2, 3)
    assert not exact_match(sheet, "## A\n## C\n## B\n") and score_fields(sheet, "## A\n## C\n## B\n") == (2, 3)
    assert not exact_match(sheet, "## A\n## A\n## B\n## C\n")
    closed = json_lines.Sheet("p", ("one\ntwo\n",), ())  # no `- ` lines: every line counts
    assert score_fields(closed, "one\nthree\n") == (1, 2) and not exact_match(closed, "one\nthree\n")


def test_every_epoch_has_every_sample_in_another_order() -> None:
    examples = [Example((n,), ((n,),)) for n in range(20)]
    draw = ShuffledEpochs(examples, seed=1)
    epochs = [[draw(20 * epoch + n).prompt[0] for n in range(20)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert ShuffledEpochs(examples, seed=1)(45).prompt[0] == epochs[2][5]  # any index at once
    assert [ShuffledEpochs(examples, seed=2)(n).prompt[0] for n in range(20)] != epochs[0]


def recipe_file(folder: Path, **data: Any) -> Path:
    fields = {
        "name": "own",
        "task": "jsonl",
        "output_dir": str(folder / "runs"),
        "seed": 3,
        "data": {"vocab_size": 600, "held_out": 0.2, **data},
        "model": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
        },
        "batches": {"num_rows": 320, "max_spans": 8, "forms": {"plain": 1, "dag": 1}, "block_lengths": {4: 1}},
        "training": dict(TWO_STEPS),
        "generation": {"do_sample": False, "max_new_tokens": 60, "hf_hybrid": {"strategy": "planned_diffusion"}},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return path


def noise(letters: int) -> str:
    """Text that no tokenizer makes short: letters at random, in one word."""
    return "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=letters))


def own_samples() -> list[Any]:
    rng = random.Random(1)
    words = ["red", "tall", "sea", "hill", "rice"]

    def answer(n: int) -> str:
        return "".join(f"## {word.title()} {n}\n{' '.join(rng.choices(words, k=6))}\n" for word in rng.sample(words, 3))

    return [{"prompt": f"About {n}", "answer": answer(n)} for n in range(20)]


def test_from_a_file_to_a_model_that_writes(tmp_path: Path) -> None:
    many = "".join(f"## {n}\nred tall sea hill rice\n" for n in range(7))
    lines = [*own_samples(), b"{", sample(answer=noise(900)), sample(answer=many)]
    path = make_file(tmp_path / "own.jsonl", lines)
    recipe = read_recipe(recipe_file(tmp_path, jsonl=str(path)))
    told: list[str] = []
    folder = run_recipe(recipe, tell=lambda task: told.extend(task.report))
    assert told[0].startswith("20 samples, 20 of them with a plan: 60 parts, 0 of which")
    assert set(told[1:4]) == {
        "1 left out: not JSON (line 21)",
        "1 left out: needs more rows than batches: num_rows=320 (line 22)",
        "1 left out: needs more spans than batches: max_spans=8 (line 23)",
    }
    assert told[4].startswith("16 to train on, 4 held out; ")
    items = read_test_set(folder / TEST_SET)
    assert Counter(item.split for item in items) == {"test": 2, "dev": 2}
    assert {item.sheet.prompt for item in items} < {f"About {n}" for n in range(20)}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoHybridModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    output = model.generate(**tokenizer("About 3", return_tensors="pt"), return_dict_in_generate=True)
    assert output.report[0].strategy == "planned_diffusion"
    assert len(tokenizer("About 3").input_ids) < output.sequences.shape[1] <= 60 + len(tokenizer("About 3").input_ids)


def test_files_without_samples_are_refused(tmp_path: Path) -> None:
    path = make_file(tmp_path / "own.jsonl", [b"{", sample(), sample(answer=noise(3000))])
    with pytest.raises(TaskError, match=r"too few samples to train on; 1 samples, .* left out: not JSON \(line 1\)"):
        read_task(read_recipe(recipe_file(tmp_path, jsonl=str(path))))
    with pytest.raises(TaskError, match=r"data: jsonl: .*absent\.jsonl cannot be read \(No such file"):
        read_task(read_recipe(recipe_file(tmp_path, jsonl=str(tmp_path / "absent.jsonl"))))
    with pytest.raises(RecipeError, match="data: vocab_size=10 is out of range: 512 to 65536"):
        read_recipe(recipe_file(tmp_path, jsonl="x", vocab_size=10))
