"""The candidates of comparisons: tables of strategies with their settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Candidate:
    """A strategy with settings, or the host.

    Attributes:
        name: unique in a comparison. strategy: a key of ``hf_hybrid.config.SETTINGS``, None: the host's own
        ``generate()``. settings: those that differ from what the checkpoint stores.
        equals: name of the candidate whose text it must reproduce, None: it may differ. dtype: of the weights, None:
        that of the model which is measured.
    """

    name: str
    strategy: str | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    equals: str | None = None
    dtype: str | None = None


_VERIFIED = {"span_decoding": "diffusion", "verify_spans": True}
_UNVERIFIED = {"span_decoding": "diffusion", "verify_spans": False}
_PLAIN = (
    Candidate("host", None),
    Candidate("autoregressive", "autoregressive", equals="host"),
)

CANDIDATES: tuple[Candidate, ...] = (
    *_PLAIN,
    Candidate("span_autoregressive", "planned_diffusion", {"span_decoding": "autoregressive"}),
    Candidate("planned_verified", "planned_diffusion", _VERIFIED, equals="span_autoregressive"),
    Candidate("planned_unverified", "planned_diffusion", _UNVERIFIED),
    Candidate("block_diffusion", "block_diffusion"),
    Candidate("speculative_suffix", "speculative", {"drafter": "suffix"}, equals="autoregressive"),
    Candidate("speculative_self", "speculative", {"drafter": "self", "window_length": 12}, equals="autoregressive"),
)
"""The default comparison."""


_NO_EXTENSION = {"max_span_extension": 1.0}
_NO_FALLBACK = {"span_fallback_confidence": None}

FEEDBACK: tuple[Candidate, ...] = (
    *_PLAIN,
    Candidate("spans", "planned_diffusion", {"span_decoding": "autoregressive"}),
    Candidate("all rules", "planned_diffusion", _VERIFIED, equals="spans"),
    Candidate("-extension", "planned_diffusion", {**_VERIFIED, **_NO_EXTENSION}),
    Candidate("-fallback", "planned_diffusion", {**_VERIFIED, **_NO_FALLBACK}, equals="spans"),
    Candidate("-verification", "planned_diffusion", _UNVERIFIED),
    Candidate("-verif. -ext.", "planned_diffusion", {**_UNVERIFIED, **_NO_EXTENSION}),
    Candidate("-verif. -fallb.", "planned_diffusion", {**_UNVERIFIED, **_NO_FALLBACK}),
    Candidate("no rules", "planned_diffusion", {**_UNVERIFIED, **_NO_EXTENSION, **_NO_FALLBACK}),
)
"""Each feedback rule switched off: parts may grow beyond their plan, a part that is never sure goes on token by token,
drafts are checked. The other settings are those of the checkpoint."""


def in_types(candidates: Sequence[Candidate], dtypes: Sequence[str]) -> tuple[Candidate, ...]:
    """The candidates in the type of the model, ``dtypes[0]``, and in each of the others."""
    again = [
        replace(c, name=f"{c.name} {SHORT.get(dtype, dtype)}", dtype=dtype, equals=_named(c.equals, dtype))
        for dtype in dtypes[1:]
        for c in candidates
    ]
    return (*candidates, *again)


SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def _named(name: str | None, dtype: str) -> str | None:
    return None if name is None else f"{name} {SHORT.get(dtype, dtype)}"


def _verified(window: int, draft: int, plan: int) -> Candidate:
    settings = {**_VERIFIED, "window_length": window, "draft_threshold": draft / 100, "plan_window": plan}
    return Candidate(f"verified w{window} d{draft} p{plan}", "planned_diffusion", settings, equals="spans")


def _unverified(window: int, threshold: int) -> Candidate:
    settings = {**_UNVERIFIED, "window_length": window, "confidence_threshold": threshold / 100}
    return Candidate(f"unverified w{window} c{threshold}", "planned_diffusion", settings)


def _blocks(window: int, threshold: int) -> Candidate:
    settings = {"window_length": window, "confidence_threshold": threshold / 100}
    return Candidate(f"block w{window} c{threshold}", "block_diffusion", settings)


SWEEP: tuple[Candidate, ...] = (
    *_PLAIN,
    Candidate("spans", "planned_diffusion", {"span_decoding": "autoregressive"}),
    Candidate("verified default", "planned_diffusion", equals="spans"),
    *(_verified(window, 60, 8) for window in (4, 8, 12, 16, 24)),
    *(_verified(12, draft, 8) for draft in (30, 45, 75, 90)),
    *(_verified(12, 60, plan) for plan in (0, 4, 12, 16)),
    *(_unverified(window, 95) for window in (4, 8, 12, 16, 24)),
    *(_unverified(12, threshold) for threshold in (60, 70, 80, 90, 98)),
    *(_unverified(window, 80) for window in (8, 16)),
    Candidate("block default", "block_diffusion"),
    *(_blocks(window, 95) for window in (4, 8, 12, 16, 24)),
    *(_blocks(12, threshold) for threshold in (80, 90, 98)),
)
"""Settings to choose from on the development split: one axis at a time, around a window of 12 (w: window; d, c: draft
and confidence threshold in percent; p: plan window; default: what the checkpoint stores)."""
