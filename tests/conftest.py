"""What every test shares: the tests folder on the path, no network, fixed seeds, one thread."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Both before transformers is imported anywhere. Folders of one name that several workers load are several modules.
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules-")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch

import hf_hybrid

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def installed() -> Iterator[None]:
    """Every model of the process understands strategies, for the length of a test."""
    hf_hybrid.install()
    yield
    hf_hybrid.uninstall()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint as it would lie on the Hub, one for each test file."""
    from checkpoint_for_tests import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))
