"""Settings of the strategies, each written once, and the one door through which they come in.

Order of precedence: arguments of the call, then ``generation_config.hf_hybrid`` of the call, then that of the
checkpoint, then the defaults below. ``generation_config.hf_hybrid`` is a plain dict:
``{"strategy": "planned_diffusion", "window_length": 8, ...}``; a nested dict under a strategy's name
(``{"block_diffusion": {...}}``) holds settings for that strategy alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from hf_hybrid.core.plan import PlanLimits

T = TypeVar("T", bound="DataclassInstance")


class SettingsError(ValueError):
    """An unknown strategy or setting, or a value outside its range; the message lists the choices."""


REQUIRED: Any = "required"
"""Default of a setting that must be given."""


def setting(default: Any, help: str, low: float | None = None, high: float | None = None) -> Any:
    """A settings field: its default, its meaning with unit, and its closed range."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every strategy understands."""

    seed: int | list[int] | None = setting(
        None,
        "noise of sampling: sequence i of a batch uses seed + i, or one seed for each; unset: drawn from torch",
        0,
        2**62,
    )
    return_control_tokens: bool = setting(
        False,
        "keep plan and control tokens in the returned sequences (default: prompt and text alone); max_new_tokens then "
        "counts them too",
    )
    continue_final_message: bool | list[bool] = setting(
        False,
        "the prompt ends inside of an answer (a prefilled assistant turn), which goes on plainly: planned_diffusion "
        "writes no plan then; one value per sequence, or one for all",
    )
    return_past_key_values: bool = setting(
        False, "with return_dict_in_generate: also return a cache of the sequences, so that a host call can continue"
    )


@dataclass(frozen=True, kw_only=True)
class AutoregressiveSettings(Settings):
    """One token a pass."""


@dataclass(frozen=True, kw_only=True)
class WindowSettings(Settings):
    """What every strategy that may carry noisy rows understands."""

    window_length: int = setting(8, "open positions behind the settled prefix of a lane, in tokens", 1, 1024)


@dataclass(frozen=True, kw_only=True)
class DraftSettings(WindowSettings):
    """What every strategy that checks what a window drafts understands."""

    draft_threshold: float = setting(
        0.6,
        "what a window drafts ends before the first position less sure than this (changes time, not text); "
        "planned_diffusion: with verify_spans, speculative: with drafter self",
        0.0,
        1.0,
    )


@dataclass(frozen=True, kw_only=True)
class SpeculativeSettings(DraftSettings):
    """A drafter proposes several tokens, the model checks them in one pass."""

    drafter: Literal["suffix", "self"] = setting(
        "suffix",
        "who drafts. suffix: copies what followed the same words before, needs no weights; self: the model's own noisy "
        "window, needs a mask token. generate() also takes a model or a hf_hybrid.Drafter",
    )
    draft_length: int = setting(24, "most drafted tokens that one pass checks; a tree has a size of its own", 1, 1024)
    adaptive: bool = setting(
        True,
        "choose the length of a draft, and whether to draft at all, by measured times and acceptance "
        "(changes time, not text); off: always draft_length",
    )
    acceptance: Literal["shared_noise", "rejection"] = setting(
        "shared_noise",
        "when sampling. shared_noise: drafts and checks draw with the same noise, so that a seed gives the same text "
        "with any drafter and with none; rejection: by the drafter's probabilities, always draft_length",
    )
    recheck_margin: float | None = setting(
        None,
        "a token that leads the next best one by less than this (logits, divided by the temperature) is decided again "
        "in a pass without drafts; unset: what rounding was measured to do in float32 and float64, nothing in half "
        "precisions, where every tenth token is that close; 0: never",
        0.0,
        1e3,
    )


@dataclass(frozen=True, kw_only=True)
class DiffusionSettings(WindowSettings):
    """What every strategy that settles noisy rows understands."""

    commit: Literal["prefix", "block"] = setting(
        "prefix",
        "prefix: commit what is settled from the left and slide the window; block: keep a block noisy until it is full",
    )
    confidence_threshold: float = setting(0.95, "an open position settles when its score reaches this", 0.0, 1.0)
    selection: Literal["confidence", "margin", "entropy", "random"] = setting(
        "confidence", "the score: top-1 probability, top-1 minus top-2, 1 - normalised entropy, or a random order"
    )
    max_denoising_steps: int | None = setting(
        None, "settle a fixed share each pass so that a block takes at most this many; unset: threshold alone", 1, 1024
    )


@dataclass(frozen=True, kw_only=True)
class BlockDiffusionSettings(DiffusionSettings):
    """Masks of one block are filled over a few passes, blocks left to right. ``window_length`` is the block length."""


