"""Theorem 12: a layer with a window sees ``position_q - position_k < window``, one with chunks its own chunk, and both
only what the row rule allows.

Catches: a window that is counted in slots or columns, so that padding, rejected drafts or other lanes move it; a window
one too long or too short; a mask of one kind of layers that reaches another kind; the host's own mask where slots are
not in the order of positions; noisy rows that look from the end of the text instead of from where they stand.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch

import hf_hybrid
from hf_hybrid import Draft, Drafter, ModelDrafter, Span, Text, TreeDrafter, generate_many
from hf_hybrid.core.plan import Plan
from hf_hybrid.core.rows import PADDING, Reach, Rows, visible
from hf_hybrid.models.host import CACHE, Unsupported
from hf_hybrid.models.layers import layers_of
from hf_hybrid.models.opening import open_runner
from hf_hybrid.models.replay import ReplayRunner
from tests.models_for_tests import ATTENTION, PROMPTS, TEXT, WINDOW, WINDOWED, hybrid, left_padded, tiny

NEW = 24
EAGER = ("gpt-oss",)
"""Classes without sdpa: float32, where the greedy choice of these texts does not hang on rounding."""
PLANNED: dict[str, Any] = {"strategy": "planned_diffusion", "return_control_tokens": True, "window_length": 4}
MODES: dict[str, dict[str, Any]] = {
    "self": {"strategy": "speculative", "drafter": "self", "window_length": 4, "adaptive": False},
    "blocks": {"strategy": "block_diffusion", "window_length": 4, "confidence_threshold": 0.3},
    "verified": PLANNED,
    "parts": {**PLANNED, "span_decoding": "autoregressive"},
    "given": {**PLANNED, "plan": Plan((Span((4,), 4), Span((7, 8), 9, (0,)), Span((9,), 12)), lead=(5,))},
}


def made(name: str, **changes: Any) -> Any:
    """Untied: a random model with tied embeddings repeats its last token."""
    return tiny(name, "eager" if name in EAGER else "sdpa", seed=26, tie_word_embeddings=False, **changes)


@cache
def model(name: str) -> Any:
    return hf_hybrid.enable(made(name))


@cache
def alone(name: str) -> tuple[tuple[int, ...], ...]:
    """The host's own greedy text behind each prompt, by itself."""
    host, texts = model(name), []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        texts.append(tuple(host.generate(ids, max_new_tokens=NEW, do_sample=False)[0, len(prompt) :].tolist()))
    return tuple(texts)


class Oracle(Drafter):
    """Drafts the host's text, every fifth token wrong."""

    name = "oracle"

    def __init__(self, answers: dict[tuple[int, ...], tuple[int, ...]]):
        self.answers, self.draws = answers, random.Random(0)

    def propose(self, texts: Sequence[Text], length: int, sampler: Any) -> list[Draft]:
        return [self.draft(text, self.draws.randint(0, length)) for text in texts]

    def draft(self, text: Text, length: int) -> Draft:
        answer = self.answers[tuple(text.tokens[: text.prompt_length])]
        done = len(text.tokens) - text.prompt_length
        return Draft(
            [self.draws.choice(TEXT) if self.draws.random() < 0.2 else t for t in answer[done : done + length]]
        )


def oracle(name: str) -> Oracle:
    return Oracle(dict(zip(PROMPTS, alone(name), strict=True)))


def batch(name: str, **options: Any) -> tuple[tuple[int, ...], ...]:
    """The texts of one call with all prompts, left-padded."""
    inputs = left_padded()
    written = model(name).generate(**inputs, max_new_tokens=NEW, **{"do_sample": False, **options})
    return tuple(tuple(row[inputs["input_ids"].shape[1] :]) for row in written.tolist())


def test_the_texts_reach_behind_the_windows_and_the_kinds_are_mixed() -> None:
    for name in WINDOWED:
        layers = layers_of(model(name))
        assert layers.near, name
        assert layers.by_kind == (name != "mistral window")
        texts = alone(name)
        assert {len(text) for text in texts} == {NEW} and NEW > 3 * WINDOW, name
        assert max(len(set(text)) for text in texts) > 4, "texts that repeat themselves would hide a wrong mask"


