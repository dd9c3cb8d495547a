"""What a user of the hub does who has transformers and not this package, as a program of its own.

python client_without_plugin.py STEP ARGUMENTS.json ANSWER.json
"""

from __future__ import annotations

import json
import re
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any


class Absent(MetaPathFinder):
    """Finds no ``hf_hybrid``, however it is installed."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.partition(".")[0] == "hf_hybrid":
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


sys.meta_path.insert(0, Absent())

import torch  # noqa: E402
from huggingface_hub import ModelCard  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline  # noqa: E402
from transformers.utils import logging  # noqa: E402


def trusting(prompt: str, name: str, strategies: dict[str, dict[str, Any]], revision: str) -> dict[str, Any]:
    """Write by every strategy with the code of the repository, and as its card says; without trust too."""
    options: dict[str, Any] = {"dtype": torch.float32, "revision": revision}
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, **options)
    tokenizer = AutoTokenizer.from_pretrained(name)
    inputs = tokenizer(prompt, return_tensors="pt")
    written = {key: model.generate(**inputs, max_new_tokens=24, **more)[0].tolist() for key, more in strategies.items()}
    write = pipeline("text-generation", model=name, trust_remote_code=True, dtype=torch.float32)
    record = write(prompt, max_new_tokens=24, do_sample=False, return_tensors=True)
    plain = AutoModelForCausalLM.from_pretrained(name, **options)
    drafted = plain.generate(
        **inputs, max_new_tokens=24, do_sample=False, custom_generate="alice/speculative", trust_remote_code=True
    )
    block = re.findall(r"```python\n(.*?)```", ModelCard.load("alice/carded").text, re.S)[1]
    scope: dict[str, Any] = {"name": "alice/carded", "inputs": inputs}
    exec(block, scope)
    return {
        "written": written,
        "pipeline": record[0]["generated_token_ids"],
        "untrusted": plain.generate(**inputs, max_new_tokens=24)[0].tolist(),
        "drafted": drafted[0].tolist(),
        "card": scope["model"].generate(**inputs, max_new_tokens=24)[0].tolist(),
        "modules": sorted({name for name in sys.modules if name.partition(".")[0] == "hf_hybrid"}),
    }


def main() -> None:
    """Run the step and write down what it found."""
    _, arguments, answer = sys.argv[1:]
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    found = [trusting(**call) for call in json.loads(Path(arguments).read_text(encoding="utf-8"))]
    Path(answer).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
