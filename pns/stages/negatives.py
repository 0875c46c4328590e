"""Where the rejected sides of the pairs come from: a table of sources, one of which `negatives` names.

A source adds the stages it needs to the plan and returns the artefact with the negatives. `chosen`, pairing
and what follows are the same for all of them, so that two sources compare.
"""

from collections.abc import Callable

from pns.algo.negatives import filter_negatives
from pns.config import Config, GeneratorStart
from pns.run.stage import ModelFiles, Plan, stage
from pns.stages.artefacts import AnyModel, Negatives, RewardModels, TrainedModel
from pns.stages.context import Context, Problems, World
from pns.stages.reverse_rl import reverse_rl
from pns.stages.synthesize import (
    SynthesizeSettings,
    sample_negatives,
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
    return run(synthesize, generator, rewards, world.preference)


@stage(Negatives, synthesize_settings, lambda settings: ("rollout", "verifier"))
def rejection_sample(
    ctx: Context, settings: SynthesizeSettings, target: TrainedModel, problems: Problems
) -> Negatives:
    """The target's own wrong completions, by the filters that every source passes."""
    rollouts = sample_negatives(ctx, settings, target.model, problems, rules=None)
    # No quantile: the ordinary reward has no terms to rank by.
    kept, counts = filter_negatives(
        rollouts, 0.0, settings.synthesize.quantile_term, settings.synthesize.drop_box_only_flips
    )
    return write_negatives(ctx, rollouts, kept, counts, "sample more per problem")


def rejection_sampled(
    run: Plan, config: Config, world: World, target: TrainedModel, rewards: RewardModels
) -> Negatives:
    return run(rejection_sample, target, world.preference, name="synthesize")


SOURCES: dict[str, Source] = {"pns": plausible, "rs": rejection_sampled}
