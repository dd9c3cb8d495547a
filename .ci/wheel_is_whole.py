"""The wheel of this environment lacks nothing of the checkout, whose root is the argument, and every module imports."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path

import transformers

import hf_hybrid

source, installed = Path(sys.argv[1], "hf_hybrid"), Path(hf_hybrid.__file__).parent
assert source.resolve() != installed.resolve(), "the checkout was imported, not the wheel"
files = [p.relative_to(source) for p in source.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
missing = [str(p) for p in files if not (installed / p).is_file()]
assert not missing, f"the wheel lacks {missing}; see package-data in pyproject.toml"
modules = [m.name for m in pkgutil.walk_packages(hf_hybrid.__path__, "hf_hybrid.") if not m.name.endswith("__main__")]
for name in modules:
    importlib.import_module(name)
print(
    f"the wheel of hf_hybrid {hf_hybrid.__version__} holds all {len(files)} files; {len(modules)} modules import "
    f"with transformers {transformers.__version__}"
)
