"""Settings of the strategies, each defined once, and the function that reads them from a call and a checkpoint.

Order of precedence: arguments of the call, then ``generation_config.hf_hybrid`` of the call, then that of the
checkpoint, then the defaults below. ``generation_config.hf_hybrid`` is a plain dict:
``{"strategy": "planned_diffusion", "window_length": 8, ...}``; a nested dict under a strategy's name
(``{"block_diffusion": {...}}``) holds settings for that strategy alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hf_hybrid.fields import SettingsError, coerced, setting, shown, unknown

if TYPE_CHECKING:
    from hf_hybrid.core.plan import PlanLimits

Needs = Literal["nothing", "noise", "grammar"]
"""What a strategy needs of a vocabulary: a mask token, or all tags of a plan."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of every strategy, and what a strategy takes and promises.

    Attributes:
        takes_plan, takes_drafter: True: ``generate()`` takes ``plan=``, ``drafter=``.
        one_text: True: it reads and commits one causal text, so that its keys are those of the host.
        one_by_one: True: behind the prompt every pass has one row, as in the host.
        stages: what an answer goes through, for reports.
    """

    takes_plan: ClassVar[bool] = False
    takes_drafter: ClassVar[bool] = False
    one_text: ClassVar[bool] = False
    one_by_one: ClassVar[bool] = False
    stages: ClassVar[tuple[str, ...]] = ("prefill", "text")

    @property
    def exact(self) -> bool:
        """True: clean rows decide every token, so that the text is that of plain decoding."""
        return self.one_text

    @property
    def needs(self) -> Needs:
        """What it needs of a vocabulary."""
        return "nothing"

    @property
    def abilities(self) -> tuple[str, ...]:
        """What it needs of a Runner, by the names in ``hf_hybrid.models.runner.Abilities``."""
        return ("noisy_rows",) if self.needs == "noise" else ()

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
        "the prompt ends inside an answer (a prefilled assistant turn), which is continued: planned_diffusion "
        "writes no plan then; one value per sequence, or one for all",
    )
    return_past_key_values: bool = setting(
        False, "with return_dict_in_generate: also return a cache of the sequences, so that a host call can continue"
    )


@dataclass(frozen=True, kw_only=True)
class AutoregressiveSettings(Settings):
    """Settings of autoregression: one token a pass."""

    one_text: ClassVar[bool] = True
    one_by_one: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class WindowSettings(Settings):
    """Settings of every strategy that may have noisy rows."""

    window_length: int = setting(8, "open positions behind the settled prefix of a lane, in tokens", 1, 1024)


@dataclass(frozen=True, kw_only=True)
class DraftSettings(WindowSettings):
    """Settings of every strategy that checks the drafts of a window."""

    draft_threshold: float = setting(
        0.6,
        "a window's draft ends before the first position less probable than this (changes time, not text); "
        "planned_diffusion: with verify_spans, speculative: with drafter self",
        0.0,
        1.0,
    )


@dataclass(frozen=True, kw_only=True)
class SpeculativeSettings(DraftSettings):
    """Settings of speculative decoding: a drafter proposes several tokens, the model checks them in one pass."""

    takes_drafter: ClassVar[bool] = True
    one_text: ClassVar[bool] = True
    stages: ClassVar[tuple[str, ...]] = ("prefill", "draft", "verify", "text")

    drafter: Literal["suffix", "self"] = setting(
        "suffix",
        "who drafts. suffix: copies what followed the same words before, needs no weights; self: the model's own noisy "
        "window, needs a mask token. generate() also takes a model or a hf_hybrid.Drafter",
    )
    draft_length: int = setting(24, "most drafted tokens that one pass checks; trees have a size of their own", 1, 1024)
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
        "in a pass without drafts; unset: the measured effect of rounding in float32 and float64, 0 in half "
        "precisions, where every tenth token is that close; 0: never",
        0.0,
        1e3,
    )

    @property
    def needs(self) -> Needs:
        """``"noise"`` for the model's own window, which needs a mask token."""
        return "noise" if self.drafter == "self" else "nothing"


@dataclass(frozen=True, kw_only=True)
class DiffusionSettings(WindowSettings):
    """Settings of every strategy that unmasks noisy rows."""

    commit: Literal["prefix", "block"] = setting(
        "prefix",
        "prefix: commit from the left what is unmasked, slide the window; block: keep a block noisy until it is full",
    )
    confidence_threshold: float = setting(0.95, "an open position is unmasked when its score reaches this", 0.0, 1.0)
    selection: Literal["confidence", "margin", "entropy", "random"] = setting(
        "confidence", "the score: top-1 probability, top-1 minus top-2, 1 - normalised entropy, or a random order"
    )
    max_denoising_steps: int | None = setting(
        None,
        "unmask a fixed share in every pass so that a block takes at most this many; unset: threshold alone",
        1,
        1024,
    )


@dataclass(frozen=True, kw_only=True)
class BlockDiffusionSettings(DiffusionSettings):
    """Settings of block diffusion: a block is unmasked over a few passes. ``window_length`` is the block length."""

    @property
    def needs(self) -> Needs:
        """``"noise"``: a mask token."""
        return "noise"


@dataclass(frozen=True, kw_only=True)
class PlannedDiffusionSettings(DiffusionSettings, DraftSettings):
    """Settings of planned diffusion: an autoregressive plan, then all its parts at once, then the next round."""

    takes_plan: ClassVar[bool] = True
    stages: ClassVar[tuple[str, ...]] = ("prefill", "plan", "spans", "text")

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
    def exact(self) -> bool:
        """True: clean rows decide every token of a part."""
        return self.visibility != "dense" and (self.verify_spans or self.span_decoding == "autoregressive")

    @property
    def needs(self) -> Needs:
        """``"grammar"``: the tags of a plan."""
        return "grammar"

    @property
    def abilities(self) -> tuple[str, ...]:
        """Parts that do not read one another, and windows unless every part is written token by token."""
        windows = self.span_decoding == "diffusion" or self.plan_window > 0 or self.visibility == "dense"
        return ("spans", "noisy_rows") if windows else ("spans",)

    @property
    def limits(self) -> PlanLimits:
        """The limits of the plan grammar."""
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
"""Every setting of every strategy: arguments that ``generate()`` takes besides the host's."""


def settings_for(strategy: str, call: Mapping[str, Any], stored: Mapping[str, Any] | None = None) -> Settings:
    """Make the settings of ``strategy`` from the arguments of a call and what the checkpoint stores.

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
    return cls(**{name: coerced(cls, name, value) for name, value in values.items()})


def stored_strategy(stored: object) -> str | None:
    """The strategy that ``generation_config.hf_hybrid`` names; None: it names none."""
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
    """Merge ``generation_config.hf_hybrid`` of a call with that of the checkpoint; the call's values win.

    A call that names only a strategy then gets the checkpoint's settings for it, as ``generate(strategy=...)``
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
            # A setting that the call gives for every strategy wins over the checkpoint's for one.
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
            raise SettingsError(f"generation_config.hf_hybrid: {unknown(name, SETTING_NAMES)}")
        elif name in own:
            values[name] = value
    return {**values, **(stored or {}).get(strategy, {})}


def _check_name(name: str, cls: type[Settings], strategy: str) -> None:
    own = {f.name for f in fields(cls)}
    if name not in own:
        raise SettingsError(f"strategy {strategy!r}: {unknown(name, own)}")
