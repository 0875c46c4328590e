"""RL of the backbone with the ordinary correctness reward: the target that all after it starts from."""

from dataclasses import dataclass

from pns.config import Config, GrpoConfig
from pns.run.stage import ModelFiles, stage
from pns.stages import grpo
from pns.stages.artefacts import TrainedModel
from pns.stages.context import Context, Problems


@dataclass(frozen=True)
class RlSettings:
    grpo: GrpoConfig
    max_new_tokens: int
    max_masked_fraction: float


def rl_settings(config: Config) -> RlSettings:
    return RlSettings(config.rl, config.rollout.max_new_tokens, config.reward.max_masked_fraction)


@stage(TrainedModel, rl_settings, lambda settings: ("rollout", "verifier", "policy"))
def rl(ctx: Context, settings: RlSettings, backbone: ModelFiles, problems: Problems) -> TrainedModel:
    """The target: `backbone` trained on what it gets right and wrong."""
    trained = TrainedModel(ctx.directory)
    run = grpo.GrpoRun("rl", settings.grpo, settings.max_new_tokens, settings.max_masked_fraction)
    grpo.train(ctx, run, trained, backbone.model, ctx.fitting(problems), grpo.accuracy)
    return trained
