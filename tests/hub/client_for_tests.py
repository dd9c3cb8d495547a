"""What a user of the hub does, as a program of its own: the client reads its endpoint when it is imported.

python client_for_tests.py STEP ARGUMENTS.json ANSWER.json
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline
from transformers.utils import logging

import hf_hybrid
from hf_hybrid import AutoHybridModelForCausalLM
from hf_hybrid.checkpoints import bundled
from hf_hybrid.hub.card import write_card
from hf_hybrid.hub.exporting import export_speculative

PROMPT = "Growth: 5.9%\nTerrain: hill"
RECORD = "Capital: Port Amel\nPopulation: 4,512,000\nArea: 12,300 sq km"
STRATEGIES: dict[str, dict[str, Any]] = {
    "stored": {},
    "autoregressive": {"strategy": "autoregressive"},
    "block_diffusion": {"strategy": "block_diffusion"},
    "planned_diffusion": {"strategy": "planned_diffusion"},
    "speculative": {"strategy": "speculative", "drafter": "suffix"},
}


def written(model: Any, tokenizer: Any, prompt: str = PROMPT) -> dict[str, list[int]]:
    """The ids that every strategy writes."""
    inputs = tokenizer(prompt, return_tensors="pt")
    return {
        name: model.generate(**inputs, max_new_tokens=24, **options)[0].tolist() for name, options in STRATEGIES.items()
    }


def load(name: str, **options: Any) -> tuple[Any, Any]:
    """Model and tokenizer, by the id of a repository."""
    subfolder = {key: options[key] for key in ("subfolder", "revision", "token") if key in options}
    model = AutoHybridModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options)
    return model.eval(), AutoTokenizer.from_pretrained(name, **subfolder)


def attempt(action: Callable[[], Any]) -> list[str]:
    """Type and message of the error that an action ends in."""
    try:
        action()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


def push(folder: str) -> dict[str, Any]:
    """Push a checkpoint in every way that there is."""
    api = HfApi()
    model, tokenizer = load(folder)
    model.generation_config.hf_hybrid = {"strategy": "planned_diffusion", "planned_diffusion": {"window_length": 6}}
    before = written(model, tokenizer)
    model.push_to_hub("alice/tiny")
    first = tokenizer.push_to_hub("alice/tiny").oid
    model.push_to_hub("alice/sharded", max_shard_size="50KB")
    tokenizer.push_to_hub("alice/sharded")
    model.push_to_hub("alice/secret", private=True)
    tokenizer.push_to_hub("alice/secret")
    model.save_pretrained(f"{folder}-again")
    tokenizer.save_pretrained(f"{folder}-again")
    api.create_repo("alice/deep")
    api.upload_folder(repo_id="alice/deep", folder_path=f"{folder}-again", path_in_repo="models/tiny")
    api.create_repo("alice/pocket")
    api.upload_folder(repo_id="alice/pocket", folder_path=bundled("hybrid-pocket"))

    # With the decoding in it: in one commit, as a folder with a card, and the decoding alone.
    one = hf_hybrid.push_to_hub(model, "alice/one", tokenizer=tokenizer, commit_message="All of it")
    page = (Path(__file__).resolve().parents[2] / "docs" / "hub.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^hf_hybrid\.push_to_hub\(.*?\)", page, re.M)  # as a reader would copy it
    exec(line.replace('"me/', '"alice/'), {"hf_hybrid": hf_hybrid, "model": model, "tokenizer": tokenizer})
    write_card(Path(f"{folder}-again"), name="alice/carded", licence="apache-2.0", base_model="alice/tiny")
    api.create_repo("alice/carded")
    api.upload_folder(repo_id="alice/carded", folder_path=f"{folder}-again")
    bad = ModelCard.load("alice/carded")
    bad.data["base_model_relation"] = "cousin"
    export_speculative(Path(f"{folder}-speculative"))
    api.create_repo("alice/speculative")
    api.upload_folder(repo_id="alice/speculative", folder_path=f"{folder}-speculative")

    # Another text on a branch, from where main is now.
    with torch.no_grad():
        model.lm_head.weight += 0.5 * torch.randn_like(model.lm_head.weight)
    api.create_branch("alice/tiny", branch="trial")
    model.push_to_hub("alice/tiny", revision="trial")
    api.create_tag("alice/tiny", tag="v1", revision=first)
    return {
        "before": before,
        "first": first,
        "branch": written(model, tokenizer),
        "refs": sorted(ref.name for ref in (lambda r: [*r.branches, *r.tags])(api.list_repo_refs("alice/tiny"))),
        "shards": sorted(api.list_repo_files("alice/sharded")),
        "tree": sorted(entry.path for entry in api.list_repo_tree("alice/deep", recursive=True)),
        "paths": [getattr(entry, "size", None) for entry in api.get_paths_info("alice/pocket", ["model.safetensors"])],
        "commits": [commit.title for commit in api.list_repo_commits("alice/tiny")],
        "one": [one.oid, [commit.title for commit in api.list_repo_commits("alice/one")]],
        "bad card": attempt(
            lambda: api.upload_file(path_or_fileobj=str(bad).encode(), path_in_repo="README.md", repo_id="alice/carded")
        ),
        "tags": api.model_info("alice/carded").tags,
        "pipeline": api.model_info("alice/carded").pipeline_tag,
    }


def read(first: str) -> dict[str, Any]:
    """Load what was pushed, by id, revision and subfolder, sharded, private, and by the host's own classes."""
    found: dict[str, Any] = {
        "id": written(*load("alice/tiny")),
        "commit": written(*load("alice/tiny", revision=first)),
        "tag": written(*load("alice/tiny", revision="v1")),
        "branch": written(*load("alice/tiny", revision="trial")),
        "sharded": written(*load("alice/sharded")),
        "subfolder": written(*load("alice/deep", subfolder="models/tiny")),
        "private": written(*load("alice/secret", token="hf_alice")),
    }
    plain: Any = AutoModelForCausalLM.from_pretrained("alice/tiny", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained("alice/tiny")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    found["plain"] = plain.generate(**inputs, max_new_tokens=24)[0].tolist()
    found["enabled"] = written(hf_hybrid.enable(plain), tokenizer)
    found["config"] = GenerationConfig.from_pretrained("alice/tiny").hf_hybrid  # type: ignore[attr-defined]
    found["one"] = written(*load("alice/one"))
    block = re.findall(r"```python\n(.*?)```", ModelCard.load("alice/carded").text, re.S)[0]
    scope: dict[str, Any] = {}
    exec(block.replace("(**inputs", "(**inputs, max_new_tokens=8"), scope)
    found["card"] = written(scope["model"], scope["tokenizer"])
    pocket, words = load("alice/pocket")
    found["pocket"] = words.decode(
        pocket.generate(**words(RECORD, return_tensors="pt"), strategy="planned_diffusion")[0], skip_special_tokens=True
    )
    hf_hybrid.install()
    try:
        write = pipeline("text-generation", model="alice/tiny", dtype=torch.float32)
        found["pipeline"] = write(PROMPT, max_new_tokens=24, do_sample=False, return_tensors=True)[0][
            "generated_token_ids"
        ]
    finally:
        hf_hybrid.uninstall()
    return found


def refused() -> dict[str, list[str]]:
    """What a user sees who asks for what is not there, or not theirs."""
    api = HfApi(token=False)
    return {
        "private without token": attempt(lambda: load("alice/secret", token=False)),
        "private of another": attempt(lambda: load("alice/secret", token="hf_bob")),
        "wrong token": attempt(lambda: load("alice/tiny", token="hf_wrong", revision="v1")),
        "wrong token, private": attempt(lambda: load("alice/secret", token="hf_wrong")),
        "missing repository": attempt(lambda: load("alice/nothing")),
        "missing revision": attempt(lambda: load("alice/tiny", revision="nowhere")),
        "missing subfolder": attempt(lambda: load("alice/deep", subfolder="models/huge")),
        "push without token": attempt(lambda: api.create_repo("alice/mine")),
        "push to another": attempt(
            lambda: HfApi(token="hf_bob").upload_file(repo_id="alice/tiny", path_or_fileobj=b"x", path_in_repo="x.txt")
        ),
    }


def remove() -> dict[str, Any]:
    """Delete a file, a branch and a repository."""
    api = HfApi()
    api.delete_file("README.md", "alice/sharded")
    api.delete_branch("alice/tiny", branch="trial")
    api.delete_repo("alice/secret")
    return {
        "files": api.list_repo_files("alice/sharded"),
        "branches": [ref.name for ref in api.list_repo_refs("alice/tiny").branches],
        "exists": api.repo_exists("alice/secret"),
    }


def offline() -> dict[str, Any]:
    """Load from the cache, without a network."""
    return {
        "id": written(*load("alice/tiny")),
        "sharded": written(*load("alice/sharded")),
        "subfolder": written(*load("alice/deep", subfolder="models/tiny")),
        "missing": attempt(lambda: load("alice/never")),
    }


def hostile(name: str, files: list[str], folder: str) -> dict[str, list[str]]:
    """Ask a hostile repository for everything, into the cache and into a folder."""
    found: dict[str, list[str]] = {}
    for file in files:
        found[f"cache {file}"] = attempt(lambda file=file: hf_hub_download(name, file))
        found[f"folder {file}"] = attempt(lambda file=file: hf_hub_download(name, file, local_dir=folder))
    return found | {
        "snapshot": attempt(lambda: snapshot_download(name)),
        "snapshot to a folder": attempt(lambda: snapshot_download(name, local_dir=folder)),
        "model": attempt(lambda: AutoHybridModelForCausalLM.from_pretrained(name)),
        "tokenizer": attempt(lambda: AutoTokenizer.from_pretrained(name)),
        "code": attempt(lambda: AutoHybridModelForCausalLM.from_pretrained(name, trust_remote_code=True)),
    }


def main() -> None:
    """Run one step and write down what it found."""
    step, arguments, answer = sys.argv[1:]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.set_verbosity_error()
    steps = {"push": push, "read": read, "refused": refused, "remove": remove, "offline": offline, "hostile": hostile}
    calls: list[dict[str, Any]] = json.loads(Path(arguments).read_text(encoding="utf-8"))
    found = [steps[step](**call) for call in calls]
    Path(answer).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
