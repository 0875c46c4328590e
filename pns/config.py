"""The schema: every key, its default, its unit and its meaning. A recipe holds only what differs from it.

`load(path, overrides)` merges schema < the recipe that a recipe `extends` < the recipe < `key=value`
overrides and returns a plain, checked `Config`. Everything that can be wrong without looking at the cluster
is said here, in one line, before anything starts. No heavy import: errors answer within a second.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from pns.errors import UserError
from pns.preference_losses import PREFERENCE_LOSSES

STAGES = ("warm_start", "rl", "reward_model", "reverse_rl", "synthesize", "pair", "preference", "evaluate")


class DataSource(Enum):
    tiny = "tiny"
    jsonl = "jsonl"


class EngineKind(Enum):
    vllm = "vllm"
    transformers = "transformers"


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Layout(Enum):
    padded = "padded"  # rows padded to the longest of their micro-batch
    packed = "packed"  # rows end to end, no padding
    shared = "shared"  # packed, and what neighbouring rows of one prompt have in common at their beginning is computed once


class GeneratorStart(Enum):
    backbone = "backbone"
    target = "target"
    path = "path"


class MarginMask(Enum):
    completion = "completion"
    first_wrong_step = "first_wrong_step"
    first_divergent_token = "first_divergent_token"


class BadPairs(Enum):
    error = "error"
    drop = "drop"


@dataclass
class TinyData:
    """Sizes of the tiny world's splits, in problems; the splits are disjoint by construction."""

    num_train: int = 2000
    num_preference: int = 500
    num_reward: int = 500
    num_test_per_suite: int = 100


@dataclass
class JsonlData:
    """Local files, one JSON object a line with `problem`, `answer` and optional `id`, `solution`, `subject`,
    `level` (`.jsonl` or `.jsonl.gz`), or names of training sets of `pns.data.benchmarks`."""

    train: str = ""
    reward: str = ""  # problems of the reward models; empty: `train`
    preference: str = ""  # problems of synthesis and pairing; empty: `train`
    suites: dict[str, str] = field(default_factory=dict)  # suite name -> file
    limit: int = 0  # at most this many problems of every file; 0: all


@dataclass
class Data:
    source: DataSource = DataSource.tiny
    tiny: TinyData = field(default_factory=TinyData)
    jsonl: JsonlData = field(default_factory=JsonlData)
    benchmarks: list[str] = field(
        default_factory=list
    )  # suites by their name in `pns.data.benchmarks`, beside those of `jsonl`
    root: str = (
        ""  # directory of the named sets: <root>/[benchmarks/|train/]<name>.jsonl[.gz]; empty: the Hub
    )
    revisions: dict[str, str] = field(
        default_factory=dict
    )  # set name -> commit of its Hub data set, where another than the pinned one
    decontaminate: bool = True  # drop training problems that overlap with a suite (jsonl only)
    prompt: str = "none"  # family of `pns.data.prompts` that fills the next six keys, or auto (by the chat template); none: they stand
    chat_template: bool = True  # False: the prompt is plain text, without turns
    system_prompt: str = ""  # system turn put before every problem; empty: none
    problem_prefix: str = ""  # text put before every problem in the user turn; empty: none
    instruction: str = ""  # text appended to every problem in the user turn; empty: none
    assistant_prefix: str = ""  # text the completion is made to begin with (part of the prompt)
    stop: str = ""  # evaluation reads a completion up to this text: base models go on to a next problem; empty: all of it
    max_prompt_tokens: int = (
        1024  # in training, longer prompts are dropped and counted; evaluation asks every problem
    )


@dataclass
class Models:
    """Directories of Hugging Face checkpoints (safetensors) or Hub ids."""

    backbone: str = ""  # the target to be improved
    generator: str = ""  # start of the generator when `reverse_rl.start` is `path`
    reward_model: str = ""  # initial weights of the reward models; empty: the backbone's
    trust_remote_code: bool = False


