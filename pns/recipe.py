"""From a recipe to a checked `Config`.

`load(path, overrides)` merges schema < the recipe that a recipe `extends` < the recipe < `key=value`
overrides. Everything that can be wrong without looking at the cluster is said here, in one line, before
anything starts. No heavy import: errors answer within a second.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from pns.config import (
    Config,
    Data,
    DataSource,
    GeneratorStart,
    PreferenceConfig,
    RatioLevel,
    TermKind,
    external_pairs,
    hyper_parameters,
)
from pns.errors import UserError, did_you_mean
from pns.fields import Key, check_ranges, walk_keys
from pns.preference_losses import PREFERENCE_LOSSES

# Of data files; a model is a directory, and the dots of Hub ids (Qwen2.5-0.5B) are no suffixes.
FILE_SUFFIXES = (".json", ".jsonl", ".gz", ".parquet")
# Parts of a run that have a name beside those of reward terms, in metrics and among the services.
RESERVED_TERMS = ("rollout", "policy", "verifier", "verdict", "format")

Settings = TypeVar("Settings")
Layer = tuple[DictConfig, Path]  # keys, and the directory that their paths are relative to


def load(path: str | Path | None, overrides: list[str] | None = None, training: bool = True) -> Config:
    """Read the recipe at `path` (None: the defaults), apply `key=value` overrides, check it; `training` False
    asks for no training data and no reward.

    Paths become absolute: those of a recipe are relative to its file, those of `overrides` to the working
    directory. Raises UserError with key, value and the way out.
    """
    source = "an override" if path is None else f"{path} or an override"
    recipes = [] if path is None else _read(Path(path))
    config = merge_layers(Config, [*recipes, override_layer(overrides or [])], source)
    config.name = config.name or Path(path or "defaults").stem
    config.runs = str(Path(config.runs).absolute())  # nobody said it: the default is in the working directory
    samples = training and not external_pairs(config)
    check_config(config, samples)
    check_data(config.data, samples)
    for name, value in hyper_parameters(config.preference).items():
        setattr(config.preference, name, value)
    return config


def _read(recipe: Path) -> list[Layer]:
    """The recipe after the one it `extends` (a path relative to it), if any."""
    if not recipe.is_file():
        names = sorted(map(str, recipe.parent.glob("*.yaml")))
        there = f"; there are: {', '.join(names)}" if names else ""
        raise UserError(f"recipe {recipe} does not exist{there}")
    try:
        loaded = OmegaConf.load(recipe)
    except yaml.YAMLError as error:
        raise UserError(f"recipe {recipe} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"recipe {recipe} is a list; it has to be keys and values")
    base = loaded.pop("extends", None)
    layer = (loaded, recipe.absolute().parent)
    if base is None:
        return [layer]
    if not (recipe.parent / base).is_file():
        raise UserError(f"extends: {recipe.parent / base} does not exist (in {recipe})")
    return [*_read(recipe.parent / base), layer]


def override_layer(overrides: list[str]) -> Layer:
    """`key=value` words of a command. Raises UserError."""
    for override in overrides:
        if "=" not in override:
            raise UserError(f"override {override!r} is not of the form key=value")
    return OmegaConf.from_dotlist(overrides), Path.cwd()


def merge_layers(schema: type[Settings], layers: list[Layer], source: str) -> Settings:
    """The defaults of `schema` with `layers` over them, later ones over earlier ones, and the paths of each
    absolute. Raises UserError, which names `source`."""
    merged = OmegaConf.structured(schema)
    try:
        # After each layer: which of them says a path decides what it is relative to.
        for layer, directory in layers:
            merged = OmegaConf.merge(merged, layer)
            for key in walk_keys(OmegaConf.to_object(merged)):
                if "path" in key.field.metadata:
                    _resolve_paths(merged, layer, key, directory)
        return cast(Settings, OmegaConf.to_object(merged))
    except ConfigKeyError as error:
        key_name = error.full_key or str(error.key)
        raise UserError(f"{key_name}: unknown key (in {source}){suggest_key(key_name, schema())}") from error
    except ValidationError as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]} (in {source})") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{source}: {str(error).splitlines()[0]}") from error


def _resolve_paths(merged: DictConfig, layer: DictConfig, key: Key, directory: Path) -> None:
    # A ${reference} to a key of an earlier layer resolves to nothing in this one; its target is absolute.
    said = OmegaConf.select(layer, key.name, throw_on_resolution_failure=False)
    named = key.field.metadata.get("named", False)
    if isinstance(said, Mapping):
        resolved: Any = {name: resolve_path(str(value), directory, named) for name, value in said.items()}
    elif said is not None:
        resolved = resolve_path(str(said), directory, named)
    else:
        return
    OmegaConf.update(merged, key.name, resolved, merge=True)


def resolve_path(value: str, directory: Path, named: bool) -> str:
    """`value` as an absolute path, relative to `directory`; empty stays empty.

    Where a key also takes names (`named`), a value is a path if it exists or the folder it is in does, if it
    begins like one (/, ./, ../, ~) or ends like a file; another stays as it is.
    """
    path = directory / Path(value).expanduser()
    like_path = value.startswith(("/", "./", "../", "~")) or value.endswith(FILE_SUFFIXES)
    there = path.exists() or (path.parent != directory and path.parent.is_dir())
    if not value or (named and not like_path and not there):
        return value
    # Not `resolve`: a link in a recipe's path may be there to be changed.
    return os.path.normpath(path)


def suggest_key(name: str, settings: Any) -> str:
    """The end of a message about a key `name` that `settings` do not have."""
    keys = {key.name for key in walk_keys(settings)}
    sections = {key_name.rpartition(".")[0] for key_name in keys}
    return did_you_mean(name, (keys | sections) - {""})


def check_config(config: Config, samples: bool) -> None:
    """Every number against its range, then what keys say of each other; of the reward only where the run
    `samples` its pairs. Raises UserError."""
    check_ranges(config)
    check_loss(config.preference)
    for check_keys in (*CHECKS, *REWARD_CHECKS) if samples else CHECKS:
        check_keys(config)


def check_loss(settings: PreferenceConfig) -> None:
    """The loss is in the table, and what is set is what it reads."""
    if settings.loss not in PREFERENCE_LOSSES:
        hint = f"{did_you_mean(settings.loss, PREFERENCE_LOSSES)}; there are {', '.join(PREFERENCE_LOSSES)}"
        raise UserError(f"preference.loss: {settings.loss!r} is not the name of a loss{hint}")
    reads = PREFERENCE_LOSSES[settings.loss].defaults
    for name in sorted({key for entry in PREFERENCE_LOSSES.values() for key in entry.defaults}):
        value = getattr(settings, name)
        if value is not None and name not in reads:
            readers = [loss for loss, entry in PREFERENCE_LOSSES.items() if name in entry.defaults]
            fault = f"{value} is not read by preference.loss={settings.loss} (it reads {', '.join(reads)})"
            raise UserError(f"preference.{name}: {fault}: remove it, or choose {' or '.join(readers)}")


def check_name(config: Config) -> None:
    if "/" in config.name or config.name in (".", ".."):
        raise UserError(f"name: {config.name!r} must be a directory name, without slashes")


def check_model_keys(config: Config) -> None:
    if not config.models.backbone:
        raise UserError("models.backbone is empty: name a model directory or a Hub id (owner/name)")
    if config.reverse_rl.start is GeneratorStart.path and not config.models.generator:
        raise UserError("reverse_rl.start is path and models.generator is empty: name the generator's model")


def check_sampling(config: Config) -> None:
    """Of training: what is sampled from has to be what is trained."""
    for section, settings in (("rl", config.rl), ("reverse_rl", config.reverse_rl)):
        if settings.top_p != 1:
            raise UserError(
                f"{section}.top_p: {settings.top_p}; the policy's log-probabilities are of all tokens, so "
                "training has to sample from all: set it to 1, and use the temperature"
            )
        if settings.importance_cap and settings.temperature != 1:
            raise UserError(
                f"{section}.importance_cap: {settings.importance_cap} needs the rollout engine's "
                f"log-probabilities, which are of temperature 1: set {section}.temperature=1, or the cap to 0"
            )
        if settings.dual_clip and settings.ratio is RatioLevel.sequence:
            raise UserError(f"{section}.dual_clip is for ratio=token: set it to 0")
        if settings.importance_cap and settings.ratio is RatioLevel.sequence:
            raise UserError(f"{section}.importance_cap is for ratio=token: set it to 0")
        if 0 < settings.dual_clip <= 1 + settings.clip_high:
            raise UserError(
                f"{section}.dual_clip: {settings.dual_clip} must be greater than 1 + clip_high "
                f"({1 + settings.clip_high:g}), or 0"
            )
        if settings.overlong_tokens > config.rollout.max_new_tokens:
            raise UserError(
                f"{section}.overlong_tokens: {settings.overlong_tokens} is more than rollout.max_new_tokens "
                f"({config.rollout.max_new_tokens}): lower it"
            )


def check_lora(config: Config) -> None:
    if not config.policy.lora.targets:
        raise UserError(
            "policy.lora.targets is empty: name linear layers, e.g. [q_proj,v_proj], or [all-linear]"
        )


def check_pools(config: Config) -> None:
    if config.placement.policy.gpus > 1:
        raise UserError(
            f"placement.policy.gpus: {config.placement.policy.gpus} must be at most 1, a rank's one GPU: add "
            "ranks with placement.policy.replicas"
        )
    pools = {"placement.rollout": config.placement.rollout}
    pools |= {f"reward.terms.{name}.pool": term.pool for name, term in config.reward.terms.items()}
    for key, pool in pools.items():
        if pool.gpus > 1 and not float(pool.gpus).is_integer():
            raise UserError(
                f"{key}.gpus: {pool.gpus} must be whole where it is above 1: only one GPU can be shared"
            )


def check_terms(config: Config) -> None:
    for name, term in config.reward.terms.items():
        key = f"reward.terms.{name}"
        if not re.fullmatch("[a-z][a-z0-9_]*", name) or name in RESERVED_TERMS:
            raise UserError(
                f"{key}: {name!r} must be a plain word (a-z, 0-9, _) and none of {', '.join(RESERVED_TERMS)}"
            )
        if term.kind is TermKind.judge and term.weight > 0 and not term.model:
            raise UserError(
                f"{key}.model is empty: name the judge's model directory or Hub id, or set {key}.weight=0"
            )


def check_rewards(config: Config) -> None:
    reward = config.reward
    best_wrong = reward.wrong + sum(term.weight for term in reward.terms.values())
    if reward.malformed > reward.correct:
        raise UserError(
            f"reward.malformed: {reward.malformed} must be at most reward.correct, {reward.correct}: "
            "nothing is worth less than a malformed completion"
        )
    if reward.correct >= best_wrong:
        raise UserError(
            f"reward.correct: {reward.correct} must be less than what a wrong completion can reach, "
            f"{best_wrong} (reward.wrong and the weights of reward.terms): the generator learns wrong ones"
        )


def check_term_names(config: Config) -> None:
    """What a stage reads of a reward term, the term has."""
    if config.reverse_rl.stop_patience > 0:
        check_computed(
            config, "reverse_rl.stop_term", config.reverse_rl.stop_term, "reverse_rl.stop_patience=0"
        )
    if config.synthesize.min_quantile > 0:
        check_computed(
            config, "synthesize.quantile_term", config.synthesize.quantile_term, "synthesize.min_quantile=0"
        )
    scored_by, terms = config.pair.scored_by, config.reward.terms
    scoring = [name for name, term in terms.items() if term.kind is TermKind.reward_model]
    if scored_by not in scoring:
        raise UserError(
            f"pair.scored_by: {scored_by!r} must be a term of kind reward_model: {' or '.join(scoring)}"
        )


def check_computed(config: Config, key: str, name: str, instead: str) -> None:
    """`key` names a term that is computed; `instead` is the setting that needs none."""
    computed = [term_name for term_name, term in config.reward.terms.items() if term.weight > 0]
    if name not in computed:
        raise UserError(
            f"{key}: {name!r} must be a term of reward.terms with a weight greater than 0 (there are: "
            f"{', '.join(computed) or 'none'}): name one, give it a weight, or set {instead}"
        )


def check_pairs(config: Config) -> None:
    data, key = config.preference.data, "preference.data"
    if data.path and data.hub:
        raise UserError(
            f"{key}.path and {key}.hub are both set ({data.path}, {data.hub}): pairs come from one of them"
        )
    if data.path and not data.path.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        raise UserError(f"{key}.path: {data.path!r} is not a .jsonl, .jsonl.gz or .parquet file")
    if data.path and not Path(data.path).is_file():
        raise UserError(f"{key}.path: {data.path!r} is not a file")
    if data.hub and Path(data.hub).exists():
        raise UserError(
            f"{key}.hub: {data.hub!r} is a path here and would hide the data set of the Hub: name a file "
            f"with {key}.path"
        )
    if data.hub and not re.fullmatch("[0-9a-f]{40}", data.revision):
        raise UserError(
            f"{key}.revision: {data.revision!r} is not the full hash of a commit (40 hexadecimal digits): a "
            f"branch or tag may move; the history of {data.hub} on the Hub lists the hashes"
        )
    if data.revision and not data.hub:
        raise UserError(
            f"{key}.revision is set and {key}.hub is empty: name the data set with {key}.hub=OWNER/NAME"
        )
    if not data.split:
        raise UserError(f'{key}.split is empty: name a split, e.g. "train"')


CHECKS: tuple[Callable[[Config], None], ...] = (
    check_name,
    check_model_keys,
    check_sampling,
    check_lora,
    check_pools,
    check_pairs,
)
REWARD_CHECKS: tuple[Callable[[Config], None], ...] = (check_terms, check_rewards, check_term_names)


def check_data(data: Data, training: bool) -> None:
    """What can be wrong with `data` without reading a file; `training` False: only suites are needed. Raises
    UserError."""
    if data.source is DataSource.tiny:
        if data.benchmarks and training:
            raise UserError("data.benchmarks: the tiny world has its own suites; set data.source=jsonl")
        return
    if training:
        check_training_files(data)
    check_suites(data)


def check_training_files(data: Data) -> None:
    if not data.jsonl.train:
        raise UserError("data.jsonl.train is empty: name a file or a training set")
    for key in ("train", "reward", "preference"):
        path = getattr(data.jsonl, key)
        if re.search(r"[./]", path) and not Path(path).is_file():
            raise UserError(f"data.jsonl.{key}: {path!r} is not a file (nor the name of a training set)")


def check_suites(data: Data) -> None:
    suites = data.jsonl.suites
    if not suites and not data.benchmarks:
        raise UserError(
            "data.jsonl.suites and data.benchmarks are empty: name at least one suite, e.g. "
            "data.benchmarks=[gsm8k,math500] or data.jsonl.suites.own=FILE"
        )
    for suite, path in suites.items():
        key = f"data.jsonl.suites.{suite}"
        if suite == "mean":
            raise UserError(f"{key}: the name is taken by the mean over all suites; choose another")
        if suite in data.benchmarks or "/" in suite:
            raise UserError(f"{key}: a suite's name is unique and has no slash; choose another")
        if not Path(path).is_file():
            raise UserError(f"{key}: {path!r} is not a file")
