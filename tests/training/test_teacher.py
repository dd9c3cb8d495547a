"""Learning from a teacher: the divergence against a slow oracle, who learns, and what is refused.

Catches: the divergence the wrong way round, or of rows shifted by one; rows without a term (prompt, padding, noisy
ones) that count; a gradient into the teacher, or a teacher with dropout; a share that scales the wrong term; a student
of another tokenizer; layers of the teacher at the wrong depth.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoint_for_tests import write_checkpoint
from models_for_tests import tiny
from training_examples import CONTROL, PAD, TWO_ROUNDS, TWO_STEPS
from transformers import AutoTokenizer, LlamaForCausalLM

from hf_hybrid.models.host import end_ids
from hf_hybrid.training import recipe as recipes
from hf_hybrid.training.arguments import HybridTrainingArguments
from hf_hybrid.training.collators import CollatorSettings, HybridCollator
from hf_hybrid.training.layout import IGNORE
from hf_hybrid.training.objectives import JointObjective, joint_loss
from hf_hybrid.training.recipe import RecipeError, build_model, read_recipe, run_recipe
from hf_hybrid.training.recipes.sheets import Sheet
from hf_hybrid.training.recipes.tokenizer import SheetEncoder
from hf_hybrid.training.tasks import Source, Task
from hf_hybrid.training.teacher import TeacherError, load_teacher
from hf_hybrid.training.trainer import HybridTrainer, IndexedExamples

PLAIN = CollatorSettings(num_rows=60, max_spans=1, forms={"plain": 1.0}, noisy_rows=False)
BOTH = CollatorSettings(num_rows=90, max_spans=12, forms={"dag": 1.0}, block_lengths={4: 1.0}, structure_weight=3.0)


def batch_of(settings: CollatorSettings, count: int = 2) -> dict[str, torch.Tensor]:
    return HybridCollator(CONTROL, PAD, settings)([(i, TWO_ROUNDS) for i in range(count)])


def pair(dropout: float = 0.0) -> tuple[Any, Any]:
    """A student and a teacher of other weights."""
    student, teacher = tiny("llama"), tiny("llama", attention_dropout=dropout)
    draw = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return student, teacher.requires_grad_(False)


def slow_divergence(student: Any, teacher: Any) -> float:
    """Mean of ``KL(teacher || student)`` over the tokens of a plain answer, row by row and token by token, each model
    asked for the next token behind the text so far."""
    text = [*TWO_ROUNDS.prompt, *TWO_ROUNDS.answer]
    total, rows = 0.0, 0
    for end in range(len(TWO_ROUNDS.prompt), len(text) + 1):
        ids = torch.tensor([text[:end]])
        with torch.no_grad():
            p, q = (model(ids).logits[0, -1].double().softmax(-1).tolist() for model in (teacher, student))
        total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
        rows += 1
    return total / rows


def test_the_divergence_is_that_of_the_written_tokens() -> None:
    student, teacher = pair()
    with torch.no_grad():
        terms = JointObjective(student, teacher=teacher, teacher_share=0.75)(batch_of(PLAIN))
    expected = slow_divergence(student, teacher)
    assert expected > 0.1, "the two models differ"
    # The loss is float32, the oracle double: a few dozen terms of order one.
    assert terms.teacher_loss is not None and float(terms.teacher_loss) == pytest.approx(expected, abs=2e-5)
    assert float(terms.loss) == pytest.approx(0.25 * float(terms.clean_loss) + 0.75 * expected, abs=2e-5)
    assert float(terms.noisy_loss) == 0.0


def test_by_hand_with_weights_and_a_noisy_row() -> None:
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    q = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.7, 0.3], [0.1, 0.9]])
    target = torch.tensor([[0, 1, IGNORE, 0]])
    noisy = torch.tensor([[False, False, False, True]])
    weight = torch.tensor([[1.0, 3.0, 5.0, 7.0]])
    terms = joint_loss(q.log()[None] + 3.0, target, noisy, 0.0, weight, teacher_logits=p.log()[None], teacher_share=1.0)
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    second = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert float(terms.loss) == pytest.approx((first + 3 * second) / 4, abs=1e-6)  # float32
    assert terms.loss == terms.teacher_loss


@pytest.mark.parametrize("settings", [PLAIN, BOTH])
def test_rows_without_a_term_learn_nothing_from_the_teacher(settings: CollatorSettings) -> None:
    """Prompt, padding and noisy rows: their logits get no gradient, and the teacher's logits there do not matter."""
    batch = batch_of(settings)
    draw = torch.Generator().manual_seed(1)
    shape = (*batch["target"].shape, 61)
    logits = torch.randn(shape, generator=draw).requires_grad_()
    wanted = torch.randn(shape, generator=draw)
    options: dict[str, Any] = {"weight": batch["weight"], "teacher_share": 1.0, "noisy_weight": 0.0}
    terms = joint_loss(logits, batch["target"], batch["noisy"], teacher_logits=wanted, **options)
    terms.loss.backward()
    scored = (batch["target"] != IGNORE) & ~batch["noisy"]
    assert scored.any() and not scored.all() and logits.grad is not None
    assert torch.equal(logits.grad.abs().sum(-1) > 0, scored)
    other = torch.where(scored[..., None], wanted, torch.randn(shape, generator=draw))
    again = joint_loss(logits, batch["target"], batch["noisy"], teacher_logits=other, **options)
    assert torch.equal(again.loss, terms.loss)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn() -> None:
    student = tiny("llama")
    terms = JointObjective(student, teacher=tiny("llama"), teacher_share=1.0, noisy_weight=0.0)(batch_of(BOTH))
    terms.loss.backward()
    assert abs(terms.loss.item()) < 1e-6  # float32
    assert all(float(p.grad.abs().max()) < 1e-6 for p in student.parameters() if p.grad is not None)


