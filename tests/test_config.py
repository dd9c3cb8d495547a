"""The one door of the settings.

Catches: a misspelt setting that is dropped in silence, a setting of one strategy taken by another, True taken for 1,
    NaN that
passes a range, infinity that crashes, a checkpoint that wins over the call, and settings that change after they were
checked.
"""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, fields
from typing import Any

import numpy as np
import pytest
import torch

from hf_hybrid.config import (
    SETTING_NAMES,
    SETTINGS,
    AutoregressiveSettings,
    BlockDiffusionSettings,
    PlannedDiffusionSettings,
    SettingsError,
    settings_for,
    stored_strategy,
)
from hf_hybrid.core.plan import PlanLimits

NAN, INF = math.nan, math.inf


def test_defaults_pass_their_own_checks() -> None:
    for strategy, cls in SETTINGS.items():
        defaults = {f.name: f.default for f in fields(cls)}
        assert settings_for(strategy, defaults) == cls() == settings_for(strategy, {})
        assert all(f.metadata["help"] for f in fields(cls))


def test_setting_names_are_all_of_them() -> None:
    assert {"seed", "window_length", "verify_spans"} < SETTING_NAMES
    assert len(SETTING_NAMES) == len({f.name for cls in SETTINGS.values() for f in fields(cls)})


def test_unknown_strategy_lists_the_choices() -> None:
    for ask in (lambda: settings_for("planed", {}), lambda: stored_strategy({"strategy": "planed"})):
        with pytest.raises(SettingsError, match=r"'planed'.*autoregressive, block_diffusion, planned_diffusion"):
            ask()


def test_unknown_setting_lists_the_choices_and_the_nearest() -> None:
    with pytest.raises(SettingsError, match=r"'window_lenght' \(did you mean 'window_length'\?\).*commit, .*selection"):
        settings_for("block_diffusion", {"window_lenght": 4})
    with pytest.raises(
        SettingsError, match=r"unknown setting 'zzz'; choose from continue_final_message, return_control_tokens, "
    ):
        settings_for("autoregressive", {"zzz": 4})


def test_a_setting_of_another_strategy_is_an_error_in_the_call() -> None:
    with pytest.raises(SettingsError, match=r"'block_diffusion'.*'verify_spans'"):
        settings_for("block_diffusion", {"verify_spans": True})


def test_stored_settings_of_other_strategies_are_ignored_but_unknown_names_are_not() -> None:
    stored = {"verify_spans": False, "window_length": 4, "planned_diffusion": {"max_parts": 3}}
    assert settings_for("block_diffusion", {}, stored) == BlockDiffusionSettings(window_length=4)
    assert settings_for("autoregressive", {}, stored) == AutoregressiveSettings()
    for wrong in (
        {"verify_span": 1},
        {"planned_diffusion": {"max_part": 3}},
        {"block_diffusion": {"verify_spans": True}},
    ):
        with pytest.raises(SettingsError, match="unknown setting"):
            settings_for("block_diffusion", {}, wrong)
        with pytest.raises(SettingsError, match="unknown setting"):
            settings_for("planned_diffusion", {}, wrong)


@pytest.mark.parametrize(
    "call, stored, window",
    [
        ({}, None, 8),
        ({}, {}, 8),
        ({}, {"window_length": 4}, 4),
        ({}, {"window_length": 4, "planned_diffusion": {"window_length": 5}}, 5),
        ({}, {"planned_diffusion": {"window_length": 5}, "window_length": 4}, 5),
        ({"window_length": 6}, {"window_length": 4, "planned_diffusion": {"window_length": 5}}, 6),
        ({}, {"strategy": "block_diffusion", "block_diffusion": {"window_length": 7}}, 8),
    ],
)
def test_precedence(call: dict[str, Any], stored: dict[str, Any] | None, window: int) -> None:
    settings = settings_for("planned_diffusion", call, stored)
    assert settings == PlannedDiffusionSettings(window_length=window)


def test_a_call_may_repair_a_stored_value() -> None:
    assert settings_for("block_diffusion", {"window_length": 4}, {"window_length": 0}).seed is None
    with pytest.raises(SettingsError, match="window_length=0"):
        settings_for("block_diffusion", {}, {"window_length": 0})


@pytest.mark.parametrize(
    "name, value",
    [
        ("window_length", 0),
        ("window_length", 1025),
        ("window_length", 2.5),
        ("window_length", True),
        ("window_length", "8"),
        ("window_length", None),
        ("window_length", NAN),
        ("window_length", INF),
        ("window_length", -INF),
        ("window_length", [8]),
        ("confidence_threshold", -0.1),
        ("confidence_threshold", 1.1),
        ("confidence_threshold", NAN),
        ("confidence_threshold", INF),
        ("confidence_threshold", "0.5"),
        ("confidence_threshold", True),
        ("confidence_threshold", None),
        ("commit", "blocks"),
        ("commit", None),
        ("commit", 1),
        ("commit", True),
        ("selection", "certainty"),
        ("verify_spans", 1),
        ("verify_spans", 0.0),
        ("verify_spans", "True"),
        ("verify_spans", None),
        ("max_denoising_steps", 0),
        ("max_denoising_steps", NAN),
        ("span_fallback_confidence", 1.5),
        ("span_fallback_confidence", NAN),
        ("max_span_extension", 0.5),
        ("seed", -1),
        ("seed", 1.5),
        ("seed", 2**62 + 1),
        ("seed", "1"),
        ("seed", [1, -1]),
        ("seed", [1, None]),
        ("seed", [True]),
    ],
)
def test_wrong_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(SettingsError, match=name):
        settings_for("planned_diffusion", {name: value})