@dataclass
class Pool:
    """Where a role runs: `replicas` processes, each with `gpus` (fractions share a device) and `cpus`."""

    replicas: int = 1
    gpus: float = 1.0
    cpus: float = 1.0


@dataclass
class Placement:
    device: Device = Device.auto  # auto: cuda where the cluster offers GPUs, else cpu
    rollout: Pool = field(default_factory=Pool)
    policy: Pool = field(default_factory=Pool)  # replicas = FSDP ranks
    verifier_processes: int = 2
    start_timeout_seconds: float = (
        600.0  # how long actors may take to come up before the run stops and says what it waits for
    )


@dataclass
class RolloutEngine:
    engine: EngineKind = EngineKind.vllm
    max_new_tokens: int = 2048
    max_batch: int = 256  # sequences decoded at once per replica
    memory_fraction: float = 0.85  # of the GPU, for vLLM's weights and cache
    kv_cache_gib: float = 0.25  # vLLM's cache on CPU


@dataclass
class Lora:
    """Low-rank adapters (arXiv 2106.09685) on language models; the reference is the adapter switched off.
    Exports have it merged."""

    rank: int = 0  # 0: every weight is trained
    alpha: int = 32  # the update is scaled by alpha / rank
    targets: list[str] = field(
        default_factory=lambda: ["all-linear"]
    )  # names of linear layers, or all of them but the head


@dataclass
class PolicyConfig:
    max_tokens_per_micro_batch: int = 16384  # per rank; prompt and completion together
    dtype: str = "auto"  # compute dtype: bfloat16, float32, or auto (bfloat16 on cuda, float32 on cpu); master weights are float32
    gradient_checkpointing: bool = True
    compile: bool = False  # torch.compile norms and feed-forward parts: slower first steps; needs a C++ compiler on cpu, Triton on cuda
    lora: Lora = field(default_factory=Lora)
    layout: Layout = (
        Layout.shared
    )  # of micro-batches; `max_tokens_per_micro_batch` counts what the layout holds


@dataclass
class Optimizer:
    learning_rate: float = 1e-6
    warmup_steps: int = 0
    schedule: str = "constant"  # constant or cosine (to 0 over the stage's steps)
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999


@dataclass
class WarmStart:
    """Supervised start of a tiny backbone (or of the judge) on the tiny world. `steps: 0`: `models.backbone`
    is used as it is."""

    steps: int = 0
    task: str = "solve"  # solve: solutions of problems; judge: the checker's rubric
    architecture: str = "qwen2"  # qwen2, llama or qwen3
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2
    feed_forward_size: int = 384
    init_std: float = 0.06
    tie_embeddings: bool = True
    batch_size: int = 32
    curriculum_steps: int = 500  # training steps on short problems alone, before all of them come
    samples_from: str = (
        ""  # judge: the model that training starts from and whose samples are graded beside made-up errors
    )
    optimizer: Optimizer = field(
        default_factory=lambda: Optimizer(
            learning_rate=2e-3, warmup_steps=50, schedule="cosine", weight_decay=0.01, beta2=0.98
        )
    )


@dataclass
class GrpoConfig:
    """Group-relative policy optimisation (arXiv 2402.03300) with clip-higher and token-level aggregation
    (arXiv 2503.14476)."""

    steps: int = 100
    problems_per_step: int = 24
    completions_per_problem: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.28
    kl_coefficient: float = 1e-3  # k3 estimate against the stage's starting policy
    normalise_by_std: bool = True  # False: Dr. GRPO (arXiv 2503.20783)
    updates_per_step: int = 1  # optimizer steps on each batch of rollouts
    checkpoint_every: int = 20
    optimizer: Optimizer = field(default_factory=Optimizer)


