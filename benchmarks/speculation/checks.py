"""Checks of an answer: where it begins to loop, and whether one plain pass over it agrees.

Small models end in loops, and a loop is the easiest text to copy; so answers are cut where they loop before anything is
timed. A token that differs from plain greedy decoding may still be right: passes of other shapes add in another order,
and where two tokens are almost equally likely two texts part. The prefill oracle decides: one plain pass over prompt
and answer, in which every token must have the largest logit, up to the drift of the precision.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_hybrid.core.precision import double_device

GRAM = 8
MAX_REPEATS = 3

DRIFT: dict[torch.dtype, float] = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
"""Largest difference of logits that is taken for rounding. Logits are of the order of 20, whose last bit is 2e-6 in
float32, 0.016 in float16 and 0.125 in bfloat16; several hundred sums of thirty layers multiply it."""


@dataclass(frozen=True)
class Difference:
    """The first token in which an answer differs from plain greedy decoding, judged by one pass over prompt and answer.

    Attributes:
        position: in the answer, from 0. token_deficit, reference_deficit: how far the logit of the answer's token, and
        of that of plain decoding, is below the largest there; None where the answer, or plain decoding, had ended.
        largest_deficit: of all tokens of the answer. right: True: it is within the drift of the precision.
    """

    position: int
    token_deficit: float | None
    reference_deficit: float | None
    largest_deficit: float
    right: bool


def loop_free_length(tokens: Sequence[int], gram: int = GRAM, repeats: int = MAX_REPEATS) -> int:
    """Number of tokens up to the end of the first ``gram``-gram that occurs ``repeats`` times; all, if none does.

    Occurrences may overlap.
    """
    seen: Counter[tuple[int, ...]] = Counter()
    for end in range(gram, len(tokens) + 1):
        piece = tuple(tokens[end - gram : end])
        seen[piece] += 1
        if seen[piece] == repeats:
            return end
    return len(tokens)


@torch.no_grad()
def difference(model: Any, prompt: Sequence[int], answer: Sequence[int], reference: Sequence[int]) -> Difference | None:
    """Where ``answer`` differs from ``reference`` and what the prefill oracle says; None when they are equal.

    Args:
        model: the causal model that wrote both. prompt, answer, reference: token ids ``(prompt,)``, ``(answer,)``,
            ``(reference,)``.
    """
    if list(answer) == list(reference):
        return None
    shorter = min(len(answer), len(reference))
    position = next((i for i in range(shorter) if answer[i] != reference[i]), shorter)
    ids = torch.tensor([[*prompt, *answer]], device=model.device)  # (1, prompt + answer)
    logits = model(input_ids=ids, logits_to_keep=len(answer) + 1, use_cache=False).logits[0]
    logits = logits.to(double_device(logits.device)).double()
    # Row i decides token i of the answer: (answer + 1, vocab).
    best = logits.amax(-1)  # (answer + 1,)
    written = torch.tensor(list(answer), device=logits.device, dtype=torch.long)  # (answer,)
    deficits = best[:-1] - logits[:-1].gather(-1, written[:, None])[:, 0]  # (answer,)
    largest = float(deficits.max()) if len(answer) else 0.0
    other = float(best[position] - logits[position, reference[position]]) if position < len(reference) else None
    return Difference(
        position=position,
        token_deficit=float(deficits[position]) if position < len(answer) else None,
        reference_deficit=other,
        largest_deficit=largest,
        # An answer that merely stopped early is wrong, however good its tokens.
        right=largest <= DRIFT[model.dtype] and len(answer) > position,
    )
