"""Does a model honour the mask of a pass in which rows side by side do not see one another?"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch

from hf_hybrid.core.rows import Rows
from hf_hybrid.models.opening import open_runner, runner_of
from hf_hybrid.models.vocabulary import width_of

_KNOWN: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
_TOLERANCE = 0.05
"""In standard deviations of the logits: far more than rounding in bfloat16, far less than another text makes."""


def honours_branches(model: Any) -> bool:
    """True: a row beside another one, at the same position, gives the logits that it gives alone. Two passes of a few
    rows, once per model."""
    if not runner_of(model).abilities.branches:
        return False
    if model not in _KNOWN:
        vocab = width_of(model)
        first, left, right = (token % vocab for token in (1, 2, 3))
        # "right" sees "first", and not "left" beside it; a chance likeness is none in two places out of two.
        together = open_runner(model, 1, capacity=8)
        for span in (1, 2):
            together.relate(0, span, [0])
        beside = Rows.clean(torch.tensor([[0, 1, 2, 1, 2]]), torch.tensor([[0, 1, 1, 2, 2]]))
        ids = torch.tensor([[first, left, left, right, first]])
        wide = together.run(ids, beside, 2).logits[0].float()  # (2, vocab)
        alone = Rows.clean(torch.arange(3)[None], torch.zeros((1, 3), dtype=torch.int64))
        ids = torch.tensor([[first, right, first]])
        narrow = open_runner(model, 1, capacity=8).run(ids, alone, 2, plain=True).logits[0].float()  # (2, vocab)
        _KNOWN[model] = bool((wide - narrow).abs().amax() <= _TOLERANCE * narrow.std())
    return _KNOWN[model]
