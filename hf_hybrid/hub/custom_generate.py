"""The entry of a repository's ``custom_generate/``: ``generate()`` for models of any process.

transformers loads it with ``from_pretrained(name, trust_remote_code=True)`` and sets it as the model's
``generate()``, or calls it once with ``generate(custom_generate=name, trust_remote_code=True)``. Where hf_hybrid is
installed its code runs; elsewhere the copies beside this file (``hf_hybrid.portable`` makes them).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

HF_HYBRID = True
"""Says that this ``generate()`` is hf_hybrid's: ``enable()`` removes it, and writes it anew on saving."""

STRATEGY: str | None = None
"""The strategy of calls that name none; None: the one in ``generation_config.hf_hybrid``, else the host decodes."""

_OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "repo_type", "revision", "token")
"""What ``generate(custom_generate=name, ...)`` may say about where the repository is; not used after loading it."""


def generate(
    inputs: Any = None,
    generation_config: Any = None,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    prefix_allowed_tokens_fn: Any = None,
    synced_gpus: bool | None = None,
    assistant_model: Any = None,
    streamer: Any = None,
    negative_prompt_ids: Any = None,
    negative_prompt_attention_mask: Any = None,
    custom_generate: Any = None,
    *,
    model: Any,  # by name alone: the host binds it, and then ids come first
    strategy: str | None = None,
    plan: Any = None,
    **kwargs: Any,
) -> Any:
    """Write answers: as ``model.generate()`` does, or with a strategy.

    Args:
        inputs: prompt ids ``(batch, length)``, left-padded; so are the other arguments that transformers knows.
        strategy: "autoregressive", "block_diffusion", "planned_diffusion" or "speculative"; unset, what the repository
            or ``generation_config.hf_hybrid`` names.
        plan: for ``planned_diffusion``, plans to carry out instead of writing one, such as those of a report.
        **kwargs: settings of the strategy, and whatever transformers takes.

    Returns:
        Ids ``(batch, prompt + new tokens)``, or a ``ModelOutput`` with ``return_dict_in_generate=True``.

    Raises:
        ValueError: an unknown strategy or setting, or arguments that do not go together; the message says what to do.
    """
    given = {
        "inputs": inputs,
        "generation_config": generation_config,
        "logits_processor": logits_processor,
        "stopping_criteria": stopping_criteria,
        "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
        "synced_gpus": synced_gpus,
        "assistant_model": assistant_model,
        "streamer": streamer,
        "negative_prompt_ids": negative_prompt_ids,
        "negative_prompt_attention_mask": negative_prompt_attention_mask,
        "custom_generate": custom_generate,
    }
    arguments = {name: value for name, value in given.items() if value is not None}
    arguments |= {name: value for name, value in kwargs.items() if name not in _OF_THE_HUB}
    if custom_generate is None and strategy is None:
        strategy = STRATEGY
    # The class's own generate(): on the model itself it may be this function.
    return type(model).generate(model, **_host_arguments()(model, arguments, strategy, plan))


def _host_arguments() -> Callable[..., dict[str, Any]]:
    """The router of the installed package, or else of the copy."""
    try:
        return import_module("hf_hybrid.routing").host_arguments
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "hf_hybrid":  # installed, and something that it needs is missing
            raise
    from hf_hybrid.models.release import release_note

    try:
        from hf_hybrid.routing import host_arguments
    except ImportError as error:  # a name that a newer transformers has no longer
        raise ImportError(f"{error}{release_note()}", name=error.name) from error
    return host_arguments
