"""Every argument acts as in the host or is refused before the first pass.

Bugs these tests catch: a keyword of ``forward`` that is dropped, so that the text is another; a subclass whose inputs
are prepared otherwise and whose text is the base model's; a cache of a chat that is never filled, or filled with the
keys of a rejected draft; new tokens beside a cache that are taken for the whole text; scores of another token; a
criterion or processor that sees the state or the parameters of another sequence; settings in a config that nobody
reads; a strategy that runs although the call asked for the host.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    StoppingCriteria,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

import hf_hybrid
from hf_hybrid.models.host import CACHE
from tests.models_for_tests import hybrid, writer

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
PROMPT = torch.tensor([[3, 7, 9, 2, 11, 3, 7, 9, 2, 11, 3, 7]])
ROWS = torch.tensor([[5, 9, 5, 9, 5], [3, 7, 9, 2, 11], [1, 2, 3, 4, 5]])
EXACT: dict[str, dict[str, Any]] = {
    "autoregressive": {"strategy": "autoregressive"},
    "chain": {"strategy": "speculative", "adaptive": False},
    "adaptive": {"strategy": "speculative"},
}
every_exact = pytest.mark.parametrize("how", EXACT.values(), ids=EXACT)


def tiny(kind: type = LlamaForCausalLM, seed: int = 1, **more: Any) -> Any:
    torch.manual_seed(seed)
    return hf_hybrid.enable(kind(LlamaConfig(**{**SIZES, **more})).double().eval())


def generate(model: Any, ids: Tensor = PROMPT, new: int = 16, **options: Any) -> Any:
    options = {"attention_mask": torch.ones_like(ids), **options}
    return model.generate(ids, max_new_tokens=new, do_sample=False, **options)


def refused(message: str, model: Any, ids: Tensor = PROMPT, **options: Any) -> None:
    """A ``ValueError`` that says ``message``, and no pass."""
    passes = 0

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        passes += 1
        return inner(*args, **kwargs)

    inner, model.model.forward = model.model.forward, forward
    try:
        with pytest.raises(ValueError, match=message):
            generate(model, ids, **options)
    finally:
        del model.model.forward
    assert passes == 0


# Keywords of forward, and what prepares its inputs.


class Steered(LlamaForCausalLM):
    """A keyword of its own moves the logits."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, steer: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if steer is not None:
            output.logits = output.logits + steer
        return output


@every_exact
def test_a_keyword_that_only_forward_knows_is_refused(how: dict[str, Any]) -> None:
    model, push = tiny(Steered), torch.zeros(61)
    push[33] = 50.0
    assert generate(model, steer=push, new=3)[0, -3:].tolist() == [33, 33, 33]  # it acts in the host
    refused("steer: the host hands this to Steered.forward.*leave it out", model, steer=push, **how)
    assert torch.equal(generate(model, **how), generate(model))
    assert torch.equal(generate(model, steer=None, **how), generate(model))


class Seeing(LlamaForCausalLM):
    """Reads images, as vision-language models do."""

    def forward(self, input_ids: Any = None, pixel_values: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, **kwargs)
        if pixel_values is not None:
            output.logits = output.logits + pixel_values.mean()
        return output


@every_exact
def test_images_are_refused_and_text_alone_is_served(how: dict[str, Any]) -> None:
    refused("pixel_values: the host hands this to Seeing", tiny(Seeing), pixel_values=torch.ones(1, 3, 4, 4), **how)
    assert torch.equal(generate(tiny(Seeing), **how), generate(tiny(Seeing)))


def test_token_types_are_refused() -> None:
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    model = hf_hybrid.enable(GPT2LMHeadModel(config).double().eval())
    types = torch.full_like(PROMPT, 33)
    assert not torch.equal(generate(model, token_type_ids=types), generate(model))
    with pytest.raises(ValueError, match="token_type_ids: the host hands this"):
        generate(model, token_type_ids=types, **EXACT["chain"])


