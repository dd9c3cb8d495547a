"""What the host hands to a callable ``custom_generate``: a canary for its releases, nothing of ours is under test.

When one of these fails after an update of transformers, the seam moved: read the difference before changing the line.
The loop in ``hf_hybrid.decoding`` and the routing in ``hf_hybrid.mixin`` rely on exactly this.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

CACHE = "cache" if Version(transformers.__version__) >= Version("5.24.dev0") else "past_key_values"
PROMPT = torch.tensor([[3, 4, 5]])
PADDED = {"input_ids": torch.tensor([[2, 3], [4, 5]]), "attention_mask": torch.tensor([[0, 1], [1, 1]])}


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.puts: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.puts.append(value.flatten().tolist())

    def end(self) -> None:
        raise AssertionError("the host ended a streamer that a callable should end")


def received(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """Every named object that a callable receives for this call of ``generate``."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.hf_hybrid = {"strategy": "autoregressive"}
    seen: dict[str, Any] = {}

    def loop(model: Any, input_ids: torch.Tensor, **rest: Any) -> torch.Tensor:
        seen.update(rest, model=model, input_ids=input_ids)
        return input_ids

    out = model.generate(*args, custom_generate=loop, **{"max_new_tokens": 4, **kwargs})
    assert out is seen["input_ids"]  # what the loop returns comes back as it is
    assert seen["model"] is model
    return seen


def test_names_and_types() -> None:
    seen = received(PROMPT)
    assert set(seen) == {
        "model",
        "input_ids",
        "logits_processor",
        "stopping_criteria",
        "generation_config",
        "attention_mask",
        "position_ids",
        "logits_to_keep",
        CACHE,
        "use_cache",
    }
    assert isinstance(seen["logits_processor"], LogitsProcessorList)
    assert isinstance(seen["stopping_criteria"], StoppingCriteriaList)
    assert [type(c) for c in seen["stopping_criteria"]] == [MaxLengthCriteria, EosTokenCriteria]
    assert isinstance(seen[CACHE], DynamicCache) and seen[CACHE].get_seq_length() == 0
    assert seen["position_ids"].tolist() == [[0, 1, 2]]
    assert seen["logits_to_keep"] == 1 and seen["use_cache"] is True


def test_config_is_merged_with_custom_fields() -> None:
    config = received(PROMPT)["generation_config"]
    assert config.hf_hybrid == {"strategy": "autoregressive"}
    assert config.max_length == 7 and config.max_new_tokens == 4  # prompt and new tokens together
    own = received(PROMPT, GenerationConfig(hf_hybrid={"strategy": "block_diffusion"}, max_new_tokens=4))
    assert own["generation_config"].hf_hybrid == {"strategy": "block_diffusion"}


def test_none_in_the_call_overrides_both_configs() -> None:
    # The mixin takes stop strings off the host in this way.
    config = GenerationConfig(stop_strings=["x"], max_new_tokens=4)
    assert received(PROMPT, config, stop_strings=None)["generation_config"].stop_strings is None


def test_mask_is_none_or_ones_when_nothing_is_padded() -> None:
    # 5.23 drops a mask of ones; older releases pass it. Either is fine, a mask with a hole is not.
    for mask in (None, torch.ones_like(PROMPT)):
        seen = received(PROMPT, attention_mask=mask)["attention_mask"]
        assert seen is None or bool((seen == 1).all())


def test_padded_batch() -> None:
    seen = received(**PADDED)
    assert seen["attention_mask"].tolist() == [[0, 1], [1, 1]]
    real = seen["position_ids"][PADDED["attention_mask"] == 1]
    assert real.tolist() == [0, 0, 1]  # positions count real tokens


def test_batch_is_expanded_by_num_return_sequences() -> None:
    seen = received(**PADDED, num_return_sequences=2, do_sample=True)
    assert seen["input_ids"].tolist() == [[2, 3], [2, 3], [4, 5], [4, 5]]
    assert seen["attention_mask"].tolist() == [[0, 1], [0, 1], [1, 1], [1, 1]]
    assert seen["position_ids"].shape == (4, 2)


def test_streamer_and_tokenizer_are_dropped_and_the_prompt_is_streamed() -> None:
    streamer = Recorder()
    seen = received(PROMPT, streamer=streamer, tokenizer=object(), synced_gpus=False)
    assert not {"streamer", "tokenizer", "synced_gpus"} & set(seen)
    assert streamer.puts == [[3, 4, 5]]


def test_stop_strings_lose_their_tokenizer() -> None:
    # Why the mixin builds the criterion itself. When this stops raising, it may stop doing so.
    with pytest.raises(ValueError, match="tokenizer"):
        received(PROMPT, stop_strings=["x"], tokenizer=object())


def test_sampling_processors_arrive() -> None:
    sampling = {"do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.9}
    names = [type(p).__name__ for p in received(PROMPT, **sampling)["logits_processor"]]
    assert names == ["TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper"]
    assert list(received(PROMPT, do_sample=False)["logits_processor"]) == []


def test_unknown_arguments_still_raise() -> None:
    with pytest.raises(ValueError, match="not_an_argument"):
        received(PROMPT, not_an_argument=1)


def test_a_static_cache_has_no_room_beyond_the_answer() -> None:
    # Why the mixin switches cache_implementation off.
    seen = received(PROMPT, cache_implementation="static")
    assert seen[CACHE].layers[0].max_cache_len == 3 + 4 - 1


def test_gradients_are_off() -> None:
    class Probe(Exception):
        pass

    def loop(model: Any, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        raise Probe

    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, eos_token_id=1
    )
    with pytest.raises(Probe):
        LlamaForCausalLM(config).generate(PROMPT, custom_generate=loop, max_new_tokens=1)
