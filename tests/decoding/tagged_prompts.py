"""Three prompts with tags in them, and the plan grammar that reads what follows: for the tests of processors."""

from __future__ import annotations

import torch

from hf_hybrid.core.grammars.native import NativeGrammar, PlanTags
from hf_hybrid.core.plan import PlanLimits
from hf_hybrid.core.tokens import ControlTokens
from tests.models_for_tests import VOCAB

TAGS = PlanTags(par=46, topic=47, async_=48, sync=49, lengths=((2, 51), (4, 52), (8, 53)), depends=(54, 55))
TOKENS = ControlTokens.of(mask=44, end=45, filler=50, tags=TAGS)
LIMITS = PlanLimits(max_parts=3, max_part_length=4, max_plan_length=20, max_label_length=2)
GRAMMAR = NativeGrammar(TOKENS, VOCAB, LIMITS)
PAD, ROOM = 1, 24  # the host fills beams up with eos when the padding id is 0
PROMPT = torch.tensor(
    [  # the first row is padded; the second holds a plan, opened and half of the next
        [PAD, PAD, PAD, 5, 6, 7, 8, 46],
        [47, 3, 51, 48, 3, 47, 4, 46],
        [9, 8, 7, 6, 5, 4, 3, 46],
    ]
)  # (3, 8)
MASK = (PROMPT != PAD).long()  # (3, 8)
