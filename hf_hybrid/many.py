"""``generate_many``: more prompts than fit into a batch. The place of a finished answer goes to the next prompt."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_hybrid.config import SETTINGS
from hf_hybrid.decoding import Answer
from hf_hybrid.models.host import CACHES
from hf_hybrid.routing import UnsupportedCallError, effective_value, host_arguments


def generate_many(
    model: Any,
    prompts: Iterable[Sequence[int] | Tensor],
    *,
    batch_size: int = 8,
    strategy: str | None = None,
    **kwargs: Any,
) -> Iterator[Answer]:
    """Answers to any number of prompts, each as soon as it is finished.

    Up to ``batch_size`` prompts are answered at the same time, in shared passes. An answer does not depend on the batch
    size, nor on what is answered beside it (up to rounding).

    Args:
        model: a causal model; it need not be enabled.
        prompts: token ids ``(length,)`` of each prompt, without padding; read as they are needed.
        batch_size: answers that are written at the same time.
        strategy: a key of ``hf_hybrid.config.SETTINGS``; unset, what ``generation_config.hf_hybrid`` names.
        **kwargs: settings of the strategy, and what ``generate()`` takes. A ``seed`` belongs to the first prompt, the
            number after it to the second, and so on.

    Returns:
        an iterator over ``Answer``, in the order in which they are finished; ``index`` is the place of the prompt.

    Raises:
        UnsupportedCallError: no strategy, or arguments that belong to a single batch.
    """
    if batch_size < 1:
        raise UnsupportedCallError(f"batch_size={batch_size}: must be 1 or more")
    for name in ("streamer", *CACHES, "inputs", "input_ids", "attention_mask"):
        if kwargs.get(name) is not None:
            raise UnsupportedCallError(f"generate_many() takes prompts, and no {name}; leave it out")
    queue = (_ids_of(prompt, number) for number, prompt in enumerate(prompts))
    first = list(itertools.islice(queue, batch_size))
    if not first:
        return iter(())
    width = max(map(len, first))
    padding = [width - len(prompt) for prompt in first]
    lines = zip(padding, first, strict=True)
    ids = torch.tensor([[0] * missing + prompt for missing, prompt in lines], device=model.device)  # (batch, width)
    mask = torch.tensor([[0] * missing + [1] * (width - missing) for missing in padding], device=model.device)
    plan = kwargs.pop("plan", None)
    arguments = host_arguments(model, {"input_ids": ids, "attention_mask": mask, **kwargs}, strategy, plan, queue)
    if "custom_generate" not in arguments:
        raise UnsupportedCallError(
            "generate_many() needs a strategy, and neither the call nor the checkpoint names one; "
            f"add strategy=, one of {', '.join(SETTINGS)}"
        )
    if (effective_value(model, arguments, "num_return_sequences") or 1) > 1:
        raise UnsupportedCallError("generate_many() writes one answer per prompt; repeat the prompt for more")
    return model.generate(**arguments)


def _ids_of(prompt: Sequence[int] | Tensor, number: int) -> list[int]:
    ids: Any = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
    if not isinstance(ids, list) or not ids or not all(isinstance(token, int) for token in ids):
        raise UnsupportedCallError(f"prompt {number} must hold token ids, at least one, in one dimension")
    return ids
