"""What a run does, in counts: the roles of its stages; tokens that are sampled, scored and trained on.

The counts are those of the stages' own code with every completion past the gates; how long texts are is
assumed, unless it is told.
"""

import gzip
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pns.config import (
    NEGATIVE_SOURCES,
    OWN,
    BcpgArm,
    BcpgStart,
    Config,
    DataSource,
    GeneratorStart,
    GrpoConfig,
    Layout,
    Method,
    PairPreference,
    TermKind,
    external_pairs,
    labels_steps,
    other_negatives,
    services,
    step_services,
)
from pns.data.benchmarks import BENCHMARKS, TRAINING_SETS, decoding
from pns.errors import UserError, did_you_mean
from pns.offline_objectives import OFFLINE_OBJECTIVES
from pns.planning.assumptions import Assumptions
from pns.preference_losses import PREFERENCE_LOSSES
from pns.recipe import study_arms
from pns.tiny.world import SUITES

# Models of a run by their name in a plan; others are the services of their own models.
BACKBONE, GENERATOR, REWARD_MODEL = "backbone", "generator", "reward model"


@dataclass(frozen=True)
class Lengths:
    """Tokens of the mean prompt and completion, and the limits of both."""

    prompt: int
    completion: int
    max_prompt: int
    max_completion: int


@dataclass(frozen=True)
class SamplingWork:
    """Completions of `prompts` problems by `model`; each goes to the verifier."""

    model: str
    completions: int
    prompts: int
    max_new_tokens: int


@dataclass(frozen=True)
class Updates:
    """Rows that go through the policy's processes: `updates` optimizer steps and `forwards` passes without
    gradients on each."""

    model: str
    rows: int
    prompts: int  # different ones among them, neighbours in the batch
    updates: int = 1
    forwards: int = 0
    score_head: bool = False
    has_reference: bool = False  # a second model, frozen
    together: int = 1  # rows that share a micro-batch: pairs


@dataclass(frozen=True)
class Phase:
    """One kind of work of a stage, `times` times; sampling and scoring go on at once, training after them, or
    (`overlaps`) beside those of the next time."""

    name: str
    times: int
    sampling: SamplingWork | None = None
    scored: dict[str, int] = field(default_factory=dict)  # service -> completions
    updates: Updates | None = None
    syncs: bool = False
    overlaps: bool = False


@dataclass(frozen=True)
class StageWork:
    roles: tuple[str, ...]
    phases: list[Phase]

    @property
    def num_sampled(self) -> int:
        return sum(phase.sampling.completions for phase in self.phases if phase.sampling)


def lengths_of(
    config: Config, assumed: Assumptions, prompt: int | None = None, completion: int | None = None
) -> Lengths:
    """As told, else as assumed."""
    limits = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    mean_completion = completion or max(1, round(assumed.completion_share * limits[1]))
    mean_prompt = prompt or min(int(assumed.prompt_tokens), limits[0])
    return Lengths(mean_prompt, min(mean_completion, limits[1]), *limits)


def scoring_terms(config: Config) -> tuple[str, ...]:
    """The reward terms that a pool computes."""
    kinds = (TermKind.reward_model, TermKind.judge)
    return tuple(name for name, term in config.reward.terms.items() if term.weight > 0 and term.kind in kinds)


def model_names(config: Config) -> dict[str, str]:
    """Model of a plan -> directory or Hub id."""
    models = config.models
    names = {BACKBONE: models.backbone}
    if config.method is Method.bcpg:
        if labels_steps(config):
            names |= {name: services(config)[name].model for name in step_services(config)}
        if not other_negatives(config):
            return names
    elif external_pairs(config):
        return names
    if GeneratorStart.path in (config.reverse_rl.start, *config.mixture.starts) and models.generator:
        names[GENERATOR] = models.generator
    names[REWARD_MODEL] = models.reward_model or models.backbone
    scoring_pairs = () if config.method is Method.bcpg else (config.pair.scored_by,)
    for name in dict.fromkeys((*scoring_terms(config), *scoring_pairs)):
        names[name] = config.reward.terms[name].model or names[REWARD_MODEL]
    return names


