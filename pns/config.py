"""The schema: every key, its default, its range, its unit and its meaning (`pns config` prints them).

A recipe holds only what differs from it; `pns.recipe.load` reads and checks one. No heavy import.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, cast

from omegaconf import OmegaConf

from pns.fields import (
    FINITE,
    above,
    at_least,
    at_most,
    below,
    between,
    key,
    path_key,
    path_or_name,
    section,
    up_to,
)
from pns.offline_objectives import OFFLINE_OBJECTIVES
from pns.preference_losses import PREFERENCE_LOSSES

STAGES = ("rl", "reward_model", "reverse_rl", "synthesize", "pair", "preference", "evaluate")
# Of every method, in an order that fits each.
ALL_STAGES = (*STAGES[:4], "solve", "choose", *STAGES[4:-1], "sample", "label_steps", "bcpg", "evaluate")
STEP_SERVICES = ("step_judge", "process_reward")  # what labels steps
# Where the rejected sides of pairs may come from: `pns.stages.negatives` has how.
NEGATIVE_SOURCES = ("pns", "rs", "rs_hard", "corrupted", "prompted", "file", "mixed")
OWN = "own"  # source of negatives of `bcpg`: the wrong completions among a round's own samples


# Choices, by the word that a recipe says.
DataSource = StrEnum("DataSource", ["tiny", "jsonl"])
# `pns.data.prompts` has what each fills in.
PromptFamily = StrEnum("PromptFamily", ["none", "auto", "qwen", "llama", "deepseek", "base"])
# What the variable enable_thinking of a chat template (Qwen3's) is told; auto: nothing.
Thinking = StrEnum("Thinking", ["auto", "on", "off"])
# Whether completions begin with <think>...</think>.
ReasoningBlock = StrEnum("ReasoningBlock", ["auto", "tags", "none"])
EngineKind = StrEnum("EngineKind", ["vllm", "transformers"])
WeightTransport = StrEnum("WeightTransport", ["auto", "store", "broadcast"])
Device = StrEnum("Device", ["auto", "cpu", "cuda"])
Dtype = StrEnum("Dtype", ["auto", "bfloat16", "float32"])
Schedule = StrEnum("Schedule", ["constant", "cosine"])
Layout = StrEnum("Layout", ["padded", "packed", "shared"])
# How a group's rewards become advantages: `pns.algo.advantages` has how.
Advantage = StrEnum("Advantage", ["grpo", "dr_grpo", "rloo", "reinforce_pp"])
# What an importance ratio is of: a token (GRPO), or a whole completion (GSPO, arXiv 2507.18071).
RatioLevel = StrEnum("RatioLevel", ["token", "sequence"])
GeneratorStart = StrEnum("GeneratorStart", ["backbone", "target", "path"])
# What a term of the reward is: a reward model's score, a language model's rubric, or a rule on the completion
# itself (wrong or not; its length; how rare its error is). `pns.algo.reward` has how.
TermKind = StrEnum("TermKind", ["reward_model", "judge", "verdict", "length", "diversity"])
# How a term's value becomes its score: sigmoid of it, its z-score in the group, or as it is.
Normalisation = StrEnum("Normalisation", ["auto", "none", "sigmoid", "z_score"])
When = StrEnum("When", ["any", "wrong", "correct"])
RewardInput = StrEnum("RewardInput", ["auto", "tokens", "chat"])
Grading = StrEnum("Grading", ["likeliest", "expected"])
# Which negative of a problem is paired first, and with which right side: in the order of sampling; the two
# with the longest common prefix; or the negative likeliest under the target, with the right side nearest it.
PairPreference = StrEnum("PairPreference", ["first", "shared_prefix", "likely"])
MarginMask = StrEnum("MarginMask", ["completion", "first_wrong_step", "first_divergent_token"])
Method = StrEnum("Method", ["pns", "bcpg", "study"])
# Which pairs an arm of a study has: of the problems that every such arm has a negative of, with the same
# right sides; or of every problem that its own source has a negative of.
StudyPairs = StrEnum("StudyPairs", ["common", "own"])
BcpgStart = StrEnum("BcpgStart", ["backbone", "target"])
SplitterKind = StrEnum("SplitterKind", ["sentences", "sat"])
# When a step of a wrong completion counts as correct: where judge and process reward model both say so, where
# either does, or by one of them alone.
StepRule = StrEnum("StepRule", ["both", "either", "judge", "process_reward"])
# What holds the policy near the one that sampled: (log pi/pi_ref)^2 of each token, or its KL (k3).
Constraint = StrEnum("Constraint", ["squared_log_ratio", "kl"])
BadPairs = StrEnum("BadPairs", ["error", "drop"])
TrackingBackend = StrEnum("TrackingBackend", ["ray", "tensorboard", "wandb", "mlflow", "trackio"])


@dataclass
class TinyData:
    """Sizes of the tiny world's splits, in problems; the splits are disjoint by construction."""

    num_train: int = key(2000, "problems of rl and reverse_rl", at_least(1))
    num_preference: int = key(500, "problems of synthesis and pairing", at_least(1))
    num_reward: int = key(500, "problems of the reward models", at_least(1))
    num_test_per_suite: int = key(100, "problems of each suite", at_least(1))
    development: bool = key(False, "suites of other problems than the test's, to choose settings on")


