"""Turns a call of ``generate()`` with ``strategy=`` into arguments of the host's own ``generate()``.

Every entry point uses it: the mixin, ``install()``, ``generate_many``, and the ``custom_generate/`` of a repository,
which brings a copy of this module (``hf_hybrid.portable``).
"""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    StoppingCriteriaList,
    StopStringCriteria,
)

from hf_hybrid.config import SETTING_NAMES, SETTINGS, Settings, merged, settings_for, stored_strategy
from hf_hybrid.core.plan import Plan
from hf_hybrid.core.tokens import ControlTokens
from hf_hybrid.decoding import Call, ModelDrafter, Queue, decode
from hf_hybrid.decoding.images import reads_images
from hf_hybrid.decoding.prompts import check_keywords, foreign_keywords
from hf_hybrid.models.host import CACHE, CACHES, forward_parameters
from hf_hybrid.models.seams import check_seams
from hf_hybrid.models.vocabulary import control_tokens, noise_tokens
from hf_hybrid.stored import check_call

_Host: Any = GenerationMixin  # its generate() types ``self`` by a protocol that it does not meet itself


def _is_set(value: object) -> bool:
    return value is not None


_REFUSED: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups"), lambda value: _is_set(value) and value > 1),
    **dict.fromkeys(("assistant_model", "assistant_tokenizer", "assistant_early_exit"), _is_set),
    **dict.fromkeys(("prompt_lookup_num_tokens", "dola_layers", "constraints", "force_words_ids"), _is_set),
    **dict.fromkeys(("penalty_alpha", "use_mtp", "token_healing"), bool),
}
"""Arguments of the host that choose another way of decoding -> True: the value switches it on."""


class UnsupportedCallError(ValueError):
    """Arguments of ``generate()`` that do not go together with a strategy; the message says what to change."""


_routed: ContextVar[Any] = ContextVar("hf_hybrid_routed", default=None)


@contextmanager
def routed(model: Any) -> Iterator[None]:
    """Mark a call of ``model`` as routed while the host carries it out.

    The host's ``generate()`` may be the one that ``install()`` put there, which would route the call again.
    """
    token = _routed.set(model)
    try:
        yield
    finally:
        _routed.reset(token)


def is_routed(model: Any) -> bool:
    """True: a call of ``model`` went through the router and is being carried out by the host."""
    return _routed.get() is model


def host_arguments(
    model: Any,
    arguments: Mapping[str, Any],
    strategy: str | None,
    plan: Plan | Sequence[Plan] | None,
    queue: Queue | None = None,
) -> dict[str, Any]:
    """Make the arguments of the host's ``generate`` that carry out this call (of a queue: its first batch)."""
    arguments = dict(arguments)
    if arguments.get("custom_generate") is not None:
        if strategy is not None or plan is not None:
            raise UnsupportedCallError("custom_generate= and strategy= are two ways of decoding; leave one out")
        return arguments
    # A drafting model inside the host's assisted decoding: a strategy of its own would run inside every round.
    if effective_value(model, arguments, "is_assistant"):
        return arguments
    stored = _stored(model, arguments)
    arguments.pop("hf_hybrid", None)
    name = strategy if strategy is not None else stored_strategy(stored)
    settings = {key: arguments.pop(key) for key in SETTING_NAMES & arguments.keys()}
    _check_bare(arguments, name)
    # The name of a drafter is a setting; an object belongs to this call alone.
    partner = None if isinstance(settings.get("drafter"), str) else settings.pop("drafter", None)
    if name is None:
        if settings or plan is not None or partner is not None:
            given = {"plan": plan, "drafter": partner}
            named = ", ".join([*sorted(settings), *(key for key, value in given.items() if value is not None)])
            raise UnsupportedCallError(
                f"{named}: settings of a strategy, but the call names none; add strategy=, one of {', '.join(SETTINGS)}"
            )
        return arguments
    cache = _take_cache(arguments)
    check_seams()
    settings |= _misspelt(model, arguments)
    checked = settings_for(name, settings, stored)
    check_call(model, arguments)
    if plan is not None and not checked.takes_plan:
        raise UnsupportedCallError(f"plan= needs {_those('takes_plan')}, not {name!r}")
    runner = arguments.pop("runner", None)
    drafter = _take_drafter(arguments, checked, name, partner, "drafter" in settings)
    _refuse(model, arguments, checked, name)
    check_positions(arguments, cache)

    tokenizer = arguments.pop("tokenizer", None)
    _take_stop_strings(model, arguments, tokenizer)
    # The loop keeps its own cache; a static one of the host would be sized by max_new_tokens, and all later ones too.
    _switch_off(model, arguments, "cache_implementation")
    # The host drops streamer, tokenizer and synced_gpus on the way to a callable, so they are bound; it streams the
    # prompt all the same.
    call = Call(
        strategy=name,
        settings=checked,
        streamer=arguments.get("streamer"),
        tokenizer=tokenizer,
        plan=plan,
        control=_control(model, checked),
        queue=queue,
        drafter=drafter,
        cache=cache,
        synced_gpus=arguments.get("synced_gpus"),
        runner=runner,
    )
    arguments["custom_generate"] = functools.partial(decode, call=call)
    return arguments


