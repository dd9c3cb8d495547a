"""The trainer: it learns, it goes on after an interruption bit by bit, it logs, it steps with two optimisers.

Catches: a resumed run that sees other batches, other rates or an empty momentum; a half-written checkpoint that is
gone on from; a parameter that nobody or both optimisers step; rates that a scheduler sets in vain; accumulated
gradients that are a sum or are scaled twice; terms of the loss that are lost on the way to the log.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import tiny
from torch.optim.lr_scheduler import LambdaLR
from training_examples import BARE, CONTROL, OVERRUN, PAD, TWO_ROUNDS
from transformers import TrainerCallback

from hf_hybrid.training.arguments import HybridTrainingArguments
from hf_hybrid.training.collators import CollatorSettings, HybridCollator
from hf_hybrid.training.examples import Example
from hf_hybrid.training.objectives import JointObjective
from hf_hybrid.training.optimizer import MuonAdamW
from hf_hybrid.training.resume import COMPLETE, last_whole_checkpoint
from hf_hybrid.training.trainer import HybridTrainer, IndexedExamples, rate_factor

EXAMPLES = (TWO_ROUNDS, BARE, OVERRUN)
COLLATOR = HybridCollator(CONTROL, PAD, CollatorSettings(num_rows=90, max_spans=12, block_lengths={4: 1.0}))


def draw(index: int) -> Example:
    return EXAMPLES[index % 3]


def model(seed: int = 1, **changes: Any) -> Any:
    """In float32, with dropout, so that a resumed run needs the random state too."""
    made = tiny("llama", attention_dropout=0.1, initializer_range=0.05, **changes).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.05, generator=generator)
    return made


def trainer(folder: Path, made: Any, steps: int, callbacks: list[TrainerCallback] | None = None, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "logging_steps": 5,
        "warmup": 2,
        "save_minutes": 1e9,
        "matrix_learning_rate": 2e-2,
        "other_learning_rate": 1e-2,
        "use_cpu": True,
        "disable_tqdm": True,
        "autocast_bfloat16": False,
        "compile_objective": False,
        "dataloader_pin_memory": False,
    }
    arguments = HybridTrainingArguments(output_dir=str(folder), max_steps=steps, **{**options, **changes})
    per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps
    data = IndexedExamples(draw, steps * per_step)
    return HybridTrainer(made, arguments, train_dataset=data, data_collator=COLLATOR, callbacks=callbacks)


class Kill(TrainerCallback):
    """Asks for a checkpoint behind step ``save`` and breaks off before step ``die``."""

    def __init__(self, save: int, die: int):
        self.save, self.die = save, die

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.save:
            control.should_save = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.die:
            raise KeyboardInterrupt


def test_the_loss_falls_and_its_terms_are_logged(tmp_path: Path) -> None:
    run = trainer(tmp_path, model(), 30)
    run.train()
    logs = [entry for entry in run.state.log_history if "clean_loss" in entry]
    assert [entry["step"] for entry in logs] == [5, 10, 15, 20, 25, 30]
    for name in ("clean_loss", "noisy_loss", "clean_accuracy", "noisy_accuracy"):
        assert all(name in entry for entry in logs)
    assert logs[-1]["clean_loss"] < 0.5 * logs[0]["clean_loss"]
    assert logs[-1]["noisy_loss"] < 0.8 * logs[0]["noisy_loss"]
    assert logs[-1]["clean_accuracy"] > logs[0]["clean_accuracy"]


def test_logged_terms_are_the_means_since_the_last_log(tmp_path: Path) -> None:
    """Without learning, the second log is the mean of the terms of batches 3 and 4."""
    made = model().eval()
    made.config.attention_dropout = 0.0
    for layer in made.model.layers:
        layer.self_attn.attention_dropout = 0.0
    run = trainer(tmp_path, made, 4, logging_steps=2, matrix_learning_rate=0.0, other_learning_rate=0.0)
    run.train()
    logged = [entry["noisy_loss"] for entry in run.state.log_history if "noisy_loss" in entry]
    objective = JointObjective(made)
    with torch.no_grad():
        batches = [COLLATOR([(i, draw(i)), (i + 1, draw(i + 1))]) for i in (0, 2, 4, 6)]
        losses = [float(objective(batch).noisy_loss) for batch in batches]
    expected = [sum(losses[:2]) / 2, sum(losses[2:]) / 2]
    assert logged == pytest.approx(expected, abs=1e-4)  # logged with four digits


def test_a_killed_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    straight = trainer(tmp_path / "straight", model(), 12)
    straight.train()
    broken = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        trainer(broken, model(), 12, [Kill(save=6, die=9)]).train()
    # What a kill in the middle of writing leaves behind.
    (broken / "checkpoint-9").mkdir()
    (broken / "checkpoint-9" / "model.safetensors").touch()
    last = last_whole_checkpoint(broken)
    assert last == broken / "checkpoint-6"
    resumed = trainer(broken, model(seed=5), 12)  # its own weights must not matter
    result = resumed.train(resume_from_checkpoint=str(last))
    assert result.global_step == 12
    pairs = zip(straight.model.state_dict().items(), resumed.model.state_dict().values(), strict=True)
    for (name, one), two in pairs:
        assert torch.equal(one, two), name
    assert last_whole_checkpoint(broken) == broken / "checkpoint-12"
    other = trainer(tmp_path / "other", model(seed=5), 1)
    assert not torch.equal(other.model.lm_head.weight, straight.model.lm_head.weight)


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    assert last_whole_checkpoint(tmp_path / "absent") is None
    assert last_whole_checkpoint(tmp_path) is None
    for name, whole in (("9", True), ("10", True), ("11", False), ("x", True)):
        (tmp_path / f"checkpoint-{name}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{name}" / COMPLETE).touch()
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-10"  # by number, not by name


def test_checkpoints_come_by_the_clock(tmp_path: Path) -> None:
    trainer(tmp_path, model(), 3, save_minutes=0.0, save_total_limit=2).train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert all((p / COMPLETE).exists() for p in tmp_path.glob("checkpoint-*"))
    trainer(tmp_path / "late", model(), 3).train()
    assert [p.name for p in (tmp_path / "late").glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_accumulated_gradients_are_the_mean_of_the_micro_batches(tmp_path: Path, micro_batches: int) -> None:
    made = tiny("llama").float()
    seen: dict[str, torch.Tensor] = {}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            seen.update({name: p.grad.clone() for name, p in made.named_parameters()})

    options = {"gradient_accumulation_steps": micro_batches, "max_grad_norm": 0.0, "logging_steps": 1}
    initial = {name: value.clone() for name, value in made.state_dict().items()}
    run = trainer(tmp_path, made, 1, [Watch()], **options)
    run.train()
    assert not run.model_accepts_loss_kwargs
    made.load_state_dict(initial)
    made.zero_grad()
    objective = JointObjective(made)
    pairs = [(2 * i, 2 * i + 1) for i in range(micro_batches)]
    losses = [objective(COLLATOR([(i, draw(i)) for i in pair])).loss for pair in pairs]
    mean = torch.stack(losses).mean()
    mean.backward()
    assert seen
    for name, parameter in made.named_parameters():
        # float32 sums in another order, gradients of order one
        torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert run.state.log_history[0]["loss"] == pytest.approx(mean.item(), abs=1e-3)


@pytest.mark.parametrize(
    ("units", "wanted", "found"),
    [
        (["amx_bf16"], None, True),
        ([], None, False),
        (None, None, True),  # the system does not say
        ([], True, True),
        (["amx_bf16"], False, False),
    ],
)
def test_bfloat16_where_it_is_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, units: list[str] | None, wanted: bool | None, found: bool
) -> None:
    monkeypatch.setattr("hf_hybrid.training.arguments.bfloat16_units", lambda: units)
    arguments = HybridTrainingArguments(output_dir=str(tmp_path), use_cpu=True, autocast_bfloat16=wanted)
    assert arguments.autocast_bfloat16 is found


def test_rate_factor() -> None:
    def at(step: int) -> float:
        return rate_factor(step, max_steps=100, warmup=10, decay_from=0.5)

    assert [at(0), at(4), at(9), at(10), at(49), at(50)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0, 1.0])
    assert [at(75), at(99)] == pytest.approx([0.5, 0.02])
    assert at(100) == 1e-3 and at(1000) == 1e-3  # never zero
    assert rate_factor(0, 10, 0, 1.0) == 1.0 and rate_factor(9, 10, 0, 1.0) == 1.0


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_stepped_by_one_optimiser(tied: bool) -> None:
    made = tiny("llama", tie_word_embeddings=tied).float()
    made.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    optimizer = MuonAdamW(made, matrix_lr=0.1, other_lr=0.1)
    names = {id(p): name for name, p in made.named_parameters()}
    muon = [names[id(p)] for group in optimizer.muon.param_groups for p in group["params"]]
    adamw = [names[id(p)] for group in optimizer.adamw.param_groups for p in group["params"]]
    assert sorted([*muon, *adamw]) == sorted(n for n, p in made.named_parameters() if p.requires_grad)
    assert all(".layers." in name and name.endswith("proj.weight") for name in muon) and len(muon) == 13
    assert [n for n in adamw if "norm" not in n] == ["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])]
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == [
        id(p) for g in (*optimizer.muon.param_groups, *optimizer.adamw.param_groups) for p in g["params"]
    ]


def step(made: Any, optimizer: MuonAdamW, index: int) -> None:
    JointObjective(made)(COLLATOR([(index, draw(index))])).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    assert all(p.grad is None for p in made.parameters())


def test_optimiser_state_survives_saving(tmp_path: Path) -> None:
    one, two = tiny("llama").float(), tiny("llama").float()
    first = MuonAdamW(one, matrix_lr=0.02, other_lr=0.01)
    second = MuonAdamW(two, matrix_lr=0.5, other_lr=0.5)
    before = {name: p.clone() for name, p in one.named_parameters()}
    step(one, first, 0)
    step(one, first, 1)
    assert all(not torch.equal(p, before[name]) for name, p in one.named_parameters())
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    two.load_state_dict(one.state_dict())
    for made, optimizer in ((one, first), (two, second)):
        step(made, optimizer, 2)
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert [g["lr"] for g in second.param_groups] == [0.02, 0.01]


def test_a_scheduler_reaches_both_optimisers_also_after_loading() -> None:
    made = tiny("llama").float()
    optimizer = MuonAdamW(made, matrix_lr=0.4, other_lr=0.2)
    schedule = LambdaLR(optimizer, lambda n: 1 / (n + 1))
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    schedule.step()
    rates = (optimizer.muon.param_groups[0]["lr"], optimizer.adamw.param_groups[0]["lr"])
    assert rates == pytest.approx((0.2, 0.1))
    with pytest.raises(ValueError, match="takes no closure"):
        optimizer.step(lambda: 0.0)