@dataclass
class JsonlData:
    """Local files of problems, or names of training sets of `pns.data.benchmarks`. A file is .jsonl or
    .jsonl.gz (an object a line), .json (a list of objects), .csv or .parquet; a problem has `problem`,
    `answer` and optional `id`, `solution`, `subject`, `level`."""

    train: str = path_or_name("", "problems of rl and reverse_rl: a file or a training set's name")
    reward: str = path_or_name("", "problems of the reward models; empty: those of train")
    preference: str = path_or_name("", "problems of synthesis and pairing; empty: those of train")
    suites: dict[str, str] = path_key({}, "name of a suite -> its file")
    fields: dict[str, str] = key(
        {},
        "field of a problem -> its name in the files, e.g. {problem: question}; in a file without that name "
        "the field has its own",
    )
    limit: int = key(0, "at most this many problems of every file; 0: all", at_least(0))


@dataclass
class Data:
    """Problems, suites, and how a problem becomes a prompt."""

    source: DataSource = key(DataSource.tiny, "the tiny world, or the files and sets of data.jsonl")
    tiny: TinyData = section(TinyData)
    jsonl: JsonlData = section(JsonlData)
    benchmarks: list[str] = key([], "suites by their name in pns.data.benchmarks, beside data.jsonl.suites")
    root: str = path_key("", "where named sets are: ROOT/[benchmarks/|train/]NAME.jsonl[.gz]; empty: the Hub")
    revisions: dict[str, str] = key({}, "set -> commit of its Hub data set, where not the pinned one")
    decontaminate: bool = key(True, "drop training problems that overlap with a suite (jsonl only)")
    prompt: PromptFamily = key(
        PromptFamily.none,
        "fills the six keys from chat_template to stop; auto: by the chat template; none: they stand",
    )
    chat_template: bool = key(True, "false: the prompt is plain text, without turns")
    system_prompt: str = key("", "system turn put before every problem; empty: none")
    problem_prefix: str = key("", "text put before every problem in the user turn; empty: none")
    instruction: str = key("", "text appended to every problem in the user turn; empty: none")
    few_shot: str = path_or_name(
        "",
        "worked examples before every problem, each as the problem is put and then its solution: a file "
        "(JSON lines with problem and solution), or grade_school_8, competition_4 (recipes/few_shot); empty: "
        "none",
    )
    few_shot_count: int = key(0, "the first so many of data.few_shot; 0: all", at_least(0))
    assistant_prefix: str = key("", "text that completions begin with, part of the prompt; empty: none")
    reasoning: ReasoningBlock = key(
        ReasoningBlock.auto,
        "whether completions begin with <think>...</think> (the format gate asks for it); auto: where the "
        "prompt opens the block or the tokenizer has a token for it",
    )
    thinking: Thinking = key(
        Thinking.auto, "tells the chat template's enable_thinking; a template without it takes auto alone"
    )
    think_tags: list[str] = key(
        ["<think>", "</think>"],
        "what opens and closes the model's reasoning block; stored texts have <think>...</think> for it",
    )
    stop: str = key("", "ends a completion of evaluation (a base model's next problem); empty: none")
    max_prompt_tokens: int = key(
        1024, "tokens; training drops longer prompts and counts them, evaluation asks all", at_least(1)
    )


@dataclass
class Models:
    """Directories of Hugging Face checkpoints (safetensors) or Hub ids."""

    backbone: str = path_or_name("", "the language model to be improved; every run needs it")
    generator: str = path_or_name("", "start of the generator where reverse_rl.start is path")
    reward_model: str = path_or_name("", "initial weights of the reward models; empty: the target's")
    trust_remote_code: bool = key(False, "run Python code that comes with a model")


@dataclass
class Pool:
    """Where a role runs: `replicas` processes of the same kind."""

    replicas: int = key(1, "processes (of the policy: FSDP ranks)", at_least(1))
    gpus: float = key(
        1.0,
        "GPUs of each process; a fraction shares one; above 1, for rollout alone: tensor parallel",
        at_least(0),
    )
    cpus: float = key(1.0, "CPU cores of each process, as Ray counts them", at_least(0))
    resources: dict[str, float] = key({}, "custom Ray resources that each process takes", at_least(0))
    labels: dict[str, str] = key({}, "labels that a process's node has to have, as Ray's label selectors")


@dataclass
class Placement:
    """Which devices the roles run on; the pools of reward terms are in reward.terms."""

    device: Device = key(
        Device.auto, "auto: cuda where there are GPUs, else cpu on one machine and an error on a cluster"
    )
    rollout: Pool = section(Pool)
    policy: Pool = section(Pool)
    colocate: list[str] = key(
        [],
        "[rollout,policy]: both have the same GPUs and use them in turns (each replica the GPUs of as many "
        "ranks; memory moves to the host, or is dropped); []: each role has its own",
    )
    verifier_processes: int = key(2, "processes that check answers", at_least(1))
    start_timeout_seconds: float = key(
        600.0,
        "seconds for processes to come up; after them the run stops and says what it waits for",
        above(0),
    )
    load_timeout_seconds: float = key(
        1800.0, "seconds for a role to read a model: more where large ones lie on slow storage", above(0)
    )
    sync_timeout_seconds: float = key(
        1200.0, "seconds to gather the policy's weights, and as many for rollout to take them", above(0)
    )
    step_timeout_seconds: float = key(
        3600.0, "seconds for a training step, a checkpoint, or rollout's next completion", above(0)
    )
    wait_for_nodes_seconds: float = key(
        0.0,
        "seconds for nodes to join that the placement needs; 0: the cluster has them already",
        at_least(0),
    )