def test_the_teacher_does_not_learn_and_drops_nothing_out() -> None:
    student, teacher = pair(dropout=0.5)
    objective = JointObjective(student, teacher=teacher.requires_grad_(True).train(), teacher_share=1.0).train()
    assert not teacher.training and student.training
    one, two = (objective(batch_of(PLAIN)) for _ in range(2))
    assert torch.equal(one.loss, two.loss)
    one.loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_batches_without_noisy_rows_have_the_clean_ones_of_the_others() -> None:
    plain = {"num_rows": 60, "max_spans": 1, "forms": {"plain": 1.0}}
    without, with_blocks = (batch_of(CollatorSettings(**plain, noisy_rows=noisy)) for noisy in (False, True))
    assert not without["noisy"].any() and with_blocks["noisy"].any()
    clean = ~with_blocks["noisy"]
    for name in ("input_ids", "position", "target", "weight"):
        expected = torch.where(clean, with_blocks[name], {"target": IGNORE, "input_ids": PAD}.get(name, 0))
        assert torch.equal(without[name], expected), name


def test_a_student_comes_closer_to_its_teacher(tmp_path: Path) -> None:
    student, teacher = pair()
    before = slow_divergence(student, teacher)
    options: dict[str, Any] = {**TWO_STEPS, "max_steps": 15, "warmup": 1, "save_minutes": 1e9, "logging_steps": 5}
    arguments = HybridTrainingArguments(output_dir=str(tmp_path), **options)
    collator = HybridCollator(CONTROL, PAD, PLAIN)
    data = IndexedExamples(lambda index: TWO_ROUNDS, 30)
    run = HybridTrainer(
        student.float(), arguments, teacher=teacher.float(), teacher_share=1.0, train_dataset=data,
        data_collator=collator,
    )  # fmt: skip
    run.train()
    logged = [entry["teacher_loss"] for entry in run.state.log_history if "teacher_loss" in entry]
    assert len(logged) == 3 and logged[-1] < logged[0]
    assert slow_divergence(student, teacher) < 0.5 * before


# Recipes.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("teacher"))


