"""``generate_many``: answers more prompts than fit into a batch; a finished answer makes room for the next prompt."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_hybrid.config import SETTINGS
from hf_hybrid.decoding import Answer, GenerationReport, Queue, prompt_fault
from hf_hybrid.models.host import CACHES
from hf_hybrid.routing import UnsupportedCallError, effective_value, host_arguments
from hf_hybrid.stored import check_call


def generate_many(
    model: Any,
    prompts: Iterable[Sequence[int] | Tensor],
    *,
    batch_size: int = 8,
    strategy: str | None = None,
    **kwargs: Any,
) -> Iterator[Answer]:
    """Answer any number of prompts; gives each answer as soon as it is finished.

    Up to ``batch_size`` prompts are answered at the same time, in shared passes. An answer does not depend on the batch
    size, nor on what is answered beside it (up to rounding). A prompt that cannot be answered (empty, too long, no
    token ids of this model) is an ``Answer`` with ``error``, and the others go on.

    Args:
        model: a causal model; it need not be enabled.
        prompts: token ids ``(length,)`` of each prompt, without padding; read as they are needed.
        batch_size: answers that are written at the same time.
        strategy: a key of ``hf_hybrid.config.SETTINGS``; unset, what ``generation_config.hf_hybrid`` names.
        **kwargs: settings of the strategy, and what ``generate()`` takes. A ``seed`` belongs to the first prompt, the
            number after it to the second, and so on. ``max_length`` and ``min_length`` count each prompt with its own
            answer.

    Returns:
        an iterator over ``Answer``, in the order in which they are finished; ``index`` is that of the prompt.

    Raises:
        UnsupportedCallError: no strategy, or arguments that belong to a single batch.
    """
    if batch_size < 1:
        raise UnsupportedCallError(f"batch_size={batch_size}: must be 1 or more")
    for name in ("streamer", *CACHES, "inputs", "input_ids", "attention_mask", "custom_generate"):
        if kwargs.get(name) is not None:
            raise UnsupportedCallError(f"generate_many() takes prompts, and no {name}; leave it out")
    check_call(model, kwargs)
    longest, shortest = (_of_both(model, kwargs, bound) for bound in ("max", "min"))
    failed: list[tuple[int, str]] = []
    queue = _good(model, prompts, longest, failed)
    first = list(itertools.islice(queue, batch_size))
    numbers, batch = [number for number, _ in first], [ids for _, ids in first] or [[0]]
    width = max(map(len, batch))
    padding = [width - len(prompt) for prompt in batch]
    padded = [[0] * missing + prompt for missing, prompt in zip(padding, batch, strict=True)]
    ids = torch.tensor(padded, device=model.device)  # (batch, width)
    mask = torch.tensor([[0] * missing + [1] * (width - missing) for missing in padding], device=model.device)
    plan = kwargs.pop("plan", None)
    together = Queue(numbers, queue, longest, shortest)
    arguments = host_arguments(model, {"input_ids": ids, "attention_mask": mask, **kwargs}, strategy, plan, together)
    if "custom_generate" not in arguments:
        raise UnsupportedCallError(
            "generate_many() needs a strategy, and neither the call nor the checkpoint names one; "
            f"add strategy=, one of {', '.join(SETTINGS)}"
        )
    if (effective_value(model, arguments, "num_return_sequences") or 1) > 1:
        raise UnsupportedCallError("generate_many() writes one answer per prompt; repeat the prompt for more")
    answers = model.generate(**arguments) if first else iter(())
    return _with_failed(answers, failed, arguments["custom_generate"].keywords["call"].strategy)


def _with_failed(answers: Iterator[Answer], failed: list[tuple[int, str]], strategy: str) -> Iterator[Answer]:
    """``answers``, and one with an error for every prompt that failed, as soon as that is known."""
    for answer in itertools.chain([None], answers, [None]):
        while failed:
            number, fault = failed.pop(0)
            yield Answer(number, [], GenerationReport(strategy), fault)
        if answer is not None:
            yield answer


def _good(
    model: Any, prompts: Iterable[Any], max_length: int | None, failed: list[tuple[int, str]]
) -> Iterator[tuple[int, list[int]]]:
    """Number and ids of every prompt that can be answered; the others go to ``failed`` with the reason."""
    for number, prompt in enumerate(prompts):
        ids = _ids_of(prompt)
        fault = prompt_fault(model, ids, max_length) if ids else "a prompt must hold token ids, at least one, in a row"
        if fault:
            failed.append((number, fault))
        else:
            yield number, ids


def _ids_of(prompt: Any) -> list[int]:
    """The token ids of a prompt; empty when it holds anything else."""
    try:
        ids = prompt.tolist() if isinstance(prompt, Tensor) else list(prompt)
        return [] if any(isinstance(token, bool) for token in ids) else [operator.index(token) for token in ids]
    except TypeError:
        return []


def _of_both(model: Any, arguments: dict[str, Any], bound: str) -> int | None:
    """``max_length`` or ``min_length``; None when it is unset, or new tokens are counted, which the host prefers."""
    if effective_value(model, arguments, f"{bound}_new_tokens") is not None:
        return None
    return effective_value(model, arguments, f"{bound}_length")
