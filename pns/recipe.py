"""From a recipe to a checked `Config`.

`load(path, overrides)` merges schema < the recipe that a recipe `extends` < the recipe < further files <
`key=value` overrides. Everything that can be wrong without looking at the cluster is said here, in one line,
before anything starts. No heavy import: errors answer within a second.
"""

import copy
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from pns.config import (
    BcpgArm,
    Config,
    Data,
    DataSource,
    EngineKind,
    GeneratorStart,
    Grading,
    GrpoConfig,
    Method,
    Normalisation,
    Pool,
    PreferenceConfig,
    RatioLevel,
    RewardTerm,
    ServicePool,
    SplitterKind,
    TermKind,
    WeightTransport,
    When,
    arm_parameters,
    external_pairs,
    hyper_parameters,
    labels_steps,
    other_negatives,
    services,
    step_services,
)
from pns.errors import UserError, did_you_mean
from pns.fields import Key, check_ranges, walk_keys
from pns.offline_objectives import OFFLINE_OBJECTIVES
from pns.preference_losses import PREFERENCE_LOSSES

# Of data files; a model is a directory, and the dots of Hub ids (Qwen2.5-0.5B) are no suffixes.
FILE_SUFFIXES = (".json", ".jsonl", ".gz", ".parquet", ".csv")
LONGEST_NAME = 200  # bytes; file systems take 255, and tracking adds to it
GATES = ("malformed", "correct", "box_only_flip")  # in the order of `pns.algo.reward`
_OF_WRONG = (TermKind.verdict, TermKind.diversity)  # 0 of every right completion
# Keys of what comes before the arms of a study, and of the run that they are in.
_BEFORE_ARMS = ("data.", "models.backbone", "models.reward_model", "rl.", "reward_model.")
_OF_RUN = ("seed", "runs", "name", "method", "study.arms")
# Parts of a run that have a name beside those of reward terms, in metrics and among the services.
RESERVED_TERMS = ("rollout", "policy", "verifier", "verdict", "format", "step_judge", "process_reward")

Settings = TypeVar("Settings")
Check = Callable[[Config], Iterator[str]]  # what is wrong, in the order in which it is to be mended
Layer = tuple[DictConfig, Path]  # keys, and the directory that their paths are relative to


def load(
    path: str | Path | None,
    overrides: list[str] | None = None,
    training: bool = True,
    over: Sequence[Path] = (),
) -> Config:
    """Read the recipe at `path` (None: the defaults), lay the files `over` it, such as a placement, apply
    `key=value` overrides, check it; `training` False asks for no training data and no reward.

    Paths become absolute: those of a file are relative to it, those of `overrides` to the working directory.
    Raises UserError with key, value and the way out.
    """
    config = read(path, overrides, over)
    is_bcpg = config.method is Method.bcpg
    samples = training and (is_bcpg or not external_pairs(config))
    check_config(config, rewards=samples and (not is_bcpg or bool(other_negatives(config))))
    raise_first(data_faults(config.data, samples))
    fill_parameters(config)
    if config.method is Method.study:
        study_arms(config)
    return config


def fill_parameters(config: Config) -> None:
    """Every number that a loss reads is there from here on, for stages and digests alike."""
    for name, value in hyper_parameters(config.preference).items():
        setattr(config.preference, name, value)
    for arm in config.bcpg.arms.values():
        for name, value in arm_parameters(arm).items():
            setattr(arm, name, value)


def study_arms(config: Config) -> dict[str, Config]:
    """Arm of the study -> its configuration: the study's with the arm's words over it. An arm with another
    loss has that loss's own numbers where it names none. Raises UserError for a fault, with the arm."""
    if not config.study.arms:
        raise UserError("study.arms is empty: name at least two, e.g. study.arms.rs=[negatives=rs]")
    arms: dict[str, Config] = {}
    for name, words in config.study.arms.items():
        key = f"study.arms.{name}"
        if not re.fullmatch("[a-z][a-z0-9_]*", name) or name in ("backbone", "target"):
            raise UserError(f"{key}: {name!r} must be a plain word (a-z, 0-9, _), not backbone or target")
        for word in words:
            if word.startswith((*_BEFORE_ARMS, *_OF_RUN)):
                section = word.split("=")[0].split(".")[0]
                raise UserError(f"{key}: {word}: all arms have the same {section}: say it outside the arms")
        base = replace(config)
        if any(word.startswith("preference.loss=") for word in words):
            base.preference = replace(config.preference)
            for read in PREFERENCE_LOSSES[config.preference.loss].defaults:
                setattr(base.preference, read, None)
        try:
            arm = merge_layers(Config, [(OmegaConf.structured(base), Path.cwd()), override_layer(words)], key)
            check_config(arm, rewards=True)
        except (UserError, ValidationError) as error:
            raise UserError(f"{key}: {str(error).splitlines()[0]}") from error
        fill_parameters(arm)
        arms[name] = arm
    return arms


