"""Models of which more must be known than their class: hooks, classes of others, encoders; and what a config asks for.

Bugs these tests catch: a hook, or an encoder, that reads the rows beside a token and makes speculative text another
one; a hook that is the same for every token and is refused all the same; a probe that is paid for by ordinary models,
or more than once; router logits, checkpointing or a cache switched off in the config that break a pass.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM

import hf_hybrid
from hf_hybrid import TreeDrafter
from hf_hybrid.models import probe
from hf_hybrid.models.host import Unsupported
from tests.models_for_tests import CONTROL, VOCAB, hybrid, tiny, watching

IDS = torch.tensor([[3, 7, 9, 2, 11, 3, 7, 9, 2, 11, 3, 7]])
TWO = torch.tensor([[3, 7, 9, 2, 11, 3, 7, 9], [5, 9, 5, 9, 5, 9, 5, 9]])
FULL: dict[str, Any] = {"strategy": "speculative", "adaptive": False}
PLAIN: dict[str, Any] = {"strategy": "autoregressive"}
STRATEGIES: list[dict[str, Any]] = [PLAIN, FULL, {**FULL, "drafter": "self"}]
PUSH = 2 * torch.randn(32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def write(host: Any, ids: torch.Tensor = IDS, **options: Any) -> list[list[int]]:
    options = {"max_new_tokens": 14, "do_sample": False, **options}
    return host.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, ids.shape[1] :].tolist()


def llama(cls: type = LlamaForCausalLM, **changes: Any) -> Any:
    made = tiny("llama", **changes)
    host = cls(made.config).double().eval()
    host.load_state_dict(made.state_dict())
    return hf_hybrid.enable(host)


def last_only(_: nn.Module, __: Any, out: torch.Tensor) -> torch.Tensor:
    return torch.cat([out[:, :-1], out[:, -1:] + PUSH], 1)


def in_place(_: nn.Module, __: Any, out: torch.Tensor) -> None:
    out[:, -1] += PUSH


def mean_of_all(_: nn.Module, args: Any) -> Any:
    return (args[0] + args[0].mean(dim=1, keepdim=True), *args[1:])


def everywhere(_: nn.Module, __: Any, out: torch.Tensor) -> torch.Tensor:
    return out + PUSH


class PassCount:
    def __init__(self, host: Any):
        self.rows: list[int] = []
        inner, forward = host.model, type(host.model).forward

        @functools.wraps(forward)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.rows.append(kwargs["input_ids"].shape[1])
            return forward(inner, *args, **kwargs)

        inner.forward = watching(counted)


@pytest.mark.parametrize("hook", [last_only, in_place, mean_of_all])
def test_a_hook_that_sees_rows_beside_a_token(hook: Any) -> None:
    host = llama()
    layer = host.model.layers[0]
    handle = (layer.register_forward_pre_hook if hook is mean_of_all else layer.register_forward_hook)(hook)
    assert write(host, **PLAIN) == write(host)
    for _ in range(2):
        message = f"forward hooks or replaced forwards \\({hook.__name__}\\), and 3 tokens in one pass give other"
        with pytest.raises(Unsupported, match=message + ".*Remove .*or take strategy='autoregressive' or none"):
            write(host, **FULL)
    handle.remove()
    assert write(host, **FULL) == write(host)


def test_a_replaced_forward_is_a_hook_too() -> None:
    host = llama()
    mlp = host.model.layers[1].mlp
    inner = mlp.forward
    mlp.forward = lambda x: last_only(mlp, (), inner(x))
    with pytest.raises(Unsupported, match=r"replaced forwards \(.*lambda.*3 tokens in one pass"):
        write(host, **FULL)
    mlp.forward = lambda x: everywhere(mlp, (), inner(x))
    assert write(host, **FULL) == write(host)
    mlp.forward = inner
    assert write(host, **FULL) == write(host)


def test_a_hook_for_all_modules() -> None:
    host = llama()
    target = host.model.layers[0]
    handle = nn.modules.module.register_module_forward_hook(
        lambda layer, args, out: last_only(layer, args, out) if layer is target else None
    )
    try:
        with pytest.raises(Unsupported, match="3 tokens in one pass"):
            write(host, **FULL)
    finally:
        handle.remove()


@pytest.mark.parametrize("strategy", ["autoregressive", "speculative", "block_diffusion", "planned_diffusion"])
def test_a_hook_that_is_the_same_for_every_token(strategy: str) -> None:
    host = hybrid(seed=13, favours={CONTROL.noise.end: 1.0})
    bare = write(host, strategy=strategy)
    host.model.layers[0].register_forward_hook(everywhere)
    assert write(host, strategy=strategy) != bare
    if strategy in ("autoregressive", "speculative"):
        assert write(host, strategy=strategy) == write(host)


def test_a_hook_that_breaks_says_so() -> None:
    host = llama()

    def one_row(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
        return out.reshape(1, 1, 32)

    host.model.norm.register_forward_hook(one_row)
    with pytest.raises(Unsupported, match=r"one_row\), and a pass of 3 tokens fails \(RuntimeError: shape"):
        write(host, torch.tensor([[5]]), **FULL)
    assert write(host, torch.tensor([[5]]), **PLAIN) == write(host, torch.tensor([[5]]))


def test_what_an_ordinary_model_pays() -> None:
    host = llama()
    count = PassCount(host)
    write(host, **PLAIN)
    assert count.rows == [12] + [1] * 13
    count.rows.clear()
    out = host.generate(IDS, max_new_tokens=14, return_dict_in_generate=True, **FULL)
    assert len(count.rows) == out.report[0].num_forwards


def test_what_a_model_in_doubt_pays() -> None:
    host = llama()
    count = PassCount(host)
    host.model.layers[0].register_forward_hook(everywhere)
    paid: list[int] = []
    for options in (PLAIN, FULL, FULL):
        count.rows.clear()
        out = host.generate(IDS, max_new_tokens=14, return_dict_in_generate=True, **options)
        paid.append(len(count.rows) - out.report[0].num_forwards)
    # Two of the host and of the Runner, three of one token, two of three.
    assert paid == [0, 9, 0]


@pytest.mark.parametrize("is_decoder", [False, True])
def test_encoders(is_decoder: bool) -> None:
    torch.manual_seed(1)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = BertConfig(
        **sizes, num_attention_heads=4, max_position_embeddings=64, initializer_range=0.2, is_decoder=is_decoder
    )
    host = hf_hybrid.enable(BertLMHeadModel(config).double().eval())
    assert write(host, **PLAIN) == write(host)
    if is_decoder:
        assert write(host, **FULL) == write(host)
        return
    with pytest.raises(Unsupported, match=r"is_decoder=False, and 3 tokens .*Load it with is_decoder=True, or take"):
        write(host, **FULL)


class Thin(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Mixing(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + out.logits.cumsum(1).flip(1)
        return out


class Stale(LlamaForCausalLM):
    """Takes a pass without a mask for the first one."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("attention_mask") is None:
            kwargs["position_ids"] = None
            kwargs["input_ids"] = kwargs["input_ids"] * 0
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("options", STRATEGIES[:2])
def test_classes_of_others(options: dict[str, Any]) -> None:
    host = llama(Thin)
    assert write(host, **options) == write(host)
    with pytest.raises(Unsupported, match=r"from outside of transformers \(.*Stale\), and passes with our cache"):
        write(llama(Stale), **options)
    if options is FULL:
        with pytest.raises(Unsupported, match=r"\(.*Mixing\), and 3 tokens in one pass give other logits"):
            write(llama(Mixing), **options)