@pytest.mark.parametrize(
    "name, value, kept",
    [
        ("window_length", 1, 1),
        ("window_length", 1024, 1024),
        ("window_length", 16.0, 16),
        ("confidence_threshold", 0, 0.0),
        ("confidence_threshold", 1, 1.0),
        ("confidence_threshold", 0.5, 0.5),
        ("commit", "block", "block"),
        ("verify_spans", False, False),
        ("max_denoising_steps", None, None),
        ("span_fallback_confidence", None, None),
        ("seed", None, None),
        ("seed", 2**62, 2**62),
        ("seed", [3, 4.0], [3, 4]),
        ("seed", (1, 2), [1, 2]),
    ],
)
def test_right_values_are_coerced_to_their_type(name: str, value: object, kept: object) -> None:
    got = getattr(settings_for("planned_diffusion", {name: value}), name)
    assert got == kept and type(got) is type(kept)


def test_messages_say_what_is_possible() -> None:
    for value, message in ((0, "1 to 1024"), (2.5, "a whole number")):
        with pytest.raises(SettingsError, match=message):
            settings_for("block_diffusion", {"window_length": value})
    with pytest.raises(SettingsError, match="a number"):
        settings_for("block_diffusion", {"confidence_threshold": "high"})
    with pytest.raises(SettingsError, match="prefix, block"):
        settings_for("block_diffusion", {"commit": "both"})
    with pytest.raises(SettingsError, match="True or False"):
        settings_for("planned_diffusion", {"verify_spans": "yes"})


def test_stored_strategy() -> None:
    assert stored_strategy(None) is None
    assert stored_strategy({}) is None
    assert stored_strategy({"window_length": 8}) is None
    assert stored_strategy({"strategy": "block_diffusion"}) == "block_diffusion"
    with pytest.raises(SettingsError, match="must be a dict, got str"):
        stored_strategy("block_diffusion")
    with pytest.raises(SettingsError, match="unknown strategy"):
        stored_strategy({"strategy": ["block_diffusion"]})


def test_a_stored_dict_must_be_one() -> None:
    with pytest.raises(SettingsError, match="must be a dict"):
        settings_for("block_diffusion", {}, [("window_length", 4)])  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=r"\['block_diffusion'\] must be a dict of settings"):
        settings_for("block_diffusion", {}, {"block_diffusion": 4})
    with pytest.raises(SettingsError, match=r"\['planned_diffusion'\] must be a dict of settings"):
        settings_for("block_diffusion", {}, {"planned_diffusion": None})


def test_settings_are_frozen_and_limits_follow_them() -> None:
    settings = PlannedDiffusionSettings(max_parts=3, max_part_length=40, max_plan_length=90, max_label_length=5)
    assert settings.limits == PlanLimits(3, 40, 90, 5)
    with pytest.raises(FrozenInstanceError):
        settings.max_parts = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    "five",
    [np.int64(5), np.uint8(5), np.float32(5), np.array(5), torch.tensor(5), torch.tensor(5.0), 5.0],
    ids=lambda value: type(value).__name__ + str(getattr(value, "dtype", "")),
)
def test_numbers_of_numpy_and_torch(five: Any) -> None:
    made = settings_for("speculative", {"seed": five, "draft_length": five, "recheck_margin": five})
    assert (made.seed, made.draft_length, made.recheck_margin) == (5, 5, 5.0)  # type: ignore[attr-defined]
    assert type(made.seed) is int and type(made.recheck_margin) is float  # type: ignore[attr-defined]
    stored = settings_for("planned_diffusion", {}, {"window_length": five, "planned_diffusion": {"max_parts": five}})
    assert (stored.window_length, stored.max_parts) == (5, 5)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "seeds", [[np.int64(1), torch.tensor(2)], np.array([1, 2]), torch.tensor([1, 2]), (np.uint8(1), 2)], ids=str
)
def test_seeds_of_numpy_and_torch(seeds: Any) -> None:
    assert settings_for("autoregressive", {"seed": seeds}).seed == [1, 2]


def test_switches_of_numpy_and_torch() -> None:
    for yes in (np.True_, torch.tensor(True)):
        assert settings_for("speculative", {"adaptive": yes}).adaptive is True  # type: ignore[attr-defined]
    for wrong in (np.int64(1), np.float64(0.5), torch.tensor([1, 2])):
        with pytest.raises(SettingsError, match=r"adaptive=.*must be True or False"):
            settings_for("speculative", {"adaptive": wrong})


@pytest.mark.parametrize("wrong", [np.float64(1.5), np.nan, np.array([[1]]), np.int64(-1), np.bool_(True)])
def test_what_is_no_seed_all_the_same(wrong: Any) -> None:
    with pytest.raises(SettingsError, match="seed="):
        settings_for("autoregressive", {"seed": wrong})
