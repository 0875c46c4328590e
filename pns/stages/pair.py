"""Preference pairs: chosen = the target's own verified-correct solution, rejected = a negative."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pns.algo.pairs import balance_flow, build_pairs, num_shared
from pns.config import Config, PairPreference, PairStage
from pns.data.checker import Checker
from pns.data.preference import pair_rows
from pns.errors import UserError
from pns.files import write_json, write_jsonl
from pns.records import Completion, PreferencePair, Problem, Rollout, Verdict
from pns.run.stage import ModelFiles, stage
from pns.stages.artefacts import Negatives, Pairs, RewardModels, TrainedModel
from pns.stages.context import Context, Problems
from pns.stages.likelihood import log_probs_under
from pns.stages.quality import CORRECT, flow_quality, perplexities, score_quality, text_quality
from pns.stages.scoring import Draws, by_problem, by_verdict, roll_out
from workers.rollout.engine import Sampling


@dataclass(frozen=True)
class PairSettings:
    pair: PairStage
    source: str  # of the negatives
    max_new_tokens: int
    max_masked_fraction: float


def pair_settings(config: Config) -> PairSettings:
    limits = config.rollout.max_new_tokens, config.reward.max_masked_fraction
    return PairSettings(config.pair, config.negatives, *limits)


def pair_roles(settings: PairSettings) -> tuple[str, ...]:
    own = settings.pair
    policy = ["policy"] if own.perplexity_samples or own.prefer is PairPreference.likely else []
    return ("rollout", "verifier", *policy, settings.pair.scored_by)


@stage(Pairs, pair_settings, pair_roles)
def pair(
    ctx: Context,
    settings: PairSettings,
    target: TrainedModel,
    negatives: Negatives,
    rewards: RewardModels,
    problems: Problems,
    backbone: ModelFiles,
) -> Pairs:
    """Pairs of the target's right completions and `negatives`, scored, with the quality of the negatives."""
    ctx.track.begin("pair", 1, 0)
    rollouts = sample_solutions(ctx, settings, ctx.fitting(problems), target)
    write_jsonl(Pairs(ctx.directory).rollouts_file, rollouts)
    return write_pairs(ctx, settings, target, rollouts, negatives, rewards, problems, backbone, None)


def sample_solutions(
    ctx: Context, settings: PairSettings, problems: list[Problem], target: TrainedModel
) -> list[Rollout]:
    """Completions of the target, whose right ones are the chosen sides."""
    own = settings.pair
    sampling = Sampling(own.temperature, 1.0, settings.max_new_tokens)
    draws = Draws("pair", own.samples_per_problem, sampling, settings.max_masked_fraction)
    return roll_out(ctx, draws, problems, model=target.model)


def write_pairs(
    ctx: Context,
    settings: PairSettings,
    target: TrainedModel,
    rollouts: Sequence[Rollout],
    negatives: Negatives,
    rewards: RewardModels,
    problems: Problems,
    backbone: ModelFiles,
    choice: Mapping[str, str] | None,
) -> Pairs:
    """`choice`: problem id -> id of the right completion that its pair has; problems without one have no
    pair. None: those that suit the negatives best."""
    artefact, own = Pairs(ctx.directory), settings.pair
    fitting, rejected, origins = ctx.fitting(problems), negatives.negatives(), negatives.sources()
    pairs, counts = make_pairs(ctx, settings, target, fitting, rollouts, rejected, origins, choice)
    if not pairs:
        way_out = "raise pair.samples_per_problem or synthesize.samples_per_problem"
        raise UserError(f"pair: no pairs ({counts}); {way_out}")
    if problems.checker is not None:
        pairs = with_margin_ends(pairs, problems.by_id, problems.checker)
    pairs = scored_pairs(ctx, settings, pairs, rewards, problems)
    write_jsonl(artefact.pairs_file, pairs)
    write_jsonl(artefact.standard_file, pair_rows(pairs, ctx.prompts.data))
    counts["kept"] = len(pairs)
    sources = by_source(settings, rollouts, rejected, origins)
    quality, scores = score_quality(ctx, own, rewards, sources)
    write_json(artefact.scores_file, scores)
    quality |= text_quality(ctx, sources, problems.checker)
    quality |= flow_quality(sources, [pair_token_ids(ctx, made) for made in pairs])
    if own.perplexity_samples:
        quality["perplexity"] = perplexities(ctx, backbone.model, sources, own.perplexity_samples)
    write_json(artefact.quality_file, {"counts": counts, **quality})
    ctx.track.log(0, {"pairs": float(len(pairs))})
    ctx.track.end()
    ctx.place.count(samples=len(rollouts), **counts)
    return artefact