def read(path: str | Path | None, overrides: list[str] | None = None, over: Sequence[Path] = ()) -> Config:
    """As `load`, without its checks. Raises UserError for what is no configuration."""
    files = [*([] if path is None else [Path(path)]), *over]
    layers = [layer for file in files for layer in _read(file)]
    source = " or ".join([*map(str, files), "an override"])
    config = merge_layers(Config, own_parameters([*layers, override_layer(overrides or [])]), source)
    config.name = config.name or Path(path or "defaults").stem
    config.runs = str(Path(config.runs).absolute())  # nobody said it: the default is in the working directory
    return config


def _read(recipe: Path, extended_by: Sequence[Path] = ()) -> list[Layer]:
    """The recipe after the one it `extends` (a path relative to it), if any."""
    if not recipe.is_file():
        folder = recipe if recipe.is_dir() else recipe.parent
        names = sorted(map(str, folder.glob("[!.]*.yaml")))
        there = f"; there are: {', '.join(names)}" if names else ""
        raise UserError(f"recipe {recipe} {'is a directory' if recipe.is_dir() else 'does not exist'}{there}")
    loaded = _parsed(recipe)
    base = loaded.pop("extends", None)  # no key of the schema
    layer = (loaded, recipe.absolute().parent)
    if base is None:
        return [layer]
    if not isinstance(base, str):
        raise UserError(f"recipe {recipe}: extends: {base!r} must be the path of another recipe")
    extended = recipe.parent / base
    if not extended.is_file():
        raise UserError(f"extends: {extended} does not exist (in {recipe})")
    chain = [*extended_by, recipe]
    if any(extended.samefile(earlier) for earlier in chain):
        raise UserError(f"recipe {recipe} extends {base}, which extends it again: name another, or none")
    return [*_read(extended, chain), layer]


