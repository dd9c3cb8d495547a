"""What the tests of whole training runs share."""

from __future__ import annotations

import pytest

from hf_hybrid.training import recipe as recipes
from tests.recipes_for_tests import counting_task


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The indices that were drawn; registers the task ``counting``."""
    indices: list[int] = []
    monkeypatch.setitem(recipes.TASKS, "counting", counting_task(indices))
    return indices
