"""Folders that were exported under one release of transformers are used under another one, without the package.

python across_hosts.py EXPORTING USING FOLDER

EXPORTING and USING are the Pythons of two environments, the first one with the package; FOLDER is made anew. The exit
code is 1 if another text comes, or none.

Catches: a copy that relies on a name of the release that it was made under; weights, a tokenizer or a config that the
other release reads otherwise.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

LENGTH = 80
TEXTS = ("Country: Port Amel\nCapital: Amel\nExports: rice, iron", "Country: Armenia\nColors: red, blue, orange")
PROMPT = [[3, 7, 9, 2, 11, 3, 7, 9, 2, 11, 3, 7, 9, 2]]


def make(root: Path) -> None:
    """The repositories, the jobs for ``without_plugin.py``, and the texts that must come."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, __version__

    from hf_hybrid import AutoHybridModelForCausalLM
    from hf_hybrid.config import SETTINGS

    for arguments in (
        ["hybrid-pocket", str(root / "hybrid-repo"), "--strategy", "planned_diffusion"],
        ["--speculative", str(root / "speculative")],
    ):
        subprocess.run([str(Path(sys.executable).with_name("hf-hybrid")), "export", *arguments], check=True)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.2, eos_token_id=40, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(root / "llama")
    model = AutoHybridModelForCausalLM.from_pretrained(root / "hybrid-repo", dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(root / "hybrid-repo", padding_side="left")
    encoded = tokenizer(list(TEXTS), return_tensors="pt", padding=True)
    wanted: dict[str, Any] = {"release": __version__, "from_pretrained": {}, "sampled": {}}
    for name in SETTINGS:
        options = {"strategy": name, "max_new_tokens": LENGTH}
        wanted["from_pretrained"][name] = model.generate(**encoded, **options).tolist()
        wanted["sampled"][name] = model.generate(**encoded, **options, do_sample=True, seed=5).tolist()
    hybrid = {"folder": str(root / "hybrid-repo"), "texts": TEXTS, "length": LENGTH, "strategies": list(SETTINGS)}
    speculative = {"folder": str(root / "speculative"), "models": {"llama": str(root / "llama")}}
    jobs = {"hybrid": hybrid, "speculative": speculative | {"prompt": PROMPT, "length": 100}}
    (root / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    (root / "wanted.json").write_text(json.dumps(wanted), encoding="utf-8")


def compare(root: Path) -> list[str]:
    """What differs."""
    wanted, found = (json.loads((root / f"{name}.json").read_text(encoding="utf-8")) for name in ("wanted", "found"))
    ours, drafted = found["hybrid"], found["speculative"]["llama"]
    pairs = {
        f"{name}, {kind}": (ours[kind][name], wanted[kind][name])
        for kind in ("from_pretrained", "sampled")
        for name in wanted[kind]
    }
    pairs["the stored strategy"] = (ours["default"], wanted["from_pretrained"]["planned_diffusion"])
    pairs["a given plan"] = (ours["report"]["same plan"], ours["positional"])
    pairs["the repository without weights"] = (drafted["ours"], drafted["plain"])
    pairs["its strategy"] = (drafted["strategy"], "speculative")
    return [name for name, (text, other) in pairs.items() if text != other]


def main() -> int:
    """Export, use and compare."""
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
        return 0
    exporting, using, root = sys.argv[1], sys.argv[2], Path(sys.argv[3]).resolve()
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    here = Path(__file__).resolve()
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(root / "modules")}
    subprocess.run([exporting, str(here), "make", str(root)], check=True, env=offline)
    files = [str(root / "jobs.json"), str(root / "found.json")]
    subprocess.run([using, str(here.with_name("without_plugin.py")), *files], check=True, env=offline)
    faults = compare(root)
    print("\n".join(f"another text: {fault}" for fault in faults) or f"{exporting} -> {using}: the same texts")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
