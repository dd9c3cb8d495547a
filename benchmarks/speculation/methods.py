"""The ways of decoding that the speculative bench compares: the host's, ours, and those of other packages.

Other packages are optional. Each is driven through its own documented calls, with drafts of up to eight tokens where it
has such a setting, and gets the end token and the limit explicitly, since not all of them read the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from hf_hybrid.decoding import GenerationReport
from hf_hybrid.decoding.drafters.memory import SuffixMemory
from hf_hybrid.decoding.drafters.suffix import SuffixDrafter
from hf_hybrid.models.host import end_ids

DRAFT_LENGTH = 8
FLASHSPEC_LENGTH = 6  # its own default for n-grams


@dataclass(frozen=True)
class Written:
    """One answer.

    Attributes:
        tokens: new ones, up to the end token, it included. accepted: mean of accepted tokens, over the passes
        that checked some. share_off: of the passes, in which drafting was switched off. None: the method does not say.
    """

    tokens: list[int]
    accepted: float | None = None
    share_off: float | None = None


Inputs = Mapping[str, Tensor]
"""``input_ids`` and ``attention_mask``, both ``(batch, prompt)``, padded on the left."""
Writer = Callable[[Inputs, int], list[Written]]
"""Answers every sequence, with at most that many new tokens."""


@dataclass(frozen=True)
class Method:
    """One way of decoding.

    Attributes:
        name: unique. build: a ``Writer`` for an enabled model, made anew for every category, so that nothing is
        remembered across them. package: what must be installed for it, None: nothing. module: its module.
        batched: True: also measured in batches of unequal prompts.
        memory: True: it keeps a memory across calls, and the category is answered once more with it.
    """

    name: str
    build: Callable[[Any], Writer]
    package: str | None = None
    module: str | None = None
    batched: bool = False
    memory: bool = False

    @property
    def install(self) -> str | None:
        """The command that installs what is missing; None: nothing is."""
        if self.module is None or find_spec(self.module) is not None:
            return None
        return f"pip install --no-deps {self.package}"


def _up_to_end(tokens: Sequence[int], ends: AbstractSet[int]) -> list[int]:
    stop = next((index + 1 for index, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[:stop])


def generated(generate: Callable[..., Any], ends: AbstractSet[int], **options: Any) -> Writer:
    """A writer that calls a function with the arguments of the host's ``generate``."""

    def write(inputs: Inputs, limit: int) -> list[Written]:
        output = generate(**inputs, max_new_tokens=limit, do_sample=False, return_dict_in_generate=True, **options)
        answers = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()  # (batch, new)
        reports = getattr(output, "report", None) or [None] * len(answers)
        return [_written(_up_to_end(answer, ends), report) for answer, report in zip(answers, reports, strict=True)]

    return write


def _written(tokens: list[int], report: GenerationReport | None) -> Written:
    if report is None:
        return Written(tokens)
    return Written(tokens, _mean(report.accepted_per_round), report.drafting.share_off if report.drafting else None)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if len(values) else None


def _plain(model: Any) -> Writer:
    return generated(model.generate, end_ids(model), hf_hybrid={})


def _stock_lookup(model: Any) -> Writer:
    return generated(model.generate, end_ids(model), hf_hybrid={}, prompt_lookup_num_tokens=DRAFT_LENGTH)


def _autoregressive(model: Any) -> Writer:
    return generated(model.generate, end_ids(model), strategy="autoregressive")


def _speculative(model: Any) -> Writer:
    return generated(model.generate, end_ids(model), strategy="speculative", drafter="suffix")


def _remembering(model: Any) -> Writer:
    drafter = SuffixDrafter(memory=SuffixMemory())
    return generated(model.generate, end_ids(model), strategy="speculative", drafter=drafter)


def _economize(model: Any) -> Any:
    package = import_module("economize")
    lookup = import_module("economize.techniques.lookup")
    settings = package.DecodeConfig(cycle_length=DRAFT_LENGTH)
    return package.apply(model, lookup.LookupConfig(max_ngram=3), decoding=settings)


def _economize_generate(model: Any) -> Writer:
    wrapped = _economize(model)

    def write(inputs: Inputs, limit: int) -> list[Written]:
        output = wrapped.generate(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=limit, do_sample=False
        )
        new = output[0, inputs["input_ids"].shape[1] :].tolist()  # (new,)
        return [Written(_up_to_end(new, end_ids(model)))]

    return write


def _economize_decode(model: Any) -> Writer:
    wrapped = _economize(model)

    def write(inputs: Inputs, limit: int) -> list[Written]:
        ends = end_ids(model)
        result = wrapped.decode(inputs["input_ids"][0], limit, stop=sorted(ends) or None)
        return [Written(_up_to_end(result.tokens.tolist(), ends), result.mean_accepted)]

    return write


def _flashspec(model: Any) -> Writer:
    package, engine = import_module("flashspec"), import_module("flashspec.engine")
    settings = package.FlashSpecConfig(
        device=str(model.device),
        drafter_strategy="bandit",
        bandit=package.BanditConfig(n_arms=1),
        sampling=package.SamplingConfig(temperature=0.0, gamma=FLASHSPEC_LENGTH),
    )
    target = engine.TargetModel("target", model.device, model.dtype, model=model)
    decoder = package.SpeculativeEngine(settings, [engine.NgramDrafter()], target)

    def write(inputs: Inputs, limit: int) -> list[Written]:
        ends = end_ids(model)
        result = decoder.generate(inputs["input_ids"], max_new_tokens=limit, eos_token_ids=sorted(ends))
        new = [token for token in result.output_ids[0].tolist() if token >= 0]  # padded with -1
        return [Written(_up_to_end(new, ends)[:limit], _mean([step.accepted for step in result.arm_steps]))]

    return write


PLAIN, STOCK, ASSISTED = "plain", "stock_lookup", "assisted"

METHODS: tuple[Method, ...] = (
    Method(PLAIN, _plain, batched=True),
    Method(STOCK, _stock_lookup),
    Method("economize_generate", _economize_generate, "economize", "economize"),
    Method("economize_decode", _economize_decode, "economize", "economize"),
    Method("flashspec", _flashspec, "flashspec", "flashspec"),
    Method("autoregressive", _autoregressive),
    Method("speculative", _speculative, batched=True),
    Method("speculative_memory", _remembering, memory=True),
)
"""The methods; ratios are to the first."""


def padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> Inputs:
    """Prompts as a batch, padded on the left."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {
        "input_ids": torch.tensor(ids, device=device),  # (batch, width)
        "attention_mask": torch.tensor(mask, device=device),  # (batch, width)
    }
