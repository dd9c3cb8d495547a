"""``generate(strategy=...)`` on existing model classes: a mixin, ``enable()`` for a model, ``install()`` for a process.

All three prepare the arguments of a call to the host's own ``generate``: unchanged when no strategy is named, else with
our decoding loop as ``custom_generate=``. The host then prepares inputs, processors and stopping as usual.
"""

from __future__ import annotations

import functools
import inspect
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from hf_hybrid.core.plan import Plan
from hf_hybrid.models.secure import secure_known
from hf_hybrid.portable import FOLDER, PortableError, write_custom_generate
from hf_hybrid.routing import UnsupportedCallError, host_arguments, is_routed, routed
from hf_hybrid.stored import check_file

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer
    from transformers.generation.utils import GenerateOutput

ModelT = TypeVar("ModelT")
_Host: Any = GenerationMixin  # its generate() types ``self`` by a protocol that the mixin alone does not meet


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
        """Write answers: as the host does, or with a strategy.

        Args:
            inputs: prompt ids ``(batch, length)``, left-padded; so are the other arguments that the host knows.
            strategy: a key of ``hf_hybrid.config.SETTINGS``; unset, what ``generation_config.hf_hybrid`` names, of the
                call's config or else of the model's; the model's settings hold where the call's config has none. When
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
        arguments = host_arguments(self, arguments, strategy, plan)
        with routed(self):
            return host.generate(**arguments)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as the host does, and keep the strategies.

        ``generation_config.hf_hybrid`` is written in a form that survives loading, and ``custom_generate/`` lets the
        folder write by them where this package is not installed. A foreign ``custom_generate/`` in the folder is left
        as it is, with a warning.
        """
        keep_custom_fields(self)
        host: Any = super()
        host.save_pretrained(save_directory, *args, **kwargs)
        is_main_process = args[0] if args else kwargs.get("is_main_process", True)
        if is_main_process and os.path.isdir(save_directory):
            _write_or_warn(save_directory)

    def _upload_modified_files(
        self, working_dir: str | os.PathLike[str], repo_id: str, files_timestamps: dict[str, float], **kwargs: Any
    ) -> Any:
        """Upload as ``save_pretrained(push_to_hub=True)`` of the host does, with ``custom_generate/`` marked as new."""
        _write_or_warn(working_dir)
        files_timestamps.pop(FOLDER, None)
        host: Any = super()
        return host._upload_modified_files(working_dir, repo_id, files_timestamps, **kwargs)


def enable(model: ModelT) -> ModelT:
    """Make a loaded causal language model understand ``generate(strategy=...)``, in place, and return it.

    Its class becomes a subclass of its class, so ``isinstance`` stays true; it saves, copies and pickles as before.
    A PEFT model is reached through ``get_base_model()``. A second call changes nothing.

    Raises:
        TypeError: not a decoder-only model with ``generate()``.
        UnsupportedCallError: the repository brought a ``custom_generate/`` of its own that is not ours.
    """
    host = causal_model(model)
    _remove_own_generate(host)
    if not isinstance(host, HybridGenerationMixin):
        host.__class__ = _hybrid_type(type(host))
    keep_custom_fields(host)
    return model


def disable(model: ModelT) -> ModelT:
    """Undo ``enable()``, in place, and return the model."""
    host = causal_model(model)
    original = getattr(type(host), "_hf_hybrid_host", None)
    if original is not None:
        host.__class__ = original
    return model


_LOCATION = frozenset({"cache_dir", "proxies", "local_files_only", "token", "revision", "subfolder"})
"""Arguments of ``from_pretrained`` that say where files are."""