@dataclass
class RolloutEngine:
    """The engine that samples completions."""

    engine: EngineKind = key(EngineKind.vllm, "library that generates")
    max_new_tokens: int = key(2048, "longest completion, tokens", at_least(1))
    max_batch: int = key(256, "sequences decoded at once per replica", at_least(1))
    memory_fraction: float = key(0.85, "of the GPU's memory, for vLLM's weights and cache", up_to(1))
    kv_cache_gib: float = key(0.25, "vLLM's cache on CPU, GiB", above(0))
    weight_transport: WeightTransport = key(
        WeightTransport.auto,
        "of the policy's weights to rollout: store, Ray's object store; broadcast, from process to process "
        "(NCCL on cuda, gloo on a CPU); auto: broadcast where rollout has whole GPUs of its own, else store",
    )


@dataclass
class Lora:
    """Low-rank adapters (arXiv 2106.09685) on language models; the reference is the adapter switched off.
    Exports have it merged."""

    rank: int = key(0, "rank of the update; 0: every weight is trained", at_least(0))
    alpha: int = key(32, "the update is scaled by alpha / rank", at_least(1))
    targets: list[str] = key(["all-linear"], "names of linear layers, or all of them but the head")


@dataclass
class PolicyConfig:
    """How every trained model is computed: rl, reward model, reverse RL and preference alike."""

    max_tokens_per_micro_batch: int = key(
        16384, "tokens per rank, prompts included, as policy.layout counts them", at_least(1)
    )
    dtype: Dtype = key(
        Dtype.auto, "of compute (master weights: float32); auto: bfloat16 on cuda, else float32"
    )
    gradient_checkpointing: bool = key(True, "compute activations again in the backward pass, to save memory")
    offload: bool = key(
        False,
        "cuda: keep weights, gradients and optimizer in host memory, and take its steps there; for models "
        "that the GPUs do not hold: every pass brings the weights to them",
    )
    compile: bool = key(
        False,
        "torch.compile norms and feed-forward parts; slow first steps, needs a C++ compiler (cpu) or Triton",
    )
    lora: Lora = section(Lora)
    fsdp_size: int = key(
        0,
        "ranks of one node that hold a copy of the model together; gradients alone go between copies (hybrid "
        "sharding); 0: all ranks, on whatever nodes, hold one copy",
        at_least(0),
    )
    layout: Layout = key(
        Layout.shared,
        "rows of a micro-batch: padded to the longest; packed end to end; shared: packed, and what "
        "neighbouring rows of one prompt have in common at their beginning is computed once",
    )


@dataclass
class Optimizer:
    """AdamW and its learning rate over the stage's steps."""

    learning_rate: float = key(1e-6, "peak learning rate", at_least(0))
    warmup_steps: int = key(0, "optimizer steps of linear warm-up", at_least(0))
    schedule: Schedule = key(Schedule.constant, "after the warm-up; cosine: to 0 over the stage's steps")
    weight_decay: float = key(0.0, "decoupled weight decay; 0: none", at_least(0))
    clip_grad: float = key(1.0, "largest norm of the gradient", above(0))
    beta1: float = key(0.9, "decay of the first moment, per step", below(1))
    beta2: float = key(0.999, "decay of the second moment, per step", below(1))


@dataclass
class GrpoConfig:
    """Group-relative policy optimisation (arXiv 2402.03300) with clip-higher and token-level aggregation
    (arXiv 2503.14476)."""

    steps: int = key(100, "training steps", at_least(1))
    problems_per_step: int = key(24, "problems of one step", at_least(1))
    completions_per_problem: int = key(8, "size of a group, completions", at_least(2))
    temperature: float = key(1.0, "of sampling, and of the log-probabilities that are trained", above(0))
    top_p: float = key(1.0, "nucleus of sampling; training needs 1, all tokens", up_to(1))
    # The upper side is wider, so that unlikely tokens can gain (clip-higher).
    clip_low: float = key(0.2, "the ratio is clipped below 1 - this", between(0, 1))
    clip_high: float = key(0.28, "the ratio is clipped above 1 + this", at_least(0))
    kl_coefficient: float = key(1e-3, "times the KL (k3) from the stage's first policy; 0: none", at_least(0))
    advantage: Advantage = key(
        Advantage.grpo,
        "a reward minus its group's mean: over the group's standard deviation; as it is; the mean of the "
        "others alone; over the batch's standard deviation",
    )
    ratio: RatioLevel = key(
        RatioLevel.token, "of each token, or of the completion (GSPO; it needs clip bounds near 3e-4)"
    )
    dual_clip: float = key(
        0.0,
        "with a negative advantage the ratio counts up to this (arXiv 1912.09729); 0: without",
        at_least(0),
    )
    importance_cap: float = key(
        0.0,
        "weigh tokens by what the policy gives over what the rollout engine gave, at most this (truncated "
        "importance sampling); 0: the engine's log-probabilities are the old policy's",
        at_least(0),
    )
    overlap: bool = key(
        False,
        "sample a step while the one before is trained on, from weights one step older; needs importance_cap",
    )
    overlong_tokens: int = key(
        0,
        "the reward falls to -1 over the last so many of rollout.max_new_tokens; 0: it does not",
        at_least(0),
    )
    dynamic_sampling: int = key(
        0,
        "draw other problems up to so many times, until problems_per_step groups have rewards that differ; "
        "those alone are trained on (DAPO, arXiv 2503.14476); 0: as they come",
        at_least(0),
    )
    max_steps_without_signal: int = key(
        10, "steps in a row in which no group's rewards differ; then the run stops; 0: never", at_least(0)
    )
    max_skipped_updates: int = key(0, "updates without a finite gradient before the run ends", at_least(0))
    updates_per_step: int = key(1, "optimizer steps on each batch of rollouts", at_least(1))
    checkpoint_every: int = key(20, "steps between checkpoints", at_least(1))
    optimizer: Optimizer = section(Optimizer)


