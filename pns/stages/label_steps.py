"""The steps of wrong completions, each labelled by the consensus of a judge and a process reward model."""

from collections.abc import Mapping
from dataclasses import dataclass

from pns.config import Config, Segments, StepRule, step_services
from pns.run.stage import stage
from pns.stages.artefacts import Negatives, Samples, StepLabels
from pns.stages.context import Context, Problems


@dataclass(frozen=True)
class LabelSettings:
    segments: Segments
    rule: StepRule
    services: tuple[str, ...]
    models: dict[str, str]  # of the services
    threshold: float
    own_negatives: bool
    max_masked_fraction: float


def label_settings(config: Config) -> LabelSettings:
    own, services = config.bcpg, step_services(config)
    models = {"step_judge": own.step_judge.model, "process_reward": own.process_reward.model}
    used = {name: models[name] for name in services}
    takes_own = all("own" in arm.negatives for arm in own.arms.values())
    return LabelSettings(
        own.segments,
        own.rule,
        services,
        used,
        own.process_reward.threshold,
        takes_own,
        config.reward.max_masked_fraction,
    )


@stage(StepLabels, label_settings, lambda settings: settings.services)
def label_steps(
    ctx: Context,
    settings: LabelSettings,
    samples: Samples,
    others: Mapping[str, Negatives],
    problems: Problems,
) -> StepLabels:
    raise NotImplementedError
