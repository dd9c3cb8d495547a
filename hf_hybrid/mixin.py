"""``generate(strategy=...)`` on existing model classes: a mixin, ``enable()`` for a model, ``install()`` for a process.

Every route prepares one thing, the arguments of a call to the host's own ``generate``: as they came when no strategy is
named, else with ``custom_generate=`` our decoding loop. The host then prepares inputs, processors and stopping as ever.
"""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)

from hf_hybrid.config import SETTING_NAMES, SETTINGS, merged, settings_for, stored_strategy
from hf_hybrid.core.plan import Plan
from hf_hybrid.decoding import Call, ModelDrafter, decode
from hf_hybrid.models.secure import secure_known
from hf_hybrid.models.vocabulary import control_tokens
from hf_hybrid.stored import check_call, check_file

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer
    from transformers.generation.utils import GenerateOutput

ModelT = TypeVar("ModelT")
_Host: Any = GenerationMixin  # its generate() types ``self`` by a protocol that the mixin alone does not meet


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


class HybridGenerationMixin(GenerationMixin):
    """``generate()`` that also understands ``strategy=``; put it before the model's class, or use ``enable()``."""

    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
        synced_gpus: bool | None = None,
        assistant_model: PreTrainedModel | None = None,
        streamer: BaseStreamer | None = None,
        negative_prompt_ids: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        custom_generate: str | Callable[..., Any] | None = None,
        *,
        strategy: str | None = None,
        plan: Plan | Sequence[Plan] | None = None,
        **kwargs: Any,
    ) -> GenerateOutput | Tensor:
        """The host's ``generate()``, and with a strategy ours.

        Args:
            inputs: prompt ids ``(batch, length)``, left-padded; so are the other arguments that the host knows.
            strategy: a key of ``hf_hybrid.config.SETTINGS``; unset, what ``generation_config.hf_hybrid`` names, of the
                call's config or else of the model's; settings of the second hold where the first says nothing. When
                neither names a strategy, the host decodes (``GenerationConfig(hf_hybrid={})`` asks for that on a
                checkpoint that names one).
            plan: for ``planned_diffusion``, plans to carry out instead of writing one.
            **kwargs: settings of the strategy (``hf_hybrid.config``), and whatever the host takes. The strategies keep
                a cache of their own, so that ``cache_implementation`` does not matter to them.

        Returns:
            Ids ``(batch, prompt + new tokens)``, or a ``ModelOutput`` with ``return_dict_in_generate=True``.

        Raises:
            UnsupportedCallError: arguments that choose another way of decoding, such as ``num_beams=2``.
            hf_hybrid.config.SettingsError: an unknown strategy or setting, or a value out of range.
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
        # A host class with a generate() of its own may not know all of these names: pass what was given.
        arguments = {name: value for name, value in given.items() if value is not None} | kwargs
        host: Any = super()
        return host.generate(**host_arguments(self, arguments, strategy, plan))

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """The host's ``save_pretrained``, with ``generation_config.hf_hybrid`` in a form that survives loading."""
        _keep_custom_fields(self)
        host: Any = super()
        host.save_pretrained(*args, **kwargs)


def enable(model: ModelT) -> ModelT:
    """Teach a loaded causal language model ``generate(strategy=...)``, in place; the same object comes back.

    Its class becomes a subclass of its class, so ``isinstance`` stays true; it saves, copies and pickles as before.
    A PEFT model is reached through ``get_base_model()``. A second call changes nothing.

    Raises:
        TypeError: not a decoder-only model with ``generate()``.
        UnsupportedCallError: the repository brought a ``custom_generate/`` of its own that is not ours.
    """
    host = _causal_model(model)
    _remove_own_generate(host)
    if not isinstance(host, HybridGenerationMixin):
        host.__class__ = _hybrid_type(type(host))
    _keep_custom_fields(host)
    return model


def disable(model: ModelT) -> ModelT:
    """Undo ``enable()``, in place; the same object comes back."""
    host = _causal_model(model)
    original = getattr(type(host), "_hf_hybrid_host", None)
    if original is not None:
        host.__class__ = original
    return model


_PLACE = frozenset({"cache_dir", "proxies", "local_files_only", "token", "revision", "subfolder"})
"""Arguments of ``from_pretrained`` that say where a file is looked for."""


