"""Drafters that do not fit, that lie or that break; streams, and streams that are interrupted.

Bugs these tests catch: a drafter with another tokenizer that drafts nonsense without a word; NaN that ends a call which
needs no drafter; ids outside the vocabulary that reach the model; a memory of another model; an argument that is taken
and ignored; a drafter that does not work any more behind an interrupt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

import hf_hybrid
from hf_hybrid import Draft, Drafter, DrafterError, ModelDrafter, SuffixDrafter, SuffixMemory, Text
from hf_hybrid.decoding import DecodingError
from tests.models_for_tests import CONTROL, VOCAB, hybrid, tiny, watching, words, writer

PROMPT = torch.tensor([[3, 7, 9, 2, 11]])
SEVEN = torch.tensor([7])
SPECULATIVE: dict[str, Any] = {"strategy": "speculative", "max_new_tokens": 24, "adaptive": False}


def generate(host: Any = None, **settings: Any) -> Any:
    return (host or writer(False)).generate(PROMPT, **{**SPECULATIVE, **settings})


def plain(**settings: Any) -> Tensor:
    return writer(False).generate(PROMPT, strategy="autoregressive", max_new_tokens=24, **settings)


class Given(Drafter):
    """Drafts what a function says."""

    def __init__(self, make: Callable[[Text], Draft]):
        self.make = make

    def propose(self, texts: Sequence[Text], length: int, sampler: Any) -> list[Draft]:
        return [self.make(text) for text in texts]


def other_vocabulary() -> SuffixMemory:
    memory = SuffixMemory()
    memory.bind(VOCAB + 1)
    return memory


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "num_beams=2 chooses another way of decoding than strategy='speculative'"),
        ({"drafter": "sufix"}, "drafter='sufix': choose one of suffix, self"),
        ({"drafter": SuffixDrafter}, r"drafter=SuffixDrafter: .* an object, SuffixDrafter\(\.\.\.\), not the class"),
        ({"drafter": 3}, "drafter=int: give 'suffix', 'self', a causal model of transformers or a hf_hybrid.Drafter"),
        ({"strategy": "autoregressive", "adaptive": None, "drafter": SuffixDrafter()}, "needs strategy='speculative'"),
        ({"strategy": None, "drafter": SuffixDrafter()}, "settings of a strategy, but the call names none"),
        ({"drafter": "suffix", "assistant_model": tiny("llama")}, "two drafters; leave one out"),
        ({"drafter": SuffixDrafter(), "assistant_model": tiny("llama")}, "two drafters; leave one out"),
        ({"drafter": SuffixDrafter(other_vocabulary())}, "a vocabulary of 62 tokens, the model has 61"),
        ({"drafter": tiny("llama", vocab_size=2000)}, r"\(2000 tokens.*another tokenizer.*vouch for it"),
        ({"drafter": tiny("llama", eos_token_id=7)}, r"ends \[7\].*another tokenizer.*take one of the same family"),
        ({"drafter": tiny("llama", attention="flex_attention")}, "attention 'flex_attention' takes no mask per row"),
        ({"drafter": Given(lambda text: Draft([VOCAB]))}, r"Given drafted \[61\]; a draft holds token ids .* 0 to 60"),
        ({"drafter": Given(lambda text: Draft([1.0]))}, r"drafted \[1.0\]"),  # type: ignore[list-item]
        ({"draft_length": 0}, "draft_length=0 is out of range: 1 to 1024"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions=True is not available"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else None,
)
def test_refused_before_the_first_pass(settings: dict[str, Any], message: str) -> None:
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    settings = {**SPECULATIVE, **settings}
    settings = {name: value for name, value in settings.items() if value is not None}
    hook = writer(False).model.register_forward_pre_hook(watching(count))
    try:
        with pytest.raises(ValueError, match=message):
            writer(False).generate(PROMPT, **settings)
    finally:
        hook.remove()
    assert passes == 0


def test_a_model_without_a_mask_token_cannot_draft_for_itself() -> None:
    host = hybrid(seed=13)
    del host.config.hf_hybrid
    with pytest.raises(DecodingError, match=r"drafter='self' needs a mask token.*take drafter='suffix'"):
        generate(host, drafter="self")
    assert generate(host).shape[1] > 5


def test_two_tokenizers_are_compared() -> None:
    other = words()
    other.add_tokens(["new"])
    with pytest.raises(DrafterError, match="the drafter has another tokenizer than the model"):
        ModelDrafter(tiny("llama"), tokenizer=other, target_tokenizer=words())
    with pytest.raises(DrafterError, match="the drafter has another tokenizer than the model"):
        generate(assistant_model=tiny("llama"), assistant_tokenizer=other, tokenizer=words())
    with pytest.raises(ValueError, match="least_chance=2 is out of range"):
        ModelDrafter(tiny("llama"), least_chance=2)
    # Vouched for: the ends of the configs need not agree.
    drafter = ModelDrafter(tiny("llama", eos_token_id=7), tokenizer=words(), target_tokenizer=words())
    assert torch.equal(generate(drafter=drafter), plain())


def test_assistant_model_is_another_name_of_drafter() -> None:
    output = generate(assistant_model=tiny("llama", seed=5), return_dict_in_generate=True)
    assert output.report[0].drafting.drafter == "model"
    assert torch.equal(output.sequences, plain())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("drawn", [{}, {"do_sample": True, "seed": 3, "acceptance": "rejection"}], ids=["", "drawn"])
def test_a_drafter_that_gives_nan_is_switched_off(value: float, drawn: dict[str, Any]) -> None:
    broken = tiny("llama", seed=5)
    broken.get_output_embeddings().register_forward_hook(lambda _, __, logits: logits.index_fill(-1, SEVEN, value))
    output = generate(drafter=broken, return_dict_in_generate=True, **drawn)
    if not drawn:
        assert torch.equal(output.sequences, plain())
    assert output.report[0].fallbacks == [
        "drafting was switched off: the drafter gave NaN or infinite logits; check its weights and its dtype"
    ]
    assert output.report[0].drafting.rounds == 0


def test_a_drafter_with_fewer_positions_stops_drafting() -> None:
    output = generate(
        drafter=ModelDrafter(tiny("gpt2", seed=5, n_positions=12), least_chance=0.0), return_dict_in_generate=True
    )
    assert torch.equal(output.sequences, plain())
    drafting = output.report[0].drafting
    # The prompt takes 5 of its 12 positions; behind the twelfth nothing is drafted.
    assert 0 < drafting.rounds <= 7 and drafting.empty > 10


def test_drafts_of_the_wrong_number() -> None:
    class Silent(Drafter):
        def propose(self, texts: Sequence[Text], length: int, sampler: Any) -> list[Draft]:
            return []

    with pytest.raises(DecodingError, match="0 drafts for 1 texts; give one for each"):
        generate(drafter=Silent())


@pytest.mark.parametrize("fault", ["shape", "sum", "zero", "negative"])
def test_probabilities_that_are_none(fault: str) -> None:
    law = torch.full((1, VOCAB), 1 / VOCAB)
    if fault == "shape":
        law = law[:, 1:]
    elif fault == "sum":
        law = law * 2
    else:
        law[0, 5] = 0.0 if fault == "zero" else -1.0
        law[0, 6] += 1 / VOCAB if fault == "zero" else 1 + 1 / VOCAB
    with pytest.raises(DecodingError, match="probabilities"):
        generate(drafter=Given(lambda text: Draft([5], law)), do_sample=True, acceptance="rejection")


class Listener(BaseStreamer):
    """Keeps what it gets; stops the call at piece number ``stop``."""

    def __init__(self, stop: int = 10**9):
        self.pieces: list[list[int]] = []
        self.stop, self.ends = stop, 0

    def put(self, value: Tensor) -> None:
        self.pieces.append(value.flatten().tolist())
        if len(self.pieces) == self.stop:
            raise KeyboardInterrupt

    def end(self) -> None:
        self.ends += 1


@pytest.mark.parametrize("drafter", ["suffix", "self", "model"])
def test_streams_and_interrupts(drafter: str) -> None:
    partner: Any = ModelDrafter(writer(False), least_chance=0.0) if drafter == "model" else drafter
    memory = SuffixMemory()
    partner = SuffixDrafter(memory) if drafter == "suffix" else partner
    expected = plain()
    listener = Listener()
    assert torch.equal(generate(drafter=partner, streamer=listener), expected)
    assert [token for piece in listener.pieces for token in piece] == expected[0].tolist() and listener.ends == 1
    assert all(len(piece) == 1 for piece in listener.pieces[1:]), "one by one, as from the host"
    held = len(memory)
    stopped = Listener(stop=2)
    with pytest.raises(KeyboardInterrupt):
        generate(drafter=partner, streamer=stopped)
    assert stopped.ends == 1 and len(memory) == held
    assert torch.equal(generate(drafter=partner), expected)
    assert torch.equal(plain(), expected)


def test_the_settings_of_a_checkpoint() -> None:
    host = hybrid(seed=13, favours={CONTROL.noise.end: 1.0})
    host.generation_config.hf_hybrid = {
        "strategy": "speculative",
        "drafter": "self",
        "speculative": {"adaptive": False},
    }
    output = host.generate(PROMPT, max_new_tokens=24, return_dict_in_generate=True)
    assert output.report[0].drafting.drafter == "self"
    assert torch.equal(output.sequences, plain())
    assert hf_hybrid.control_tokens(host) == CONTROL
