"""Drafting with a smaller model beside the host's assisted generation, by a pair of random models; by a trained pair
see `benchmarks.speculation.trained`.

The gain of such a pair follows from two numbers: what a draft costs, and how often it is accepted. So no trained
weights are needed: the draft is the first layers of the target with noise on their output, as much as it takes to agree
on a wanted share of the tokens. Probabilities are as sharp as that share says, since drafts may end where they are low.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.speculation.methods import ASSISTED, PLAIN, Method, Writer, generated
from benchmarks.speculation.prompts import Prompt
from hf_hybrid.decoding import ModelDrafter, TreeDrafter
from hf_hybrid.mixin import enable
from hf_hybrid.models.host import end_ids

PROMPT_TOKENS = 32
ASSISTED_SINCE = "5.16"
"""The first transformers whose assisted generation serves such a pair."""
_STEPS = 12  # of a bisection: to 1 in 4,000
_DAMPED = 0.02  # of what the layers add that the draft lacks


@dataclass(frozen=True)
class PairSizes:
    """Of the two models; the draft has the first ``draft_layers`` of ``layers``, and everything else alike. The usual
    ones cost 1 to 8 in weights that a pass reads."""

    vocab: int = 8192
    hidden: int = 512
    intermediate: int = 1536
    heads: int = 8
    layers: int = 16
    draft_layers: int = 1


@dataclass(frozen=True)
class Pair:
    """Two models in eval mode, the target enabled.

    Attributes:
        agreement: share of tokens of the target's own text that the draft would write too, 0 to 1.
        cost: weights that a pass of the draft reads, in units of those of the target.
    """

    target: Any
    draft: Any
    agreement: float
    cost: float

    def methods(self) -> tuple[Method, ...]:
        """Plain decoding, the host's assisted generation, ours with chains and with trees.

        Assisted generation runs as it comes, and with five tokens a round, whatever their probabilities; ``absent``
        says when it is left out.
        """
        assisted = (Method(ASSISTED, self._assisted(None, None)), Method("assisted_five", self._assisted(5, 0.0)))
        return (
            Method(PLAIN, lambda model: generated(model.generate, end_ids(model), hf_hybrid={})),
            *(() if self.absent() else assisted),
            Method("speculative_model", self._ours),
            Method("speculative_tree", self._tree),
        )

    def absent(self) -> list[dict[str, str]]:
        """What is not measured, and how to install it.

        transformers 5.15 crops the cache of the draft too little after some rounds, and its assisted generation fails.
        """
        whole = Version(transformers.__version__) >= Version(ASSISTED_SINCE)
        return [] if whole else [{"method": ASSISTED, "install": f'pip install "transformers>={ASSISTED_SINCE}"'}]

    def _assisted(self, length: int | None, threshold: float | None) -> Callable[[Any], Writer]:
        def build(model: Any) -> Writer:
            write = generated(model.generate, end_ids(model), hf_hybrid={}, assistant_model=self.draft)

            def with_settings(inputs: Any, limit: int) -> Any:
                config = self.draft.generation_config  # which the host reads at the start of every call
                config.num_assistant_tokens, config.assistant_confidence_threshold = length, threshold
                return write(inputs, limit)

            return with_settings

        return build

    def _ours(self, model: Any) -> Writer:
        return generated(model.generate, end_ids(model), strategy="speculative", drafter=ModelDrafter(self.draft))

    def _tree(self, model: Any) -> Writer:
        drafter = TreeDrafter(ModelDrafter(self.draft))
        return generated(model.generate, end_ids(model), strategy="speculative", drafter=drafter)


class Numbers:
    """A tokenizer for random models: a text is its ids."""

    pad_token_id = 0

    def __call__(self, text: str) -> dict[str, list[int]]:
        """``input_ids`` of a text of numbers."""
        return {"input_ids": [int(word) for word in text.split()]}


def random_prompts(count: int, vocab: int, seed: int = 0) -> list[Prompt]:
    """``count`` prompts of random tokens, as texts of ``Numbers``."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab, (count, PROMPT_TOKENS), generator=draw).tolist()  # (count, prompt)
    return [Prompt("random", f"random/{number}", " ".join(map(str, row))) for number, row in enumerate(ids)]


