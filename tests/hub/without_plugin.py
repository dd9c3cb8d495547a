"""Run by ``test_without_plugin.py`` in a process of its own, in which ``hf_hybrid`` cannot be imported.

Arguments: a JSON file with what to do, and one to write what came out. It uses what a user without the package has.
"""

from __future__ import annotations

import json
import sys
from importlib.abc import MetaPathFinder
from typing import Any


class Absent(MetaPathFinder):
    """Finds no ``hf_hybrid``, however it is installed."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.partition(".")[0] == "hf_hybrid":
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


sys.meta_path.insert(0, Absent())

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, pipeline  # noqa: E402


def written(model: Any, encoded: Any, **arguments: Any) -> list[list[int]]:
    return model.generate(**encoded, **arguments).tolist()


def error_of(call: Any) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


class Kept(TextStreamer):
    """Keeps the text instead of printing it."""

    text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text


def hybrid(job: dict[str, Any]) -> dict[str, Any]:
    """Every strategy through from_pretrained and pipeline, and what comes without trust."""
    folder, texts, length = job["folder"], job["texts"], job["length"]
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    encoded = tokenizer(texts, return_tensors="pt", padding=True)
    single = tokenizer(texts[:1], return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, trust_remote_code=True).eval()
    pipe = pipeline(
        "text-generation", model=folder, trust_remote_code=True, dtype=torch.float64, device="cpu", tokenizer=tokenizer
    )
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    out: dict[str, Any] = {"from_pretrained": {}, "sampled": {}, "pipeline": {}}
    for strategy in job["strategies"]:
        out["from_pretrained"][strategy] = written(model, encoded, strategy=strategy, max_new_tokens=length)
        drawn = {"do_sample": True, "seed": 5, "strategy": strategy, "max_new_tokens": length}
        out["sampled"][strategy] = written(model, encoded, **drawn)
        record = pipe(texts[0], strategy=strategy, max_new_tokens=length, do_sample=False, return_tensors=True)
        out["pipeline"][strategy] = record[0]["generated_token_ids"]
    drafting = {"strategy": "speculative", "assistant_model": plain}
    out["assisted"] = written(model, encoded, **drafting, max_new_tokens=length)
    out["default"] = written(model, encoded, max_new_tokens=length)
    out["positional"] = model.generate(single.input_ids, max_new_tokens=length).tolist()
    out["host"] = written(plain, encoded, max_new_tokens=length, do_sample=False)
    out["without trust"] = error_of(lambda: written(plain, single, strategy="planned_diffusion", max_new_tokens=4))
    out["unknown"] = error_of(lambda: written(model, single, strategy="nonsense", max_new_tokens=4))
    streamer = Kept(tokenizer, skip_prompt=True, skip_special_tokens=True)
    rich = model.generate(**single, max_new_tokens=length, return_dict_in_generate=True, streamer=streamer)
    out["streamed"] = streamer.text
    out["report"] = {
        "strategy": rich.report[0].strategy,
        "labels": [list(span.label) for span in rich.report[0].spans],
        "same plan": model.generate(**single, max_new_tokens=length, plan=rich.report[0].plans).tolist(),
    }
    return out


def speculative(job: dict[str, Any]) -> dict[str, Any]:
    """The repository without weights on models that know nothing of it."""
    out: dict[str, Any] = {}
    for name, folder in job["models"].items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        ids = torch.tensor(job["prompt"])  # (1, length)
        arguments = {"max_new_tokens": job["length"], "do_sample": False}
        plain = model.generate(ids, **arguments)
        model.generation_config.return_dict_in_generate = True
        repository = {"custom_generate": job["folder"], "trust_remote_code": True, "local_files_only": True}
        # Not adaptive: whether a draft pays depends on the machine.
        ours = model.generate(ids, **repository, **arguments, adaptive=False)
        out[name] = {
            "plain": plain.tolist(),
            "ours": ours.sequences.tolist(),
            "strategy": ours.report[0].strategy,
            "passes": ours.report[0].num_forwards,
        }
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    results = {"hybrid": hybrid(jobs["hybrid"]), "speculative": speculative(jobs["speculative"])}
    assert not [name for name in sys.modules if name.partition(".")[0] == "hf_hybrid"]
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(results, file)
