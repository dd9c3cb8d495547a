"""What is looked up in a text, and a drafting model that checks it: the same drafts in fewer passes.

Catches: a tail that is looked up where it ends the text, an older occurrence taken, tails over the end of the prompt
lost; keys of wrong guesses that stay in the drafting model's cache; a position that is drawn twice, with another noise,
or of the wrong row; a draft that a guess makes longer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models_for_tests import tiny

import hf_hybrid
from hf_hybrid.decoding import ModelDrafter, TreeDrafter
from hf_hybrid.decoding.drafters.lookup import GRAMS, Followers


def slow_after(tokens: list[int], more: list[int], count: int) -> list[int]:
    """The longest tail's last occurrence that something of the text follows, by looking everywhere."""
    whole = [*tokens, *more]
    for length in GRAMS:
        for end in range(len(tokens) - 1, length - 1, -1):
            if len(whole) >= length and tokens[end - length : end] == whole[-length:]:
                return tokens[end : end + count]
    return []


def test_followers_are_those_of_the_last_occurrence() -> None:
    draw = random.Random(3)
    found = 0
    for _ in range(40):
        tokens: list[int] = []
        followers = Followers()
        for _ in range(6):
            tokens += [draw.randrange(4) for _ in range(draw.randrange(1, 7))]  # the same list grows, as a text does
            followers.read(tokens)
            for size in range(5):
                more = [draw.randrange(4) for _ in range(size)]
                expected = slow_after(tokens, more, 3)
                assert followers.after(more, 3) == expected
                found += bool(expected)
    assert found > 300
    assert followers.after([], 0) == []


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Rows of every pass of the model."""
    rows: list[int] = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        yield rows
    finally:
        hook.remove()


def pair() -> tuple[Any, Any]:
    """A target and a draft that often agree."""
    target, draft = tiny("llama"), tiny("llama")
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=noise, dtype=parameter.dtype))
    return hf_hybrid.enable(target), draft


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.4, "seed": 3},
    "rejection": {"do_sample": True, "temperature": 0.4, "seed": 3, "acceptance": "rejection"},
}


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_the_same_is_drafted_in_fewer_passes(way: str, tree: bool) -> None:
    target, draft = pair()
    prompt = torch.tensor([[7, 8, 9, 7, 8, 7, 9, 8, 7, 8, 9, 9, 7, 8]])  # its tails go on in several ways
    written: dict[int, tuple[list[int], Any]] = {}
    passes: dict[int, list[int]] = {}
    for lookup in (0, 12):
        drafter: Any = ModelDrafter(draft, lookup=lookup, least_chance=0.05)
        drafter = TreeDrafter(drafter) if tree else drafter
        with counted(draft) as rows:
            output = target.generate(
                prompt, strategy="speculative", drafter=drafter, adaptive=False, draft_length=6, max_new_tokens=60,
                return_dict_in_generate=True, recheck_margin=0.0, **WAYS[way],
            )  # fmt: skip
        report = output.report[0].drafting
        written[lookup], passes[lookup] = (output.sequences[0].tolist(), report.passes), rows
    assert written[0] == written[12]
    assert any(drafted > 1 for drafted, _, _ in written[0][1])
    assert max(passes[12][1:]) > 2 >= max(passes[0][1:]), "guesses ride along"
    assert len(passes[12]) < len(passes[0])


def test_a_guess_stays_within_the_positions_of_the_drafting_model() -> None:
    target, _ = pair()
    prompt = torch.tensor([[7, 8, *range(20, 30), 7, 8]])  # twelve tokens follow the tail
    drafter = ModelDrafter(tiny("gpt2", seed=5, n_positions=20), least_chance=0.0)
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}
    drafted = target.generate(prompt, strategy="speculative", drafter=drafter, adaptive=False, **options)
    assert torch.equal(drafted, target.generate(prompt, strategy="autoregressive", **options))


@pytest.mark.parametrize("lookup", [-1, 65])
def test_another_lookup_is_refused(lookup: int) -> None:
    with pytest.raises(ValueError, match=f"lookup={lookup} is out of range: 0 to 64"):
        ModelDrafter(tiny("llama"), lookup=lookup)
