"""Where the rejected sides of the pairs come from: a table of sources, one of which `negatives` names.

A source adds the stages it needs to the plan and returns the artefact with the negatives. `chosen`, pairing
and what follows are the same for all of them, so that two sources compare.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from pns.algo.negatives import filter_negatives, mix_negatives
from pns.config import Config, GeneratorStart
from pns.files import write_json, write_jsonl
from pns.run.stage import ModelFiles, Plan, stage
from pns.stages.artefacts import AnyModel, Negatives, RewardModels, TrainedModel
from pns.stages.baselines import corrupted, given, hardest, prompted
from pns.stages.context import Context, Problems, World
from pns.stages.reverse_rl import reverse_rl
from pns.stages.synthesize import (
    SynthesizeSettings,
    keep_in_log_prob_range,
    sample_negatives,
    sampling_roles,
    synthesize,
    synthesize_settings,
    write_negatives,
)

Source = Callable[[Plan, Config, World, TrainedModel, RewardModels], Negatives]


def plausible(
    run: Plan, config: Config, world: World, target: TrainedModel, rewards: RewardModels
) -> Negatives:
    """A generator trained by reverse RL, and what it writes."""
    start: AnyModel = target
    if config.reverse_rl.start is GeneratorStart.backbone:
        start = world.backbone
    elif config.reverse_rl.start is GeneratorStart.path:
        start = ModelFiles(config.models.generator)
    solved = target if config.reverse_rl.refresh_every else None
    generator = run(reverse_rl, start, solved, rewards, world.train, world.preference)
    return run(synthesize, generator, rewards, world.preference, target)


@stage(Negatives, synthesize_settings, sampling_roles)
def rejection_sample(
    ctx: Context, settings: SynthesizeSettings, target: TrainedModel, problems: Problems
) -> Negatives:
    """The target's own wrong completions, by the filters that every source passes."""
    rollouts = sample_negatives(ctx, settings, target.model, problems, rules=None)
    # No quantile: the ordinary reward has no terms to rank by.
    kept, counts = filter_negatives(
        rollouts, 0.0, settings.synthesize.quantile_term, settings.synthesize.drop_box_only_flips
    )
    kept = keep_in_log_prob_range(ctx, settings, target, kept, counts)
    return write_negatives(ctx, rollouts, kept, counts, "sample more per problem")


def rejection_sampled(
    run: Plan, config: Config, world: World, target: TrainedModel, rewards: RewardModels
) -> Negatives:
    return run(rejection_sample, target, world.preference, name="synthesize")


def mixed(run: Plan, config: Config, world: World, target: TrainedModel, rewards: RewardModels) -> Negatives:
    """Several sources, and of plausible negatives a generator from each of several starts."""
    parts: dict[str, Negatives] = {}
    for source in config.mixture.sources:
        own = {source: config}
        if source == "pns" and config.mixture.starts:
            own = {f"pns_{start}": with_start(config, start) for start in config.mixture.starts}
        for name, of_part in own.items():
            parts[name] = SOURCES[source](run.part(name, of_part), of_part, world, target, rewards)
    return run(mix, parts, name="synthesize")


def with_start(config: Config, start: GeneratorStart) -> Config:
    return replace(config, reverse_rl=replace(config.reverse_rl, start=start))


@stage(Negatives, lambda config: None, lambda settings: ())
def mix(ctx: Context, settings: None, parts: dict[str, Negatives]) -> Negatives:
    """The union of `parts`, by `mix_negatives`, with the source of each and how many there are of each."""
    negatives = Negatives(ctx.directory)
    own, num_dropped = mix_negatives({name: part.negatives() for name, part in parts.items()})
    # Sources count their samples alike: an id is one only with its source.
    named = [(name, f"{name}/{rollout.completion.id}", rollout) for name, rollout in own]
    kept = [replace(r, completion=replace(r.completion, id=identity)) for _, identity, r in named]
    write_jsonl(negatives.negatives_file, kept)
    write_json(negatives.sources_file, {identity: name for name, identity, _ in named})
    num_kept = Counter(name for name, _ in own)
    counts = {f"kept_{name}": num_kept[name] for name in parts}
    counts |= {f"duplicate_{name}": num for name, num in num_dropped.items()}
    write_json(negatives.counts_file, counts)
    ctx.place.count(kept=len(kept), **counts)
    return negatives


def rejection_sampled_hardest(
    run: Plan, config: Config, world: World, target: TrainedModel, rewards: RewardModels
) -> Negatives:
    sampled = run(rejection_sample, target, world.preference, name="sample_wrong")
    return run(hardest, sampled, rewards, name="synthesize")


def corrupted_right(
    run: Plan, config: Config, world: World, target: TrainedModel, rewards: RewardModels
) -> Negatives:
    return run(corrupted, target, world.preference, name="synthesize")


def prompted_wrong(
    run: Plan, config: Config, world: World, target: TrainedModel, rewards: RewardModels
) -> Negatives:
    return run(prompted, world.backbone, world.preference, name="synthesize")


def from_file(
    run: Plan, config: Config, world: World, target: TrainedModel, rewards: RewardModels
) -> Negatives:
    return run(given, world.preference, name="synthesize")


SOURCES: dict[str, Source] = {
    "pns": plausible,
    "rs": rejection_sampled,
    "rs_hard": rejection_sampled_hardest,
    "corrupted": corrupted_right,
    "prompted": prompted_wrong,
    "file": from_file,
    "mixed": mixed,
}