@dataclass
class ReverseRl(GrpoConfig):
    """GRPO of the generator on the composite reward: wrong answers that look right."""

    start: GeneratorStart = key(
        GeneratorStart.target,
        "initial weights: models.backbone, the model that rl trained, or models.generator",
    )
    stop_wrong_rate: float = key(0.9, "stop early at this share of wrong completions ...", between(0, 1))
    stop_format_rate: float = key(0.95, "... with at least this share well-formed ...", between(0, 1))
    stop_patience: int = key(
        10, "... when stop_term has not risen for so many steps; 0: all steps", at_least(0)
    )
    stop_term: str = key("plausibility", "name of the reward term that stop_patience watches")
    refresh_every: int = key(
        0,
        "steps after which the run's own reward model learns the generator's negatives; 0: never",
        at_least(0),
    )
    refresh_steps: int = key(10, "training steps of each time, as reward_model trains", at_least(1))
    max_hold_wrong_rate: float = key(
        1.0,
        "stop at once at this share of wrong completions (a KL-anchored generator near the target); 1: never",
        between(0, 1),
    )


@dataclass
class ServicePool(Pool):
    """Where a reward term is computed. None of it changes a score."""

    engine: EngineKind = key(
        EngineKind.transformers,
        "of a judge: transformers; vllm: it shares what prompts have in common, and takes more GPUs than one",
    )
    min_replicas: int = key(0, "fewest replicas when there is little to do; 0: replicas", at_least(0))
    max_replicas: int = key(0, "most replicas while items queue up; 0: replicas", at_least(0))
    batch_tokens: int = key(
        0, "tokens of one forward pass, padding included; 0: 2048 on cpu, 16384 on cuda", at_least(0)
    )
    deadline_seconds: float = key(
        0.0, "seconds that a replica may take for one request; 0: reward.deadline_seconds", at_least(0)
    )


@dataclass
class Endpoint:
    """An OpenAI-compatible server that judges in the place of a pool; the term's model is its name there."""

    url: str = key("", "base URL, such as http://HOST:8000/v1; empty: the term's pool judges")
    key_variable: str = key("OPENAI_API_KEY", "environment variable that holds the key; unset: none is sent")
    concurrency: int = key(16, "requests at once", at_least(1))
    retries: int = key(3, "times that a request is repeated after an error of the server", at_least(0))
    max_tokens: int = key(64, "longest reply, tokens", at_least(1))
    price_in: float = key(0.0, "of a million prompt tokens, in any currency; counted in status", at_least(0))
    price_out: float = key(0.0, "of a million reply tokens", at_least(0))


@dataclass
class RewardTerm:
    """One named term of the composite reward: weight times a score."""

    kind: TermKind = key(
        TermKind.reward_model,
        "a reward model's score; a language model's rubric; 1 for a wrong answer; how well the length fits; "
        "how rare the error is among the step's",
    )
    weight: float = key(0.0, "times the score; 0: neither asked for, placed nor started", at_least(0))
    when: When = key(When.any, "completions that the term is of, past the gates: any, wrong or correct ones")
    normalise: Normalisation = key(
        Normalisation.auto,
        "score of a value: as it is (none), sigmoid, z-score in the group; auto: sigmoid of a reward model's",
    )
    model: str = path_or_name("", "directory or Hub id; empty (reward_model only): this run's own")
    input: RewardInput = key(
        RewardInput.auto,
        "what a reward model reads: the policy's token ids, or the chat in its own tokenizer and template; "
        "auto: tokens for this run's own, chat for a named model",
    )
    grading: Grading = key(Grading.likeliest, "a judge's likeliest digits, or their expectation")
    shortest: int = key(0, "of kind length: below so many tokens the score falls linearly to 0", at_least(0))
    longest: int = key(0, "of kind length: above so many it falls as longest / length; 0: never", at_least(0))
    endpoint: Endpoint = section(Endpoint)
    pool: ServicePool = section(ServicePool)