@dataclass
class ReverseRl(GrpoConfig):
    start: GeneratorStart = GeneratorStart.target
    stop_wrong_rate: float = 0.9  # stop early at this share of wrong completions ...
    stop_format_rate: float = 0.95  # ... with at least this share well-formed ...
    stop_patience: int = (
        10  # ... when the mean plausibility has not risen for this many steps; 0: run all steps
    )
    max_hold_wrong_rate: float = 1.0  # stop at once when the wrong rate reaches this (a KL-anchored generator near the target); 1: never


class TermKind(Enum):
    """How a reward term is computed; `pns.algo.reward` and `workers.rewards` know how."""

    reward_model = "reward_model"  # sigmoid of a reward model's score
    judge = "judge"  # rubric score of a language model


@dataclass
class RewardTerm:
    """One named term of the composite reward: an unweighted score in [0, 1], computed by a service of its own."""

    kind: TermKind = TermKind.reward_model
    weight: float = 0.0  # 0: the term is neither asked for, placed nor started
    model: str = ""  # directory or Hub id; empty (reward_model only): the reward model that this run trains
    pool: Pool = field(default_factory=Pool)  # the processes that compute it


@dataclass
class RewardConfig:
    """The composite reward of reverse RL (arXiv 2602.03516); the gates and the numbers are ours."""

    wrong: float = 0.5  # weight of being wrong
    terms: dict[str, RewardTerm] = field(  # name -> term; a recipe changes these and adds its own
        default_factory=lambda: {
            "plausibility": RewardTerm(TermKind.reward_model, weight=0.25),
            "coherence": RewardTerm(TermKind.judge, weight=0.25),
        }
    )
    malformed: float = -1.0
    correct: float = 0.0
    gated: bool = True  # False: additive form, for the ablation
    max_masked_fraction: float = 0.2  # of one step's completions; above it the run stops
    deadline_seconds: float = 120.0  # after it a term that has not been computed is missing
    verify_seconds: float = 5.0  # limit of one verification, from the start of its work


@dataclass
class RewardModelStage:
    rl_steps: int = 0  # pairs also come from the rollouts of the last so many steps of rl, which cost nothing more; 0: none
    steps: int = 60
    pairs_per_step: int = 16
    samples_per_problem: int = 8
    temperature: float = 1.0
    centre: float = 0.01  # lambda of (r_w + r_l)^2
    max_length_ratio: float = 1.5
    held_out_fraction: float = 0.1  # of the problems, for pairwise accuracy and calibration
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=1e-5, warmup_steps=5))


@dataclass
class Synthesize:
    samples_per_problem: int = 4
    temperature: float = 1.0
    min_quantile: float = 0.0  # negatives below this quantile of `quantile_term` are dropped
    quantile_term: str = "plausibility"  # the name of a reward term
    drop_box_only_flips: bool = True


@dataclass
class PairStage:
    samples_per_problem: int = 8  # of the RL-trained backbone, for the chosen side
    temperature: float = 1.0
    max_length_ratio: float = 2.0
    pairs_per_problem: int = 1
    prefer_shared_prefix: bool = (
        True  # pair each negative with the correct completion that shares the longest prefix with it
    )
    balance_flow: bool = (
        False  # keep as many (right, wrong) as (wrong, right) token flows at the first divergence
    )


@dataclass
class PreferenceData:
    """Where the pairs of `preference` come from: `path`, or `hub`, or (both empty) the run's own `pair`
    stage. External pairs are in the standard format: `prompt`, `chosen`, `rejected`, as strings or as lists
    of messages."""

    path: str = ""  # .jsonl, .jsonl.gz or .parquet
    hub: str = ""  # data set of the Hugging Face Hub, owner/name
    revision: str = ""  # of the Hub data set: the full hash of a commit, which never moves
    split: str = "train"  # of the Hub data set
    limit: int = 0  # at most this many pairs of `path` or `hub`; 0: all
    bad_pairs: BadPairs = (
        BadPairs.error
    )  # an empty or identical side, a prompt or a pair too long: stop at the first, or drop and count