@dataclass(frozen=True, kw_only=True)
class PlannedDiffusionSettings(DiffusionSettings, DraftSettings):
    """An autoregressive plan, then all parts at once, then the next round."""

    span_decoding: Literal["diffusion", "autoregressive"] = setting(
        "diffusion",
        "diffusion: a window of open positions per part; autoregressive: every part token by token, all in one pass",
    )
    verify_spans: bool = setting(
        True,
        "check drafted tokens with the clean rows of the next pass: the text equals span_decoding='autoregressive'",
    )
    visibility: Literal["sparse", "dag", "dense"] = setting(
        "dag",
        "what a part sees besides the trunk. sparse: nothing; dag: the parts it names; "
        "dense: the whole round is one block (quality reference)",
    )
    plan_window: int = setting(
        0, "draft the plan too, with this many open positions, and check it (changes time, not text); 0: off", 0, 64
    )
    max_rounds: int = setting(8, "rounds in one answer", 1, 1024)
    max_parts: int = setting(16, "parts in one round", 1, 256)
    max_part_length: int = setting(256, "planned tokens of one part", 1, 65536)
    max_plan_length: int = setting(2048, "planned tokens of one round, openings included", 16, 1048576)
    max_label_length: int = setting(16, "tokens of one label", 1, 256)
    max_span_extension: float = setting(
        1.5, "a part may grow to this multiple of its planned length; 1.0 switches extension off", 1.0, 16.0
    )
    span_fallback_confidence: float | None = setting(
        0.2,
        "a part whose surest open position stays below this for two passes goes on token by token; None: off",
        0.0,
        1.0,
    )

    @property
    def limits(self) -> PlanLimits:
        """The caps of the plan grammar."""
        from hf_hybrid.core.plan import PlanLimits  # brings torch, which help and errors of usage do without

        return PlanLimits(self.max_parts, self.max_part_length, self.max_plan_length, self.max_label_length)


SETTINGS: dict[str, type[Settings]] = {
    "autoregressive": AutoregressiveSettings,
    "block_diffusion": BlockDiffusionSettings,
    "planned_diffusion": PlannedDiffusionSettings,
    "speculative": SpeculativeSettings,
}
"""Strategy name -> its settings."""

SETTING_NAMES: frozenset[str] = frozenset(f.name for cls in SETTINGS.values() for f in fields(cls))
"""Every setting of every strategy: the names that ``generate()`` takes besides the host's."""


def checked(cls: type[T], values: Mapping[str, Any]) -> T:
    """A settings dataclass (fields made by ``setting``) from plain values, such as a section of a recipe.

    Raises:
        SettingsError: an unknown or missing name, or a value outside its range.
    """
    own = {f.name for f in fields(cls)}
    for name in values:
        if name not in own:
            raise SettingsError(_unknown(name, own))
    coerced = {name: _coerce(cls, name, value) for name, value in values.items()}
    missing = next((f.name for f in fields(cls) if f.default is REQUIRED and f.name not in values), None)
    if missing is not None:
        raise SettingsError(f"{missing} is missing: {cls.__dataclass_fields__[missing].metadata['help']}")
    return cls(**coerced)


def settings_for(strategy: str, call: Mapping[str, Any], stored: Mapping[str, Any] | None = None) -> Settings:
    """The settings of ``strategy`` from the arguments of a call and from what a checkpoint stores.

    Args:
        strategy: a key of ``SETTINGS``.
        call: settings named in the call; an unknown name or one of another strategy is an error.
        stored: ``generation_config.hf_hybrid``; settings of other strategies in it are ignored, unknown names are an
            error.
    """
    if strategy not in SETTINGS:
        raise SettingsError(f"unknown strategy {shown(strategy)}; choose one of {', '.join(SETTINGS)}")
    cls = SETTINGS[strategy]
    values: dict[str, Any] = {}
    values.update(_stored_values(strategy, stored))
    for name, value in call.items():
        _check_name(name, cls, strategy)
        values[name] = value
    return cls(**{name: _coerce(cls, name, value) for name, value in values.items()})


def stored_strategy(stored: object) -> str | None:
    """The strategy that ``generation_config.hf_hybrid`` names, None when it names none."""
    if stored is None:
        return None
    if not isinstance(stored, Mapping):
        raise SettingsError(f"generation_config.hf_hybrid must be a dict, got {type(stored).__name__}")
    strategy = stored.get("strategy")
    if strategy is not None and (not isinstance(strategy, str) or strategy not in SETTINGS):
        raise SettingsError(
            f"generation_config.hf_hybrid names the unknown strategy {shown(strategy)}; "
            f"choose one of {', '.join(SETTINGS)}"
        )
    return strategy


