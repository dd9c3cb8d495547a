"""Every argument acts as in the host or is refused before the first pass: what a call and its config say.

Bugs these tests catch: a keyword of ``forward`` that is dropped, so that the text is another; a subclass whose inputs
are prepared otherwise and whose text is the base model's; prompts as vectors, holes and padding that are read as text;
settings in a config that nobody reads; a strategy that runs although the call asked for the host.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

import hf_hybrid
from tests.hosts_for_tests import EXACT, PROMPT, ROWS, every_exact, generate, refused, tiny
from tests.models_for_tests import hybrid

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
