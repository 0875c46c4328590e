"""Offline training on samples, by one of the objectives in `pns.offline_objectives`."""

from collections.abc import Mapping
from dataclasses import dataclass

from pns.config import Bcpg, BcpgArm, Config, Optimizer
from pns.run.stage import stage
from pns.stages.artefacts import AnyModel, BcpgTrained, Negatives, Samples, StepLabels
from pns.stages.context import Context


@dataclass(frozen=True)
class BcpgSettings:
    arm: BcpgArm
    steps: int
    problems_per_step: int
    max_skipped_updates: int
    checkpoint_every: int
    optimizer: Optimizer


def bcpg_settings(config: Config) -> BcpgSettings:
    own: Bcpg = config.bcpg
    [arm] = own.arms.values()  # the method asks for one arm at a time
    return BcpgSettings(
        arm, own.steps, own.problems_per_step, own.max_skipped_updates, own.checkpoint_every, own.optimizer
    )


@stage(BcpgTrained, bcpg_settings, lambda settings: ("policy",))
def bcpg(
    ctx: Context,
    settings: BcpgSettings,
    policy: AnyModel,
    samples: Samples,
    others: Mapping[str, Negatives],
    labels: StepLabels | None,
) -> BcpgTrained:
    raise NotImplementedError
