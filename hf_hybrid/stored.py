"""Checks ``generation_config.json`` of a checkpoint before it is used: anybody may have written it.

The host takes most values as they come and fails later, somewhere else. Here every field of the host has its type and
its range in one table. ``check_file`` reads the file before the host does; ``check_call`` looks at the values that a
call with a strategy would use. Settings under ``hf_hybrid`` come in through ``hf_hybrid.config``.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.hub import cached_file

from hf_hybrid.config import SettingsError
from hf_hybrid.fields import shown

MAX_BYTES = 1 << 20
"""Largest file in bytes; a generation config has a few lines."""

MAX_DEPTH = 16
"""Deepest nesting of dicts and lists."""

MAX_SEQUENCES = 4096
"""Most ``num_return_sequences``, checked before so many sequences are made."""

_HUGE = 2**53
"""Lengths are clamped to the positions of the model; larger numbers are no lengths."""

_LENGTHS = ("max_length", "max_new_tokens", "prefill_chunk_size", "max_cache_len")
_COUNTS = (
    *("min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("num_assistant_tokens", "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit"),
    *("assistant_lookbehind", "target_lookbehind"),
)
_SHARES = ("top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "assistant_confidence_threshold")
_NUMBERS = ("length_penalty", "guidance_scale", "penalty_alpha", "diversity_penalty", "assistant_ensemble_weight")
_SWITCHES = (
    *("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values", "return_dict_in_generate"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "is_assistant", "token_healing"),
    *("low_memory", "use_mtp", "disable_compile"),
)
_TEXTS = ("cache_implementation", "num_assistant_tokens_schedule", "transformers_version", "speculation_type")
_TOKENS = ("pad_token_id", "bos_token_id", "decoder_start_token_id", "forced_bos_token_id")
_ANY_ID = frozenset({"pad_token_id", "bos_token_id", "eos_token_id"})
"""Fields whose id may be negative or outside the vocabulary: then it is no token, as in the host."""
_TOKEN_LISTS = ("eos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")

_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(_LENGTHS, (1, _HUGE)),
    **dict.fromkeys(_COUNTS, (0, _HUGE)),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), (1, MAX_SEQUENCES)),
    **dict.fromkeys(_SHARES, (0.0, 1.0)),
    **dict.fromkeys(_NUMBERS, (-1e6, 1e6)),
    **dict.fromkeys(("temperature", "repetition_penalty", "encoder_repetition_penalty"), (0.0, 1e6)),
    "max_time": (0.0, 1e12),
}
"""Number of the host -> its closed range. Numbers that count neither tokens nor sequences need not be whole."""

_WHOLE = frozenset({*_LENGTHS, *_COUNTS, "num_beams", "num_beam_groups", "num_return_sequences"})
_KEPT = frozenset({"_from_model_config", "_commit_hash", "_original_object_hash"})
_PARTNERS = frozenset({"custom_generate", "trust_remote_code", "assistant_tokenizer", "tokenizer", "self"})


def check_file(name: Any, **hub: Any) -> None:
    """Read ``generation_config.json`` of a folder or of a Hub repository, if there is one, and check it.

    Args:
        name: what ``from_pretrained`` takes.
        **hub: arguments of ``from_pretrained`` that say where to look, such as ``revision``.

    Raises:
        SettingsError: it is no JSON object, too large, or holds what the host could not read; the message names the
            field.
    """
    try:
        path = cached_file(name, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    except OSError:  # the host will say what is wrong with the name
        return
    if path is None:
        return
    if os.stat(path).st_size > MAX_BYTES:
        raise SettingsError(f"{GENERATION_CONFIG_NAME} is larger than {MAX_BYTES} bytes; {_repair()}")
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except RecursionError:
        raise SettingsError(f"{GENERATION_CONFIG_NAME} is nested deeper than {MAX_DEPTH} levels; {_repair()}") from None
    except ValueError as error:  # no JSON, no UTF-8, a number of thousands of digits
        raise SettingsError(f"{GENERATION_CONFIG_NAME} is no JSON file ({shown(error)}); {_repair()}") from error
    if not isinstance(values, Mapping):
        raise SettingsError(
            f"{GENERATION_CONFIG_NAME} must be an object with fields, got {type(values).__name__}; {_repair()}"
        )
    check_fields(values, GENERATION_CONFIG_NAME)
    _check_names(values)
    _check_that_the_host_reads(values)


def check_fields(values: Mapping[str, Any], where: str, vocab_size: int | None = None) -> None:
    """Check the type and the range of the host's fields in ``values``; other names and None pass.

    Args:
        values: field -> value. What no JSON file can hold, such as a tensor, is the caller's own and passes too.
        where: name of their source, for the message.
        vocab_size: size of the vocabulary; None: not known yet, so that token ids are not compared with it.

    Raises:
        SettingsError: with the name of the field.
    """
    for name, value in values.items():
        if value is None or not isinstance(value, (bool, int, float, str, list, tuple, dict)):
            continue
        fault = _fault(name, value, vocab_size)
        if fault:
            raise SettingsError(f"{where}: {name}={shown(value)}: {fault}")


def check_call(model: Any, arguments: Mapping[str, Any]) -> None:
    """Apply ``check_fields`` to a call: its arguments, its config, and that of the model."""
    check_fields(arguments, "generate()")
    config = arguments.get("generation_config")
    if not isinstance(config, GenerationConfig | None):
        raise SettingsError(
            f"generation_config= must be a GenerationConfig, got {type(config).__name__}; "
            "use GenerationConfig(**fields), or pass the fields as arguments"
        )
    values: dict[str, Any] = {}
    for config in (getattr(model, "generation_config", None), arguments.get("generation_config")):
        values |= {name: value for name, value in (vars(config) if config else {}).items() if value is not None}
    stored = {name: value for name, value in values.items() if name not in arguments}
    check_fields(stored, "generation_config", model.config.get_text_config().vocab_size)


def _fault(name: str, value: Any, vocab_size: int | None) -> str:
    """Say what is wrong with the value of a field of the host; empty: nothing."""
    if name in _RANGES:
        return _number_fault(value, name in _WHOLE, *_RANGES[name])
    if name in _SWITCHES:
        return "" if isinstance(value, bool) else "must be true or false"
    if name in _TEXTS:
        return "" if isinstance(value, str) else "must be a text"
    if name in _TOKENS:
        return _token_fault(value, vocab_size, name in _ANY_ID)
    if name in _TOKEN_LISTS:
        items = value if isinstance(value, (list, tuple)) else [value]
        return next((fault for item in items if (fault := _token_fault(item, vocab_size, name in _ANY_ID))), "")
    if name == "bad_words_ids":
        lists = isinstance(value, (list, tuple)) and all(isinstance(word, (list, tuple)) and word for word in value)
        if not lists or not value:
            return "must be a list of lists of token ids"
        return next((fault for word in value for item in word if (fault := _token_fault(item, vocab_size))), "")
    if name == "stop_strings":
        texts = [value] if isinstance(value, str) else value
        whole = isinstance(texts, (list, tuple)) and all(isinstance(text, str) and text for text in texts)
        return "" if whole and texts else "must be a text or a list of texts, none of them empty"
    if name == "early_stopping":
        return "" if value == "never" or isinstance(value, bool) else "must be true, false or 'never'"
    if name == "exponential_decay_length_penalty":
        pair = isinstance(value, (list, tuple)) and len(value) == 2
        faults = [_number_fault(value[0], True, 0, _HUGE), _number_fault(value[1], False, 0.0, 1e6)] if pair else []
        return next(filter(None, faults), "") if pair else "must be a start index and a factor"
    return ""


def _number_fault(value: Any, whole: bool, low: float, high: float) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or (whole and value % 1 != 0):
        return "must be a whole number" if whole else "must be a number"
    return "" if low <= value <= high else f"is out of range: {low} to {high}"  # NaN is in no range


def _token_fault(value: Any, vocab_size: int | None, any_id: bool = False) -> str:
    if isinstance(value, bool) or not isinstance(value, int):
        return f"{shown(value)} is no token id"
    if any_id and -_HUGE < value < _HUGE:
        return ""
    if vocab_size is None and value == -1:  # an old way to say that there is none
        return ""
    if value < 0 or (vocab_size is not None and value >= vocab_size) or value >= _HUGE:
        size = "" if vocab_size is None else f" of {vocab_size} tokens"
        return f"{shown(value)} is outside the vocabulary{size}"
    return ""


def _check_names(values: Mapping[str, Any]) -> None:
    """Refuse fields that hide a method of the host's config, and code and partners, which never come from a file."""
    for name, value in values.items():
        if name not in _KEPT and (hasattr(GenerationConfig, name) or name.startswith("_") or name in _PARTNERS):
            raise SettingsError(f"{GENERATION_CONFIG_NAME}: {shown(name)} is no field of a config; {_repair()}")
        if _depth(value) >= MAX_DEPTH:
            raise SettingsError(
                f"{GENERATION_CONFIG_NAME}: {shown(name)} is nested deeper than {MAX_DEPTH} levels; {_repair()}"
            )


def _check_that_the_host_reads(values: Mapping[str, Any]) -> None:
    """Make the host's config once, and turn whatever it raises into an error that names the field."""
    with warnings.catch_warnings():  # the host will say them again
        warnings.simplefilter("ignore")
        try:
            GenerationConfig(**values)
        except Exception as error:
            fault = f"{_culprit(values)}{shown(error, 300)}"
            raise SettingsError(f"{GENERATION_CONFIG_NAME}: {fault}; {_repair()}") from error


def _culprit(values: Mapping[str, Any]) -> str:
    for name, value in values.items():
        try:
            GenerationConfig(**{name: value})
        except Exception:
            return f"{shown(name)}={shown(value)}: "
    return ""


def _depth(value: Any) -> int:
    """Depth of nested dicts and lists, counted without recursion."""
    level, depth = [value], 0
    while level := [v for v in level if isinstance(v, (dict, list))]:
        depth += 1
        level = [inner for v in level for inner in (v.values() if isinstance(v, dict) else v)]
    return depth


def _repair() -> str:
    return "repair the file, or pass generation_config=GenerationConfig(...) to from_pretrained()"