def named_strategy(model: Any, arguments: Mapping[str, Any]) -> str | None:
    """The strategy of a call of ``generate()``; None: the host decodes."""
    named = arguments.get("strategy")
    return named if named is not None else stored_strategy(_stored(model, arguments))


def _control(model: Any, settings: Settings) -> ControlTokens | None:
    """What the strategy needs of the vocabulary; None: nothing, or the model does not have it."""
    if settings.needs == "grammar":
        return control_tokens(model)
    noise = noise_tokens(model) if settings.needs == "noise" else None
    return None if noise is None else ControlTokens(noise)


def effective_value(model: Any, arguments: Mapping[str, Any], name: str) -> Any:
    """The value that the host would use for ``name``: of the call, its config, the model's config; None when unset."""
    if name in arguments:
        return arguments[name]
    configs = (arguments.get("generation_config"), getattr(model, "generation_config", None))
    return next((v for c in configs if (v := getattr(c, name, None)) is not None), None)


def _stored(model: Any, arguments: Mapping[str, Any]) -> Any:
    """``hf_hybrid`` of the call and its config, merged with that of the model's config; strategy and settings may also
    be fields of a config of their own."""
    own = getattr(model, "generation_config", None)
    config = arguments.get("generation_config")
    given = _with_bare(config, arguments.get("hf_hybrid", getattr(config, "hf_hybrid", None)))
    return merged(given, _with_bare(own, getattr(own, "hf_hybrid", None)))


def _with_bare(config: Any, stored: Any) -> Any:
    """``stored`` merged with settings that are fields of the config itself.

    ``GenerationConfig(strategy=...)`` is an obvious thing to write, and a trainer puts its ``generation_kwargs`` there.
    """
    bare = {name: value for name in ("strategy", *SETTING_NAMES) if (value := getattr(config, name, None)) is not None}
    return merged(bare, stored) if bare else stored


def _check_bare(arguments: Mapping[str, Any], strategy: str | None) -> None:
    """Refuse settings in the call's config that would be ignored."""
    config = arguments.get("generation_config")
    bare = sorted(name for name in SETTING_NAMES if getattr(config, name, None) is not None)
    known = {f.name for f in fields(SETTINGS[strategy])} if strategy in SETTINGS else set()
    lost = [name for name in bare if name not in known]
    if lost:
        which = f"strategy {strategy!r} does not have it" if strategy else "no strategy is named; add strategy="
        raise UnsupportedCallError(f"generation_config.{lost[0]} is a setting of a strategy, and {which}")


def _take_cache(arguments: dict[str, Any]) -> Any:
    """The caller's cache, under the name that this release of the host gives it; None: there is none."""
    given = {name: arguments.pop(name) for name in CACHES if name in arguments}
    caches = [cache for cache in given.values() if cache is not None]
    if len(caches) > 1:
        raise UnsupportedCallError(f"{' and '.join(given)} are two names of one argument; leave one out")
    if caches:
        arguments[CACHE] = caches[0]
    return next(iter(caches), None)


def check_positions(arguments: dict[str, Any], cache: Any) -> None:
    """Drop ``position_ids`` that equal the host's own, and refuse others."""
    given = arguments.pop("position_ids", None)
    if given is None:
        return
    mask = arguments.get("attention_mask")
    if mask is None:
        prompts = (arguments.get(name) for name in ("inputs_embeds", "input_ids", "inputs"))
        length = next(prompt.shape[1] for prompt in prompts if prompt is not None)
        length += int(cache.get_seq_length()) if cache is not None and length == given.shape[-1] else 0
        mask = torch.ones((1, length), dtype=torch.int64, device=given.device)
    counted = (mask.to(given.device).cumsum(dim=-1) - 1)[:, -given.shape[-1] :]
    real = mask.to(given.device)[:, -given.shape[-1] :] != 0
    if given.ndim != 2 or bool(((given != counted) & real).any()):
        raise UnsupportedCallError(
            "position_ids that do not count the tokens one by one are not available with a strategy; "
            "leave them out, or leave out strategy="
        )