def work_of(config: Config, assumed: Assumptions | None = None) -> dict[str, StageWork]:
    """Stage, by its name in the run -> its work, as the stages declare it; without the driver, which imports
    Ray and torch. A count that is not known without reading a set is 0."""
    if config.method is Method.bcpg:
        return bcpg_work(config, assumed or Assumptions())
    if config.method is Method.study:
        return study_work(config)
    counts = problem_counts(config)
    sampled, trained = ("rollout", "verifier"), ("rollout", "verifier", "policy")
    if external_pairs(config):
        return {
            "preference": StageWork(("policy",), preference(config, counts["pairs"])),
            "evaluate": StageWork(sampled, evaluation(config, models=2)),
        }
    preferred = counts["preference"]
    negatives = negatives_of(config, config.negatives, preferred)
    num_negatives = sum(own.num_sampled for name, own in negatives.items() if name.startswith("synthesize"))
    return {
        "rl": StageWork(trained, [grpo_step(config, config.rl, BACKBONE, ())]),
        "reward_model": StageWork(trained, reward_models(config, counts["reward"])),
        **negatives,
        "pair": pairing(config, preferred, num_negatives),
        "preference": StageWork(("policy",), preference(config, preferred * config.pair.pairs_per_problem)),
        "evaluate": StageWork(sampled, evaluation(config, models=3)),
    }


def negatives_of(config: Config, source: str, problems: int, part: str = "") -> dict[str, StageWork]:
    """The stages of a source of NEGATIVE_SOURCES; those of a part of a mixture have its name.
    Raises UserError for another source."""
    if source not in NEGATIVE_SOURCES:
        hint = did_you_mean(source, NEGATIVE_SOURCES) or f"; there are {', '.join(NEGATIVE_SOURCES)}"
        raise UserError(f"negatives: {source!r} is no source of negatives that a plan knows{hint}")
    if source == "mixed":
        return mixture_of(config, problems, part) | {f"synthesize{part}": StageWork((), [])}
    if source == "file":
        return {f"synthesize{part}": StageWork(("verifier",), [])}
    terms = scoring_terms(config) if source == "pns" else ()
    model = generator_model(config) if source == "pns" else BACKBONE
    num = problems * config.synthesize.samples_per_problem
    phases = [Phase("sampling", 1, SamplingWork(model, num, problems, config.rollout.max_new_tokens))]
    phases[0] = replace(phases[0], scored=dict.fromkeys(terms, num))
    roles = ["rollout", "verifier"]
    if config.synthesize.bounds_log_probs:
        roles.append("policy")
        phases.append(Phase("log-probs", 1, updates=Updates(BACKBONE, num, problems, 0, forwards=1)))
    stages = {f"synthesize{part}": StageWork((*roles, *terms), phases)}
    if source == "rs_hard":
        scored = Phase("scoring", 1, scored={config.pair.scored_by: num})  # at most: of the wrong ones
        hardest = StageWork((config.pair.scored_by,), [scored])
        stages = {f"sample_wrong{part}": StageWork(tuple(roles), phases), f"synthesize{part}": hardest}
    if source == "pns":
        own_roles = ("rollout", "verifier", "policy", *terms)
        stages = {f"reverse_rl{part}": StageWork(own_roles, reverse_rl(config, terms)), **stages}
    return stages


def mixture_of(config: Config, problems: int, part: str) -> dict[str, StageWork]:
    """Of every part of a mixture."""
    stages: dict[str, StageWork] = {}
    for source in config.mixture.sources:
        parts = {source: config}
        if source == "pns" and config.mixture.starts:
            parts = {
                f"pns_{start}": replace(config, reverse_rl=replace(config.reverse_rl, start=start))
                for start in config.mixture.starts
            }
        for name, own in parts.items():
            stages |= negatives_of(own, source, problems, part=f"{part}_{name}")
    return stages


def generator_model(config: Config) -> str:
    """What reverse RL starts from: of the backbone's shape, unless it is a model of its own."""
    return GENERATOR if config.reverse_rl.start is GeneratorStart.path else BACKBONE