@every_exact
def test_positions_are_counted_or_refused(how: dict[str, Any]) -> None:
    model, counted = tiny(), torch.arange(12)[None]
    assert torch.equal(generate(model, position_ids=counted, **how), generate(model))
    refused("position_ids that do not count", model, position_ids=counted * 3, **how)
    ids = torch.tensor([[0, 0, 3, 7, 9], [3, 7, 9, 2, 11]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    padded = (mask.cumsum(dim=1) - 1).clamp(min=0)
    expected = generate(model, ids, attention_mask=mask)
    assert torch.equal(generate(model, ids, attention_mask=mask, position_ids=padded, **how), expected)
    wrong = torch.arange(5).expand(2, -1)  # padding is counted too
    refused("position_ids that do not count", model, ids, attention_mask=mask, position_ids=wrong, **how)


class Doubled(LlamaForCausalLM):
    """Reads every id plus one."""

    def prepare_inputs_for_generation(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        inputs["input_ids"] = (inputs["input_ids"] + 1) % 61
        return inputs


class Later(LlamaForCausalLM):
    """Changes what is read behind the prompt alone."""

    def prepare_inputs_for_generation(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if inputs["input_ids"].shape[1] == 1:
            inputs["position_ids"] = inputs["position_ids"] * 2
        return inputs


class Same(LlamaForCausalLM):
    """Overridden, and the same."""

    def prepare_inputs_for_generation(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)


@every_exact
@pytest.mark.parametrize(
    ("kind", "change"), [(Doubled, "changes input_ids"), (Later, "changes position_ids")], ids=["prompt", "later"]
)
def test_inputs_that_a_class_prepares_otherwise_are_refused(kind: type, change: str, how: dict[str, Any]) -> None:
    refused(f"prepare_inputs_for_generation of this {kind.__name__}.*{change}.*leave out strategy", tiny(kind), **how)


def test_inputs_that_an_instance_prepares_otherwise_are_refused_and_the_same_are_not() -> None:
    model = tiny()
    usual = model.prepare_inputs_for_generation

    def longer(ids: Tensor, *args: Any, **kwargs: Any) -> Any:  # as soft prompts of PEFT do
        return {**usual(ids, *args, **kwargs), "inputs_embeds": torch.zeros(1, 4, 32)}

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("task_ids")

    for own, message in ((longer, "adds inputs_embeds"), (failing, "fails.*task_ids")):
        model.prepare_inputs_for_generation = own
        refused(message, model, **EXACT["chain"])
    del model.prepare_inputs_for_generation
    assert torch.equal(generate(tiny(Same), **EXACT["chain"]), generate(tiny(Same)))


# Caches.


@every_exact
def test_a_cache_of_a_chat_is_filled_and_read(how: dict[str, Any]) -> None:
    model = tiny()
    theirs, ours, text = DynamicCache(), DynamicCache(), PROMPT
    for turn in range(3):
        expected = generate(model, text, 6, **{CACHE: theirs})
        found = generate(model, text, 6, return_dict_in_generate=True, **{CACHE: ours}, **how)
        assert torch.equal(found.sequences, expected)
        assert ours.get_seq_length() == theirs.get_seq_length() == expected.shape[1] - 1
        same(ours, theirs)
        # A turn reads its own three tokens and what it writes, drafts included, and never the text before it.
        assert turn == 0 or found.report[0].num_rows < text.shape[1] + 6 * 10
        text = torch.cat([expected, torch.tensor([[5, 9, 4]])], dim=1)
    # The new tokens alone, more of them than the cache holds, and fewer.
    for new in (torch.tensor([[8, 2, 6] * 20]), torch.tensor([[8, 2]])):
        mask = torch.ones((1, ours.get_seq_length() + new.shape[1]), dtype=torch.long)
        expected = generate(model, new, 6, attention_mask=mask, **{CACHE: theirs})
        assert torch.equal(generate(model, new, 6, attention_mask=mask, **{CACHE: ours}, **how), expected)
        same(ours, theirs)


def same(ours: Any, theirs: Any) -> None:
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, rtol=0, atol=1e-12)  # float64, sums in another order
        torch.testing.assert_close(one.values, other.values, rtol=0, atol=1e-12)


@every_exact
def test_the_cache_of_a_ragged_batch_is_the_hosts(how: dict[str, Any]) -> None:
    model = tiny(eos_token_id=[26, 29, 4])  # sequences end at different times
    ids, mask = torch.tensor([[0, 0, 3, 7, 9], [3, 7, 9, 2, 11], [0, 1, 2, 3, 4]]), torch.ones((3, 5), dtype=torch.long)
    mask[0, :2] = mask[2, 0] = 0
    options = {"attention_mask": mask, "return_dict_in_generate": True}
    expected, found = generate(model, ids, **options), generate(model, ids, **options, **how)
    assert torch.equal(found.sequences, expected.sequences)
    ends = [next((i for i, t in enumerate(row[5:]) if t in (26, 29, 4)), 16) for row in expected.sequences.tolist()]
    assert len(set(ends)) > 1
    for one, other in zip(found[CACHE].layers, expected[CACHE].layers, strict=True):
        assert one.keys.shape == other.keys.shape
        for row, end in enumerate(ends):
            real = [c for c in range(one.keys.shape[2]) if c >= 5 or mask[row, c]]
            real = [c for c in real if c <= 5 + end]  # the host reads padding behind an end
            torch.testing.assert_close(one.keys[row, :, real], other.keys[row, :, real], rtol=0, atol=1e-12)


def test_a_planned_call_fills_the_cache_of_its_caller() -> None:
    model, cache = writer(True), DynamicCache()
    ids = torch.tensor([[3, 7, 9, 2, 11]])
    output = model.generate(ids, strategy="planned_diffusion", max_new_tokens=30, **{CACHE: cache})
    assert cache.get_seq_length() == output.shape[1] - 1
    more = torch.cat([output, torch.tensor([[8, 4]])], dim=1)
    assert torch.equal(model.generate(more, max_new_tokens=8, **{CACHE: cache}), model.generate(more, max_new_tokens=8))


def test_either_name_of_a_cache_and_not_both() -> None:
    model, expected = tiny(), generate(tiny())
    for name in ("cache", "past_key_values"):
        cache = DynamicCache()
        assert torch.equal(generate(model, **{name: cache}, **EXACT["chain"]), expected)
        assert cache.get_seq_length() == expected.shape[1] - 1
    refused("two names of one", model, cache=DynamicCache(), past_key_values=DynamicCache(), **EXACT["chain"])


# Prompts as vectors, padding and holes.


@every_exact
def test_prompts_as_vectors(how: dict[str, Any]) -> None:
    model = tiny()
    vectors = model.get_input_embeddings()(PROMPT).detach() + 0.1
    for more in ({}, {"input_ids": PROMPT}):
        options = {"inputs_embeds": vectors, "max_new_tokens": 16, "do_sample": False, **more}
        assert torch.equal(model.generate(**options, **how), model.generate(**options))
    rows = model.get_input_embeddings()(ROWS).detach() * 1.1
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5, [0, 1, 1, 1, 1]])
    options = {"inputs_embeds": rows, "attention_mask": mask, "max_new_tokens": 16, "do_sample": False}
    assert torch.equal(model.generate(**options, **how), model.generate(**options))


def test_vectors_need_a_strategy_of_one_text_and_a_drafter_that_reads_none() -> None:
    vectors = tiny().get_input_embeddings()(PROMPT).detach()
    with pytest.raises(ValueError, match="reads token ids, not inputs_embeds"):
        hybrid().generate(inputs_embeds=vectors.float()[..., :1], strategy="block_diffusion", max_new_tokens=4)
    with pytest.raises(ValueError, match="reads the ids of the prompt"):
        tiny().generate(inputs_embeds=vectors, strategy="speculative", drafter=tiny(), max_new_tokens=4)


@every_exact
def test_holes_are_not_seen_and_padding_on_the_right_is_moved(how: dict[str, Any], caplog: Any) -> None:
    model = tiny()
    ids = torch.tensor([[3, 7, 0, 9, 2, 0, 0, 11]])
    mask = (ids != 0).long()
    found = generate(model, ids, attention_mask=mask, **how)
    assert torch.equal(found, generate(model, ids, attention_mask=mask))
    assert torch.equal(model.generate(ids, max_new_tokens=16, do_sample=False, **how), found)  # the host infers it
    right, left = torch.tensor([[3, 7, 9, 0, 0], [3, 7, 9, 2, 11]]), torch.tensor([[0, 0, 3, 7, 9], [3, 7, 9, 2, 11]])
    moved = generate(model, right, attention_mask=(right != 0).long(), **how)
    assert torch.equal(moved, generate(model, left, attention_mask=(left != 0).long()))


# Scores and logits.


class Offset(LogitsProcessor):
    """Depends on the whole prefix."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + (input_ids.sum(dim=1, keepdim=True) % 7 * torch.arange(scores.shape[1]) % 5).to(scores.dtype)


@every_exact
@pytest.mark.parametrize("processed", [{}, {"repetition_penalty": 1.3, "min_new_tokens": 9}, {"own": True}], ids=str)
def test_scores_and_logits_are_the_hosts(how: dict[str, Any], processed: dict[str, Any]) -> None:
    model = tiny(eos_token_id=[26, 4])
    processed = {"logits_processor": [Offset()]} if processed.get("own") else processed
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, **processed}
    expected, found = generate(model, ROWS, **asked), generate(model, ROWS, **asked, **how)
    assert torch.equal(found.sequences, expected.sequences)
    written = [next((i for i, t in enumerate(r) if t in (26, 4)), 15) for r in expected.sequences[:, 5:].tolist()]
    for name in ("scores", "logits"):
        assert len(found[name]) == len(expected[name]) == expected.sequences.shape[1] - 5
        for step, (one, other) in enumerate(zip(found[name], expected[name], strict=True)):
            rows = [row for row, last in enumerate(written) if step <= last]  # behind an end there is padding
            torch.testing.assert_close(one[rows], other[rows], rtol=1e-5, atol=1e-5)  # the host's are float32
    likely = [model.compute_transition_scores(o.sequences, o.scores, normalize_logits=True) for o in (found, expected)]
    for row, last in enumerate(written):
        torch.testing.assert_close(likely[0][row, : last + 1], likely[1][row, : last + 1], rtol=1e-5, atol=1e-5)
        assert not likely[0][row, last + 1 :].any()  # padding was certain


def test_fields_that_nobody_asked_for_are_none() -> None:
    output = generate(tiny(), return_dict_in_generate=True, **EXACT["chain"])
    for name in ("scores", "logits", "attentions", "hidden_states"):
        assert getattr(output, name) is None
    assert generate(tiny(), return_dict_in_generate=True, output_scores=True, **EXACT["chain"]).logits is None


@pytest.mark.parametrize("how", [{"draft_threshold": 0.0}, {"span_decoding": "autoregressive"}], ids=str)
def test_scores_of_parts_stand_in_text_order(how: dict[str, Any]) -> None:
    model, ids = writer(True), torch.tensor([[3, 7, 9, 2, 11]])
    asked = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 60}
    output = model.generate(ids, strategy="planned_diffusion", **asked, **how)
    assert output.report[0].spans and len(output.scores) == output.sequences.shape[1] - 5
    forced = 0
    for token, scores in zip(output.sequences[0, 5:].tolist(), output.scores, strict=True):
        assert int(scores[0].argmax()) == token  # greedy: every token is the best of its own scores
        forced += int((scores[0] > -torch.inf).sum()) == 1
    assert forced < len(output.scores)
    assert forced >= sum(len(span.label) for span in output.report[0].spans)  # labels were certain


# Criteria and processors.


class Done(StoppingCriteria):
    """Keeps a note for each sequence of the batch."""

    def __init__(self, token: int):
        self.token, self.done = token, dict[int, bool]()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for row, ids in enumerate(input_ids):
            self.done[row] = self.done.get(row, False) or int(ids[-1]) == self.token
        return torch.tensor([self.done[row] for row in range(len(input_ids))])


class Limits(StoppingCriteria):
    """Has a limit for each sequence of the batch."""

    def __init__(self, limits: list[int]):
        self.limits = torch.tensor(limits)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] >= self.limits


@every_exact
def test_criteria_with_a_state_or_parameters_for_each_sequence(how: dict[str, Any]) -> None:
    model = tiny(seed=5)
    options = {"pad_token_id": 0, "new": 20}
    texts = generate(model, ROWS, **options)[:, 5:].tolist()
    token = texts[1][3]  # it ends the second text early
    for make in (lambda: Done(token), lambda: Limits([7, 20, 11])):
        expected = ended(generate(model, ROWS, stopping_criteria=[make()], **options), make())
        assert ended(generate(model, ROWS, stopping_criteria=[make()], **options, **how), make()) == expected


def ended(sequences: Tensor, criterion: Any) -> list[list[int]]:
    """Each text up to where the criterion ends it: without end tokens the host writes on behind it."""
    stops: list[list[int]] = []
    for row, ids in enumerate(sequences.tolist()):
        for count in range(6, len(ids) + 1):
            wide = torch.tensor([ids[:count]] * len(sequences))
            if bool(criterion(wide, None)[row]):
                break
        stops.append(ids[:count])
    return stops


@every_exact
def test_the_callers_own_limit_and_end_replace_the_hosts(how: dict[str, Any]) -> None:
    model = tiny(eos_token_id=26)
    ids = generate(model, new=16)
    own = [MaxLengthCriteria(max_length=PROMPT.shape[1] + 20)]  # longer than max_new_tokens
    expected = generate(model, new=3, stopping_criteria=own, eos_token_id=None)
    assert expected.shape[1] == PROMPT.shape[1] + 20
    assert torch.equal(generate(model, new=3, stopping_criteria=own, eos_token_id=None, **how), expected)
    end = EosTokenCriteria(eos_token_id=torch.tensor([int(ids[0, PROMPT.shape[1] + 2])]))
    expected = generate(model, stopping_criteria=[end])
    assert expected.shape[1] <= PROMPT.shape[1] + 3
    assert torch.equal(generate(model, stopping_criteria=[end], **how), expected)


class Bans(LogitsProcessor):
    """Has a list for each sequence of the batch, and writes into what it gets."""

    def __init__(self, bans: list[list[int]]):
        self.bans = bans

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for row, ids in enumerate(self.bans):
            scores[row, ids] = -torch.inf
        return scores


class Scaled(LogitsProcessor):
    """Has a number for each sequence of the batch."""

    def __init__(self, factors: list[float]):
        self.factors = torch.tensor(factors)[:, None]  # (batch, 1)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + self.factors * (torch.arange(scores.shape[1]) % 3)


class Notes(LogitsProcessor):
    """Keeps a list for each sequence of the batch, inside of a list."""

    def __init__(self, rows: int):
        self.seen: list[list[int]] = [[] for _ in range(rows)]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for row, ids in enumerate(input_ids):
            self.seen[row].append(int(ids[-1]))
            scores[row, self.seen[row][-4:]] -= 3
        return scores


@every_exact
def test_processors_with_a_state_or_parameters_for_each_sequence(how: dict[str, Any]) -> None:
    model = tiny()
    for make in (lambda: Bans([[26], [29], [47]]), lambda: Scaled([1.0, -2.0, 0.5]), lambda: Notes(3)):
        expected = generate(model, ROWS, logits_processor=[make()])
        assert torch.equal(generate(model, ROWS, logits_processor=[make()], **how), expected)


def test_what_cannot_be_copied_is_refused_for_a_batch_and_serves_one() -> None:
    class Locked(LogitsProcessor):
        def __init__(self) -> None:
            self.numbers = iter(range(1000)).__iter__()
            self.generator = (i for i in range(1000))

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores + next(self.generator) * 0

    options = {"logits_processor": [Locked()], **EXACT["chain"]}
    refused("Locked cannot be copied.*one prompt at a time", tiny(), ROWS, **options)
    expected = generate(tiny())
    assert torch.equal(generate(tiny(), **options), expected)


# Where a strategy may be named.


def test_strategies_and_settings_in_a_config() -> None:
    model = tiny()

    def report(**options: Any) -> Any:
        output = model.generate(PROMPT, return_dict_in_generate=True, **options)
        return output.report[0] if hasattr(output, "report") else None

    config = GenerationConfig(strategy="speculative", draft_length=3, max_new_tokens=16, return_dict_in_generate=True)
    output = model.generate(PROMPT, generation_config=config)
    assert output.report[0].strategy == "speculative"
    assert max(length for length, _, _ in output.report[0].drafting.passes) <= 3
    model.generation_config.strategy = "autoregressive"
    assert report(max_new_tokens=4).strategy == "autoregressive"
    assert report(max_new_tokens=4, strategy="speculative").strategy == "speculative"
    assert report(max_new_tokens=4, hf_hybrid={}) is None  # the host was asked for
    model.generation_config.strategy = "nonsense"
    with pytest.raises(ValueError, match="unknown strategy 'nonsense'; choose one of"):
        report(max_new_tokens=4)
    del model.generation_config.strategy
    with pytest.raises(ValueError, match="draft_length is a setting of a strategy, and no strategy is named"):
        model.generate(PROMPT, generation_config=GenerationConfig(draft_length=3, max_new_tokens=4))
    odd = GenerationConfig(strategy="autoregressive", draft_length=3, max_new_tokens=4)
    with pytest.raises(ValueError, match=r"draft_length is a setting.*'autoregressive' does not have it"):
        model.generate(PROMPT, generation_config=odd)


def test_a_call_that_asks_for_the_host_gets_it_after_install() -> None:
    model = tiny()
    model.generation_config.hf_hybrid = {"strategy": "speculative"}
    hf_hybrid.install()
    try:
        assert hasattr(model.generate(PROMPT, max_new_tokens=4, return_dict_in_generate=True), "report")
        asked = model.generate(PROMPT, max_new_tokens=4, return_dict_in_generate=True, hf_hybrid={})
        config = GenerationConfig(hf_hybrid={}, max_new_tokens=4, return_dict_in_generate=True)
        plain = hf_hybrid.disable(tiny())  # no mixin: the installed door alone
        plain.generation_config.hf_hybrid = {"strategy": "speculative"}
        theirs = plain.generate(PROMPT, max_new_tokens=4, return_dict_in_generate=True, hf_hybrid={})
        for output in (asked, model.generate(PROMPT, generation_config=config), theirs):
            assert not hasattr(output, "report")
    finally:
        hf_hybrid.uninstall()


@every_exact
def test_rows_that_ended_are_padded_with_the_first_end_token(how: dict[str, Any]) -> None:
    model = tiny(seed=0, pad_token_id=None, eos_token_id=[40, 7, 26, 5])
    found, expected = generate(model, ROWS, 8, **how), generate(model, ROWS, 8)
    assert torch.equal(found, expected) and 40 in expected[:, 5:].tolist()[0] + expected[:, 5:].tolist()[1]


@every_exact
def test_answers_go_on_beyond_the_trained_positions(how: dict[str, Any]) -> None:
    model = tiny(max_position_embeddings=20)
    assert torch.equal(generate(model, new=30, **how), generate(model, new=30))
