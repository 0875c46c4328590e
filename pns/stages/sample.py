"""Completions of the policy for offline training, with verdicts and its own log-probabilities."""

from dataclasses import dataclass

from pns.config import Config
from pns.errors import UserError
from pns.files import write_jsonl
from pns.run.stage import stage
from pns.stages.artefacts import AnyModel, Samples
from pns.stages.context import Context, Problems
from pns.stages.scoring import Draws, roll_out
from workers.rollout.engine import Sampling


@dataclass(frozen=True)
class SampleSettings:
    samples_per_problem: int
    temperature: float
    max_new_tokens: int
    max_masked_fraction: float


def sample_settings(config: Config) -> SampleSettings:
    own = config.bcpg
    limits = config.rollout.max_new_tokens, config.reward.max_masked_fraction
    return SampleSettings(own.samples_per_problem, own.temperature, *limits)


@stage(Samples, sample_settings, lambda settings: ("rollout", "verifier"))
def sample(ctx: Context, settings: SampleSettings, policy: AnyModel, problems: Problems) -> Samples:
    """What `policy` writes for `problems`. Raises UserError where nothing of it is right."""
    samples = Samples(ctx.directory)
    ctx.track.begin("sample", 1, 0)
    sampling = Sampling(settings.temperature, 1.0, settings.max_new_tokens)
    draws = Draws("sample", settings.samples_per_problem, sampling, settings.max_masked_fraction)
    rollouts = roll_out(ctx, draws, ctx.fitting(problems), model=policy.model)
    write_jsonl(samples.rollouts_file, rollouts)
    num_right = sum(rollout.reward.value == 1 for rollout in rollouts)
    if not num_right:
        way_out = "raise bcpg.samples_per_problem, or begin with a stronger model"
        raise UserError(f"sample: none of {len(rollouts)} completions is right: {way_out}")
    ctx.track.log(0, {"accuracy": num_right / len(rollouts)})
    ctx.track.end()
    ctx.place.count(samples=len(rollouts), right=num_right)
    return samples
