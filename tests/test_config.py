"""The schema: every recipe loads, and every kind of wrong configuration is one line with key, value and the
way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from pns.config import (
    LOSS_DEFAULTS,
    Config,
    Preference,
    PreferenceLoss,
    hyper_parameters,
    load,
    reference_free,
    to_dict,
)
from pns.errors import UserError

RECIPES = sorted(Path(__file__).parents[1].glob("recipes/*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_takes_its_name(recipe: Path) -> None:
    config = load(recipe)
    assert config.name == recipe.stem
    assert to_dict(config)["models"]["backbone"] == config.models.backbone != ""


def test_there_are_recipes() -> None:
    assert {"tiny-qwen2", "tiny-llama", "tiny-qwen3"} <= {path.stem for path in RECIPES}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text("models: {backbone: some/where}\nseed: 3\n")
    return path


def test_recipe_overrides_schema_and_override_overrides_recipe(recipe: Path) -> None:
    assert load(recipe).seed == 3
    assert load(recipe, ["seed=4", "rl.optimizer.learning_rate=0.5"]).rl.optimizer.learning_rate == 0.5
    assert load(recipe).rl.steps == Config().rl.steps


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rl.stepz=3", ("rl.stepz", "unknown key", "rl.steps")),
        ("rl.steps=many", ("rl.steps", "many")),
        ("rl.steps=0", ("rl.steps", "0", "greater than 0")),
        ("rl.completions_per_problem=1", ("completions_per_problem", "1", "at least 2")),
        ("preference.margin=half", ("preference.margin", "half", "first_divergent_token")),
        ("preference.loss=dpo", ("preference.loss", "dpo", "sigmoid")),
        ("preference.beta=0", ("preference.beta", "0", "greater than 0")),
        ("preference.beta=.nan", ("preference.beta", "nan", "greater than 0")),
        (
            "preference.label_smoothing=0.1",
            ("preference.label_smoothing", "loss=sigmoid", "it reads beta", "cdpo or robust"),
        ),
        ("preference.target_margin=0.5", ("preference.target_margin", "simpo")),
        ("reward.max_masked_fraction=1.5", ("reward.max_masked_fraction", "1.5", "[0, 1]")),
        ('models.backbone=""', ("models.backbone", "warm_start.steps")),
        ("reverse_rl.start=path", ("reverse_rl.start", "models.generator")),
        ("data.source=jsonl", ("data.jsonl.train",)),
        ("policy.dtype=int8", ("policy.dtype", "int8", "bfloat16")),
        ("rl.optimizer.schedule=linear", ("rl.optimizer.schedule", "linear", "cosine")),
        ("warm_start.architecture=gpt2", ("warm_start.architecture", "gpt2", "qwen3")),
        ("name=a/b", ("name", "a/b")),
        ("seed", ("seed", "key=value")),
    ],
)
def test_wrong_configuration_is_one_line(recipe: Path, override: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        load(recipe, [override])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("loss", "key", "value", "words"),
    [
        ("cdpo", "label_smoothing", "0.5", ("[0, 0.5)",)),
        ("robust", "label_smoothing", "-0.1", ("0 or more",)),
        ("rpo", "nll_weight", "-1", ("0 or more",)),
        ("simpo", "target_margin", ".inf", ("inf", "0 or more")),
        ("kto", "desirable_weight", "0", ("greater than 0",)),
        ("orpo", "beta", "0.1", ("loss=orpo", "it reads odds_ratio_weight")),
        ("offset", "offset_scale", "-1", ("0 or more",)),
    ],
)
def test_hyper_parameters_of_losses_have_ranges(
    recipe: Path, loss: str, key: str, value: str, words: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as caught:
        load(recipe, [f"preference.loss={loss}", f"preference.{key}={value}"])
    for word in (f"preference.{key}", *words):
        assert word in str(caught.value)


def test_every_loss_has_its_own_defaults_and_keeps_what_is_set(recipe: Path) -> None:
    for loss, defaults in LOSS_DEFAULTS.items():
        settings = load(recipe, [f"preference.loss={loss.value}"]).preference
        assert hyper_parameters(settings) == defaults == hyper_parameters(Preference(loss))
        for name in defaults:
            settings = load(recipe, [f"preference.loss={loss.value}", f"preference.{name}=0.25"]).preference
            assert hyper_parameters(settings) == defaults | {name: 0.25}
            assert getattr(settings, name) == 0.25
    assert set(LOSS_DEFAULTS) == set(PreferenceLoss)
    assert [loss.value for loss in PreferenceLoss if reference_free(loss)] == ["simpo", "orpo"]


def test_missing_and_malformed_recipe(tmp_path: Path) -> None:
    (tmp_path / "there.yaml").write_text("seed: [1\n")
    with pytest.raises(UserError, match=r"does not exist; there are: .*there\.yaml"):
        load(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="not valid YAML"):
        load(tmp_path / "there.yaml")