@dataclass
class RewardConfig:
    """The composite reward of reverse RL (arXiv 2602.03516): the number of the first gate that holds, else
    the sum of weight times score. The gates and the numbers are ours.

    A recipe changes the three terms and adds its own.
    """

    gates: dict[str, float | None] = key(
        {"malformed": -1.0, "correct": 0.0},
        "what decides alone -> its reward, asked in this order: malformed, correct, box_only_flip (the "
        "derivation is right, the box is not); null: not a gate (correct: null is the additive form)",
        FINITE,
    )
    terms: dict[str, RewardTerm] = key(
        {
            "wrong": RewardTerm(TermKind.verdict, weight=0.5),
            "plausibility": RewardTerm(TermKind.reward_model, weight=0.25),
            "coherence": RewardTerm(TermKind.judge, weight=0.25),
        },
        "name -> term",
    )
    max_masked_fraction: float = key(
        0.2, "share of a step's completions without a reward; above it the run stops", between(0, 1)
    )
    deadline_seconds: float = key(
        120.0,
        "seconds that a replica may take for one request; then it is restarted, and what two did not "
        "answer is missing",
        above(0),
    )
    verify_seconds: float = key(5.0, "processor seconds of one verification", above(0))


@dataclass
class RewardModelStage:
    """Bradley-Terry training of the reward model on right and wrong completions of one problem."""

    rl_steps: int = key(0, "last steps of rl whose rollouts give pairs too, at no cost; 0: none", at_least(0))
    steps: int = key(60, "training steps", at_least(1))
    pairs_per_step: int = key(16, "pairs of one step", at_least(1))
    samples_per_problem: int = key(8, "completions drawn for each problem", at_least(1))
    temperature: float = key(1.0, "sampling temperature; 0: greedy", at_least(0))
    centre: float = key(0.01, "lambda of (r_w + r_l)^2, which keeps scores near 0; 0: none", at_least(0))
    max_length_ratio: float = key(1.5, "longer over shorter side of a pair, in tokens, at most", at_least(1))
    held_out_fraction: float = key(0.1, "of the problems, for accuracy and calibration", below(1))
    optimizer: Optimizer = section(lambda: Optimizer(learning_rate=1e-5, warmup_steps=5))


@dataclass
class Mixture:
    """What `negatives=mixed` is the union of; the sources of a problem take turns."""

    sources: list[str] = key(["pns", "rs"], "names in pns.stages.negatives.SOURCES, without mixed; each once")
    starts: list[GeneratorStart] = key(
        [], "source pns has one generator from each of these; empty: one from reverse_rl.start"
    )


@dataclass
class Sources:
    """What single sources of negatives need."""

    file: str = path_key("", "of source file: JSON lines of problem (text or id) and completion")
    instruction: str = key(
        "Solve it with a mistake that is hard to notice: every step looks right, the final answer is wrong.",
        "of source prompted: what the backbone is told after the problem",
    )


@dataclass
class Synthesize:
    """Plausible wrong completions, drawn from the generator."""

    samples_per_problem: int = key(4, "completions drawn for each problem", at_least(1))
    temperature: float = key(1.0, "sampling temperature; 0: greedy", at_least(0))
    min_quantile: float = key(0.0, "of quantile_term; negatives below are dropped; 0: none", below(1))
    quantile_term: str = key("plausibility", "name of the reward term that min_quantile reads")
    drop_box_only_flips: bool = key(True, "drop negatives that reason rightly and box a wrong answer")
    min_log_prob: float | None = key(
        None, "mean natural log-probability per token under the target, at least; null: no bound", at_most(0)
    )
    max_log_prob: float | None = key(None, "... and at most; null: no bound", at_most(0))

    @property
    def bounds_log_probs(self) -> bool:
        return self.min_log_prob is not None or self.max_log_prob is not None


@dataclass
class PairStage:
    """Each negative with a right completion of the target."""

    samples_per_problem: int = key(8, "completions of the target, for the chosen side", at_least(1))
    temperature: float = key(1.0, "sampling temperature; 0: greedy", at_least(0))
    max_length_ratio: float = key(2.0, "longer over shorter side of a pair, in tokens, at most", at_least(1))
    pairs_per_problem: int = key(1, "pairs of each problem, at most", at_least(1))
    prefer: PairPreference = key(
        PairPreference.shared_prefix,
        "which negative goes first: as sampled, nearest to a right side, or likeliest under the target",
    )
    balance_flow: bool = key(False, "as many (right, wrong) as (wrong, right) tokens at the first divergence")
    scored_by: str = key("plausibility", "reward_model term whose model scores pairs")
    perplexity_samples: int = key(
        256,
        "completions of each source whose perplexity under the backbone is measured; 0: none",
        at_least(0),
    )


@dataclass
class PreferenceData:
    """Where the pairs of `preference` come from: `path`, or `hub`, or (both empty) the run's own `pair`
    stage. External pairs are in the standard format: `prompt`, `chosen`, `rejected`, as strings or as lists
    of messages."""

    path: str = path_key("", "file of pairs: .jsonl, .jsonl.gz or .parquet; empty: none")
    hub: str = key("", "data set of the Hugging Face Hub, owner/name; empty: none")
    revision: str = key("", "of the Hub data set: the full hash of a commit, which never moves")
    split: str = key("train", "of the Hub data set")
    chat_template: bool = key(
        True,
        "pairs of plain strings become a user's turn and the assistant's, where the model has a template and "
        "the prompt none of its marks; false: as they are",
    )
    limit: int = key(0, "at most this many pairs of path or hub; 0: all", at_least(0))
    bad_pairs: BadPairs = key(
        BadPairs.error,
        "empty or identical sides, prompts or pairs too long: stop at the first, or drop and count them",
    )


