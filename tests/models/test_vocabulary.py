"""Control tokens: added once, reused where they exist, recorded in the config, read back and checked.

Bugs these tests catch: a resize that shrinks, that unties embeddings or that moves old rows; ids that drift on a
second call; tags that decode as text; a tokenizer's mask token ignored, or taken although it is the end token; holes
in a vocabulary counted as tokens; a damaged record that decodes anyway.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_hybrid.models.vocabulary import LENGTHS, VocabularyError, control_tokens, prepare_vocabulary

NEW = 6 + len(LENGTHS) + 8  # mask and five tags, the lengths, the dependencies
WORDS = 20


def llama(rows: int = WORDS, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": rows,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "bos_token_id": 0,
            "eos_token_id": 1,
            **changes,
        }
    )
    return LlamaForCausalLM(config).eval()


def words(extra: dict[str, int] | None = None, **special: str) -> PreTrainedTokenizerFast:
    vocab = {"<bos>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, WORDS)} | (extra or {})
    raw = Tokenizer(models.WordLevel(vocab, unk_token="w2"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, **{"bos_token": "<bos>", "eos_token": "<eos>", **special})


@pytest.mark.parametrize("tied", [False, True])
def test_adds_resizes_and_is_idempotent(tied: bool) -> None:
    model, tokenizer = llama(tie_word_embeddings=tied), words()
    old_in, old_out = (e.weight.detach().clone() for e in (model.get_input_embeddings(), model.get_output_embeddings()))
    tokens = prepare_vocabulary(model, tokenizer)
    size = WORDS + NEW
    assert len(tokenizer) == size and model.config.vocab_size == size
    new_in, new_out = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert new_in.shape[0] == new_out.shape[0] == size
    assert (new_in is new_out) == tied
    assert torch.equal(new_in[:WORDS], old_in) and torch.equal(new_out[:WORDS], old_out)
    assert sorted([*tokens.noise.banned]) == list(range(WORDS, size)) and tokens.noise.end == 1
    assert [n for n, _ in tokens.tags.lengths] == list(LENGTHS) and len(tokens.tags.depends) == 8
    assert tokenizer.mask_token_id == tokens.noise.mask
    assert model(torch.tensor([[tokens.noise.mask, tokens.tags.par]])).logits.shape == (1, 2, size)

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert prepare_vocabulary(model, tokenizer) == tokens == control_tokens(model)
    assert len(tokenizer) == size
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_new_rows_lie_around_the_mean() -> None:
    model = llama(rows=90)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(5.0)
    old = model.get_input_embeddings().weight.detach().clone()
    prepare_vocabulary(model, words({f"x{i}": i for i in range(WORDS, 90)}))
    new = model.get_input_embeddings().weight[90:]
    # The host draws with a covariance of 1e-9 times that of the old rows; a start around zero would miss by 5.
    assert torch.allclose(new, old.mean(0).expand_as(new), atol=1e-3)


def test_tags_are_special_and_whole() -> None:
    model, tokenizer = llama(), words()
    tokens = prepare_vocabulary(model, tokenizer)
    ids = tokenizer("w3 <topic> w4<len:8><dep:1> <async> w4 <sync/>", add_special_tokens=False)["input_ids"]
    assert ids == [
        3,
        tokens.tags.topic,
        4,
        dict(tokens.tags.lengths)[8],
        tokens.tags.depends[0],
        tokens.tags.async_,
        4,
        tokens.tags.sync,
    ]
    assert tokenizer.decode([*tokens.noise.banned], skip_special_tokens=True) == ""


def test_spare_rows_are_used_and_never_cut() -> None:
    model = llama(rows=WORDS + NEW + 5)
    weight = model.get_input_embeddings().weight
    prepare_vocabulary(model, words())
    assert model.get_input_embeddings().weight is weight and model.config.vocab_size == WORDS + NEW + 5


def test_existing_tokens_are_reused() -> None:
    extra = {"<topic>": WORDS, "<len:8>": WORDS + 1, "[MASK]": WORDS + 2}
    model, tokenizer = llama(rows=WORDS + 3), words(extra, mask_token="[MASK]")
    tokens = prepare_vocabulary(model, tokenizer, lengths=(8, 16), max_depends=0)
    assert (tokens.tags.topic, tokens.tags.lengths[0], tokens.noise.mask) == (WORDS, (8, WORDS + 1), WORDS + 2)
    assert tokens.tags.depends == () and "<mask>" not in tokenizer.get_vocab()
    assert len(tokenizer) == WORDS + 3 + 5  # par, async, sync, spad and one length are new
    assert (
        tokenizer.decode([tokens.tags.topic], skip_special_tokens=True) == ""
    )  # an ordinary token before, special now


def test_a_mask_token_with_another_job_is_not_taken() -> None:
    model, tokenizer = llama(), words(mask_token="<eos>")
    tokens = prepare_vocabulary(model, tokenizer)
    assert tokens.noise.mask != tokens.noise.end and tokenizer.mask_token == "<mask>"


def test_other_special_tokens_stay_special() -> None:
    tokenizer = words(extra_special_tokens=["w5"])
    prepare_vocabulary(llama(), tokenizer)
    assert "w5" in tokenizer.all_special_tokens


def test_holes_in_the_vocabulary() -> None:
    # 21 tokens, but the highest id is 40: the number of tokens would leave the new ones without rows.
    model, tokenizer = llama(rows=41), words({"far": 40})
    tokens = prepare_vocabulary(model, tokenizer)
    assert model.config.vocab_size >= 1 + max(tokens.noise.banned)
    assert control_tokens(model) == tokens


def test_record_survives_save_and_load(tmp_path: Path) -> None:
    model, tokenizer = llama(tie_word_embeddings=True), words()
    tokens = prepare_vocabulary(model, tokenizer, lengths=(4, 9), max_depends=2)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, reread = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert control_tokens(loaded) == tokens
    assert prepare_vocabulary(loaded, reread, lengths=(4, 9), max_depends=2) == tokens
    assert reread.convert_tokens_to_ids("<len:9>") == dict(tokens.tags.lengths)[9] and len(reread) == len(tokenizer)


def test_end_token() -> None:
    model, tokenizer = llama(eos_token_id=[3, 1]), words()
    assert prepare_vocabulary(model, tokenizer).noise.end == 3
    model.generation_config.eos_token_id = 4
    assert control_tokens(model).noise.end == 4  # type: ignore[union-attr]
    bare = llama(eos_token_id=None)
    assert prepare_vocabulary(bare, words()).noise.end == 1  # the tokenizer's
    assert bare.generation_config.eos_token_id == 1
    silent = words(eos_token=None)  # type: ignore[arg-type]
    with pytest.raises(VocabularyError, match=r"set tokenizer\.eos_token"):
        prepare_vocabulary(llama(eos_token_id=None), silent)
    assert len(silent) == WORDS  # nothing was changed before the refusal


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": ()}, "at least one"),
        ({"lengths": (8, 8)}, "rising"),
        ({"lengths": (0, 8)}, "positive"),
        ({"max_depends": -1}, "0 or more"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(VocabularyError, match=message):
        prepare_vocabulary(llama(), words(), **arguments)


def test_a_model_without_a_record() -> None:
    assert control_tokens(llama()) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"par": None}, "par must be a token id"),
        ({"par": True}, "par must be a token id"),
        ({"topic": "<topic>"}, "topic must be a token id"),
        ({"sync": 10**6}, "outside the vocabulary"),
        ({"spad": -1}, "outside the vocabulary"),
        ({"mask_token_id": 1}, "two meanings"),
        ({"lengths": []}, "at least one length"),
        ({"lengths": [8, 16]}, r"list of \[tokens, id\]"),
        ({"lengths": [[16, 5], [8, 6]]}, "above 16"),
        ({"lengths": [[8, 99]]}, "outside the vocabulary"),
        ({"depends": 3}, "list of token ids"),
        ({"depends": [3, 3]}, "two meanings"),
    ],
)
def test_damaged_records_are_refused(change: dict[str, Any], message: str) -> None:
    model = llama()
    prepare_vocabulary(model, words())
    model.config.hf_hybrid = {**model.config.hf_hybrid, **change}
    with pytest.raises(VocabularyError, match=message):
        control_tokens(model)


def test_incomplete_and_foreign_records_are_refused() -> None:
    model = llama()
    prepare_vocabulary(model, words())
    model.config.hf_hybrid = {k: v for k, v in model.config.hf_hybrid.items() if k not in ("par", "lengths")}
    with pytest.raises(VocabularyError, match=r"par, lengths.*prepare_vocabulary"):
        control_tokens(model)
    model.config.hf_hybrid = [1, 2]
    with pytest.raises(VocabularyError, match="must be a dict"):
        control_tokens(model)