def merged(call: Any, checkpoint: Any) -> Any:
    """``generation_config.hf_hybrid`` of a call on top of what the checkpoint stores.

    A call that names a strategy alone then gets the settings of the checkpoint for it, as ``generate(strategy=...)``
    does. An empty dict stays one: it asks for the host's own decoding, and so does ``{"strategy": None}``.

    Args:
        call: a dict, or None when the call brings none.
        checkpoint: a dict, or None.
    """
    if call is None or not isinstance(checkpoint, Mapping):
        return checkpoint if call is None else call
    if not isinstance(call, Mapping) or not call:
        return call
    both = {**checkpoint, **call}
    for name in SETTINGS:
        below, above = checkpoint.get(name), call.get(name, {})
        if isinstance(below, Mapping) and isinstance(above, Mapping):
            # A setting that the call names for every strategy is not to lose against the checkpoint's for one.
            both[name] = {key: value for key, value in below.items() if key not in call} | dict(above)
    return both


def _stored_values(strategy: str, stored: Mapping[str, Any] | None) -> dict[str, Any]:
    stored_strategy(stored)
    values: dict[str, Any] = {}
    own = {f.name for f in fields(SETTINGS[strategy])}
    for name, value in (stored or {}).items():
        if name == "strategy":
            continue
        if name in SETTINGS:
            if not isinstance(value, Mapping):
                raise SettingsError(f"generation_config.hf_hybrid[{name!r}] must be a dict of settings")
            for inner in value:
                _check_name(inner, SETTINGS[name], name)
        elif name not in SETTING_NAMES:
            raise SettingsError(f"generation_config.hf_hybrid: {_unknown(name, SETTING_NAMES)}")
        elif name in own:
            values[name] = value
    return {**values, **(stored or {}).get(strategy, {})}


def shown(value: object, most: int = 80) -> str:
    """A value as a message shows it, no longer than ``most`` characters: anybody may have written it."""
    try:
        text = str(value) if isinstance(value, Exception) else repr(value)
    except (ValueError, RecursionError):  # Python refuses to print thousands of digits
        return f"a huge {type(value).__name__}"
    return text if len(text) <= most else f"{text[: most - 20]}... ({len(text)} characters)"


def _check_name(name: str, cls: type[Settings], strategy: str) -> None:
    own = {f.name for f in fields(cls)}
    if name not in own:
        raise SettingsError(f"strategy {strategy!r}: {_unknown(name, own)}")


def _unknown(name: object, choices: frozenset[str] | set[str]) -> str:
    near = difflib.get_close_matches(str(name)[:80], choices, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"unknown setting {shown(name)}{hint}; choose from {', '.join(sorted(choices))}"


def _coerce(cls: type, name: str, value: Any) -> Any:
    """``value`` checked against the type and the range of the field; the field's annotation is the one source of its
    type."""
    value = _plain(value)
    hint = get_type_hints(cls)[name]
    meta = next(f for f in fields(cls) if f.name == name).metadata
    options = get_args(hint) or (hint,)
    if all(isinstance(o, str) for o in options):
        if not isinstance(value, str) or value not in options:
            raise SettingsError(f"{name}={shown(value)}: choose one of {', '.join(options)}")
        return value
    if value is None and type(None) in options:
        return None
    if options == (str,):
        if not isinstance(value, str) or not value:
            raise SettingsError(f"{name}={shown(value)}: must be a text")
        return value
    kinds = tuple(o for o in options if o in (int, float, bool))
    inner = next((get_args(option)[0] for option in options if get_origin(option) is list), None)
    if isinstance(value, (list, tuple)) and inner is not None:
        return [_number(name, _plain(v), (inner,), meta) for v in value]
    return _number(name, value, kinds, meta)


def _plain(value: Any) -> Any:
    """A scalar of numpy or torch as one of Python, and an array of them as a list; the rest as it is."""
    return value.tolist() if hasattr(value, "ndim") and hasattr(value, "tolist") else value


def _number(name: str, value: Any, kinds: tuple[type, ...], meta: Mapping[str, Any]) -> Any:
    if bool in kinds:
        if not isinstance(value, bool):
            raise SettingsError(f"{name}={shown(value)}: must be True or False")
        return value
    wanted = "a whole number" if kinds == (int,) else "a number"
    # NaN and infinity are not whole either: their remainder is NaN, which differs from 0.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or (kinds == (int,) and value % 1 != 0):
        raise SettingsError(f"{name}={shown(value)}: must be {wanted}")
    low, high = meta["low"], meta["high"]
    if value != value or (low is not None and value < low) or (high is not None and value > high):
        raise SettingsError(f"{name}={shown(value)} is out of range: {low} to {high}")
    return int(value) if kinds == (int,) else float(value)