@dataclass
class PreferenceConfig:
    """Preference optimisation; reference = the starting backbone, its log-probabilities computed once (none
    for simpo and orpo).

    A hyper-parameter of the loss that is left out takes the default in `PREFERENCE_LOSSES`; one that the
    loss does not read is an error.
    """

    loss: str = key("sigmoid", "a name in `pns.preference_losses`")
    beta: float | None = key(
        None,
        "scale of the implicit reward (ipo: tau). All but orpo; null: 0.1, simpo 2.0, length_normalised 5.0",
        above(0),
    )
    label_smoothing: float | None = key(None, "share of flipped labels. cdpo, robust; null: 0.1", below(0.5))
    nll_weight: float | None = key(None, "times the chosen side's NLL per token. rpo; null: 1.0", at_least(0))
    target_margin: float | None = key(None, "gamma, off the reward margin. simpo; null: 1.0", at_least(0))
    desirable_weight: float | None = key(None, "lambda_D, of the chosen sides. kto; null: 1.0", above(0))
    undesirable_weight: float | None = key(None, "lambda_U, of the rejected sides. kto; null: 1.0", above(0))
    odds_ratio_weight: float | None = key(None, "lambda, beside the chosen NLL. orpo; null: 0.1", at_least(0))
    offset_scale: float | None = key(None, "alpha, times the score gap. offset; null: 1.0", at_least(0))
    steps: int = key(30, "training steps", at_least(1))
    pairs_per_step: int = key(32, "pairs of one step", at_least(1))
    margin: MarginMask = key(
        MarginMask.completion,
        "tokens in the margin: all of both sides; of the rejected side those up to its first wrong step; of "
        "each side the one where they first differ",
    )
    data: PreferenceData = section(PreferenceData)
    max_skipped_updates: int = key(0, "updates without a finite gradient before the run ends", at_least(0))
    checkpoint_every: int = key(20, "steps between checkpoints", at_least(1))
    optimizer: Optimizer = section(lambda: Optimizer(learning_rate=5e-7, warmup_steps=5))


@dataclass
class SegmentRules:
    """How a wrong completion becomes steps (arXiv 2505.14403)."""

    splitter: SplitterKind = key(
        SplitterKind.sentences, "ends of sentences and lines, or Segment any Text (arXiv 2406.16678)"
    )
    sat_model: str = path_or_name("", "directory of a Segment-any-Text model; read by splitter=sat")
    min_tokens: int = key(30, "tokens of a step, at least: shorter ones are merged", at_least(1))
    max_tokens: int = key(200, "tokens of a step, at most, where no formula is cut for it", at_least(1))


@dataclass
class StepJudgeConfig:
    """The language model that grades every step of a completion in one answer."""

    model: str = path_or_name("", "directory or Hub id; with an endpoint its name there")
    endpoint: Endpoint = section(lambda: Endpoint(max_tokens=1024))
    pool: ServicePool = section(ServicePool)


@dataclass
class ProcessRewardConfig:
    """The process reward model: a probability that a step is correct, for each step."""

    model: str = path_or_name("", "directory or Hub id")
    threshold: float = key(0.5, "a step is correct at this probability or above", between(0, 1))
    pool: ServicePool = section(ServicePool)


@dataclass
class BcpgArm:
    """One objective on the same samples. A hyper-parameter that is left out takes the default in
    `pns.offline_objectives`; one that the objective does not read is an error."""

    objective: str = key("nsa", "a name in `pns.offline_objectives`")
    negatives: list[str] = key(
        [OWN], "where wrong completions come from: own (the round's samples), sources of `negatives`"
    )
    beta: float | None = key(
        None, "of the behaviour constraint, or (rpo) scale of the implicit reward; null: 0.1", at_least(0)
    )
    constraint: Constraint = key(
        Constraint.squared_log_ratio, "nsa, masked, bcpg: what keeps the policy near the one that sampled"
    )
    correct_step_weight: float | None = key(
        None, "lambda, the advantage of correct steps of wrong completions. nsa; null: 0.1", at_least(0)
    )
    positive_weight: float | None = key(
        None, "lambda of right completions beside -1 of wrong ones. w_reinforce; null: 0.1", at_least(0)
    )
    nll_weight: float | None = key(None, "times the right side's NLL per token. rpo; null: 1.0", at_least(0))