def study_work(config: Config) -> dict[str, StageWork]:
    """Of one run of a study, a seed of a backbone. What arms have in common is made once, and stands with the
    first of them."""
    counts, trained = problem_counts(config), ("rollout", "verifier", "policy")
    preferred = counts["preference"]
    stages = {
        "rl": StageWork(trained, [grpo_step(config, config.rl, BACKBONE, ())]),
        "reward_model": StageWork(trained, reward_models(config, counts["reward"])),
        "solve": StageWork(("rollout", "verifier"), [solving(config, preferred)]),
        "choose": StageWork((), []),
    }
    made: list[Config] = []
    for name, own in study_arms(config).items():
        is_made = any(same_negatives(own, other) for other in made)
        made.append(own)
        of_source = negatives_of(own, own.negatives, preferred, f"_{name}")
        num = sum(stage.num_sampled for stage in of_source.values())
        for stage, work in of_source.items():
            stages[stage] = StageWork(work.roles, []) if is_made else work
        stages[f"pair_{name}"] = StageWork(*scoring_of_pairs(own, preferred, num))
        phases = preference(own, preferred)  # at most: of problems that all arms have a negative of
        stages[f"preference_{name}"] = StageWork(("policy",), phases)
    models = 2 + len(config.study.arms)
    return stages | {"evaluate": StageWork(("rollout", "verifier"), evaluation(config, models))}


def same_negatives(arm: Config, other: Config) -> bool:
    sections = ("negatives", "synthesize", "reverse_rl", "reward", "mixture", "sources")
    return all(getattr(arm, section) == getattr(other, section) for section in sections)


def solving(config: Config, problems: int) -> Phase:
    num = problems * config.pair.samples_per_problem
    return Phase("sampling", 1, SamplingWork(BACKBONE, num, problems, config.rollout.max_new_tokens))


def pairing(config: Config, problems: int, num_negatives: int) -> StageWork:
    roles, phases = scoring_of_pairs(config, problems, num_negatives)
    return StageWork(("rollout", "verifier", *roles), [solving(config, problems), *phases])


def scoring_of_pairs(
    config: Config, problems: int, num_negatives: int
) -> tuple[tuple[str, ...], list[Phase]]:
    """Roles and work of what is measured of pairs."""
    own = config.pair
    num = problems * own.samples_per_problem
    # Both sides of the pairs, and all completions twice: by the reward model and the held-out one.
    scored = 2 * problems * own.pairs_per_problem + 2 * (num + num_negatives)
    phases = [Phase("scoring", 1, scored={own.scored_by: scored})]
    roles = [own.scored_by]
    if own.prefer is PairPreference.likely and num_negatives:
        likely = Updates(BACKBONE, num_negatives, problems, 0, forwards=1)
        phases.append(Phase("log-probs", 1, updates=likely))
    if own.perplexity_samples:  # of right ones, of the target's wrong ones and of the negatives
        rows = 3 * min(own.perplexity_samples, num)
        phases.append(Phase("perplexity", 1, updates=Updates(BACKBONE, rows, rows, 0, forwards=1)))
    if own.perplexity_samples or own.prefer is PairPreference.likely:
        roles.insert(0, "policy")
    return tuple(roles), phases


def grpo_step(config: Config, settings: GrpoConfig, model: str, terms: tuple[str, ...]) -> Phase:
    num = settings.problems_per_step * settings.completions_per_problem
    has_reference = settings.kl_coefficient > 0
    # The reference's, and the old policy's where the engine's log-probabilities are not taken for them.
    forwards = has_reference + (settings.importance_cap > 0 or settings.temperature != 1)
    sampling = SamplingWork(model, num, settings.problems_per_step, config.rollout.max_new_tokens)
    updates = Updates(
        model,
        num,
        settings.problems_per_step,
        settings.updates_per_step,
        forwards,
        has_reference=has_reference,
    )
    scored = dict.fromkeys(terms, num)
    return Phase("step", settings.steps, sampling, scored, updates, syncs=True, overlaps=settings.overlap)


