"""Drafting with a trained model beside the host's assisted generation, on the held-out prompts of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.speculation.pair import Pair, weights_read
from benchmarks.speculation.prompts import Prompt, token_ids
from hf_hybrid.decoding import ModelDrafter
from hf_hybrid.evaluation.harness import even_subset
from hf_hybrid.training.recipes.sheets import TestItem

COMPARED_PROMPTS = 8
"""Whose answers say how often the two models agree."""


def held_out_prompts(items: Sequence[TestItem], count: int) -> list[Prompt]:
    """``count`` held-out prompts (all, when there are fewer), evenly over their groups."""
    chosen = even_subset(items, min(count, len(items)))
    return [Prompt("held-out", item.id, item.sheet.prompt) for item in chosen]


@torch.no_grad()
def trained_pair(
    target: Any,
    tokenizer: Any,
    draft: Any,
    draft_tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
) -> Pair:
    """An enabled ``target`` and a ``draft``, and how often they agree on the target's greedy answers to the first of
    the ``prompts``.

    Raises:
        DrafterError: their tokenizers differ.
    """
    ModelDrafter(draft, tokenizer=draft_tokenizer, target_tokenizer=tokenizer)
    same = written = 0
    for prompt in prompts[:COMPARED_PROMPTS]:
        ids = torch.tensor([token_ids(tokenizer, prompt)], device=target.device)  # (1, prompt)
        whole = target.generate(
            ids, attention_mask=torch.ones_like(ids), hf_hybrid={}, max_new_tokens=max_new_tokens, do_sample=False
        )  # (1, prompt + answer)
        answer = whole[:, ids.shape[1] :]
        logits = draft(input_ids=whole, use_cache=False).logits[:, ids.shape[1] - 1 : -1]  # (1, answer, vocab)
        same += int((logits.argmax(-1) == answer).sum())
        written += answer.shape[1]
    return Pair(target, draft, same / written, weights_read(draft) / weights_read(target))