@dataclass
class PreferenceConfig:
    """Preference optimisation; reference = the starting backbone, its log-probabilities computed once (none
    for simpo and orpo).

    A hyper-parameter of the loss that is left out takes the default in `PREFERENCE_LOSSES`; one that the
    loss does not read is an error.
    """

    loss: str = "sigmoid"  # a name in `pns.preference_losses`
    beta: float | None = (
        None  # > 0; scale of the implicit reward (ipo: tau). All but orpo: 0.1, simpo 2.0, length_normalised 5.0
    )
    label_smoothing: float | None = None  # [0, 0.5); share of flipped labels. cdpo, robust: 0.1
    nll_weight: float | None = None  # >= 0; weight of the chosen side's NLL per token. rpo: 1.0
    target_margin: float | None = None  # >= 0; gamma, subtracted from the reward margin. simpo: 1.0
    desirable_weight: float | None = None  # > 0; lambda_D, of the chosen sides. kto: 1.0
    undesirable_weight: float | None = None  # > 0; lambda_U, of the rejected sides. kto: 1.0
    odds_ratio_weight: float | None = None  # >= 0; lambda, beside the chosen side's NLL per token. orpo: 0.1
    offset_scale: float | None = None  # >= 0; alpha, times the reward model's score difference. offset: 1.0
    steps: int = 30
    pairs_per_step: int = 32
    margin: MarginMask = MarginMask.completion
    data: PreferenceData = field(default_factory=PreferenceData)
    max_skipped_updates: int = (
        0  # more updates than this with a loss or gradient that is not finite end the run
    )
    checkpoint_every: int = 20
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=5e-7, warmup_steps=5))


@dataclass
class Decoding:
    """How a suite is decoded. None: as the benchmark asks (`pns.data.benchmarks`); other suites greedily,
    once."""

    samples_per_problem: int | None = None
    temperature: float | None = None  # 0: greedy
    top_p: float | None = None
    max_new_tokens: int | None = None  # None: rollout.max_new_tokens


@dataclass
class Evaluate(Decoding):
    per_suite: dict[str, Decoding] = field(default_factory=dict)  # suite name -> what it has of its own
    generator_samples: int = 512  # completions of the generator before and after reverse RL, at temperature 1
    generator_temperature: float = 1.0


@dataclass
class Tracking:
    """Metrics go to `metrics.jsonl` always, and to these backends of verl's `Tracking`: tensorboard, wandb,
    mlflow, trackio."""

    backends: list[str] = field(default_factory=list)
    project: str = "pns"


@dataclass
class Config:
    name: str = ""  # of the run; empty: the recipe's file name
    runs: str = "runs"  # the run directory is <runs>/<name>
    seed: int = 0
    data: Data = field(default_factory=Data)
    models: Models = field(default_factory=Models)
    placement: Placement = field(default_factory=Placement)
    rollout: RolloutEngine = field(default_factory=RolloutEngine)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    warm_start: WarmStart = field(default_factory=WarmStart)
    rl: GrpoConfig = field(default_factory=GrpoConfig)
    reward_model: RewardModelStage = field(default_factory=RewardModelStage)
    reverse_rl: ReverseRl = field(default_factory=ReverseRl)
    negatives: str = (
        "pns"  # where the rejected sides come from: a name in `pns.stages.negatives.SOURCES` (pns, rs)
    )
    synthesize: Synthesize = field(default_factory=Synthesize)
    pair: PairStage = field(default_factory=PairStage)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    evaluate: Evaluate = field(default_factory=Evaluate)
    tracking: Tracking = field(default_factory=Tracking)