class AutoHybridModelForCausalLM:
    """``AutoModelForCausalLM``, and then ``enable()``. Use the class methods; there are no instances."""

    def __init__(self) -> None:
        raise TypeError("use AutoHybridModelForCausalLM.from_pretrained(name) or .from_config(config)")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """``AutoModelForCausalLM.from_pretrained`` with the same arguments; the model is enabled.

        Raises:
            hf_hybrid.config.SettingsError: a ``generation_config.json`` that the host could not use; the message names
                the field. With ``generation_config=`` the file is not read.
        """
        if kwargs.get("generation_config") is None:
            check_file(pretrained_model_name_or_path, **{key: kwargs[key] for key in _PLACE & kwargs.keys()})
        loaded = AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        enable(loaded[0] if isinstance(loaded, tuple) else loaded)  # a tuple: output_loading_info=True
        return loaded

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Any:
        """``AutoModelForCausalLM.from_config`` with the same arguments; the model is enabled, its weights random."""
        return enable(AutoModelForCausalLM.from_config(config, **kwargs))


_Tokenizer: Any = PreTrainedTokenizerBase
_installed: tuple[tuple[Any, Any], tuple[Any, Any]] | None = None
"""(the host's, ours) of ``generate`` and of the tokenizers' ``from_pretrained`` while ``install()`` is in force."""


def install() -> None:
    """Let every model of this process understand ``strategy=``, also those that others load (pipelines by name, serve).

    A call without a strategy goes to the host. Tokenizers that know the tags of a plan are loaded secured
    (``hf_hybrid.secure``). Idempotent; ``uninstall()`` undoes it.
    """
    global _installed
    if _installed is not None:
        return
    original = _Host.generate
    names = tuple(inspect.signature(original).parameters)[1:]

    @functools.wraps(original)
    def generate(
        self: Any, *args: Any, strategy: str | None = None, plan: Plan | Sequence[Plan] | None = None, **kwargs: Any
    ) -> Any:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        return original(self, **host_arguments(self, arguments, strategy, plan))

    load = vars(_Tokenizer)["from_pretrained"]

    @functools.wraps(load.__func__)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return secure_known(load.__func__(cls, *args, **kwargs))

    secured = classmethod(from_pretrained)
    _installed = ((original, generate), (load, secured))
    _Host.generate, _Tokenizer.from_pretrained = generate, secured


def uninstall() -> None:
    """Undo ``install()``; without one nothing happens.

    Raises:
        RuntimeError: another library replaced one of the two methods later; undo that first.
    """
    global _installed
    if _installed is None:
        return
    (generate, ours), (load, secured) = _installed
    for owner, name, wrapper in ((_Host, "generate", ours), (_Tokenizer, "from_pretrained", secured)):
        if vars(owner)[name] is not wrapper:
            raise RuntimeError(f"{owner.__name__}.{name} was replaced after install(); undo that before uninstall()")
    _Host.generate, _Tokenizer.from_pretrained = generate, load
    _installed = None


def host_arguments(
    model: Any,
    arguments: Mapping[str, Any],
    strategy: str | None,
    plan: Plan | Sequence[Plan] | None,
    queue: Iterator[Sequence[int]] | None = None,
) -> dict[str, Any]:
    """The arguments of the host's ``generate`` that carry out this call; the prompts of ``queue`` follow it."""
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
    # A name of a drafter is a setting, an object is a partner of this call.
    partner = None if isinstance(settings.get("drafter"), str) else settings.pop("drafter", None)
    if name is None:
        if settings or plan is not None or partner is not None:
            given = {"plan": plan, "drafter": partner}
            named = ", ".join([*sorted(settings), *(key for key, value in given.items() if value is not None)])
            raise UnsupportedCallError(
                f"{named}: settings of a strategy, but the call names none; add strategy=, one of {', '.join(SETTINGS)}"
            )
        return arguments
    settings |= _misspelt(model, arguments)
    checked = settings_for(name, settings, stored)
    check_call(model, arguments)
    if plan is not None and name != "planned_diffusion":
        raise UnsupportedCallError(f"plan= needs strategy='planned_diffusion', not {name!r}")
    drafter = _take_drafter(arguments, name, partner, "drafter" in settings)
    _refuse(model, arguments, name)

    tokenizer = arguments.pop("tokenizer", None)
    _take_stop_strings(model, arguments, tokenizer)
    # The loop keeps its own cache; a static one of the host would be sized by max_new_tokens, and all later ones too.
    _switch_off(model, arguments, "cache_implementation")
    # The host drops streamer and tokenizer on the way to a callable, so they are bound; it still streams the prompt.
    call = Call(
        strategy=name,
        settings=checked,
        streamer=arguments.get("streamer"),
        tokenizer=tokenizer,
        plan=plan,
        control=control_tokens(model),
        queue=queue,
        drafter=drafter,
    )
    arguments["custom_generate"] = functools.partial(decode, call=call)
    return arguments


