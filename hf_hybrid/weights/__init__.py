"""Weights that other packages ship, read from their files without importing those packages."""

from hf_hybrid.weights.gguf import GgufError, GgufFile
from hf_hybrid.weights.smollm2 import MissingPackageError, load_smollm2

__all__ = ["GgufError", "GgufFile", "MissingPackageError", "load_smollm2"]
