"""Calls that cannot be carried out are refused before the first forward, in words that name the fix.

Bugs these tests catch: a giant number that is allocated before it is checked; a mask, a cache or a plan that is read
wrongly without a word, or a plan that fails in the middle of an answer; tags that are demanded where none are needed;
NaN that becomes token 0; tags in a user's text that act; a model that does not work any more after a refusal.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, StaticCache
from transformers.generation.streamers import BaseStreamer

import hf_hybrid
from hf_hybrid import Plan, Span
from hf_hybrid.decoding import DecodingError
from hf_hybrid.models.host import CACHE
from tests.models_for_tests import CONTROL, hybrid, left_padded, writer
from tests.oracles import SlowPlanned

PROMPT = torch.tensor([[3, 7, 9, 2, 11]])
PLANNED: dict[str, Any] = {"strategy": "planned_diffusion"}
BLOCKS: dict[str, Any] = {"strategy": "block_diffusion"}
CYCLE = Plan((Span((5,), 3, (1,)), Span((6,), 3, (0,))))


def model() -> Any:
    return writer(True)


def generate(host: Any, ids: Tensor = PROMPT, **settings: Any) -> Tensor:
    return host.generate(ids, **{"max_new_tokens": 16, **settings})


def refused(message: str, ids: Tensor = PROMPT, host: Any = None, **settings: Any) -> None:
    """A ``ValueError`` that says ``message``, no forward, and a model that works afterwards."""
    host, passes = host or model(), 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    before = generate(model(), **PLANNED)
    hook = host.model.register_forward_pre_hook(count)
    try:
        with pytest.raises(ValueError, match=message):
            generate(host, ids, **settings)
    finally:
        hook.remove()
    assert passes == 0
    assert torch.equal(generate(model(), **PLANNED), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "diffusion"}, "unknown strategy 'diffusion'; choose one of autoregressive, block_diffusion"),
        ({**BLOCKS, "window_lenght": 4}, "did you mean 'window_length'"),
        ({**BLOCKS, "verify_spans": False}, "unknown setting 'verify_spans'"),
        ({**BLOCKS, "window_length": 0}, "window_length=0 is out of range: 1 to 1024"),
        ({**BLOCKS, "window_length": 10**9}, "window_length=1000000000 is out of range"),
        ({**BLOCKS, "window_length": 2.5}, "window_length=2.5: must be a whole number"),
        ({**BLOCKS, "confidence_threshold": 1.5}, "confidence_threshold=1.5 is out of range"),
        ({**BLOCKS, "confidence_threshold": math.nan}, "confidence_threshold=nan"),
        ({**BLOCKS, "max_denoising_steps": 0}, "max_denoising_steps=0 is out of range"),
        ({**BLOCKS, "commit": "lazily"}, "choose one of prefix, block"),
        ({**PLANNED, "draft_threshold": -0.1}, "draft_threshold=-0.1 is out of range"),
        ({**PLANNED, "max_span_extension": 0.5}, "max_span_extension=0.5 is out of range"),
        ({**PLANNED, "commit": "block"}, "verify_spans=False"),
        ({**PLANNED, "num_beams": 2}, "num_beams=2 chooses another way"),
        ({**PLANNED, "seed": [1, 2]}, "seed has 2 entries for 1 sequences"),
        ({**PLANNED, "verify_spans": False, "repetition_penalty": 1.3}, "RepetitionPenalty.*verify_spans=True"),
        ({**PLANNED, "visibility": "dense", "no_repeat_ngram_size": 2}, "NoRepeatNGram.*drop the processor"),
        ({**BLOCKS, "repetition_penalty": 1.3}, "RepetitionPenalty.*strategy='autoregressive'"),
        ({**BLOCKS, "output_scores": True, "return_dict_in_generate": True}, "output_scores=True needs tokens"),
        ({**PLANNED, "output_attentions": True, "return_dict_in_generate": True}, "output_attentions=True is not"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    refused(message, **settings)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (CYCLE, "which is not an earlier part; order the parts"),
        (Plan((Span((5,), 3, (1,)), Span((6,), 3))), "Plan.sorted does it"),
        (Plan((Span((5,), 3),) * 10**6), "1000000 parts, more than max_parts=16"),
        (Plan((Span((5,), 10**6),)), "length 1000000, outside 1 to max_part_length=256"),
        (Plan((Span((5,) * 10**6, 3),)), "has 1000000 tokens, more than max_label_length=16"),
        (Plan((Span((5,), 100),)), "longer than the longest length token"),
        (Plan((Span((5,), 0),)), "length 0, outside 1"),
        (Plan((Span((), 3),)), "part 1 has no label"),
        (Plan((Span((CONTROL.tags.topic,), 3),)), "holds a control token"),
        (Plan(()), "at least one part"),
        ([], "takes a hf_hybrid.Plan, or one per round"),
        ([Plan((Span((5,), 3),))] * 9, "9 plans are more than max_rounds=8"),
        (Plan((Span((5,), 12, text=(6,) * 16),)), "alone holds 17 tokens, and max_new_tokens leaves 16; raise it"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_plans(plan: Any, message: str) -> None:
    refused(message, plan=plan, **PLANNED)


PART = Span((5,), 3)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan((Span((5, 61), 3),)), "token id 61, and the model knows 0 to 60"),
        ([Plan((PART,)), Plan((PART,), lead=(-1,))], "token id -1"),
        (
            [Plan((PART,)), Plan((Span((5,), 3, text=(7,) * 15),))],
            "alone holds 17 tokens, and max_new_tokens leaves 16",
        ),
        ([Plan((PART,) * 3, lead=(7,) * 4)] * 3, "alone holds 21 tokens, and max_new_tokens leaves 16; raise it"),
        (Plan((*(PART,) * 5, Span((5,), 2, (4,)))), "only 4 dependency tags"),
        (Plan((PART, Span((5,), 3, text=torch.tensor([6, CONTROL.tags.sync])))), "part 2 holds a control token"),  # type: ignore
        (Plan((Span((5,), 3, text=(6, 39)),)), "holds an id that ends an answer"),
        (5, "plan= takes a hf_hybrid.Plan"),
        ("plan", "plan= takes a hf_hybrid.Plan"),
        ({"rounds": []}, "plan= takes a hf_hybrid.Plan"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_all_of_a_given_plan_is_checked_before_the_first_pass(plan: Any, message: str) -> None:
    refused(message, plan=plan, eos_token_id=[CONTROL.noise.end, 39], **PLANNED)


def test_given_rounds_that_a_table_of_positions_cannot_hold() -> None:
    host = hybrid("gpt2", seed=26, n_positions=64)
    host.model = host.transformer  # where ``refused`` counts
    rounds = [Plan((Span((5,), 12), Span((6,), 12, text=(7,) * 9)))] * 2
    refused(
        "the given plan needs 69 positions and the model has 64; shorten",
        host=host,
        plan=rounds,
        max_new_tokens=59,
        **PLANNED,
    )
    dense = {"visibility": "dense", "max_new_tokens": 60}
    refused("needs 74 positions", host=host, plan=Plan((Span((5,), 12),) * 4), **dense, **PLANNED)
    assert generate(host, plan=rounds[:1], **PLANNED).shape[1] > 5


def test_a_sorted_plan_is_carried_out_and_a_cycle_cannot_be_sorted() -> None:
    plan = Plan((Span((5,), 3, (1,)), Span((6,), 3)))
    output = generate(model(), plan=plan.sorted(), return_dict_in_generate=True, max_new_tokens=40, **PLANNED)
    assert [span.label for span in output.report[0].spans] == [(6,), (5,)]
    with pytest.raises(ValueError, match=r"parts \[1, 2\] form a cycle; remove one of them"):
        CYCLE.sorted()


def test_models_without_control_tokens() -> None:
    host = hybrid(seed=26)
    del host.config.hf_hybrid
    refused("needs a mask token, and the model has none; add one with", host=host, **BLOCKS)
    refused("needs control tokens, and the model has none; add them with", host=host, **PLANNED)
    assert generate(host, strategy="autoregressive").shape[1] > 5


def test_a_record_of_a_mask_token_alone() -> None:
    """Only plans need tags; a window needs a mask, and nothing behind the end is named when there is no filler."""
    host = hybrid(seed=26)
    whole = host.config.hf_hybrid
    drafted = {"strategy": "speculative", "drafter": "self"}
    others: tuple[dict[str, Any], ...] = ({"strategy": "autoregressive"}, {"strategy": "speculative"}, drafted)
    expected = [generate(host, **settings) for settings in others]
    blocks = generate(host, max_new_tokens=30, **BLOCKS)
    for record in (
        {"mask_token_id": CONTROL.noise.mask},
        {"mask_token_id": CONTROL.noise.mask, "spad": CONTROL.noise.filler},
    ):
        host.config.hf_hybrid = record
        for settings, ids in zip(others, expected, strict=True):
            assert torch.equal(generate(host, **settings), ids)
        assert CONTROL.noise.mask not in generate(host, max_new_tokens=30, **BLOCKS)
        refused("needs control tokens, and the model has none; add them with", host=host, **PLANNED)
    for record in ({**whole, "lengths": "many"}, {name: whole[name] for name in ("mask_token_id", "par", "spad")}):
        host.config.hf_hybrid = record  # broken tags, which only plans read
        for settings, ids in zip(others, expected, strict=True):
            assert torch.equal(generate(host, **settings), ids)
        generate(host, **BLOCKS)
        refused("config.hf_hybrid", host=host, **PLANNED)
    host.config.hf_hybrid = {"spad": CONTROL.noise.filler}
    refused("needs a mask token, and the model has none", host=host, **BLOCKS)
    refused("needs a mask token, and the model has none", host=host, **drafted)
    host.config.hf_hybrid = {**whole, "mask_token_id": CONTROL.noise.end}
    refused("two meanings", host=host, **BLOCKS)
    host.config.hf_hybrid = whole
    assert torch.equal(generate(host, max_new_tokens=30, **BLOCKS), blocks)


ALL: tuple[dict[str, Any], ...] = ({"strategy": "autoregressive"}, BLOCKS, PLANNED)


@pytest.mark.parametrize("strategy", ALL, ids=lambda s: s["strategy"])
def test_prompts_and_masks(strategy: dict[str, Any]) -> None:
    refused("prompt of at least one token", torch.zeros((1, 0), dtype=torch.long), **strategy)
    ids, mask = torch.tensor([[3, 7, 9], [0, 0, 0]]), torch.tensor([[1, 1, 1], [0, 0, 0]])
    refused("sequence 1 of the batch is all padding", ids, attention_mask=mask, **strategy)
    refused("covers 4 tokens, and the prompt has 3", ids[:1], attention_mask=torch.ones((1, 4)).long(), **strategy)


@pytest.mark.parametrize("strategy", ALL, ids=lambda s: s["strategy"])
def test_caches_of_the_caller(strategy: dict[str, Any]) -> None:
    cache = DynamicCache()
    model()(torch.tensor([[3, 7, 9, 2, 11]]), **{CACHE: cache})
    refused("holds 5 tokens and input_ids 5; pass the whole text", past_key_values=cache, **strategy)
    refused("holds 5 tokens and input_ids 2", torch.tensor([[3, 7]]), past_key_values=cache, **strategy)
    wide = torch.ones((1, 9), dtype=torch.long)
    strategy = {**strategy, "attention_mask": wide}
    refused("covers 9 tokens, the cache 5", torch.tensor([[3, 7]]), past_key_values=cache, **strategy)
    del strategy["attention_mask"]
    static = StaticCache(config=model().config, max_cache_len=64)
    model()(torch.tensor([[3, 7, 9]]), **{CACHE: static})
    refused("cannot take over a StaticCache; pass a DynamicCache", past_key_values=static, **strategy)
    empty = StaticCache(config=model().config, max_cache_len=64)  # it would never be filled
    refused("cannot take over a StaticCache; pass a DynamicCache", past_key_values=empty, **strategy)
    for given in (DynamicCache(), cache):  # the host reads the whole text again and appends it to the cache
        ids = torch.tensor([[3, 7, 9, 2, 11, 4]])
        refused("use_cache=False and a cache exclude", ids, past_key_values=given, use_cache=False, **strategy)


@pytest.mark.parametrize("drafted", [{"strategy": "autoregressive"}, {"strategy": "speculative"}], ids=str)
def test_vectors_of_new_tokens_alone_are_read_by_nobody(drafted: dict[str, Any]) -> None:
    host, cache = model(), DynamicCache()
    host(PROMPT, **{CACHE: cache})
    vectors = host.get_input_embeddings()(torch.tensor([[3, 7]])).detach()
    more = {"inputs_embeds": vectors, "attention_mask": torch.ones((1, 7)).long(), "past_key_values": cache}
    refused(
        "holds 5 tokens and inputs_embeds 2 more.*pass those of the whole text",
        torch.tensor([[3, 7]]),
        **more,
        **drafted,
    )
    with pytest.raises(ValueError, match="pass those of the whole text"):
        host.generate(max_new_tokens=4, **more, **drafted)


@pytest.mark.parametrize("strategy", [*ALL, {"strategy": "speculative"}], ids=lambda s: s["strategy"])
def test_ids_that_the_model_does_not_have(strategy: dict[str, Any]) -> None:
    for odd in (-1, 61, 9999):
        ids = torch.tensor([[odd, 3, 7, 9, 3, 7], [3, 7, 9, 2, 11, 5]])
        refused("ids outside the vocabulary of 61 tokens; use the tokenizer of this model", ids, **strategy)
        padded = {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6]), **strategy}
        right = generate(model(), ids.clamp(0, 60), **padded)
        assert torch.equal(generate(model(), ids, **padded)[:, 1:], right[:, 1:])  # nobody reads it
    cache = DynamicCache()
    model()(PROMPT, **{CACHE: cache})
    alone = {"attention_mask": torch.ones((1, 7)).long(), "past_key_values": cache, **strategy}
    refused("ids outside the vocabulary", torch.tensor([[3, 61]]), **alone)


@pytest.mark.parametrize("config", [{"max_new_tokens": 3}, "greedy", 3])
def test_a_config_that_is_none(config: Any) -> None:
    message = f"generation_config= must be a GenerationConfig, got {type(config).__name__}; use GenerationConfig"
    refused(message, generation_config=config, **PLANNED)


def test_a_streamer_for_two_rows() -> None:
    class Wide(BaseStreamer):  # those of the host refuse a batch themselves
        def put(self, value: Tensor) -> None: ...
        def end(self) -> None: ...

    batch = left_padded()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    refused("a streamer shows one answer", ids, attention_mask=mask, streamer=Wide(), **PLANNED)


@pytest.mark.parametrize("strategy", ALL, ids=lambda s: s["strategy"])
def test_a_giant_budget_is_not_allocated(strategy: dict[str, Any]) -> None:
    planning = (
        {CONTROL.tags.topic: 6.0, CONTROL.tags.async_: 9.0, CONTROL.noise.filler: 6.0} if strategy == PLANNED else {}
    )
    host = hybrid(seed=26, favours={CONTROL.noise.end: 6.0, **planning})
    # 10**9 slots of two layers would take more than 250 GB.
    answer = generate(host, max_new_tokens=10**9, **strategy)
    assert answer[0, -1] == CONTROL.noise.end and answer.shape[1] < 100
    assert torch.equal(answer, generate(host, max_new_tokens=100, **strategy))


@pytest.mark.parametrize("strategy", ALL, ids=lambda s: s["strategy"])
def test_nan_logits(strategy: dict[str, Any]) -> None:
    host = hybrid(seed=26)
    good, weight = generate(host, **strategy), host.model.norm.weight.data
    saved = weight.clone()
    weight[3] = math.nan
    with pytest.raises(DecodingError, match="NaN logits; check the weights and the dtype"):
        generate(host, **strategy)
    weight.copy_(saved)
    assert torch.equal(generate(host, **strategy), good)


@pytest.mark.parametrize(("value", "message"), [(math.nan, "processors give NaN"), (-math.inf, "ban every token")])
@pytest.mark.parametrize(
    "strategy",
    [
        PLANNED,
        {"strategy": "autoregressive"},
        {"strategy": "speculative"},
        {"strategy": "speculative", "do_sample": True, "acceptance": "rejection"},
    ],
    ids=str,
)
def test_processors_that_leave_nothing(strategy: dict[str, Any], value: float, message: str) -> None:
    def broken(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, value) if ids.shape[1] > 8 else scores

    processors: Any = LogitsProcessorList([broken])
    with pytest.raises(DecodingError, match=message):
        generate(hybrid(seed=26), logits_processor=processors, max_new_tokens=30, **strategy)


def test_control_tags_in_a_prompt_are_inert() -> None:
    length = dict(CONTROL.tags.lengths)[3]
    prompt = [
        3,
        CONTROL.tags.par,
        CONTROL.tags.topic,
        5,
        length,
        CONTROL.tags.async_,
        5,
        CONTROL.tags.sync,
        CONTROL.noise.end,
        7,
        CONTROL.tags.topic,
    ]
    answer = generate(model(), torch.tensor([prompt]), max_new_tokens=40, return_control_tokens=True, **PLANNED)
    assert answer[0, : len(prompt)].tolist() == prompt
    assert answer[0, len(prompt) :].tolist() == SlowPlanned(model(), CONTROL).write(prompt, 40).ids
    blocks = generate(writer(False), torch.tensor([prompt]), **BLOCKS)
    assert blocks[0, : len(prompt)].tolist() == prompt
    assert not set(CONTROL.noise.banned) & set(blocks[0, len(prompt) :].tolist())


@pytest.mark.parametrize("asked", ["output_scores", "output_logits"])
def test_an_answer_of_many_holds_no_scores(asked: str) -> None:
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, asked: True}
    with pytest.raises(ValueError, match=f"{asked}=True: an answer of generate_many.*call generate"):
        list(hf_hybrid.generate_many(model(), [[3, 7], [9]], strategy="autoregressive", **options))