@dataclass
class Bcpg:
    """Behaviour-constrained policy gradient with negative sample augmentation (BCPG-NSA, arXiv 2505.14403)
    and its baselines: sample, label the steps of what is wrong, train offline; in rounds."""

    start: BcpgStart = key(
        BcpgStart.backbone, "initial weights: models.backbone, or the model that rl trained"
    )
    rounds: int = key(
        1, "times of sampling, labelling and training, each on its share of problems", at_least(1)
    )
    samples_per_problem: int = key(8, "completions drawn for each problem", at_least(1))
    temperature: float = key(1.0, "of sampling", above(0))
    segments: SegmentRules = section(SegmentRules)
    rule: StepRule = key(StepRule.both, "whose word makes a step correct")
    step_judge: StepJudgeConfig = section(StepJudgeConfig)
    process_reward: ProcessRewardConfig = section(ProcessRewardConfig)
    arms: dict[str, BcpgArm] = key({"nsa": BcpgArm()}, "name -> objective; each trains a model of its own")
    steps: int = key(60, "training steps of each round", at_least(1))
    problems_per_step: int = key(24, "problems of one step, with all their completions", at_least(1))
    max_skipped_updates: int = key(0, "updates without a finite gradient before the run ends", at_least(0))
    checkpoint_every: int = key(20, "steps between checkpoints", at_least(1))
    optimizer: Optimizer = section(Optimizer)


@dataclass
class Study:
    """Arms that have all before the negatives in common, each with a model of its own (`pns study`)."""

    arms: dict[str, list[str]] = key({}, "name -> its words key=value: what it has otherwise than the rest")
    pairs: StudyPairs = key(StudyPairs.common, "problems and right sides that arms share, or an arm's own")
    seeds: list[int] = key(
        [0, 1, 2, 3, 4], "each is a run, with models, negatives and orders of its own", between(0, 2**32 - 1)
    )
    backbones: dict[str, str] = path_key({}, "name -> model, each with all seeds; empty: models.backbone")
    at_once: int = key(1, "runs side by side", at_least(1))


@dataclass
class Decoding:
    """How a suite is decoded. null: as the benchmark (`pns.data.benchmarks`) asks; others greedily, once."""

    samples_per_problem: int | None = key(None, "completions; null: the benchmark's, else 1", at_least(1))
    temperature: float | None = key(None, "0: greedy; null: the benchmark's, else 0", at_least(0))
    top_p: float | None = key(None, "nucleus of sampling; null: the benchmark's, else 1", up_to(1))
    max_new_tokens: int | None = key(
        None, "tokens; null: rollout's, or with pns evaluate by the model", at_least(1)
    )
    top_k: int | None = key(None, "draw from so many likeliest tokens; 0 or null: from all", at_least(0))
    min_p: float | None = key(
        None,
        "draw from tokens of at least this share of the likeliest one's probability; 0 or null: from all",
        between(0, 1),
    )
    presence_penalty: float | None = key(
        None, "taken off the logits of tokens in the completion; 0 or null: none", FINITE
    )
    frequency_penalty: float | None = key(
        None, "taken off once for each time that they are in it; 0 or null: none", FINITE
    )
    repetition_penalty: float | None = key(
        None,
        "divides positive logits of tokens in prompt or completion, multiplies others; 1 or null: none",
        above(0),
    )
    stop: list[str] | None = key(None, "texts that end a completion, beside data.stop; null: none")
    # Evaluation alone has it: a forced token is no sample of the policy, and cannot be trained on as one.
    thinking_budget: int | None = key(
        None,
        "tokens after which a reasoning block that is still open is closed (data.think_tags), for the answer "
        "to follow; less than max_new_tokens; 0 or null: none",
        at_least(0),
    )


# What the keys beyond the first four are where they change nothing.
DECODING_OFF: dict[str, Any] = {
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "stop": [],
    "thinking_budget": 0,
}


def described_decoding(decoding: Decoding) -> dict[str, Any]:
    """A complete decoding without the keys that change nothing: equal where samples are."""
    stated = vars(decoding)
    return {name: value for name, value in stated.items() if value not in (None, DECODING_OFF.get(name))}


@dataclass
class ModelEndpoint:
    """An OpenAI-compatible server that `pns evaluate` asks in the place of an engine: models.backbone is the
    model's name there. It need not honour seeds."""

    url: str = key("", "base URL, such as http://HOST:8000/v1; empty: rollout's engine samples")
    key_variable: str = key("OPENAI_API_KEY", "environment variable that holds the key; unset: none is sent")
    concurrency: int = key(64, "requests at once", at_least(1))
    retries: int = key(5, "times that a request is repeated after an error of the server", at_least(0))
    deadline_seconds: float = key(3600.0, "seconds for one completion", above(0))


@dataclass
class Evaluate(Decoding):
    """The suites, and the generator before and after reverse RL."""

    per_suite: dict[str, Decoding] = key({}, "suite -> those of these keys that it has of its own")
    from_generation_config: bool = key(
        False, "what is null comes from the model's generation_config.json before the benchmark"
    )
    endpoint: ModelEndpoint = section(ModelEndpoint)
    generator_samples: int = key(512, "of the generator before and after reverse RL", at_least(1))
    generator_temperature: float = key(1.0, "sampling temperature of those; 0: greedy", at_least(0))


@dataclass
class Tracking:
    """Metrics go to `metrics.jsonl` always, to gauges of Ray, and to backends of verl's `Tracking`."""

    backends: list[TrackingBackend] = key(
        [], "any of ray (gauges for Prometheus), tensorboard, wandb, mlflow, trackio; empty: none"
    )
    project: str = key("pns", "the backends' name for the runs together")


