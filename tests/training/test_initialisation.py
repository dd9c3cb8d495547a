"""Copy heads: what the first two layers attend to before any training.

Catches: a look-back that is off by one or blurred, an induction head that finds the earlier token instead of the one
behind it, heads that drown in the rest of the layer, and models whose shape does not fit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_for_tests import tiny
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hf_hybrid.training.initialisation import start_with_copy_heads

VOCAB, LENGTH = 400, 96


def fitting(**changes: Any) -> LlamaForCausalLM:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 256,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(2)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}, attn_implementation="eager")).eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return start_with_copy_heads(fitting())


@torch.no_grad()
def attention(model: Any, ids: Tensor) -> tuple[Tensor, ...]:
    """Per layer ``(heads, queries, keys)`` of one sequence."""
    return tuple(a[0] for a in model(input_ids=ids.unsqueeze(0), output_attentions=True).attentions)


def test_heads_of_layer_0_look_one_to_four_picked_back(model: Any) -> None:
    ids = torch.randint(VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(1))
    first = attention(model, ids)[0]
    for h in range(4):
        back = first[h].diagonal(offset=-(h + 1))  # (LENGTH - h - 1,), every query that has such a key
        # Keys of tokens with a large norm are weaker, so that a few queries look past theirs.
        assert float(back.mean()) > 0.9 and float(back.median()) > 0.98, h
        beside = first[h].diagonal(offset=-(h + 2)) + first[h].diagonal(offset=-h)[1 : LENGTH - h - 1]
        assert float(beside.mean()) < 0.1, h
    plain = attention(fitting(), ids)[0]
    assert float(plain[0].diagonal(offset=-1)[20:].max()) < 0.5  # without the start nobody looks back


def test_the_induction_head_finds_the_token_behind_an_earlier_occurrence(model: Any) -> None:
    """48 different tokens, then 24 of them again in another order, each of which has one earlier occurrence."""
    order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(4))[:48]
    picked = torch.randperm(47, generator=torch.Generator().manual_seed(5))[:24]
    second = attention(model, torch.cat([order, order[picked]]))[1]
    behind = second[0, 48 + torch.arange(24), picked + 1]
    assert float(behind.mean()) > 0.7 and float(behind.median()) > 0.9
    itself = second[0, 48 + torch.arange(24), picked]
    assert float(itself.max()) < 0.1


def test_the_second_head_prefers_an_earlier_pair(model: Any) -> None:
    """The token occurred twice before, once behind the same neighbour as now: head 1 goes there."""
    order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(6))[:30]
    a, b = order[0], order[1]
    ids = torch.cat([order[2:11], b[None], order[11:20], order[:2], order[20:], order[:2]])
    second = attention(model, ids)[1]
    pair, single = 20 + 1, 9 + 1  # behind "a b" at 19 and 20, and behind the lone b at 9
    assert ids[pair - 1] == b and ids[pair - 2] == a and ids[single - 1] == b
    assert float(second[1, -1, pair]) > 5 * float(second[1, -1, single])
    assert 0.3 < float(second[0, -1, pair] / second[0, -1, single]) < 3  # head 0 knows the last token alone


def test_it_copies_before_any_training(model: Any) -> None:
    """A sequence twice: the second time the next token is the best guess behind the token itself (chance: 1 in 399)."""
    once = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(7))[:40]
    with torch.no_grad():
        logits = model(input_ids=torch.cat([once, once]).unsqueeze(0)).logits[0, 40:-1]  # (39, vocab)
    guess = logits.scatter(1, once[:-1].unsqueeze(1), float("-inf")).argmax(-1)
    assert float((guess == once[1:]).float().mean()) > 0.8


def test_it_depends_on_its_seed_alone() -> None:
    one, two, other = (start_with_copy_heads(fitting(), seed) for seed in (0, 0, 1))
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(one.model.layers[0].self_attn.v_proj.weight, other.model.layers[0].self_attn.v_proj.weight)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 1},
        {"num_key_value_heads": 2},
        {"num_attention_heads": 2, "num_key_value_heads": 2},
        {"head_dim": 32},
        {"head_dim": 128},
    ],
)
def test_wrong_shapes_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="copy heads need 2 layers, 4 ungrouped heads of 64 dimensions"):
        start_with_copy_heads(fitting(**changes))


def test_other_projections_are_refused() -> None:
    shape = {"hidden_size": 256, "num_key_value_heads": 4, "head_dim": 64}
    with pytest.raises(ValueError, match="Qwen2ForCausalLM has others"):  # biases
        start_with_copy_heads(tiny("qwen2", hidden_size=256, num_key_value_heads=4))
    with pytest.raises(ValueError, match="Qwen3ForCausalLM has others"):  # norms
        start_with_copy_heads(tiny("qwen3", **shape))
    with pytest.raises(ValueError, match="GPT2LMHeadModel has others"):
        start_with_copy_heads(tiny("gpt2", n_embd=256))
