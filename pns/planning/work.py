"""What a run does, in counts: the roles of its stages; tokens that are sampled, scored and trained on.

The counts are those of the stages' own code with every completion past the gates; how long texts are is
assumed, unless it is told.
"""

import gzip
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pns.config import Config, DataSource, GrpoConfig, Layout, TermKind, external_pairs
from pns.data.benchmarks import BENCHMARKS, TRAINING_SETS, decoding
from pns.planning.assumptions import Assumptions
from pns.preference_losses import PREFERENCE_LOSSES
from pns.tiny.world import SUITES

# Models of a run by their name in a plan; others are the reward terms of their own models.
BACKBONE, GENERATOR, REWARD_MODEL = "backbone", "generator", "reward model"


@dataclass(frozen=True)
class Lengths:
    """Tokens of the mean prompt and completion, and the limits of both."""

    prompt: int
    completion: int
    max_prompt: int
    max_completion: int


@dataclass(frozen=True)
class Sampling:
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


@dataclass(frozen=True)
class Phase:
    """One kind of work of a stage, `times` times; sampling and scoring go on at once, training after them."""

    name: str
    times: int
    sampling: Sampling | None = None
    scored: dict[str, int] = field(default_factory=dict)  # reward term -> completions
    updates: Updates | None = None
    syncs: bool = False


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


def roles_by_stage(config: Config) -> dict[str, tuple[str, ...]]:
    """Stage -> its roles, as the stages declare them; without the driver, which imports Ray and torch."""
    sampled, trained = ("rollout", "verifier"), ("rollout", "verifier", "policy")
    if external_pairs(config):
        return {"preference": ("policy",), "evaluate": sampled}
    terms = scoring_terms(config)
    if config.negatives == "pns":
        negatives = {"reverse_rl": (*trained, *terms), "synthesize": (*sampled, *terms)}
    else:
        negatives = {"synthesize": sampled}
    first, last = {"rl": trained, "reward_model": trained}, {"preference": ("policy",), "evaluate": sampled}
    return {**first, **negatives, "pair": (*sampled, config.pair.scored_by), **last}


def model_names(config: Config) -> dict[str, str]:
    """Model of a plan -> directory or Hub id."""
    models = config.models
    names = {BACKBONE: models.backbone}
    if external_pairs(config):
        return names
    names[GENERATOR] = models.generator if config.reverse_rl.start.value == "path" else models.backbone
    names[REWARD_MODEL] = models.reward_model or models.backbone
    for name in dict.fromkeys((*scoring_terms(config), config.pair.scored_by)):
        names[name] = config.reward.terms[name].model or names[REWARD_MODEL]
    return names


def phases_by_stage(config: Config) -> dict[str, list[Phase]]:
    """Stage -> its work; a count that is not known without reading a set is 0."""
    counts = problem_counts(config)
    if external_pairs(config):
        num_pairs, models = counts["pairs"], 2
        return {"preference": preference(config, num_pairs), "evaluate": evaluation(config, models)}
    terms, preferred = scoring_terms(config), counts["preference"]
    phases = {"rl": [grpo_step("rl", config, config.rl, BACKBONE, ())]}
    phases["reward_model"] = reward_models(config, counts["reward"])
    per_problem = config.synthesize.samples_per_problem
    negatives = Sampling(BACKBONE, preferred * per_problem, preferred, config.rollout.max_new_tokens)
    if config.negatives == "pns":
        phases["reverse_rl"] = reverse_rl(config, terms)
        own = Sampling(GENERATOR, negatives.completions, preferred, negatives.max_new_tokens)
        scored = dict.fromkeys(terms, own.completions)
        phases["synthesize"] = [Phase("sampling", 1, own, scored)]
    else:
        phases["synthesize"] = [Phase("sampling", 1, negatives)]
    own_samples = preferred * config.pair.samples_per_problem
    num_pairs = preferred * config.pair.pairs_per_problem
    chosen = Sampling(BACKBONE, own_samples, preferred, config.rollout.max_new_tokens)
    # Both sides of the pairs, and all completions twice: by the reward model and the held-out one.
    scored = {config.pair.scored_by: 2 * num_pairs + 2 * (own_samples + negatives.completions)}
    phases["pair"] = [Phase("sampling", 1, chosen), Phase("scoring", 1, scored=scored)]
    phases["preference"] = preference(config, num_pairs)
    phases["evaluate"] = evaluation(config, models=3)
    return phases


def grpo_step(name: str, config: Config, settings: GrpoConfig, model: str, terms: tuple[str, ...]) -> Phase:
    num = settings.problems_per_step * settings.completions_per_problem
    forwards = int(settings.kl_coefficient > 0)  # the reference's
    forwards += int(settings.importance_cap > 0 or settings.temperature != 1)  # the old policy's
    sampling = Sampling(model, num, settings.problems_per_step, config.rollout.max_new_tokens)
    updates = Updates(model, num, settings.problems_per_step, settings.updates_per_step, forwards)
    return Phase("step", settings.steps, sampling, dict.fromkeys(terms, num), updates, syncs=True)


def reverse_rl(config: Config, terms: tuple[str, ...]) -> list[Phase]:
    own, num = config.reverse_rl, config.evaluate.generator_samples
    phases = [grpo_step("reverse_rl", config, own, GENERATOR, terms)]
    # Before and after, problems in turn.
    measured = Sampling(GENERATOR, num, num, config.rollout.max_new_tokens)
    phases.append(Phase("measuring", 2, measured, dict.fromkeys(terms, num)))
    if own.refresh_every:
        times = (own.steps - 1) // own.refresh_every * own.refresh_steps
        pairs = 2 * max(1, config.reward_model.pairs_per_step // 2)
        phases.append(Phase("refreshing", times, updates=_of_pairs(REWARD_MODEL, pairs, score_head=True)))
    return phases


def reward_models(config: Config, num_problems: int) -> list[Phase]:
    """The main model and the held-out one."""
    own = config.reward_model
    num = num_problems * own.samples_per_problem
    sampling = Sampling(BACKBONE, num, num_problems, config.rollout.max_new_tokens)
    updates = _of_pairs(REWARD_MODEL, own.pairs_per_step, score_head=True)
    return [Phase("sampling", 1, sampling), Phase("step", 2 * own.steps, updates=updates)]


def preference(config: Config, num_pairs: int) -> list[Phase]:
    own = config.preference
    phases = [Phase("step", own.steps, updates=_of_pairs(BACKBONE, own.pairs_per_step))]
    if PREFERENCE_LOSSES[own.loss].needs_reference and num_pairs:
        reference = Updates(BACKBONE, 2 * num_pairs, num_pairs, updates=0, forwards=1)
        phases.insert(0, Phase("reference", 1, updates=reference))
    return phases


def _of_pairs(model: str, pairs: int, score_head: bool = False) -> Updates:
    return Updates(model, 2 * pairs, pairs, score_head=score_head)


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
        Phase("sampling", models, Sampling(BACKBONE, num, prompts[tokens], tokens))
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
    if external_pairs(config):
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


def held_tokens(updates: Updates, lengths: Lengths, layout: Layout) -> int:
    """Tokens of a batch as the layout holds them; padding is left out, as rows are sorted by length."""
    prompts = updates.prompts if layout is Layout.shared else updates.rows
    return updates.rows * lengths.completion + prompts * lengths.prompt
