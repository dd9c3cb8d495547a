"""What the tests of the bench of drafting share: a tokenizer of letters, plain greedy decoding, sizes and settings."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.speculation import PairSizes

SETTINGS = {"model": "tiny", "repeats": 1}
SMALL = PairSizes(vocab=97, hidden=32, intermediate=48, heads=4, layers=3, draft_layers=1)


class Letters:
    """A tokenizer: one id per letter."""

    pad_token_id = 2

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """Token by token, without a cache."""
    tokens: list[int] = []
    with torch.no_grad():
        for _ in range(count):
            logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, -1]  # (vocab,)
            tokens.append(int(logits.argmax()))
    return tokens