def _parsed(recipe: Path) -> DictConfig:
    """What the file says, before it is held against the schema. Raises UserError where that is no YAML of
    keys and values."""
    try:
        text = recipe.read_text(encoding="utf-8-sig")
        said = yaml.safe_load(text)
        # It refuses a key that is there twice, and takes neither a number nor a word.
        loaded = OmegaConf.create(text) if isinstance(said, dict) else None
    except UnicodeDecodeError as error:
        fault = f"is not UTF-8 text (byte {error.start + 1})"
        raise UserError(f"recipe {recipe} {fault}: save it as UTF-8, or name a YAML file") from error
    except yaml.YAMLError as error:
        raise UserError(f"recipe {recipe} is not valid YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise UserError(f"recipe {recipe} cannot be read ({error.strerror}): name another file") from error
    if not isinstance(said, dict):
        kinds = {list: "a list", type(None): "empty"}
        is_what = kinds.get(type(said), f"the {type(said).__name__} {str(said)[:20]!r}")
        raise UserError(f"recipe {recipe} is {is_what}; it has to be keys and values, such as seed: 1")
    return cast(DictConfig, loaded)


def override_layer(overrides: list[str]) -> Layer:
    """`key=value` words of a command. Raises UserError."""
    for override in overrides:
        if not re.match("[^=]+=", override):
            raise UserError(f"override {override!r} is not of the form key=value")
    try:
        return OmegaConf.from_dotlist(overrides), Path.cwd()
    except yaml.YAMLError as error:
        fault = " ".join(str(error).split())
        raise UserError(f"an override of {', '.join(overrides)} has no value of YAML: {fault}") from error


def own_parameters(layers: list[Layer]) -> list[Layer]:
    """`layers`, where hyper-parameters of preference.loss belong to the loss that they are said with: those
    of earlier layers go where a later one names another loss."""
    names = {name for entry in PREFERENCE_LOSSES.values() for name in entry.defaults}
    loss, kept = PreferenceConfig().loss, list(layers)
    for index, (layer, _) in enumerate(layers):
        said = OmegaConf.select(layer, "preference.loss")
        if said is not None and said != loss:
            loss = said
            kept[:index] = [(_without(earlier, names), where) for earlier, where in kept[:index]]
    return kept


def _without(layer: DictConfig, parameters: AbstractSet[str]) -> DictConfig:
    """The layer without those keys of its section `preference`."""
    layer = copy.deepcopy(layer)
    own = OmegaConf.select(layer, "preference")
    for name in parameters & own.keys() if isinstance(own, DictConfig) else ():
        own.pop(name)
    return layer


def merge_layers(schema: type[Settings], layers: list[Layer], source: str) -> Settings:
    """The defaults of `schema` with `layers` over them, later ones over earlier ones, and the paths of each
    absolute. Raises UserError, which names `source`."""
    merged = OmegaConf.structured(schema)
    try:
        # After each layer: which of them says a path decides what it is relative to.
        for layer, directory in layers:
            thinking = OmegaConf.select(layer, "data.thinking", throw_on_resolution_failure=False)
            if isinstance(thinking, bool):  # what YAML makes of on and off
                OmegaConf.update(layer, "data.thinking", "on" if thinking else "off")
            merged = OmegaConf.merge(merged, layer)
            for key in walk_keys(OmegaConf.to_object(merged)):
                if "path" in key.field.metadata:
                    _resolve_paths(merged, layer, key, directory)
        # Enums and nested dataclasses, no longer OmegaConf's own nodes.
        return cast(Settings, OmegaConf.to_object(merged))
    except ConfigKeyError as error:
        key_name = error.full_key or str(error.key)
        raise UserError(f"{key_name}: unknown key (in {source}){suggest_key(key_name, schema())}") from error
    except ValidationError as error:
        raise UserError(f"{section_fault(layer, schema()) or value_fault(error)} (in {source})") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{source}: {str(error).splitlines()[0]}") from error


def value_fault(error: ValidationError) -> str:
    said = str(error).splitlines()[0]
    if "not a ListConfig" in said:  # in OmegaConf's words: AnyNode is not a ListConfig, list or tuple.
        said = f"the value must be a list: {error.full_key}=[VALUE]"
    return f"{error.full_key}: {said}"


def section_fault(layer: DictConfig, settings: Any, prefix: str = "") -> str:
    """Where `layer` gives a section of `settings` a value of its own, what is wrong; empty: nowhere."""
    for name, own in vars(settings).items():
        said = layer._get_node(name) if name in layer else None
        if not is_dataclass(own) or said is None:
            continue
        key = f"{prefix}{name}"
        if isinstance(said, DictConfig):
            if fault := section_fault(said, own, f"{key}."):
                return fault
        else:
            first = ", ".join(f"{key}.{inner}" for inner in list(vars(own))[:3])
            return f"{key}: {said} is no section: name one of its keys, {first}, ... (pns config {key})"
    return ""


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
    OmegaConf.update(merged, key.name, resolved, merge=True)  # merge: of a dict only the paths that were said


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


# Where people look for a key that is elsewhere.
_SOUGHT = {
    "models.judge": "reward.terms.coherence.model",
    "pair.prefer_shared_prefix": "pair.prefer (first, shared_prefix or likely)",
}


def suggest_key(name: str, settings: Any) -> str:
    """The end of a message about a key `name` that `settings` do not have."""
    keys = {key.name for key in walk_keys(settings)}
    if name in _SOUGHT:
        return f"; did you mean {_SOUGHT[name]}?"
    words = name.split(".")
    # data.train for data.jsonl.train: a section is left out.
    within = [key for key in sorted(keys) if len(words) > 1 and _in_order(words, key.split("."))]
    if within:
        return f"; did you mean {within[0]}?"
    sections = {key_name.rpartition(".")[0] for key_name in keys}
    return did_you_mean(name, (keys | sections) - {""})


def _in_order(words: Sequence[str], among: Sequence[str]) -> bool:
    left = iter(among)
    return words[-1] == among[-1] and all(word in left for word in words)


def check_config(config: Config, rewards: bool) -> None:
    """Every number against its range, then what keys say of each other; of the composite reward only where
    the run has it (`rewards`). Raises UserError for the first fault."""
    check_ranges(config)
    checks: list[Check] = [loss_faults, key_faults, sampling_faults, pool_faults, pair_faults]
    if config.method is Method.bcpg:
        checks += [arm_faults, label_faults]
    # Terms by their names first: what comes after them looks a term up.
    checks += [term_faults, reward_faults, term_name_faults] if rewards else []
    raise_first(fault for check in checks for fault in check(config))


def raise_first(faults: Iterator[str]) -> None:
    for fault in faults:
        raise UserError(fault)


def loss_faults(config: Config) -> Iterator[str]:
    """The loss is in the table, and what is set is what it reads."""
    settings = config.preference
    if settings.loss not in PREFERENCE_LOSSES:
        near = (
            "; DPO is sigmoid" if settings.loss == "dpo" else did_you_mean(settings.loss, PREFERENCE_LOSSES)
        )
        hint = f"{near}; there are {', '.join(PREFERENCE_LOSSES)}"
        yield f"preference.loss: {settings.loss!r} is not the name of a loss{hint}"
    reads = PREFERENCE_LOSSES[settings.loss].defaults
    for name in sorted({key for entry in PREFERENCE_LOSSES.values() for key in entry.defaults}):
        value = getattr(settings, name)
        if value is not None and name not in reads:
            readers = [loss for loss, entry in PREFERENCE_LOSSES.items() if name in entry.defaults]
            fault = f"{value} is not read by preference.loss={settings.loss} (it reads {', '.join(reads)})"
            yield f"preference.{name}: {fault}: remove it, or choose {' or '.join(readers)}"


def arm_faults(config: Config) -> Iterator[str]:
    """Each arm of bcpg has an objective of the table and sets what that reads."""
    if not config.bcpg.arms:
        yield "bcpg.arms is empty: name at least one, e.g. bcpg.arms.nsa.objective=nsa"
    for name, arm in config.bcpg.arms.items():
        key = f"bcpg.arms.{name}"
        if not re.fullmatch("[a-z][a-z0-9_]*", name) or name in ("backbone", "target"):
            yield f"{key}: {name!r} must be a plain word (a-z, 0-9, _), and not backbone or target"
        if arm.objective not in OFFLINE_OBJECTIVES:
            there = ", ".join(OFFLINE_OBJECTIVES)
            hint = f"{did_you_mean(arm.objective, OFFLINE_OBJECTIVES)}; there are {there}"
            yield f"{key}.objective: {arm.objective!r} is not the name of an objective{hint}"
        entry = OFFLINE_OBJECTIVES[arm.objective]
        unread = {
            own for other in OFFLINE_OBJECTIVES.values() for own in other.defaults
        } - entry.defaults.keys()
        for unset in sorted(unread):
            if (value := getattr(arm, unset)) is not None:
                reads = ", ".join(entry.defaults) or "none"
                fault = f"{value} is not read by objective={arm.objective} (it reads {reads})"
                yield f"{key}.{unset}: {fault}: remove it"
        if arm.constraint is not BcpgArm().constraint and not entry.constrained:
            yield f"{key}.constraint is not read by objective={arm.objective}: remove it"
        if len(set(arm.negatives)) < len(arm.negatives) or not arm.negatives:
            yield f"{key}.negatives: [{', '.join(arm.negatives)}] must name sources, each once, e.g. [own]"


def label_faults(config: Config) -> Iterator[str]:
    """What labels steps is there."""
    own = config.bcpg
    if own.segments.min_tokens > own.segments.max_tokens:
        fault = f"{own.segments.min_tokens} is more than max_tokens, {own.segments.max_tokens}"
        yield f"bcpg.segments.min_tokens: {fault}: lower it"
    if own.segments.splitter is SplitterKind.sat and not own.segments.sat_model:
        yield "bcpg.segments.sat_model is empty: name the directory of a Segment-any-Text model"
    if not labels_steps(config):
        return
    models = {"step_judge": own.step_judge.model, "process_reward": own.process_reward.model}
    for service in step_services(config):
        if not models[service]:
            other = next(name for name in models if name != service)
            way_out = f"name a model, or ask the other alone with bcpg.rule={other.removeprefix('step_')}"
            yield f"bcpg.{service}.model is empty: {way_out}"


def key_faults(config: Config) -> Iterator[str]:
    if "/" in config.name or config.name in (".", ".."):
        yield f"name: {config.name!r} must be a directory name, without slashes"
    if (length := len(config.name.encode())) > LONGEST_NAME:
        yield f"name: {length} bytes are too long for a directory: choose one of at most {LONGEST_NAME}"
    if not config.models.backbone:
        yield "models.backbone is empty: name a model directory or a Hub id (owner/name)"
    starts = {"reverse_rl.start is": [config.reverse_rl.start], "mixture.starts has": config.mixture.starts}
    for said, own in starts.items():
        if GeneratorStart.path in own and not config.models.generator:
            yield f"{said} path and models.generator is empty: name the generator's model"
    for key, names in (("sources", config.mixture.sources), ("starts", config.mixture.starts)):
        if len(set(names)) < len(names):
            yield f"mixture.{key}: {', '.join(names)} names one twice: name each once"
    if config.mixture.starts and "pns" not in config.mixture.sources:
        yield "mixture.starts are of source pns, which mixture.sources does not name: add it, or remove them"
    if not config.mixture.sources or "mixed" in config.mixture.sources:
        fault = f"[{', '.join(config.mixture.sources)}] must be sources of their own, at least one"
        yield f"mixture.sources: {fault}; e.g. [pns,rs]"
    named = (config.negatives, *config.mixture.sources)
    if "file" in named and not Path(config.sources.file).is_file():
        yield f"sources.file: {config.sources.file!r} is not a file: name one for negatives=file"
    low, high = config.synthesize.min_log_prob, config.synthesize.max_log_prob
    if low is not None and high is not None and low > high:
        way_out = "nothing is in this range: lower it, or set either to null"
        yield f"synthesize.min_log_prob: {low} is above max_log_prob, {high}; {way_out}"
    if not config.policy.lora.targets:
        yield "policy.lora.targets is empty: name linear layers, e.g. [q_proj,v_proj], or [all-linear]"


def sampling_faults(config: Config) -> Iterator[str]:
    """Of RL: what is sampled from has to be what is trained, and a bound has to be one."""
    max_tokens = config.rollout.max_new_tokens
    for section, own in (("rl", config.rl), ("reverse_rl", config.reverse_rl)):
        sequence, highest = own.ratio is RatioLevel.sequence, 1 + own.clip_high
        if own.top_p != 1:
            way_out = "training has to sample from all tokens, whose log-probabilities it trains: set it to 1"
            yield f"{section}.top_p: {own.top_p}; {way_out}, and use the temperature"
        if own.importance_cap and own.temperature != 1:
            fault = "the rollout engine's log-probabilities are of temperature 1"
            yield f"{section}.importance_cap: {own.importance_cap}; {fault}: set it to 1, or the cap to 0"
        for name in ("dual_clip", "importance_cap"):
            if sequence and getattr(own, name):
                yield f"{section}.{name} is read by {section}.ratio=token alone: set it to 0"
        if 0 < own.dual_clip <= highest:
            yield f"{section}.dual_clip: {own.dual_clip} must be 0, or above 1 + clip_high ({highest:g})"
        if own.overlap:
            yield from overlap_faults(config, section, own)
        if own.overlong_tokens > max_tokens:
            fault = f"{own.overlong_tokens} is more than rollout.max_new_tokens, {max_tokens}"
            yield f"{section}.overlong_tokens: {fault}: lower it"


def overlap_faults(config: Config, section: str, own: GrpoConfig) -> Iterator[str]:
    """Sampling and training at a time need GPUs of their own, and a bound on what the weights' age does."""
    if config.placement.colocate:
        fault = "rollout and policy take turns on the same GPUs (placement.colocate)"
        yield f"{section}.overlap: {fault}: set it to false, or placement.colocate=[]"
    if not own.importance_cap:
        fault = "clipping does not bound tokens of negative advantage, whose sampler is one step older"
        yield f"{section}.overlap: {fault}: set {section}.importance_cap, e.g. to 2"
    if own is config.reverse_rl and config.reverse_rl.refresh_every:
        fault = "the reward model changes between two steps"
        yield f"{section}.overlap: {fault}: set it to false, or {section}.refresh_every=0"


def pool_faults(config: Config) -> Iterator[str]:
    gpus = config.placement.policy.gpus
    if gpus > 1:
        way_out = "add ranks with placement.policy.replicas"
        yield f"placement.policy.gpus: {gpus} must be at most 1, a rank's one GPU: {way_out}"
    shard_group, ranks = config.policy.fsdp_size, config.placement.policy.replicas
    if shard_group and ranks % shard_group:
        way_out = f"set it to a divisor of {ranks}, or to 0 for one copy of the model"
        yield f"policy.fsdp_size: {shard_group} does not divide placement.policy.replicas, {ranks}: {way_out}"
    yield from colocation_faults(config)
    rollout_gpus = config.placement.rollout.gpus
    if rollout_gpus > 1 and not float(rollout_gpus).is_integer():
        fault = "must be whole where it is above 1: only one GPU can be shared"
        yield f"placement.rollout.gpus: {rollout_gpus} {fault}"
    judges = {
        f"reward.terms.{name}.pool"
        for name, term in config.reward.terms.items()
        if term.kind is TermKind.judge
    }
    service_pools = {f"{service.key}.pool": service.pool for service in services(config).values()}
    for key, service in service_pools.items():
        on_vllm = service.engine is EngineKind.vllm
        if on_vllm and key not in judges:
            yield f"{key}.engine: vllm runs the judges of reward.terms alone: set it to transformers"
        if service.gpus > 1 and not on_vllm:
            fault = "must be at most 1, as transformers splits no model over GPUs"
            yield f"{key}.gpus: {service.gpus} {fault}: add replicas, or set engine=vllm for a judge"
        if service.gpus > 1 and not float(service.gpus).is_integer():
            yield f"{key}.gpus: {service.gpus} must be whole where it is above 1: only one GPU can be shared"
        yield from growth_faults(key, service)
    pools: dict[str, Pool] = {
        "placement.rollout": config.placement.rollout,
        "placement.policy": config.placement.policy,
    }
    for key, pool in (pools | service_pools).items():
        yield from node_faults(key, pool)


def colocation_faults(config: Config) -> Iterator[str]:
    """Rollout and policy can have the same GPUs, whole ones and as many."""
    key, named = "placement.colocate", config.placement.colocate
    rollout, policy = config.placement.rollout, config.placement.policy
    if not named:
        return
    if sorted(named) != ["policy", "rollout"]:
        fault = "only these two roles take turns"
        yield f"{key}: [{', '.join(named)}] must be [rollout,policy] or []: {fault}"
    if policy.gpus != 1 or rollout.gpus < 1 or not float(rollout.gpus).is_integer():
        fault = f"rollout has {rollout.gpus:g} GPUs a replica and policy {policy.gpus:g} a rank"
        yield f"{key}: {fault}; set placement.policy.gpus=1 and placement.rollout.gpus to 1 or more, whole"
    if rollout.replicas * rollout.gpus != policy.replicas * policy.gpus:
        both = f"rollout has {rollout.replicas} x {rollout.gpus:g} GPUs and policy {policy.replicas} ranks"
        way_out = f"set placement.policy.replicas={rollout.replicas * rollout.gpus:g}"
        yield f"{key}: {both}, which have to be as many: {way_out}"
    if rollout.labels != policy.labels or rollout.resources:
        way_out = "give placement.rollout the labels of placement.policy, and the resources to policy alone"
        yield f"{key}: the two roles lie on the same nodes: {way_out}"
    if config.rollout.weight_transport is WeightTransport.broadcast:
        fault = "NCCL takes no two processes on one GPU"
        yield f"rollout.weight_transport: broadcast cannot be with {key}: {fault}: set it to store or auto"
    if config.policy.fsdp_size % int(rollout.gpus):
        fault = f"{config.policy.fsdp_size} is no multiple of placement.rollout.gpus, {rollout.gpus:g}"
        yield f"policy.fsdp_size: {fault}, whose GPUs lie on one node ({key}): raise it, or set it to 0"


def growth_faults(key: str, pool: ServicePool) -> Iterator[str]:
    """The pool can grow and shrink to what it is."""
    smallest, largest = pool.min_replicas, pool.max_replicas
    if smallest > pool.replicas:
        way_out = f"set it to {pool.replicas} or less, or raise {key}.replicas"
        yield f"{key}.min_replicas: {smallest} is more than {key}.replicas, {pool.replicas}: {way_out}"
    if 0 < largest < pool.replicas:
        way_out = f"set it to {pool.replicas} or more, to 0 for no growth, or lower {key}.replicas"
        yield f"{key}.max_replicas: {largest} is less than {key}.replicas, {pool.replicas}: {way_out}"


def node_faults(key: str, pool: Pool) -> Iterator[str]:
    """Ray takes the pool's resources and labels."""
    for name, amount in pool.resources.items():
        if name in ("CPU", "GPU", "memory", "object_store_memory"):
            way_out = f"use {key}.cpus and {key}.gpus" if name in ("CPU", "GPU") else "remove it"
            yield f"{key}.resources.{name}: {name} is no custom resource: {way_out}"
        if not (0 < amount < math.inf) or (amount > 1 and not amount.is_integer()):
            yield f"{key}.resources.{name}: {amount} must be above 0, and whole where it is above 1"
    for label, value in pool.labels.items():
        if not label or not value or value != value.strip():
            yield f"{key}.labels: {label!r}: {value!r} must be a label and its value: name both"


# Kind of a reward term -> those of its keys that not every kind reads.
_TERM_KEYS: dict[TermKind, tuple[str, ...]] = {
    TermKind.reward_model: ("model", "input"),
    TermKind.judge: ("model", "grading", "endpoint"),
    TermKind.verdict: (),
    TermKind.length: ("shortest", "longest"),
    TermKind.diversity: (),
}


def term_faults(config: Config) -> Iterator[str]:
    """Of each term by itself."""
    for name, term in config.reward.terms.items():
        key = f"reward.terms.{name}"
        if not re.fullmatch("[a-z][a-z0-9_]*", name) or name in RESERVED_TERMS:
            taken = ", ".join(RESERVED_TERMS)
            yield f"{key}: {name!r} must be a plain word (a-z, 0-9, _) and none of {taken}"
        for unread in sorted({own for keys in _TERM_KEYS.values() for own in keys}):
            is_read, is_set = (
                unread in _TERM_KEYS[term.kind],
                vars(term)[unread] != vars(RewardTerm())[unread],
            )
            if is_set and not is_read:
                yield f"{key}.{unread} is not read by a term of kind {term.kind}: remove it"
        if term.weight > 0:
            yield from weighted_term_faults(key, term)


def weighted_term_faults(key: str, term: RewardTerm) -> Iterator[str]:
    if term.kind is TermKind.judge and not term.model:
        yield f"{key}.model is empty: name the judge's model directory or Hub id, or set {key}.weight=0"
    if term.kind is TermKind.judge and term.endpoint.url and term.grading is Grading.expected:
        yield f"{key}.grading: an endpoint tells no probabilities of digits: set it to likeliest"
    placed = replace(term.pool, deadline_seconds=0.0) != ServicePool()
    if term.endpoint.url and placed:
        yield f"{key}.pool: an endpoint has no processes here: of the pool set deadline_seconds alone"
    if term.endpoint.url and not re.match("https?://[^/]", term.endpoint.url):
        yield f"{key}.endpoint.url: {term.endpoint.url!r} must begin with http:// or https:// and a host"
    if term.kind is TermKind.length and not (term.shortest or term.longest):
        yield f"{key}: without shortest and longest every length is as good: set one of them"
    if 0 < term.longest < term.shortest:
        yield f"{key}.longest: {term.longest} must be 0, or at least shortest, {term.shortest}"


def _highest_score(term: RewardTerm) -> float:
    as_it_is = term.kind is TermKind.reward_model and term.normalise is Normalisation.none
    return math.inf if as_it_is or term.normalise is Normalisation.z_score else 1.0


def reward_faults(config: Config) -> Iterator[str]:
    """What gates and terms say of each other."""
    reward = config.reward
    unknown = [name for name in reward.gates if name not in GATES]
    if unknown:
        hint = did_you_mean(unknown[0], GATES) or f"; there are {', '.join(GATES)}"
        yield f"reward.gates.{unknown[0]}: {unknown[0]!r} is no gate{hint}"
    gates = {name: number for name, number in reward.gates.items() if number is not None}
    if "malformed" not in gates:
        yield "reward.gates.malformed: a malformed completion has no answer to go on with: give it a number"
    if (malformed := gates["malformed"]) > min(gates.values()):
        fault = f"{malformed} must be at most {min(gates.values())}, the lowest of the other gates"
        yield f"reward.gates.malformed: {fault}: nothing is worth less than a malformed completion"
    terms = {name: term for name, term in reward.terms.items() if term.weight > 0}
    of_wrong = {name: term for name, term in terms.items() if term.when is not When.correct}
    best_wrong = sum(term.weight * _highest_score(term) for term in of_wrong.values())
    if "correct" in gates and gates["correct"] >= best_wrong:
        fault = f"{gates['correct']} must be less than what a wrong completion can reach, {best_wrong}"
        yield f"reward.gates.correct: {fault} (the weights of reward.terms): the generator learns wrong ones"
    for name, term in terms.items():
        if term.when is When.correct and ("correct" in gates or term.kind in _OF_WRONG):
            why = "no right answer gets that far" if "correct" in gates else f"{term.kind} is of wrong ones"
            yield f"reward.terms.{name}.when: correct can never hold ({why}): change it, or weight=0"
        what = replace(term, weight=0.0, pool=ServicePool())
        twins = [
            other for other, own in terms.items() if replace(own, weight=0.0, pool=ServicePool()) == what
        ]
        if twins[0] != name:
            yield f"reward.terms.{name} is reward.terms.{twins[0]} again: remove one, and add the weights"


def term_name_faults(config: Config) -> Iterator[str]:
    """What a stage reads of a reward term, the term has."""
    computed = [name for name, term in config.reward.terms.items() if term.weight > 0]
    # Of wrong completions a verdict is always the same.
    varying = [name for name in computed if config.reward.terms[name].kind is not TermKind.verdict]
    scoring = [name for name, term in config.reward.terms.items() if term.kind is TermKind.reward_model]
    named = {}  # key that names a term -> (the name, the key whose 0 needs none), where it is read
    if config.reverse_rl.stop_patience > 0:
        named["reverse_rl.stop_term"] = config.reverse_rl.stop_term, "reverse_rl.stop_patience"
    if config.synthesize.min_quantile > 0:
        named["synthesize.quantile_term"] = config.synthesize.quantile_term, "synthesize.min_quantile"
    for key, (name, switch) in named.items():
        if name not in varying:
            fault = f"{name!r} must be a term of reward.terms with a weight greater than 0, and no verdict"
            there = f"there are: {', '.join(varying) or 'none'}"
            yield f"{key}: {fault} ({there}): name one, give it a weight, or set {switch}=0"
    own = [name for name in computed if name in scoring and not config.reward.terms[name].model]
    if config.reverse_rl.refresh_every and not own:
        fault = "no term of reward.terms is of this run's own reward model"
        yield f"reverse_rl.refresh_every: {fault}: give one a weight, or set refresh_every=0"
    if config.pair.scored_by not in scoring:
        kinds = " or ".join(scoring)
        yield f"pair.scored_by: {config.pair.scored_by!r} must be a term of kind reward_model: {kinds}"


def pair_faults(config: Config) -> Iterator[str]:
    data, key = config.preference.data, "preference.data"
    if data.path and data.hub:
        both = f"({data.path}, {data.hub})"
        yield f"{key}.path and {key}.hub are both set {both}: pairs come from one of them"
    if data.path and not data.path.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        yield f"{key}.path: {data.path!r} is not a .jsonl, .jsonl.gz or .parquet file"
    if data.path and not Path(data.path).is_file():
        yield f"{key}.path: {data.path!r} is not a file"
    if data.hub and Path(data.hub).exists():  # `datasets` would read it instead
        fault = f"{data.hub!r} is a path here and would hide the data set of the Hub"
        yield f"{key}.hub: {fault}: name a file with {key}.path"
    if data.hub and not re.fullmatch("[0-9a-f]{40}", data.revision):
        fault = f"{data.revision!r} is not the full hash of a commit (40 hexadecimal digits)"
        way_out = f"a branch or tag may move; the history of {data.hub} on the Hub lists the hashes"
        yield f"{key}.revision: {fault}: {way_out}"
    if data.revision and not data.hub:
        yield f"{key}.revision is set and {key}.hub is empty: name the data set with {key}.hub=OWNER/NAME"
    if not data.split:
        yield f'{key}.split is empty: name a split, e.g. "train"'


def data_faults(data: Data, training: bool) -> Iterator[str]:
    """What can be wrong with `data` without reading a file; `training` False: only suites are needed."""
    if data.source is DataSource.tiny:
        if data.benchmarks and training:
            yield "data.benchmarks: the tiny world has its own suites; set data.source=jsonl"
        unread = {f"data.jsonl.{name}": value for name, value in vars(data.jsonl).items()}
        for name, value in (unread | {"data.root": data.root}).items():
            if value:
                way_out = "set data.source=jsonl, or remove it"
                yield f"{name}: {value!r} is not read with data.source=tiny: {way_out}"
        return
    if training and not data.jsonl.train:
        yield "data.jsonl.train is empty: name a file or a training set"
    for key in ("train", "reward", "preference") if training else ():
        path = getattr(data.jsonl, key)
        if re.search(r"[./]", path) and not Path(path).is_file():  # the names of sets have neither
            yield f"data.jsonl.{key}: {path!r} is not a file (nor the name of a training set)"
    if not data.jsonl.suites and not data.benchmarks:
        examples = "data.benchmarks=[gsm8k,math500] or data.jsonl.suites.own=FILE"
        yield f"data.jsonl.suites and data.benchmarks are empty: name at least one suite, e.g. {examples}"
    for suite, path in data.jsonl.suites.items():
        key = f"data.jsonl.suites.{suite}"
        if suite == "mean":
            yield f"{key}: the name is taken by the mean over all suites; choose another"
        if suite in data.benchmarks or "/" in suite:
            yield f"{key}: a suite's name is unique and has no slash; choose another"
        if not Path(path).is_file():
            yield f"{key}: {path!r} is not a file"
