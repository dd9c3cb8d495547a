"""Hand-made examples for the tests of training: two rounds, dependencies, text around them, parts that overrun."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from oracles import Row, pack
from torch import Tensor

from hf_hybrid.core.grammars.native import PlanTags
from hf_hybrid.core.tokens import ControlTokens
from hf_hybrid.training.examples import Example, Part
from hf_hybrid.training.layout import Form

TAGS = PlanTags(par=41, topic=42, async_=43, sync=44, lengths=((2, 46), (4, 47), (8, 48)), depends=(50, 51, 52))
CONTROL = ControlTokens.of(mask=60, end=40, filler=45, tags=TAGS)
"""Ids within the vocabulary of the tiny models; texts use 1 to 39."""

TWO_STEPS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
    "autocast_bfloat16": False,
    "compile_objective": False,
    "dataloader_pin_memory": False,
}
"""``training`` of a recipe that is run to its end in a test."""

PAD = 0
FORMS: tuple[Form, ...] = ("plain", "sparse", "dag", "dense")

TWO_ROUNDS = Example(
    prompt=(1, 2, 3),
    pieces=(
        (4, 5),
        (
            Part((10,), (11, 12)),
            Part((13, 14), (15, 16, 17), depends=(0,)),
            Part((18,), (19,), depends=(1,)),
        ),
        (6,),
        (Part((20, 21), (22, 23, 24, 25, 26)), Part((27,), (28, 29))),
        (7, 8),
    ),
)
"""Text before, between and behind two rounds; the third part reads the first one through the second."""

BARE = Example(prompt=(1, 2), pieces=((Part((10,), (11, 12, 13)), Part((14,), (15,))), (Part((16,), (17, 18)),)))
"""Nothing but two rounds: no text around them."""

OVERRUN = Example(
    prompt=(1,),
    pieces=((Part((10,), tuple(range(20, 30))), Part((11,), (12, 13), depends=(0,)), Part((14,), (15,))), (5,)),
)
"""Its first part has 10 tokens, and the longest length is 8."""


def rows_of(batch: dict[str, Tensor], b: int = 0) -> list[Row]:
    """The rows of one collated example."""
    names = ("input_ids", "position", "span", "noisy", "anchor", "block")
    return [Row(*values) for values in zip(*(batch[name][b].tolist() for name in names), strict=True)]


def batch_of(rows: Sequence[Row], depends: Sequence[set[int]]) -> dict[str, Tensor]:
    """One collated example, without targets, from its rows and from what every span reads."""
    tokens, packed = pack([rows])
    matrix = torch.zeros(1, len(depends), len(depends), dtype=torch.bool)  # (1, spans, spans)
    for span, seen in enumerate(depends):
        matrix[0, span, list(seen)] = True
    return {
        "input_ids": tokens,
        "position": packed.position,
        "span": packed.span,
        "noisy": packed.noisy,
        "anchor": packed.anchor,
        "block": packed.block,
        "depends": matrix,
    }
