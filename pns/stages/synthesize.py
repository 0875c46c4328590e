"""Synthesis: the generator's negatives, kept only where two independent verifiers call them wrong."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pns.algo.negatives import filter_negatives, in_log_prob_range
from pns.algo.reward import reward_rules, service_terms
from pns.config import Config, RewardConfig, Synthesize
from pns.errors import UserError
from pns.files import write_json, write_jsonl
from pns.records import Rollout
from pns.run.stage import stage
from pns.stages.artefacts import Negatives, RewardModels, TrainedModel
from pns.stages.context import Context, Problems
from pns.stages.likelihood import log_probs_under
from pns.stages.scoring import Draws, load_terms, roll_out
from workers.rollout.engine import Sampling


@dataclass(frozen=True)
class SynthesizeSettings:
    synthesize: Synthesize
    rules: RewardConfig
    max_new_tokens: int


def synthesize_settings(config: Config) -> SynthesizeSettings:
    return SynthesizeSettings(config.synthesize, reward_rules(config), config.rollout.max_new_tokens)


def sampling_roles(settings: SynthesizeSettings) -> tuple[str, ...]:
    """Of any source that samples: the policy only where log-probabilities under the target are asked for."""
    return ("rollout", "verifier", *(["policy"] if settings.synthesize.bounds_log_probs else []))


@stage(Negatives, synthesize_settings, lambda s: (*sampling_roles(s), *service_terms(s.rules)))
def synthesize(
    ctx: Context,
    settings: SynthesizeSettings,
    generator: TrainedModel,
    rewards: RewardModels,
    problems: Problems,
    target: TrainedModel,
) -> Negatives:
    """What the generator writes for `problems`, with every reward term, filtered."""
    load_terms(ctx, settings.rules, rewards.main)
    rollouts = sample_negatives(ctx, settings, generator.model, problems, settings.rules)
    own = settings.synthesize
    kept, counts = filter_negatives(rollouts, own.min_quantile, own.quantile_term, own.drop_box_only_flips)
    kept = keep_in_log_prob_range(ctx, settings, target, kept, counts)
    way_out = "train the generator longer or sample more per problem"
    return write_negatives(ctx, rollouts, kept, counts, way_out)


def sample_negatives(
    ctx: Context, settings: SynthesizeSettings, model: str, problems: Problems, rules: RewardConfig | None
) -> list[Rollout]:
    """Completions of `model` for the problems that fit; with the ordinary reward where `rules` is None."""
    own = settings.synthesize
    ctx.track.begin("synthesize", 1, 0)
    sampling = Sampling(own.temperature, 1.0, settings.max_new_tokens)
    draws = Draws("synthesize", own.samples_per_problem, sampling, settings.rules.max_masked_fraction, rules)
    return roll_out(ctx, draws, ctx.fitting(problems), model=model)


def keep_in_log_prob_range(
    ctx: Context,
    settings: SynthesizeSettings,
    target: TrainedModel,
    negatives: list[Rollout],
    counts: dict[str, int],
) -> list[Rollout]:
    """Those as likely under the target as `synthesize.min_log_prob` and `max_log_prob` want; the others are
    added to `counts`."""
    own = settings.synthesize
    if not own.bounds_log_probs:
        return negatives
    log_probs = log_probs_under(ctx, target.model, negatives)
    means_B = [float(np.mean(log_probs_T)) for log_probs_T in log_probs]
    inside = in_log_prob_range(means_B, own.min_log_prob, own.max_log_prob)
    kept = [negative for negative, is_inside in zip(negatives, inside, strict=True) if is_inside]
    counts["log_prob_out_of_range"] = len(negatives) - len(kept)
    return kept


def write_negatives(
    ctx: Context, rollouts: Sequence[Rollout], kept: Sequence[Rollout], counts: dict[str, int], way_out: str
) -> Negatives:
    """Write all samples, the kept ones and why others were dropped. Raises UserError where none is kept."""
    negatives = Negatives(ctx.directory)
    write_jsonl(negatives.rollouts_file, rollouts)
    if not kept:
        raise UserError(f"synthesize: no negative was kept ({counts}); {way_out}")
    write_jsonl(negatives.negatives_file, kept)
    write_json(negatives.counts_file, counts)
    ctx.track.log(0, {"kept": float(len(kept)), "kept_share": len(kept) / len(rollouts)})
    ctx.track.end()
    ctx.place.count(samples=len(rollouts), kept=len(kept), **counts)
    return negatives