def effective_value(model: Any, arguments: Mapping[str, Any], name: str) -> Any:
    """The value that the host would use for ``name``: of the call, its config, the model's config; None when unset."""
    if name in arguments:
        return arguments[name]
    configs = (arguments.get("generation_config"), getattr(model, "generation_config", None))
    return next((v for c in configs if (v := getattr(c, name, None)) is not None), None)


def _stored(model: Any, arguments: Mapping[str, Any]) -> Any:
    """``hf_hybrid`` of the call or of its config, on top of what the model's config says."""
    own = getattr(getattr(model, "generation_config", None), "hf_hybrid", None)
    return merged(effective_value(model, arguments, "hf_hybrid"), own)


def _take_drafter(arguments: dict[str, Any], strategy: str, partner: Any, named: bool) -> Any:
    """The drafter of the call: ``drafter=`` or, for ``speculative``, its other name ``assistant_model=``."""
    if strategy != "speculative":
        if partner is not None:
            raise UnsupportedCallError(f"drafter= needs strategy='speculative', not {strategy!r}")
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


def _refuse(model: Any, arguments: Mapping[str, Any], strategy: str) -> None:
    """Raise for whatever does not go together with a strategy."""
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
    if arguments.get("inputs_embeds") is not None:
        raise UnsupportedCallError(f"strategy={strategy!r} reads token ids, not inputs_embeds; pass input_ids")
    if model.config.is_encoder_decoder:
        raise UnsupportedCallError(
            f"strategy={strategy!r} needs a decoder-only model, and {type(model).__name__} is an encoder-decoder"
        )


def _misspelt(model: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that the host does not know and that look like a setting, for ``settings_for`` to list the choices."""
    known = {*inspect.signature(_Host.generate).parameters, *vars(GenerationConfig()), "trust_remote_code"}
    for method in (model.prepare_inputs_for_generation, model.forward):
        known.update(inspect.signature(method).parameters)
    return {
        name: value
        for name, value in arguments.items()
        if name not in known and difflib.get_close_matches(name, SETTING_NAMES, n=1, cutoff=0.75)
    }


def _causal_model(model: Any) -> Any:
    """The model itself, or the one inside a PEFT wrapper."""
    reach = getattr(model, "get_base_model", None)
    host = reach() if callable(reach) else model
    if not isinstance(host, PreTrainedModel) or not isinstance(host, GenerationMixin):
        raise TypeError(
            f"{type(host).__name__} has no generate() of transformers; load the model with AutoModelForCausalLM"
            " (unwrap a compiled or distributed model first)"
        )
    if host.config.is_encoder_decoder:
        raise TypeError(
            f"{type(host).__name__} is an encoder-decoder; load a decoder-only model with AutoModelForCausalLM"
        )
    return host


def _unwrapped(function: Any) -> Iterator[Any]:
    """A callable and what stands behind its partials, bound methods and decorators."""
    while function is not None:
        yield function
        inner = (getattr(function, name, None) for name in ("func", "__func__", "__wrapped__"))
        function = next((f for f in inner if f is not None), None)


def _remove_own_generate(host: Any) -> None:
    """Remove the ``generate`` that ``from_pretrained`` of a repository with ``custom_generate/`` sets on a model."""
    own = vars(host).get("generate")
    if own is None:
        return
    if not any(getattr(f, "__globals__", {}).get("HF_HYBRID") is True for f in _unwrapped(own)):
        raise UnsupportedCallError(
            "the model has a generate() of its own (from custom_generate/ in its repository), which would hide"
            " strategy=; load it with trust_remote_code=False, or `del model.generate` before enable()"
        )
    del host.generate


def _keep_custom_fields(model: Any) -> None:
    """Clear the flag of a config made from a model config: with it, the host drops custom fields on loading."""
    config: Any = getattr(model, "generation_config", None)
    if getattr(config, "_from_model_config", None):
        config._from_model_config = None


@functools.cache
def _hybrid_type(host: type) -> type:
    """The subclass of ``host`` that understands ``strategy=``, made once.

    It keeps the host's name, which ``save_pretrained`` writes into ``architectures`` and ``pipeline()`` looks up. Since
    nobody can import it under that name, instances are pickled by their host class.
    """

    def reduce(self: Any, protocol: object) -> tuple[Any, ...]:
        return _rebuild, (host,), self.__getstate__()

    body = {
        "__module__": host.__module__,
        "__qualname__": f"Hybrid{host.__qualname__}",
        "__doc__": host.__doc__,
        "__reduce_ex__": reduce,
        "_hf_hybrid_host": host,
    }
    return type(host)(host.__name__, (HybridGenerationMixin, host), body)


def _rebuild(host: type) -> Any:
    """An empty instance of the hybrid type of ``host``, to be filled by ``pickle`` or ``copy``."""
    hybrid: Any = _hybrid_type(host)
    return hybrid.__new__(hybrid)