def make_pairs(
    ctx: Context,
    settings: PairSettings,
    target: TrainedModel,
    problems: list[Problem],
    rollouts: Sequence[Rollout],
    negatives: Sequence[Rollout],
    origins: Mapping[str, str],
    choice: Mapping[str, str] | None,
) -> tuple[list[PreferencePair], dict[str, int]]:
    """The pairs, and how many problems gave none for which reason."""
    own = settings.pair
    chosen, rejected = by_problem(by_verdict(rollouts, Verdict.CORRECT)), by_problem(negatives)
    if choice is not None:
        chosen = {
            identity: [completion for completion in chosen[identity] if completion.id == chosen_id]
            for identity, chosen_id in choice.items()
        }
    with_both = chosen.keys() & rejected.keys()
    if own.prefer is PairPreference.likely:
        candidates = [negative for negative in negatives if negative.problem.id in with_both]
        rejected |= by_problem(likeliest_first(ctx, target, candidates))
    for identity in with_both:
        if own.prefer is PairPreference.likely:
            chosen[identity], _ = nearest_first(chosen[identity], rejected[identity][:1])
        elif own.prefer is PairPreference.shared_prefix:
            chosen[identity], rejected[identity] = nearest_first(chosen[identity], rejected[identity])
    limits = own.max_length_ratio, own.pairs_per_problem
    pairs, counts = build_pairs(problems, chosen, rejected, *limits, settings.source, origins)
    if own.balance_flow:
        pairs = [pairs[i] for i in balance_flow([pair_token_ids(ctx, made) for made in pairs])]
    return pairs, counts


def likeliest_first(ctx: Context, target: TrainedModel, negatives: Sequence[Rollout]) -> list[Rollout]:
    """Sorted by the mean log-probability of their tokens under the target, the highest first."""
    log_probs = log_probs_under(ctx, target.model, negatives)
    means_B = [float(log_probs_T.mean(dtype=np.float64)) for log_probs_T in log_probs]
    order = sorted(range(len(negatives)), key=means_B.__getitem__, reverse=True)
    return [negatives[index] for index in order]


def nearest_first(
    chosen: Sequence[Completion], rejected: Sequence[Completion]
) -> tuple[list[Completion], list[Completion]]:
    """Both sides reordered so that the two with the longest common prefix come first: where many solutions
    are right, the first divergence of such a pair is more likely an error than another right way."""

    def shared(sides: tuple[Completion, Completion]) -> int:
        right, wrong = sides
        return num_shared(right.token_ids, wrong.token_ids)

    best = max(((c, r) for c in chosen for r in rejected), key=shared)
    # Sorting is stable: the others keep their order.
    right, wrong = (sorted(side, key=lambda c: c not in best) for side in (chosen, rejected))
    return right, wrong


def with_margin_ends(
    pairs: Sequence[PreferencePair], by_id: Mapping[str, Problem], checker: Checker
) -> list[PreferencePair]:
    """The pairs with the end of the first wrong step of their rejected side."""
    checks = [checker.check(by_id[own.problem_id], own.rejected) for own in pairs]
    return [replace(own, margin_end=c.first_wrong_end) for own, c in zip(pairs, checks, strict=True)]


def scored_pairs(
    ctx: Context,
    settings: PairSettings,
    pairs: Sequence[PreferencePair],
    rewards: RewardModels,
    problems: Problems,
) -> list[PreferencePair]:
    """The pairs with the raw scores of both sides, where the reward model gave both."""
    pool, by_id = ctx.fleet.scorer(settings.pair.scored_by), problems.by_id
    pool.load(rewards.main)
    sequences = []
    for own in pairs:
        prompt_ids = ctx.prompts.encode(by_id[own.problem_id])
        sequences += [prompt_ids + ctx.prompts.encode_completion(side) for side in (own.chosen, own.rejected)]
    values = [outcome.value for outcome in pool.score(sequences)]
    scored = []
    for own, chosen, rejected in zip(pairs, values[::2], values[1::2], strict=True):
        both = chosen is not None and rejected is not None  # one score says nothing of a pair
        scored.append(replace(own, score_chosen=chosen, score_rejected=rejected) if both else own)
    return scored


def pair_token_ids(ctx: Context, pair: PreferencePair) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return ctx.prompts.encode_completion(pair.chosen), ctx.prompts.encode_completion(pair.rejected)


def by_source(
    settings: PairSettings,
    rollouts: Sequence[Rollout],
    negatives: Sequence[Rollout],
    origins: Mapping[str, str],
) -> dict[str, list[Rollout]]:
    """The target's right and wrong completions, and the negatives of each source, which take the place of the
    wrong ones where they are the target's own. `origins`: see `Negatives.sources`."""
    sources = {CORRECT: by_verdict(rollouts, Verdict.CORRECT), "rs": by_verdict(rollouts, Verdict.WRONG)}
    of_negatives: dict[str, list[Rollout]] = {}
    for negative in negatives:
        source = origins.get(negative.completion.id, settings.source)
        of_negatives.setdefault(source, []).append(negative)
    return sources | of_negatives