def test_a_release_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    host = llama()
    expected = write(host)
    monkeypatch.setattr("hf_hybrid.models.release.transformers.__version__", "5.99.0")
    assert write(host, **FULL) == expected
    monkeypatch.setattr(probe, "_of_runner", lambda *_: torch.zeros(2, VOCAB, dtype=torch.float64))
    with pytest.raises(Unsupported, match=r"not known, and passes with.*5.99.0 is installed.*update hf-hybrid"):
        write(llama(), **PLAIN)


def _adapter_names_pre_forward_hook(target: Any, args: Any, kwargs: Any, adapter_names: list[str]) -> Any:
    assert len(args[0]) == len(adapter_names)
    return args, kwargs


def _alora_offsets_pre_forward_hook(target: Any, args: Any, kwargs: Any, alora_offsets: list[int]) -> Any:
    return args, kwargs


def test_adapters_of_the_sequences_of_a_batch() -> None:
    host = llama()
    layer = host.model.layers[0].mlp.up_proj

    def during(hook: Any, ids: torch.Tensor, options: dict[str, Any]) -> list[list[int]]:
        handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
        found = write(host, ids, **options)
        handle.remove()  # PEFT does so too, unless the call fails
        return found

    for options in STRATEGIES[:2]:
        one = functools.partial(_adapter_names_pre_forward_hook, adapter_names=["a"])
        assert during(one, IDS, options) == write(host)
        two = functools.partial(_adapter_names_pre_forward_hook, adapter_names=["a", "b"])
        with pytest.raises(Unsupported, match=r"adapter_names= gives each sequence .*one sequence at a time"):
            during(two, TWO, options)
        assert not layer._forward_pre_hooks and write(host, TWO, **options) == write(host, TWO)
    offsets = functools.partial(_alora_offsets_pre_forward_hook, alora_offsets=[3])
    assert during(offsets, IDS, PLAIN) == write(host)
    for ids, options in ((IDS, FULL), (TWO, PLAIN)):
        with pytest.raises(Unsupported, match=r"aLoRA counts the tokens .*take strategy='autoregressive' with one seq"):
            during(offsets, ids, options)


EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "JetMoe"])
@pytest.mark.parametrize("asked", [{"output_router_logits": True}, {"use_cache": False}], ids=["router", "cache"])
def test_what_a_config_asks_for(kind: str, asked: dict[str, Any]) -> None:
    torch.manual_seed(1)
    sizes = {**EXPERTS, "shared_expert_intermediate_size": 16, "sliding_window": None, **asked}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
        **sizes,
    )
    host = hf_hybrid.enable(getattr(transformers, f"{kind}ForCausalLM")(config).eval())
    host.config.output_router_logits = False  # with them the oldest host itself fails on a batch
    expected = write(host, TWO)
    host.config.output_router_logits = bool(asked.get("output_router_logits"))
    assert write(host, TWO, **FULL) == expected
    assert write(host, TWO, **FULL, drafter=TreeDrafter(host)) == expected
    options = {"return_dict_in_generate": True, "return_past_key_values": True, "max_new_tokens": 4}
    assert host.generate(TWO, attention_mask=torch.ones_like(TWO), **PLAIN, **options).report is not None


def checkpointing(host: Any) -> Any:
    enable = getattr(host, "activation_checkpointing_enable", None) or host.gradient_checkpointing_enable
    enable()
    return host


@pytest.mark.parametrize("options", STRATEGIES[:2])
def test_checkpointing_in_training_mode(options: dict[str, Any]) -> None:
    host = llama()
    expected = write(host)
    checkpointing(host).train()
    with pytest.raises(Unsupported, match=r"training mode with gradient checkpointing.*call model\.eval\(\)"):
        write(host, **options)
    host.eval()
    assert write(host, **options) == expected
    host.model.layers[0].train()  # one layer is enough
    with pytest.raises(Unsupported, match=r"or model\.\w+_checkpointing_disable\(\)"):
        write(host, **options)
    disable = getattr(host, "activation_checkpointing_disable", None) or host.gradient_checkpointing_disable
    disable()
    assert write(host.train(), **options) == expected


def test_a_drafting_model_in_training_mode() -> None:
    drafter = checkpointing(LlamaForCausalLM(LlamaConfig(**tiny("llama").config.to_diff_dict())).double()).train()
    with pytest.raises(Unsupported, match=r"call model\.eval\(\)"):
        write(llama(), **FULL, drafter=drafter)
