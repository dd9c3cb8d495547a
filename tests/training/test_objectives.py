"""The joint loss: its terms by hand, where its gradient goes, and the host's own loss as its limit.

Catches: a term divided by the other one's tokens or by all rows, ``IGNORE`` rows that count, a clean row that learns
through a noisy one, a shift of the targets by one, and an attention implementation that would misread the mask.
"""

from __future__ import annotations

import math

import pytest
import torch
from models_for_tests import tiny
from training_examples import CONTROL, FORMS, PAD, TWO_ROUNDS

from hf_hybrid.training.collators import CollatorSettings, HybridCollator
from hf_hybrid.training.layout import IGNORE, Form
from hf_hybrid.training.objectives import JointObjective, joint_loss

# The loss is float32 whatever the model is: 1e-7 relative for each of a few dozen terms.
TOLERANCE = 2e-5


def batch_of_form(form: Form, count: int = 2) -> dict[str, torch.Tensor]:
    settings = CollatorSettings(num_rows=90, max_spans=12, forms={form: 1.0}, block_lengths={4: 1.0})
    return HybridCollator(CONTROL, PAD, settings)([(i, TWO_ROUNDS) for i in range(count)])


def test_each_term_is_a_mean_over_its_own_tokens() -> None:
    """Two sequences; three clean terms and one noisy one, of known probabilities."""
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.3, 0.6, 0.1]])
    logits = torch.stack([p.log(), p.log() + 7.0])  # (2, 4, 3); a constant does not matter
    target = torch.tensor([[0, IGNORE, 2, 0], [IGNORE, 1, IGNORE, IGNORE]])
    noisy = torch.tensor([[False, False, False, True], [False, False, True, True]])
    terms = joint_loss(logits, target, noisy, noisy_weight=0.5)
    clean = -(math.log(0.5) + math.log(0.6) + math.log(0.8)) / 3
    hidden = -math.log(0.3)
    assert float(terms.clean_loss) == pytest.approx(clean, abs=1e-6)  # float32
    assert float(terms.noisy_loss) == pytest.approx(hidden, abs=1e-6)
    assert float(terms.loss) == pytest.approx(clean + 0.5 * hidden, abs=1e-6)
    assert float(terms.clean_accuracy) == 1.0 and float(terms.noisy_accuracy) == 0.0


def test_weights_are_shares_of_the_means() -> None:
    """Of both kinds of rows; a weight of an ignored row is none."""
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.3, 0.6, 0.1], [0.4, 0.5, 0.1]])
    target, noisy = torch.tensor([[0, IGNORE, 2, 0, 1]]), torch.tensor([[False, False, False, True, True]])
    weight = torch.tensor([[3.0, 50.0, 1.0, 0.5, 2.0]])
    for scale in (1.0, 7.0):
        terms = joint_loss(p.log()[None], target, noisy, weight=scale * weight)
        clean = -(3 * math.log(0.5) + math.log(0.6)) / 4
        hidden = -(0.5 * math.log(0.3) + 2 * math.log(0.5)) / 2.5
        assert float(terms.clean_loss) == pytest.approx(clean, abs=1e-6)  # float32
        assert float(terms.noisy_loss) == pytest.approx(hidden, abs=1e-6)
        assert float(terms.noisy_accuracy) == 0.5  # of rows, not of weights


def test_ignored_rows_count_nowhere() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 6, 9, generator=generator).requires_grad_()
    target = torch.randint(9, (2, 6), generator=generator)
    target[0, 2:4] = target[1, 5] = IGNORE
    noisy = torch.arange(6).expand(2, 6) > 3
    joint_loss(logits, target, noisy).loss.backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad.abs().sum(-1) > 0, target != IGNORE)
    other = logits.detach().clone()
    other[target == IGNORE] = 50.0
    one, two = joint_loss(logits.detach(), target, noisy), joint_loss(other, target, noisy)
    for name in ("loss", "clean_loss", "noisy_loss", "clean_accuracy", "noisy_accuracy"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name


def test_a_batch_without_a_kind_of_term_is_finite() -> None:
    logits = torch.randn(1, 3, 5)
    none = torch.full((1, 3), IGNORE)
    terms = joint_loss(logits, none, torch.zeros(1, 3, dtype=torch.bool))
    assert float(terms.loss) == 0.0
    target = torch.tensor([[1, 2, 3]])
    terms = joint_loss(logits, target, torch.zeros(1, 3, dtype=torch.bool))
    assert float(terms.noisy_loss) == 0.0 and terms.loss == terms.clean_loss > 0


def test_clean_loss_of_the_plain_form_is_the_hosts_causal_loss() -> None:
    model = tiny("llama")
    batch = batch_of_form("plain", 1)
    text = [*TWO_ROUNDS.prompt, *TWO_ROUNDS.answer, CONTROL.noise.end]
    labels = [-100] * len(TWO_ROUNDS.prompt) + text[len(TWO_ROUNDS.prompt) :]
    with torch.no_grad():
        host = model(input_ids=torch.tensor([text]), labels=torch.tensor([labels])).loss
        ours = JointObjective(model)(batch).clean_loss
    assert float(ours) == pytest.approx(float(host), abs=TOLERANCE)


@pytest.mark.parametrize("form", FORMS)
def test_clean_rows_learn_as_if_there_were_no_noisy_ones(form: Form) -> None:
    """The clean term's gradient is that of a batch of clean rows alone; it never reaches the mask's embedding."""
    model = tiny("llama")  # its head is not tied to the embedding
    batch = batch_of_form(form)
    embedding = model.get_input_embeddings().weight
    JointObjective(model, noisy_weight=0.0)(batch).loss.backward()
    joint = embedding.grad.clone()
    assert not joint[CONTROL.noise.mask].any() and joint[CONTROL.noise.end].any() == 0
    assert joint[list(TWO_ROUNDS.prompt)].any(-1).all()
    embedding.grad = None
    alone = {**batch, "target": batch["target"].masked_fill(batch["noisy"], IGNORE)}
    alone["span"] = batch["span"].masked_fill(batch["noisy"], -1)
    JointObjective(model)(alone).loss.backward()
    torch.testing.assert_close(joint, embedding.grad, rtol=0, atol=TOLERANCE)
    embedding.grad = None
    JointObjective(model)({**batch, "target": batch["target"].masked_fill(~batch["noisy"], IGNORE)}).loss.backward()
    assert embedding.grad[CONTROL.noise.mask].any()


def test_noisy_weight_scales_its_term() -> None:
    model, batch = tiny("llama"), batch_of_form("dag")
    with torch.no_grad():
        terms = JointObjective(model, noisy_weight=0.25)(batch)
    assert float(terms.loss) == pytest.approx(float(terms.clean_loss + 0.25 * terms.noisy_loss), abs=1e-6)
    assert float(terms.noisy_loss) > 0


def test_other_attention_implementations_are_refused() -> None:
    with pytest.raises(ValueError, match="attn_implementation='sdpa', and the model uses 'eager'"):
        JointObjective(tiny("llama", "eager"))