def fields_of(path: Path, teacher: dict[str, Any], **model: Any) -> Path:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    data = {
        "name": "student",
        "task": "sheets",
        "output_dir": str(path / "runs"),
        "seed": 3,
        "model": {**shape, "num_key_value_heads": 2, "max_position_embeddings": 512, **model},
        "batches": {"num_rows": 200, "max_spans": 1, "forms": {"plain": 1}, "noisy_rows": False},
        "training": dict(TWO_STEPS),
        "generation": {"do_sample": False},
        "teacher": teacher,
    }
    file = path / "recipe.yaml"
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    return file


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The task ``sheets``: a text of two words in whatever tokenizer it is given."""

    def task(source: Source) -> Task:
        tokenizer = source.make_tokenizer(["never"], ())
        encode = SheetEncoder(tokenizer)
        return Task(tokenizer, lambda index: encode(Sheet(f"green {index}", ("red coast",), ("one",))), lambda path: 0)

    monkeypatch.setitem(recipes.TASKS, "sheets", task)


def test_a_recipe_with_a_teacher_gives_a_draft_of_its_tokenizer(made: None, folder: Path, tmp_path: Path) -> None:
    recipe = read_recipe(fields_of(tmp_path, {"checkpoint": str(folder), "share": 0.5}))
    result = run_recipe(recipe)
    assert (result / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    student: Any = LlamaForCausalLM.from_pretrained(result)
    teacher: Any = LlamaForCausalLM.from_pretrained(folder)
    assert student.config.vocab_size == teacher.config.vocab_size == len(AutoTokenizer.from_pretrained(result))
    assert student.config.hf_hybrid == teacher.config.hf_hybrid
    assert end_ids(student) == end_ids(teacher) == {1}  # the oldest host's trainer stores a list of one
    assert '"teacher_loss"' in (result / "training.json").read_text()


POCKET = {"hidden_size": 256, "intermediate_size": 672, "num_key_value_heads": 4}


def test_a_student_may_begin_as_the_first_layers_of_its_teacher(made: None, tmp_path: Path) -> None:
    recipe = read_recipe(fields_of(tmp_path, {"checkpoint": "hybrid-pocket", "first_layers": 1}, **POCKET))
    teacher = load_teacher("hybrid-pocket")
    student: Any = build_model(recipe, teacher.tokenizer, teacher.model)[0]
    wanted = teacher.model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in student.state_dict().items())
    assert len(student.model.layers) == 1 and student.lm_head.weight is student.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("hybrid-pocket", "teacher: must be a mapping"),
        ({}, "teacher: checkpoint is missing: bundled checkpoint, folder"),
        ({"checkpoint": "x", "share": 1.5}, "teacher: share=1.5 is out of range"),
        ({"checkpoint": "x", "shar": 1.0}, "teacher: unknown setting 'shar'"),
    ],
)
def test_wrong_sections_are_refused(made: None, tmp_path: Path, section: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_recipe(fields_of(tmp_path, section))


def test_a_teacher_that_is_none_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"cannot load '.*absent': give a bundled checkpoint \(hybrid-pocket\)"):
        load_teacher(str(tmp_path / "absent"))
    model: Any = LlamaForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer) + 8)
    model.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    with pytest.raises(TeacherError, match="writes 708 tokens and its tokenizer has 700"):
        load_teacher(str(tmp_path / "padded"))


def test_a_tokenizer_without_tags_is_refused(tmp_path: Path) -> None:
    from gguf_for_tests import tiny_llama
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model = tiny_llama()
    size = model.config.vocab_size
    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="w0").save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match="lacks the control tags"):
        load_teacher(str(tmp_path))
    with pytest.raises(ValueError, match=r"no <\|user\|> and <\|assistant\|>"):
        SheetEncoder(PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="w0"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({**POCKET, "num_hidden_layers": 2}, "first_layers=1, and the model has num_hidden_layers=2"),
        ({**POCKET, "intermediate_size": 64}, "mlp.gate_proj.weight differs in shape from the teacher's"),
        ({"hidden_size": 32}, "its head is not its embedding"),
    ],
)
def test_layers_that_do_not_fit_are_refused(
    made: None, folder: Path, tmp_path: Path, model: dict[str, int], message: str
) -> None:
    name = "hybrid-pocket" if "num_key_value_heads" in model else str(folder)
    recipe = read_recipe(fields_of(tmp_path, {"checkpoint": name, "first_layers": 1}, **model))
    teacher = load_teacher(name)
    with pytest.raises(TeacherError, match=message):
        build_model(recipe, teacher.tokenizer, teacher.model)