@pytest.mark.parametrize("name", WINDOWED)
def test_a_batch_writes_what_the_host_writes_of_each_prompt(name: str) -> None:
    assert batch(name, strategy="autoregressive") == alone(name)
    drafted = {"strategy": "speculative", "adaptive": False, "draft_length": 5}
    assert batch(name, **drafted) == alone(name)
    assert batch(name, **drafted, drafter=oracle(name)) == alone(name)


@pytest.mark.parametrize("name", WINDOWED)
def test_prompts_that_come_and_go(name: str) -> None:
    prompts = [list(p) for p in PROMPTS]
    options = {"strategy": "speculative", "adaptive": False, "drafter": oracle(name), "do_sample": False}
    answers = generate_many(model(name), prompts, batch_size=2, max_new_tokens=NEW, **options)
    assert {a.index: tuple(a.tokens) for a in answers} == dict(enumerate(alone(name)))


@pytest.mark.parametrize("name", WINDOWED)
def test_drafts_do_not_change_what_is_drawn(name: str) -> None:
    sampled = {"do_sample": True, "temperature": 1.3, "seed": 5}
    plain = batch(name, strategy="autoregressive", **sampled)
    drafted = {"strategy": "speculative", "adaptive": False, "drafter": oracle(name)}
    assert batch(name, **drafted, **sampled) == plain != alone(name)


@pytest.mark.parametrize("name", WINDOWED)
def test_trees(name: str) -> None:
    near = made(name)
    with torch.no_grad():
        near.get_output_embeddings().weight[7:13] *= 1.5  # drafts that are right now and then
    for drafter in (TreeDrafter(near), ModelDrafter(near)):
        drafted = {"strategy": "speculative", "adaptive": False, "draft_length": 5, "drafter": drafter}
        assert batch(name, **drafted) == alone(name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [name for name in WINDOWED if name not in EAGER])
def test_noisy_windows_and_parts_as_without_a_cache(name: str, mode: str) -> None:
    """Theorem 11 for rows that see one another, lanes with holes between their slots, and lanes of their own."""
    options = {**left_padded(), "max_new_tokens": 36, "do_sample": False, **MODES[mode]}
    planner = hybrid(name, seed=26)
    assert torch.equal(planner.generate(**options), planner.generate(**options, runner=ReplayRunner))