def load(path: str | Path | None, overrides: list[str] | None = None, training: bool = True) -> Config:
    """Read the recipe at `path` (None: the defaults), apply `key=value` overrides, check it; `training` False
    asks for no training data.

    Raises UserError with key, value and the way out.
    """
    recipe = Path(path) if path is not None else Path("the defaults")
    if path is not None and not recipe.is_file():
        near = sorted(str(p) for p in recipe.parent.glob("*.yaml")) if recipe.parent.is_dir() else []
        raise UserError(
            f"recipe {recipe} does not exist" + (f"; there are: {', '.join(near)}" if near else "")
        )
    schema = OmegaConf.structured(Config)
    layers = _read(recipe) if path is not None else []
    try:
        merged = OmegaConf.merge(schema, *layers)
        for override in overrides or []:
            if "=" not in override:
                raise UserError(f"override {override!r} is not of the form key=value")
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([override]))
        config = cast(Config, OmegaConf.to_object(merged))
    except ConfigKeyError as error:
        raise UserError(_unknown_key(error, recipe)) from error
    except ValidationError as error:
        raise UserError(
            f"{error.full_key}: {str(error).splitlines()[0]} (in {recipe} or an override)"
        ) from error
    except OmegaConfBaseException as error:
        raise UserError(f"{recipe}: {str(error).splitlines()[0]}") from error
    if not config.name:
        config.name = recipe.stem
    check(config)
    check_data(config.data, training and not external_pairs(config))
    for name, value in hyper_parameters(config.preference).items():
        setattr(config.preference, name, value)
    return config


def stages(config: Config) -> tuple[str, ...]:
    """The stages that `config` asks for, in order. Pairs given from outside need no negatives made: the
    backbone is trained on them."""
    if external_pairs(config):
        return ("warm_start", "preference", "evaluate")
    return STAGES


def external_pairs(config: Config) -> bool:
    """Whether the pairs of `preference` come from a file or the Hub."""
    return bool(config.preference.data.path or config.preference.data.hub)


def hyper_parameters(settings: PreferenceConfig) -> dict[str, float]:
    """What the chosen loss reads: what is set, and its own defaults for the rest."""
    defaults = PREFERENCE_LOSSES[settings.loss].defaults
    values = {name: getattr(settings, name) for name in defaults}
    return {name: defaults[name] if value is None else value for name, value in values.items()}


