"""The schema: every key says what it means, every number has a range, every loss its defaults."""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import fields
from typing import Any

import pytest
from omegaconf import OmegaConf

from pns.config import (
    STAGES,
    Config,
    Decoding,
    PreferenceConfig,
    RewardTerm,
    hyper_parameters,
    stages,
    to_dict,
)
from pns.errors import UserError
from pns.fields import FINITE, Range, above, at_least, at_most, below, between, check_ranges, up_to, walk_keys
from pns.preference_losses import PREFERENCE_LOSSES
from pns.tiny.settings import WarmStart

# `per_suite` is empty by default: one suite, so that the walk meets what a suite's section has.
SCHEMAS: dict[str, Any] = {"config": Config(), "suite": Decoding(), "tiny make": WarmStart()}


@pytest.mark.parametrize("settings", SCHEMAS.values(), ids=SCHEMAS)
def test_every_key_has_a_meaning_and_every_number_a_range(settings: Any) -> None:
    for key in walk_keys(settings):
        assert len(key.meaning) > 3, key.name
        is_number = bool(re.search(r"\b(int|float)\b", str(key.field.type)))
        assert (key.allowed is not None) == is_number, key.name
        assert all(number is None or number in key.allowed for number in key.numbers.values()), key.name
        if key.name.endswith("_seconds"):
            assert "seconds" in key.meaning, key.name
        if key.name.endswith("_tokens"):
            assert "tokens" in key.meaning, key.name


@pytest.mark.parametrize("settings", SCHEMAS.values(), ids=SCHEMAS)
def test_every_section_says_what_it_is(settings: Any) -> None:
    for key in walk_keys(settings):
        section = type(key.section)
        # A dataclass without a docstring gets its own signature as one.
        assert not str(inspect.getdoc(section)).startswith(f"{section.__name__}("), section


@pytest.mark.parametrize("settings", SCHEMAS.values(), ids=SCHEMAS)
def test_every_number_refuses_nan_and_infinity(settings: Any) -> None:
    for key in walk_keys(settings):
        if key.allowed is None:
            continue
        before = getattr(key.section, key.field.name)
        for absurd in (math.nan, math.inf, -math.inf):
            setattr(key.section, key.field.name, {"own": absurd} if isinstance(before, dict) else absurd)
            with pytest.raises(UserError, match=rf"^{key.name}(\.own)?: .*finite"):
                check_ranges(settings)
        setattr(key.section, key.field.name, before)


def test_the_walk_reaches_sections_in_dicts() -> None:
    config = Config()
    config.reward.terms["second"] = RewardTerm()
    config.evaluate.per_suite["own"] = Decoding()
    names = {key.name for key in walk_keys(config)}
    assert {"reward.terms.second.pool.gpus", "evaluate.per_suite.own.top_p", "seed"} <= names


@pytest.mark.parametrize(
    ("allowed", "inside", "outside", "text"),
    [
        (at_least(1), (1, 2.5), (0.99, math.nan, math.inf), "1 or more"),
        (at_most(0), (0, -2.5), (0.01, math.nan, -math.inf), "0 or less"),
        (above(0), (0.01,), (0, -1, math.nan), "greater than 0"),
        (between(0, 1), (0, 1), (-0.01, 1.01), "in [0, 1]"),
        (up_to(1), (1,), (0,), "in (0, 1]"),
        (below(0.5), (0,), (0.5,), "in [0, 0.5)"),
        (FINITE, (-5, 5), (math.nan, math.inf, -math.inf), "finite"),
    ],
)
def test_ranges(allowed: Range, inside: tuple[float, ...], outside: tuple[float, ...], text: str) -> None:
    assert str(allowed) == text
    assert all(value in allowed for value in inside)
    assert not any(value in allowed for value in outside)


def test_sections_do_not_share_their_defaults() -> None:
    first, second = Config(), Config()
    first.reward.terms["plausibility"].weight = 7.0
    first.policy.lora.targets.append("q_proj")
    assert second.reward.terms["plausibility"].weight == 0.25
    assert second.policy.lora.targets == ["all-linear"]


def test_a_configuration_survives_yaml() -> None:
    text = OmegaConf.to_yaml(to_dict(Config()))
    read = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(text))
    assert OmegaConf.to_object(read) == Config()


def test_stages_are_named_like_their_sections() -> None:
    sections = {section.name for section in fields(Config)}
    assert set(STAGES) <= sections
    config = Config()
    assert stages(config) == STAGES
    config.preference.data.hub = "owner/pairs"
    assert stages(config) == ("preference", "evaluate")


def test_every_loss_has_its_own_defaults_and_keeps_what_is_set() -> None:
    for loss, entry in PREFERENCE_LOSSES.items():
        defaults = dict(entry.defaults)
        assert hyper_parameters(PreferenceConfig(loss)) == defaults
        for name in defaults:
            settings = PreferenceConfig(loss, **{name: 0.25})
            assert hyper_parameters(settings) == defaults | {name: 0.25}
    assert not PREFERENCE_LOSSES["simpo"].needs_reference
    assert not PREFERENCE_LOSSES["orpo"].needs_reference