class AutoHybridModelForCausalLM:
    """``AutoModelForCausalLM`` whose models are enabled. Use the class methods; there are no instances."""

    _host: Any = AutoModelForCausalLM

    def __init__(self) -> None:
        name = type(self).__name__
        raise TypeError(f"use {name}.from_pretrained(name) or .from_config(config)")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """``AutoModelForCausalLM.from_pretrained`` with the same arguments; the model is enabled.

        Raises:
            hf_hybrid.config.SettingsError: a ``generation_config.json`` that the host could not use; the message names
                the field. With ``generation_config=`` the file is not read.
        """
        if kwargs.get("generation_config") is None:
            check_file(pretrained_model_name_or_path, **{key: kwargs[key] for key in _LOCATION & kwargs.keys()})
        loaded = cls._host.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        enable(loaded[0] if isinstance(loaded, tuple) else loaded)  # a tuple: output_loading_info=True
        return loaded

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Any:
        """``AutoModelForCausalLM.from_config`` with the same arguments; the model is enabled, its weights random."""
        return enable(cls._host.from_config(config, **kwargs))


class AutoHybridModelForImageTextToText(AutoHybridModelForCausalLM):
    """``AutoModelForImageTextToText`` whose models are enabled: prompts may hold images where a strategy writes one
    text."""

    _host: Any = AutoModelForImageTextToText


_Tokenizer: Any = PreTrainedTokenizerBase
_installed: tuple[tuple[Any, Any], tuple[Any, Any]] | None = None
"""(the host's, ours) of ``generate`` and of the tokenizers' ``from_pretrained`` while ``install()`` is in force."""
_changing = threading.RLock()
"""Held while ``_installed`` and the two methods change, so that they change together."""


def install() -> None:
    """Make every model of this process understand ``strategy=``, also those that others load (pipelines, serve).

    A call without a strategy goes to the host. Tokenizers that know the tags of a plan are loaded secured
    (``hf_hybrid.secure``). Idempotent, from any thread; ``uninstall()`` undoes it.
    """
    global _installed
    with _changing:
        if _installed is None:
            installed = (_wrapped_generate(), _wrapped_loading())
            (_, generate), (_, secured) = installed
            _Host.generate, _Tokenizer.from_pretrained = generate, secured
            _installed = installed


def _wrapped_generate() -> tuple[Any, Any]:
    """The host's ``generate``, and ours around it."""
    original = _Host.generate
    names = tuple(inspect.signature(original).parameters)[1:]

    @functools.wraps(original)
    def generate(
        self: Any, *args: Any, strategy: str | None = None, plan: Plan | Sequence[Plan] | None = None, **kwargs: Any
    ) -> Any:
        if strategy is None and plan is None and is_routed(self):
            return original(self, *args, **kwargs)
        arguments = dict(zip(names, args, strict=False)) | kwargs
        return original(self, **host_arguments(self, arguments, strategy, plan))

    return original, generate


def _wrapped_loading() -> tuple[Any, Any]:
    """The tokenizers' ``from_pretrained``, and ours around it."""
    load = vars(_Tokenizer)["from_pretrained"]

    @functools.wraps(load.__func__)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return secure_known(load.__func__(cls, *args, **kwargs))

    return load, classmethod(from_pretrained)


def uninstall() -> None:
    """Undo ``install()``; without one nothing happens.

    Raises:
        RuntimeError: another library replaced one of the two methods later; undo that first.
    """
    global _installed
    with _changing:
        if _installed is None:
            return
        (generate, ours), (load, secured) = _installed
        for owner, name, wrapper in ((_Host, "generate", ours), (_Tokenizer, "from_pretrained", secured)):
            if vars(owner)[name] is not wrapper:
                raise RuntimeError(
                    f"{owner.__name__}.{name} was replaced after install(); undo that before uninstall()"
                )
        _Host.generate, _Tokenizer.from_pretrained = generate, load
        _installed = None


def causal_model(model: Any) -> Any:
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
    """A callable, and the functions inside its partials, bound methods and decorators."""
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


def keep_custom_fields(model: Any) -> None:
    """Clear the flag of a config made from a model config: with it, the host drops custom fields on loading."""
    config: Any = getattr(model, "generation_config", None)
    if getattr(config, "_from_model_config", None):
        config._from_model_config = None


def _write_or_warn(folder: str | os.PathLike[str]) -> None:
    """Write ``custom_generate/``, or warn: a training run must not be lost because that fails."""
    try:
        write_custom_generate(folder)
    except PortableError as error:
        warnings.warn(f"saved without the strategies' code: {error}", stacklevel=3)


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