@dataclass
class Config:
    """The run."""

    name: str = key("", "of the run; empty: the recipe's file name")
    runs: str = path_key("runs", "directory of runs; the run directory is RUNS/NAME")
    method: Method = key(
        Method.pns, "pns: preference optimisation on negatives; bcpg: policy gradients on their good steps"
    )
    # NumPy's generators take 32 bits.
    seed: int = key(0, "of everything that is drawn", between(0, 2**32 - 1))
    data: Data = section(Data)
    models: Models = section(Models)
    placement: Placement = section(Placement)
    rollout: RolloutEngine = section(RolloutEngine)
    policy: PolicyConfig = section(PolicyConfig)
    reward: RewardConfig = section(RewardConfig)
    rl: GrpoConfig = section(GrpoConfig)
    reward_model: RewardModelStage = section(RewardModelStage)
    reverse_rl: ReverseRl = section(ReverseRl)
    negatives: str = key("pns", f"where the rejected sides come from: {', '.join(NEGATIVE_SOURCES)}")
    mixture: Mixture = section(Mixture)
    sources: Sources = section(Sources)
    synthesize: Synthesize = section(Synthesize)
    pair: PairStage = section(PairStage)
    preference: PreferenceConfig = section(PreferenceConfig)
    bcpg: Bcpg = section(Bcpg)
    study: Study = section(Study)
    evaluate: Evaluate = section(Evaluate)
    tracking: Tracking = section(Tracking)


def stages(config: Config, last: str | None = None) -> tuple[str, ...]:
    """The stages that `config` asks for, in order, up to `last`. Pairs given from outside need no negatives
    made: the backbone is trained on them."""
    asked: tuple[str, ...] = STAGES
    if config.method is Method.bcpg:
        asked = bcpg_stages(config)
    elif config.method is Method.study:
        asked = (*STAGES[:4], "solve", "choose", *STAGES[4:])
    elif external_pairs(config):
        asked = ("preference", "evaluate")
    return asked[: asked.index(last) + 1] if last else asked


def bcpg_stages(config: Config) -> tuple[str, ...]:
    """Those of method bcpg: what samples and labels, and what makes the negatives that its arms ask for."""
    others = other_negatives(config)
    before = ("rl",) if others or config.bcpg.start is BcpgStart.target else ()
    made = ("reward_model", "reverse_rl", "synthesize") if others else ()
    labelled = ("label_steps",) if labels_steps(config) else ()
    return (*before, *made, "sample", *labelled, "bcpg", "evaluate")


def other_negatives(config: Config) -> tuple[str, ...]:
    """The sources of negatives, beside the samples themselves, that some arm of `bcpg` names."""
    named = dict.fromkeys(source for arm in config.bcpg.arms.values() for source in arm.negatives)
    return tuple(source for source in named if source != OWN)


def labels_steps(config: Config) -> bool:
    """Whether some arm of `bcpg` reads labels of steps."""
    return any(OFFLINE_OBJECTIVES[arm.objective].reads_steps for arm in config.bcpg.arms.values())


def step_services(config: Config) -> tuple[str, ...]:
    """Those of STEP_SERVICES that `bcpg.rule` reads."""
    if config.bcpg.rule in (StepRule.judge, StepRule.process_reward):
        return ("step_judge" if config.bcpg.rule is StepRule.judge else "process_reward",)
    return STEP_SERVICES


def external_pairs(config: Config) -> bool:
    """Whether the pairs of `preference` come from a file or the Hub."""
    return bool(config.preference.data.path or config.preference.data.hub)


def hyper_parameters(settings: PreferenceConfig) -> dict[str, float]:
    """What the chosen loss reads: what is set, and its own defaults for the rest."""
    defaults = PREFERENCE_LOSSES[settings.loss].defaults
    values = {name: getattr(settings, name) for name in defaults}
    return {name: defaults[name] if value is None else value for name, value in values.items()}


@dataclass(frozen=True)
class Service:
    """A model that scores; `key` names its section. `url`: of the endpoint where it is asked, else its pool
    has processes here."""

    key: str
    model: str  # empty: the run's own reward model
    judges: bool  # a language model that writes a verdict, and not a head on one
    pool: ServicePool
    url: str = ""


def services(config: Config) -> dict[str, Service]:
    """Role -> service: the reward terms by their names, and what labels steps."""
    own = config.bcpg
    found = {
        name: Service(
            f"reward.terms.{name}", term.model, term.kind is TermKind.judge, term.pool, term.endpoint.url
        )
        for name, term in config.reward.terms.items()
    }
    judge, process_reward = own.step_judge, own.process_reward
    found["step_judge"] = Service("bcpg.step_judge", judge.model, True, judge.pool, judge.endpoint.url)
    found["process_reward"] = Service("bcpg.process_reward", process_reward.model, False, process_reward.pool)
    return found


def arm_parameters(arm: BcpgArm) -> dict[str, float]:
    """What the arm's objective reads: what is set, and its own defaults for the rest."""
    defaults = OFFLINE_OBJECTIVES[arm.objective].defaults
    values = {name: getattr(arm, name) for name in defaults}
    return {name: defaults[name] if value is None else value for name, value in values.items()}


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain YAML/JSON values."""
    values = OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)
    return cast(dict[str, Any], values)