def _those(fact: str) -> str:
    """Text for messages: the strategies with that property."""
    return " or ".join(f"strategy={name!r}" for name, settings in SETTINGS.items() if getattr(settings, fact))


def _take_drafter(arguments: dict[str, Any], settings: Settings, strategy: str, partner: Any, named: bool) -> Any:
    """The drafter of the call: ``drafter=`` or its other name, ``assistant_model=``."""
    if not settings.takes_drafter:
        if partner is not None:
            raise UnsupportedCallError(f"drafter= needs {_those('takes_drafter')}, not {strategy!r}")
        return None
    assistant, tokenizer = (arguments.pop(key, None) for key in ("assistant_model", "assistant_tokenizer"))
    if assistant is not None and (partner is not None or named):
        raise UnsupportedCallError("assistant_model= and drafter= are two drafters; leave one out")
    if assistant is not None and tokenizer is not None:
        return ModelDrafter(assistant, tokenizer=tokenizer, target_tokenizer=arguments.get("tokenizer"))
    return assistant if partner is None else partner


def _switch_off(model: Any, arguments: dict[str, Any], name: str) -> None:
    """Make the effective value of ``name`` None."""
    if effective_value(model, arguments, name) is None:
        return
    config = arguments.get("generation_config")
    if config is None or name in arguments or getattr(model.generation_config, name, None) is not None:
        arguments[name] = None
    else:  # The host warns when a config comes together with other arguments.
        arguments["generation_config"] = config = copy.deepcopy(config)
        setattr(config, name, None)


def _take_stop_strings(model: Any, arguments: dict[str, Any], tokenizer: Any) -> None:
    """Turn ``stop_strings`` into a stopping criterion here: the host loses the tokenizer and then asks for it."""
    strings = effective_value(model, arguments, "stop_strings")
    if strings is None:
        return
    if tokenizer is None:
        raise UnsupportedCallError("stop_strings need the tokenizer: generate(..., tokenizer=tokenizer)")
    criterion = StopStringCriteria(tokenizer=tokenizer, stop_strings=strings)
    arguments["stopping_criteria"] = StoppingCriteriaList([*(arguments.get("stopping_criteria") or ()), criterion])
    _switch_off(model, arguments, "stop_strings")


def _refuse(model: Any, arguments: Mapping[str, Any], settings: Settings, strategy: str) -> None:
    """Raise for arguments that do not go together with a strategy."""
    for name, switched_on in _REFUSED.items():
        value = effective_value(model, arguments, name)
        if switched_on(value):
            shown = "" if isinstance(value, GenerationMixin) or name == "assistant_tokenizer" else f"={value!r}"
            raise UnsupportedCallError(
                f"{name}{shown} chooses another way of decoding than strategy={strategy!r}; leave out one of the two"
            )
    if effective_value(model, arguments, "cache_implementation") == "paged":
        raise UnsupportedCallError(
            f"cache_implementation='paged' excludes strategy={strategy!r}; leave out one of the two"
        )
    if arguments.get("inputs_embeds") is not None and not settings.one_text:
        raise UnsupportedCallError(
            f"strategy={strategy!r} reads token ids, not inputs_embeds; pass input_ids, or use {_those('one_text')}"
        )
    if model.config.is_encoder_decoder:
        raise UnsupportedCallError(
            f"strategy={strategy!r} needs a decoder-only model, and {type(model).__name__} is an encoder-decoder"
        )
    # Here under the names of the caller: the host reads images before it calls the loop.
    own = forward_parameters(model).keys() - _known_to_generate() - {"input_ids"}
    given = {name: value for name, value in arguments.items() if name in own}
    if reads_images(model) and foreign_keywords(given):
        if not settings.one_text:
            raise UnsupportedCallError(f"strategy={strategy!r} reads token ids, no images; use {_those('one_text')}")
        return
    check_keywords(model, given)


def _known_to_generate() -> set[str]:
    """Names that the host's ``generate()`` takes itself."""
    return {*inspect.signature(_Host.generate).parameters, *vars(GenerationConfig()), "trust_remote_code"}


def _misspelt(model: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that the host does not know and that look like a setting, for ``settings_for`` to list the choices."""
    known = _known_to_generate()
    for method in (model.prepare_inputs_for_generation, model.forward):
        known.update(inspect.signature(method).parameters)
    return {
        name: value
        for name, value in arguments.items()
        if name not in known and difflib.get_close_matches(name, SETTING_NAMES, n=1, cutoff=0.75)
    }