def random_pair(
    sizes: PairSizes | None = None, agreement: float = 0.7, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Pair:
    """A target and a draft that agree on about ``agreement`` of the tokens of the target's greedy text.

    Args:
        agreement: 0 to 1, more than chance and less than what the shared layers alone give. seed: of the weights; the
            same one gives the same pair.
    """
    sizes = sizes or PairSizes()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        target, draft = _model(sizes, sizes.layers, dtype), _model(sizes, sizes.draft_layers, dtype)
        head = target.lm_head.weight.detach().clone()  # (vocab, hidden)
        noise = torch.randn_like(head) * head.std()
    with torch.no_grad():
        for layer in target.model.layers[sizes.draft_layers :]:
            layer.self_attn.o_proj.weight.mul_(_DAMPED)
            layer.mlp.down_proj.weight.mul_(_DAMPED)
    shared = {name: w for name, w in target.state_dict().items() if name in draft.state_dict()}
    draft.load_state_dict(shared)
    enable(target)
    ids = _texts(target, sizes.vocab, seed)  # (texts, length)
    wanted, found = _hidden(target, ids), _hidden(draft, ids)  # (tokens, hidden)
    best = (wanted @ head.T).argmax(-1)  # (tokens,)

    def agreed(scale: float) -> float:
        return float(((found @ (head + scale * noise).T).argmax(-1) == best).cpu().double().mean())

    def sharpness(scale: float) -> float:
        return float((scale * (wanted @ head.T)).softmax(-1).amax(-1).cpu().double().mean())

    spread = _bisected(lambda scale: -agreed(scale), -agreement, 0.0, 4.0)
    sharp = _bisected(sharpness, agreement, 0.01, 100.0)
    with torch.no_grad():
        target.lm_head.weight.copy_(sharp * head)
        draft.lm_head.weight.copy_(sharp * (head + spread * noise))
    return Pair(target, draft, agreed(spread), weights_read(draft) / weights_read(target))


def weights_read(model: Any) -> int:
    """Weights that a pass of one row reads: all of them but an embedding that is no head as well."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tied = embedding is head
    return sum(p.numel() for p in model.parameters()) - (0 if tied else embedding.numel())


def _model(sizes: PairSizes, layers: int, dtype: torch.dtype) -> Any:
    config = LlamaConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        initializer_range=0.06,  # three times the usual: so that a token follows from all before it
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    host: Any = LlamaForCausalLM(config)
    model = host.to(dtype).eval()
    model.generation_config.pad_token_id = 0
    return model


@torch.no_grad()
def _texts(target: Any, vocab: int, seed: int) -> Tensor:
    """Greedy texts of the target behind random prompts, ``(8, prompt + 48)``."""
    numbers = Numbers()
    prompts = torch.tensor([numbers(p.text)["input_ids"] for p in random_prompts(8, vocab, seed + 1)])
    return target.generate(prompts, hf_hybrid={}, max_new_tokens=48, do_sample=False)


@torch.no_grad()
def _hidden(model: Any, ids: Tensor) -> Tensor:
    """What the head reads in front of every written token, ``(tokens, hidden)``."""
    states = model.model(input_ids=ids, use_cache=False).last_hidden_state  # (texts, length, hidden)
    return states[:, PROMPT_TOKENS - 1 : -1].flatten(0, 1)


def _bisected(rising: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """Where ``rising`` is ``wanted``, between ``low`` and ``high``."""
    for _ in range(_STEPS):
        middle = (low + high) / 2 if low <= 0 else (low * high) ** 0.5
        low, high = (middle, high) if rising(middle) < wanted else (low, middle)
    return (low + high) / 2