def reverse_rl(config: Config, terms: tuple[str, ...]) -> list[Phase]:
    own, num, model = config.reverse_rl, config.evaluate.generator_samples, generator_model(config)
    # Before and after, problems in turn.
    measured = SamplingWork(model, num, num, config.rollout.max_new_tokens)
    phases = [
        grpo_step(config, own, model, terms),
        Phase("measuring", 2, measured, dict.fromkeys(terms, num)),
    ]
    if own.refresh_every:
        times = (own.steps - 1) // own.refresh_every * own.refresh_steps
        pairs = 2 * max(1, config.reward_model.pairs_per_step // 2)
        phases.append(Phase("refreshing", times, updates=_of_pairs(REWARD_MODEL, pairs, score_head=True)))
    return phases


def reward_models(config: Config, num_problems: int) -> list[Phase]:
    """The main model and the held-out one."""
    own = config.reward_model
    num = num_problems * own.samples_per_problem
    sampling = SamplingWork(BACKBONE, num, num_problems, config.rollout.max_new_tokens)
    updates = _of_pairs(REWARD_MODEL, own.pairs_per_step, score_head=True)
    return [Phase("sampling", 1, sampling), Phase("step", 2 * own.steps, updates=updates)]


def preference(config: Config, num_pairs: int) -> list[Phase]:
    own = config.preference
    phases = [Phase("step", own.steps, updates=_of_pairs(BACKBONE, own.pairs_per_step))]
    if PREFERENCE_LOSSES[own.loss].needs_reference and num_pairs:
        reference = Updates(BACKBONE, 2 * num_pairs, num_pairs, updates=0, forwards=1)
        phases.insert(0, Phase("reference", 1, updates=reference))
    return phases


@dataclass(frozen=True)
class ArmRows:
    """Completions of a problem that an arm of bcpg has, in the mean."""

    right: float
    wrong: float


def bcpg_work(config: Config, assumed: Assumptions) -> dict[str, StageWork]:
    """Of method bcpg: what every arm does in every round."""
    own = config.bcpg
    stages, negatives = before_arms(config)
    made: set[Hashable] = set()
    for name, arm in own.arms.items():
        rows = arm_rows(config, arm, negatives, assumed)
        for number in range(1, own.rounds + 1):
            stages |= arm_round(config, name, number, rows, made)
    models = 1 + (own.start is BcpgStart.target) + len(own.arms)
    return stages | {"evaluate": StageWork(("rollout", "verifier"), evaluation(config, models))}


def before_arms(config: Config) -> tuple[dict[str, StageWork], dict[str, float]]:
    """RL and the negatives of other sources, where they are asked for; source -> negatives of a problem."""
    others, problems = other_negatives(config), problem_counts(config)["preference"]
    stages: dict[str, StageWork] = {}
    negatives: dict[str, float] = {}
    roles = ("rollout", "verifier", "policy")
    if others or config.bcpg.start is BcpgStart.target:
        stages["rl"] = StageWork(roles, [grpo_step(config, config.rl, BACKBONE, ())])
    if others:
        num = problem_counts(config)["reward"]
        stages["reward_model"] = StageWork(roles, reward_models(config, num))
    for source in others:
        of_source = negatives_of(config, source, problems, f"_{source}")
        stages |= of_source
        num = sum(own.num_sampled for name, own in of_source.items() if name.startswith("synthesize"))
        negatives[source] = num / max(1, problems)
    return stages, negatives


def arm_round(
    config: Config, name: str, number: int, rows: ArmRows, made: set[Hashable]
) -> dict[str, StageWork]:
    """What an arm does in a round. Samples of the first round are the same for all arms, and so is what
    follows from them and the same negatives: it stands with the first arm that needs it, noted in `made`."""
    own, arm, part = config.bcpg, config.bcpg.arms[name], f"{name}_{number}"
    entry = OFFLINE_OBJECTIVES[arm.objective]
    problems = -(-problem_counts(config)["preference"] // own.rounds)
    samples = frozenset[str]() if number == 1 else frozenset([part])
    labelled = samples | frozenset(arm.negatives)

    def once(key: Hashable, phase: Phase) -> list[Phase]:
        is_made = key in made
        made.add(key)
        return [] if is_made else [phase]

    num = problems * own.samples_per_problem
    sampling = SamplingWork(BACKBONE, num, problems, config.rollout.max_new_tokens)
    sampled = once(("sample", samples), Phase("sampling", 1, sampling))
    stages = {f"sample_{part}": StageWork(("rollout", "verifier"), sampled)}
    if entry.reads_steps:
        asked = step_services(config)
        scored = Phase("labels", 1, scored=dict.fromkeys(asked, round(problems * rows.wrong)))
        stages[f"label_steps_{part}"] = StageWork(asked, once(("label_steps", labelled), scored))
    phases = [Phase("step", own.steps, updates=arm_updates(config, arm, rows))]
    if entry.needs_reference and problems:
        all_rows = Updates(BACKBONE, round(problems * (rows.right + rows.wrong)), problems, 0, forwards=1)
        phases = once(("reference", labelled), Phase("reference", 1, updates=all_rows)) + phases
    return stages | {f"bcpg_{part}": StageWork(("policy",), phases)}


def arm_rows(config: Config, arm: BcpgArm, negatives: Mapping[str, float], assumed: Assumptions) -> ArmRows:
    """`negatives`: source -> those of a problem."""
    num = config.bcpg.samples_per_problem
    own_wrong = assumed.wrong_share * num if OWN in arm.negatives else 0.0
    others = sum(negatives[source] for source in arm.negatives if source != OWN)
    return ArmRows((1 - assumed.wrong_share) * num, own_wrong + others)


def arm_updates(config: Config, arm: BcpgArm, rows: ArmRows) -> Updates:
    """One step of an arm: pairs use each completion once, rft has right ones alone."""
    problems = config.bcpg.problems_per_step
    if arm.objective == "rpo":
        return _of_pairs(BACKBONE, max(1, round(problems * min(rows.right, rows.wrong))))
    of_problem = rows.right if arm.objective == "rft" else rows.right + rows.wrong
    return Updates(BACKBONE, max(1, round(problems * of_problem)), problems)


def _of_pairs(model: str, pairs: int, score_head: bool = False) -> Updates:
    return Updates(model, 2 * pairs, pairs, score_head=score_head, together=2)


def evaluation(config: Config, models: int) -> list[Phase]:
    """Suites with the same limit together, once a model."""
    completions: dict[int, int] = {}
    prompts: dict[int, int] = {}
    for suite, count in suite_counts(config):
        asked = decoding(config, suite)
        tokens = asked.max_new_tokens or config.rollout.max_new_tokens
        completions[tokens] = completions.get(tokens, 0) + count * (asked.samples_per_problem or 1)
        prompts[tokens] = prompts.get(tokens, 0) + count
    return [
        Phase("sampling", models, SamplingWork(BACKBONE, num, prompts[tokens], tokens))
        for tokens, num in completions.items()
    ]


def suite_counts(config: Config) -> Iterator[tuple[str, int]]:
    """(suite, problems)."""
    if config.data.source is DataSource.tiny:
        yield from ((suite, config.data.tiny.num_test_per_suite) for suite in SUITES)
        return
    limit = config.data.jsonl.limit
    for suite in config.data.benchmarks:
        yield suite, _limited(BENCHMARKS[suite].count if suite in BENCHMARKS else 0, limit)
    for suite, file in config.data.jsonl.suites.items():
        yield suite, _limited(count_lines(Path(file)), limit)


def problem_counts(config: Config) -> dict[str, int]:
    """Problems of the parts train, reward and preference, and pairs from outside; 0: not known."""
    data = config.data
    if config.method is Method.pns and external_pairs(config):
        source = config.preference.data
        num = 0 if source.path.endswith(".parquet") or not source.path else count_lines(Path(source.path))
        return {"pairs": _limited(num, source.limit)}
    if data.source is DataSource.tiny:
        sizes = data.tiny
        return {"train": sizes.num_train, "reward": sizes.num_reward, "preference": sizes.num_preference}
    counts = {}
    for part in ("train", "reward", "preference"):
        name = getattr(data.jsonl, part) or data.jsonl.train
        num = TRAINING_SETS[name].count if name in TRAINING_SETS else count_lines(Path(name))
        counts[part] = _limited(num, data.jsonl.limit)
    return counts


def _limited(num: int, limit: int) -> int:
    return min(num, limit) if limit else num


def count_lines(file: Path) -> int:
    """Lines with something on them; 0 where there is no such file."""
    if not file.is_file():
        return 0
    text = file.read_bytes()
    lines = (gzip.decompress(text) if file.suffix == ".gz" else text).splitlines()
    return sum(1 for line in lines if line.strip())


def steps_of(config: Config, completion_tokens: float, assumed: Assumptions) -> float:
    """Steps of a wrong completion."""
    own = config.bcpg.segments
    return completion_tokens / min(max(assumed.step_tokens, own.min_tokens), own.max_tokens)


def held_tokens(updates: Updates, lengths: Lengths, layout: Layout) -> int:
    """Tokens of a batch as the layout holds them; padding is left out, as rows are sorted by length."""
    prompts = updates.prompts if layout is Layout.shared else updates.rows
    return updates.rows * lengths.completion + prompts * lengths.prompt
