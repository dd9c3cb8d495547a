"""Other packages warn of their own and of one another's old names; nothing of ours is hidden by that."""

from __future__ import annotations

from pathlib import Path

import pytest

OTHERS = ("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:torch.quantize_per_tensor:UserWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            for rule in OTHERS:
                item.add_marker(pytest.mark.filterwarnings(rule))