def _read(recipe: Path) -> list[DictConfig]:
    """The recipe after the one it `extends` (a path relative to it), if any."""
    try:
        loaded = OmegaConf.load(recipe)
    except yaml.YAMLError as error:
        raise UserError(f"recipe {recipe} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"recipe {recipe} is a list; it has to be keys and values")
    base = loaded.pop("extends", None)
    if base is None:
        return [loaded]
    if not (recipe.parent / base).is_file():
        raise UserError(f"extends: {recipe.parent / base} does not exist (in {recipe})")
    return [*_read(recipe.parent / base), loaded]


def check(config: Config) -> None:
    """Cross-field checks. Raises UserError."""
    if "/" in config.name or config.name in (".", ".."):
        raise UserError(f"name: {config.name!r} is not a directory name; choose one without slashes")
    _require_positive(config)
    _check_loss(config.preference)
    for key, value in _items(config):
        last = key.rsplit(".", 1)[-1]
        if value is None:
            continue
        if last in _FRACTIONS and not 0 <= value <= 1:
            raise UserError(f"{key}: {value} is outside [0, 1]")
        if last in _NON_NEGATIVE and value < 0:
            raise UserError(f"{key}: {value} is negative; use 0 or more")
    if config.policy.dtype not in ("auto", "bfloat16", "float32"):
        raise UserError(f"policy.dtype: {config.policy.dtype!r} is not one of auto, bfloat16, float32")
    if not config.policy.lora.targets:
        raise UserError(
            "policy.lora.targets is empty: name linear layers, e.g. [q_proj,v_proj], or [all-linear]"
        )
    for key, value in _items(config):
        if key.endswith(".schedule") and value not in ("constant", "cosine"):
            raise UserError(f"{key}: {value!r} is not one of constant, cosine")
    if config.warm_start.architecture not in ("qwen2", "llama", "qwen3"):
        raise UserError(
            f"warm_start.architecture: {config.warm_start.architecture!r} is not one of qwen2, llama, qwen3"
        )
    if config.warm_start.task not in ("solve", "judge"):
        raise UserError(f"warm_start.task: {config.warm_start.task!r} is not one of solve, judge")
    if config.warm_start.steps == 0 and not config.models.backbone:
        raise UserError(
            "models.backbone is empty and warm_start.steps is 0: name a model, or train one with warm_start.steps=N"
        )
    if config.warm_start.steps and config.data.source is not DataSource.tiny:
        raise UserError(
            "warm_start.steps: a warm start is made on the tiny world only; set data.source=tiny or warm_start.steps=0"
        )
    if config.reverse_rl.start is GeneratorStart.path and not config.models.generator:
        raise UserError("reverse_rl.start is path and models.generator is empty: name the generator's model")
    _check_pairs(config.preference.data)
    for name in ("rl", "reverse_rl"):
        stage: GrpoConfig = getattr(config, name)
        if stage.completions_per_problem < 2:
            raise UserError(
                f"{name}.completions_per_problem: {stage.completions_per_problem}; a group needs at least 2"
            )


def check_data(data: Data, training: bool) -> None:
    """What can be wrong with `data` without reading a file; `training` False: only suites are needed. Raises
    UserError."""
    if data.source is DataSource.tiny:
        if data.benchmarks and training:
            raise UserError("data.benchmarks: the tiny world has its own suites; set data.source=jsonl")
        return
    if training:
        for key in ("train", "reward", "preference"):
            path = getattr(data.jsonl, key)
            if (
                (path or key == "train")
                and not Path(path).is_file()
                and (not path or re.search(r"[./]", path))
            ):
                raise UserError(f"data.jsonl.{key}: {path!r} is not a file (nor the name of a training set)")
    if "mean" in data.jsonl.suites:
        raise UserError(
            "data.jsonl.suites.mean: the name is taken by the mean over all suites; choose another"
        )
    if not data.jsonl.suites and not data.benchmarks:
        raise UserError(
            "data.jsonl.suites and data.benchmarks are empty: name at least one suite, e.g. data.benchmarks=[gsm8k,math500] or "
            "data.jsonl.suites.own=FILE"
        )
    for suite, path in data.jsonl.suites.items():
        if not Path(path).is_file():
            raise UserError(f"data.jsonl.suites.{suite}: {path!r} is not a file")
        if suite in data.benchmarks or "/" in suite:
            raise UserError(
                f"data.jsonl.suites.{suite}: a suite's name is unique and has no slash; choose another"
            )


def _check_pairs(data: PreferenceData) -> None:
    key = "preference.data"
    if data.path and data.hub:
        raise UserError(
            f"{key}.path and {key}.hub are both set ({data.path}, {data.hub}): the pairs come from one of them"
        )
    if data.path and not data.path.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        raise UserError(f"{key}.path: {data.path!r} is not a .jsonl, .jsonl.gz or .parquet file")
    if data.path and not Path(data.path).is_file():
        raise UserError(f"{key}.path: {data.path!r} is not a file")
    if data.hub and Path(data.hub).exists():
        raise UserError(
            f"{key}.hub: {data.hub!r} is a path here and would hide the data set of the Hub: name a file with {key}.path"
        )
    if data.hub and not re.fullmatch("[0-9a-f]{40}", data.revision):
        raise UserError(
            f"{key}.revision: {data.revision!r} is not the full hash of a commit (40 hexadecimal digits): a branch or tag may move; "
            f"the history of {data.hub} on the Hub lists the hashes"
        )
    if data.revision and not data.hub:
        raise UserError(
            f"{key}.revision is set and {key}.hub is empty: name the data set with {key}.hub=OWNER/NAME"
        )
    if not data.split:
        raise UserError(f'{key}.split is empty: name a split, e.g. "train"')


_FRACTIONS = {
    "memory_fraction",
    "max_masked_fraction",
    "held_out_fraction",
    "top_p",
    "min_quantile",
    "stop_wrong_rate",
    "stop_format_rate",
    "max_hold_wrong_rate",
}
_NON_NEGATIVE = {
    "max_skipped_updates",
    "rank",
    "rl_steps",
    "kl_coefficient",
    "learning_rate",
    "temperature",
    "centre",
    "warmup_steps",
    "limit",
    "gpus",
    "cpus",
}
_POSITIVE = {
    "alpha",
    "replicas",
    "steps",
    "problems_per_step",
    "pairs_per_step",
    "samples_per_problem",
    "batch_size",
    "max_new_tokens",
    "max_batch",
    "max_prompt_tokens",
    "max_tokens_per_micro_batch",
    "checkpoint_every",
    "updates_per_step",
    "pairs_per_problem",
    "verifier_processes",
    "num_train",
    "num_preference",
    "num_reward",
    "num_test_per_suite",
    "deadline_seconds",
    "verify_seconds",
    "start_timeout_seconds",
}


_POSITIVE_OF_LOSS = {"beta", "desirable_weight", "undesirable_weight"}


def _require_positive(config: Config) -> None:
    for key, value in _items(config):
        if (
            key.rsplit(".", 1)[-1] in _POSITIVE
            and key != "warm_start.steps"
            and value is not None
            and value <= 0
        ):
            raise UserError(f"{key}: {value} must be greater than 0")
    if config.warm_start.steps < 0:
        raise UserError(
            f"warm_start.steps: {config.warm_start.steps} is negative; 0 uses models.backbone as it is"
        )


def _check_loss(settings: PreferenceConfig) -> None:
    if settings.loss not in PREFERENCE_LOSSES:
        near = difflib.get_close_matches(settings.loss, PREFERENCE_LOSSES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(PREFERENCE_LOSSES)}"
        raise UserError(f"preference.loss: {settings.loss!r} is not the name of a loss; {hint}")
    reads = PREFERENCE_LOSSES[settings.loss].defaults
    for name in sorted({key for entry in PREFERENCE_LOSSES.values() for key in entry.defaults}):
        value: float | None = getattr(settings, name)
        if value is None:
            continue
        if name not in reads:
            readers = [loss for loss, entry in PREFERENCE_LOSSES.items() if name in entry.defaults]
            raise UserError(
                f"preference.{name}: {value} is not read by preference.loss={settings.loss} "
                f"(it reads {', '.join(reads)}): remove it, or choose {' or '.join(readers)}"
            )
        if name in _POSITIVE_OF_LOSS and not 0 < value < math.inf:
            raise UserError(f"preference.{name}: {value} must be a number greater than 0")
        if not 0 <= value < math.inf:
            raise UserError(f"preference.{name}: {value} must be a number, 0 or more")
        if name == "label_smoothing" and value >= 0.5:
            raise UserError(
                f"preference.label_smoothing: {value} is outside [0, 0.5); at 0.5 the labels say nothing"
            )


def _items(section: Any, prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for f in fields(section):
        value = getattr(section, f.name)
        key = f"{prefix}{f.name}"
        if is_dataclass(value):
            found += _items(value, key + ".")
        elif isinstance(value, dict) and any(is_dataclass(item) for item in value.values()):
            for name, item in value.items():
                found += _items(item, f"{key}.{name}.")
        else:
            found.append((key, value))
    return found


def _unknown_key(error: ConfigKeyError, recipe: Path) -> str:
    key = error.full_key or str(error.key)
    known = [name for name, _ in _items(Config())]
    sections = {name.rsplit(".", depth)[0] for name in known for depth in (1, 2)}
    near = difflib.get_close_matches(key, known + sorted(sections), n=1)
    return f"{key}: unknown key (in {recipe} or an override)" + (f"; did you mean {near[0]}?" if near else "")


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain YAML/JSON values."""
    return cast(
        dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)
    )
