"""Stores the folder of a release: ``make release``, once per version, before it is tagged.

A tiny random model with all tags is exported by this code and answers a prompt in every way; folder and answers are
written to ``tests/releases/<version>/``. Later versions must load the folder and write the same (``test_releases.py``).
"""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

import hf_hybrid
from hf_hybrid.config import SETTINGS
from hf_hybrid.hub.exporting import export_model
from hf_hybrid.training.recipes.tokenizer import build_tokenizer
from tests.checkpoint_for_tests import favour
from tests.hub.stored_release import ARCHIVE, RECORD, answers

RELEASES = Path(__file__).resolve().parents[1] / "releases"
DTYPE = "float64"  # so that no processor rounds a token into another one
PROMPT = "Country: Isle 3\nCoast: green 12\nRice: red 7\n"
SAMPLED = {"do_sample": True, "temperature": 1.2, "seed": 5}
CALLS: list[dict[str, Any]] = [
    {},  # the stored strategy with the stored settings
    *({"strategy": name} for name in SETTINGS),
    *({"strategy": name, "repetition_penalty": 1.5} for name in ("autoregressive", "planned_diffusion", "speculative")),
    *({"strategy": name, **SAMPLED} for name in SETTINGS),
    {"strategy": "planned_diffusion", "span_decoding": "autoregressive"},
    {"strategy": "planned_diffusion", "verify_spans": False, "visibility": "sparse", "return_control_tokens": True},
    {"strategy": "block_diffusion", "commit": "block", "window_length": 4, "selection": "margin"},
    {"strategy": "speculative", "drafter": "self", "draft_length": 4, "adaptive": False},
]


def write_release(folder: Path) -> None:
    """Export the model into ``folder``, which must not be there yet, and record its answers."""
    folder.mkdir(parents=True)
    model, tokenizer = _model_and_tokenizer()
    model.generation_config.hf_hybrid = {"window_length": 6, "planned_diffusion": {"max_span_extension": 1.25}}
    export_model(model, folder, tokenizer=tokenizer, strategy="planned_diffusion")
    loaded = hf_hybrid.AutoHybridModelForCausalLM.from_pretrained(folder, dtype=DTYPE).eval()
    found = answers(loaded, AutoTokenizer.from_pretrained(folder), PROMPT, CALLS)
    record = {"version": hf_hybrid.__version__, "dtype": DTYPE, "prompt": PROMPT, "answers": found}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    code = folder / "custom_generate"
    with zipfile.ZipFile(folder / ARCHIVE, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for file in sorted(code.iterdir()):
            entry = zipfile.ZipInfo(f"{code.name}/{file.name}")  # of a fixed time: the same code is the same archive
            archive.writestr(entry, file.read_bytes(), zipfile.ZIP_DEFLATED)
    shutil.rmtree(code)


def _model_and_tokenizer() -> tuple[Any, Any]:
    """A random Llama of 20,000 weights that likes to plan, and its tokenizer."""
    tokenizer = build_tokenizer([PROMPT, "## Land\n- rice, hills and a river\n"], ("## Land\n",), 400, fewer=True)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=None,
        **ends,
    )
    model: Any = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ends, max_new_tokens=80)
    control = hf_hybrid.prepare_vocabulary(model, tokenizer)
    tags, noise = control.tags, control.noise
    shortest = tags.lengths[0][1]
    favour(model, {tags.topic: 3.0, tags.async_: 2.0, shortest: 2.0, noise.filler: 1.6, noise.end: -1.0})
    return model, tokenizer


if __name__ == "__main__":
    target = RELEASES / hf_hybrid.__version__
    if target.exists():
        sys.exit(f"{target} is there already: a stored release is never written anew")
    write_release(target)
    print(target)