def test_the_reach_of_a_window_and_of_a_chunk() -> None:
    queries, keys = torch.tensor([[4, 9, 12]]), torch.tensor([[0, 3, 4, 5, 9, 13]])
    window, chunk = Reach(window=5).within(queries, keys)[0], Reach(chunk=5).within(queries, keys)[0]
    for i, q in enumerate((4, 9, 12)):
        for j, k in enumerate((0, 3, 4, 5, 9, 13)):
            assert bool(window[i, j]) == (q - k < 5)
            assert bool(chunk[i, j]) == (q // 5 == k // 5)
    assert Reach(window=5).covers(4) and not Reach(window=5).covers(5)
    for wrong in ({}, {"window": 0}, {"chunk": -1}, {"window": 3, "chunk": 3}):
        with pytest.raises(ValueError, match="give one of the two"):
            Reach(**wrong)


@pytest.mark.parametrize("name", ["mistral window", "gemma3", "llama4"])
def test_a_pass_with_holes_and_noisy_rows_is_the_rule_written_out(name: str) -> None:
    """Clean and noisy rows of two lanes, in shuffled slots, beside one forward over everything with a mask of loops."""
    host, torch_generator = tiny(name), torch.Generator().manual_seed(4)
    runner = open_runner(host, 1, capacity=8)
    trunk = torch.randint(1, 40, (1, 14), generator=torch_generator)
    at = torch.arange(14)[None]
    runner.relate(0, 1, [0])
    padded = torch.zeros_like(at)
    padded[0, [3, 8]] = PADDING  # two holes, which later rows fill
    runner.run(trunk, Rows.clean(at, padded), 0)
    runner.commit()
    tokens = torch.randint(1, 40, (1, 6), generator=torch_generator)
    position, span = torch.tensor([[14, 15, 20, 21, 16, 17]]), torch.tensor([[0, 0, 1, 1, 0, 0]])
    noisy = torch.tensor([[False, False, False, False, True, True]])
    rows = Rows(position, span, noisy, torch.where(noisy, 16, 0), torch.zeros_like(position))
    got = runner.run(tokens, rows, 6).logits[0]
    kept = [i for i in range(14) if i not in (3, 8)]
    every = [Rows.clean(at[:, kept], torch.zeros((1, 12), dtype=torch.int64)), rows]
    whole = Rows(
        *(torch.cat([getattr(r, f) for r in every], 1) for f in ("position", "span", "noisy", "anchor", "block"))
    )
    sees = visible(whole, whole, torch.tensor([[[True, False], [True, True]]]))[0]
    masks = {}
    for kind in ("full_attention", "sliding_attention", "chunked_attention"):
        mask = torch.full((1, 1, 18, 18), torch.finfo(torch.float64).min, dtype=torch.float64)
        for q in range(18):
            for k in range(18):
                pq, pk = int(whole.position[0, q]), int(whole.position[0, k])
                near = {"sliding_attention": pq - pk < WINDOW, "chunked_attention": pq // WINDOW == pk // WINDOW}
                if sees[q, k] and near.get(kind, True):
                    mask[0, 0, q, k] = 0
        masks[kind] = mask
    given = masks if layers_of(host).by_kind else masks["sliding_attention"]
    ids = torch.cat([trunk[:, kept], tokens], 1)
    wanted = host(input_ids=ids, position_ids=whole.position, attention_mask=given, use_cache=False).logits[0, -6:]
    torch.testing.assert_close(got, wanted, rtol=0, atol=ATTENTION["sdpa"][1])


def test_configs_that_say_nothing_clear_are_refused_before_the_first_pass() -> None:
    def refused(change: dict[str, Any], match: str, name: str = "gemma3") -> None:
        host = tiny(name)
        for field, value in change.items():
            object.__setattr__(host.config, field, value)
        with pytest.raises(Unsupported, match=match):
            open_runner(host, 1)

    refused({"layer_types": ["full_attention"]}, "1 layer_types for 3 layers; make them equal")
    refused({"layer_types": ["full_attention", "spiral_attention", "full_attention"]}, "kind spiral_attention")
    for size in (0, -4, None):
        refused({"sliding_window": size}, f"sliding_window={size}; give it a length")
    refused({"sliding_window": 0}, "sliding_window=0", "mistral window")
    refused({"attention_chunk_size": None}, "attention_chunk_size=None", "llama4")
    beyond = tiny("mistral window", sliding_window=10_000)  # longer than all positions: it never matters
    assert open_runner(beyond, 1).abilities.noisy_rows


@pytest.mark.parametrize("name", ["mistral window", "gemma3", "llama4"])
def test_the_host_goes_on_from_the_cache_that_is_handed_out(name: str) -> None:
    ids = torch.tensor([PROMPTS[0]])
    options = {"do_sample": False, "return_dict_in_generate": True}
    half = model(name).generate(ids, max_new_tokens=NEW // 2, strategy="speculative", **options)
    held = {CACHE: half[CACHE]}
    rest = model(name).generate(half.sequences, max_new_tokens=NEW - NEW // 2, **options, **held).sequences
    assert tuple(rest[0, len(PROMPTS[0]) :].tolist()) == alone(name)[0]


def test_queries_that_are_scaled_by_the_number_of_keys() -> None:
    """Llama 4: one prompt is as in the host on both sides of the border; what would be wrong behind it is refused."""
    host = made("llama4", floor_scale=12, attn_scale=8.0)
    ids = torch.tensor([PROMPTS[0]])
    wanted = host.generate(ids, max_new_tokens=NEW, do_sample=False)
    tuned = hf_hybrid.enable(host)
    drafter = Oracle({PROMPTS[0]: tuple(wanted[0, len(PROMPTS[0]) :].tolist())})
    for options in ({"strategy": "autoregressive"}, {"strategy": "speculative", "drafter": drafter, "adaptive": False}):
        assert torch.equal(tuned.generate(ids, max_new_tokens=NEW, do_sample=False, **options), wanted)
    assert not torch.equal(wanted, model("llama4").generate(ids, max_new_tokens=NEW, do_sample=False))
    with pytest.raises(Unsupported, match="one prompt at a time"):
        tuned.generate(**left_padded(), max_new_tokens=NEW, do_sample=False, strategy="autoregressive")
