"""Preference pairs: chosen = the target's own verified-correct solution, rejected = a negative."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pns.algo.metrics import auroc
from pns.algo.pairs import balance_flow, build_pairs, first_divergence, one_sidedness, token_flow
from pns.config import Config, PairStage
from pns.data.checker import Checker
from pns.data.preference import pair_rows
from pns.errors import UserError
from pns.files import write_json, write_jsonl
from pns.records import Completion, PreferencePair, Problem, Rollout, Verdict
from pns.run.stage import stage
from pns.stages.artefacts import Negatives, Pairs, RewardModels, TrainedModel
from pns.stages.context import Context, Problems
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


@stage(Pairs, pair_settings, lambda settings: ("rollout", "verifier", settings.pair.scored_by))
def pair(
    ctx: Context,
    settings: PairSettings,
    target: TrainedModel,
    negatives: Negatives,
    rewards: RewardModels,
    problems: Problems,
) -> Pairs:
    """Pairs of the target's right completions and `negatives`, scored, with the quality of the negatives."""
    artefact, own = Pairs(ctx.directory), settings.pair
    ctx.track.begin("pair", 1, 0)
    fitting, rejected = ctx.fitting(problems), negatives.negatives()
    sampling = Sampling(own.temperature, 1.0, settings.max_new_tokens)
    draws = Draws("pair", own.samples_per_problem, sampling, settings.max_masked_fraction)
    rollouts = roll_out(ctx, draws, fitting, model=target.model)
    write_jsonl(artefact.rollouts_file, rollouts)
    pairs, counts = make_pairs(ctx, settings, fitting, rollouts, rejected)
    if not pairs:
        way_out = "raise pair.samples_per_problem or synthesize.samples_per_problem"
        raise UserError(f"pair: no pairs ({counts}); {way_out}")
    if problems.checker is not None:
        pairs = with_margin_ends(pairs, problems.by_id, problems.checker)
    pairs = scored_pairs(ctx, settings, pairs, rewards, problems)
    write_jsonl(artefact.pairs_file, pairs)
    write_jsonl(artefact.standard_file, pair_rows(pairs, ctx.prompts.data))
    counts["kept"] = len(pairs)
    quality = quality_of_negatives(ctx, settings, artefact, rewards, pairs, rejected, rollouts)
    write_json(artefact.quality_file, {"counts": counts, **quality})
    ctx.track.log(0, {"pairs": float(len(pairs))})
    ctx.track.end()
    ctx.place.count(samples=len(rollouts), **counts)
    return artefact


def make_pairs(
    ctx: Context,
    settings: PairSettings,
    problems: list[Problem],
    rollouts: Sequence[Rollout],
    negatives: Sequence[Rollout],
) -> tuple[list[PreferencePair], dict[str, int]]:
    """The pairs, and how many problems gave none for which reason."""
    own = settings.pair
    chosen, rejected = by_problem(by_verdict(rollouts, Verdict.CORRECT)), by_problem(negatives)
    if own.prefer_shared_prefix:
        for identity in chosen.keys() & rejected.keys():
            chosen[identity], rejected[identity] = nearest_first(chosen[identity], rejected[identity])
    limits = own.max_length_ratio, own.pairs_per_problem
    pairs, counts = build_pairs(problems, chosen, rejected, *limits, settings.source)
    if own.balance_flow:
        pairs = [pairs[i] for i in balance_flow([pair_token_ids(ctx, made) for made in pairs])]
    return pairs, counts


def nearest_first(
    chosen: Sequence[Completion], rejected: Sequence[Completion]
) -> tuple[list[Completion], list[Completion]]:
    """Both sides reordered so that the two with the longest common prefix come first: where many solutions
    are right, the first divergence of such a pair is more likely an error than another right way."""

    def shared(sides: tuple[Completion, Completion]) -> int:
        right, wrong = sides
        divergence = first_divergence(right.token_ids, wrong.token_ids)
        return len(right.token_ids) if divergence is None else divergence

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


def quality_of_negatives(
    ctx: Context,
    settings: PairSettings,
    artefact: Pairs,
    rewards: RewardModels,
    pairs: Sequence[PreferencePair],
    negatives: Sequence[Rollout],
    rollouts: Sequence[Rollout],
) -> dict[str, object]:
    """Quality of the negatives beside the backbone's own wrong completions: reward-model scores, how well the
    held-out reward model tells them from correct ones (AUROC; 0.5: not at all), length, and one-sidedness of
    the pairs' first divergence."""
    sources: dict[str, Sequence[Rollout]] = {
        "correct": by_verdict(rollouts, Verdict.CORRECT),
        "rs": by_verdict(rollouts, Verdict.WRONG),
        settings.source: negatives,  # in the place of the pair stage's own where they are the target's
    }
    scores: dict[str, dict[str, list[float]]] = {}
    num_unscored = 0
    for name in rewards.names:
        ctx.fleet.scorer(settings.pair.scored_by).load(rewards.model(name))
        scores[name] = {source: raw_scores(ctx, settings, own) for source, own in sources.items()}
        num_unscored += sum(len(own) - len(scores[name][source]) for source, own in sources.items())
    write_json(artefact.scores_file, scores["main"])
    held_out = scores["held_out"]
    sides = dict.fromkeys(("rs", settings.source))  # one where the negatives are the target's own
    comparable = [source for source in sides if held_out[source] and held_out["correct"]]
    flow = token_flow([pair_token_ids(ctx, own) for own in pairs])
    return {
        "auroc_held_out": {source: auroc(held_out["correct"], held_out[source]) for source in comparable},
        "reward_model_mean": {source: float(np.mean(own)) for source, own in scores["main"].items() if own},
        "tokens_mean": {source: mean_tokens(own) for source, own in sources.items() if own},
        "one_sidedness": one_sidedness(flow),
        "unscored": num_unscored,
    }


def mean_tokens(rollouts: Sequence[Rollout]) -> float:
    return float(np.mean([len(rollout.completion.token_ids) for rollout in rollouts]))


def raw_scores(ctx: Context, settings: PairSettings, rollouts: Sequence[Rollout]) -> list[float]:
    """Raw reward-model scores; a completion without a score is left out (and counted by the caller)."""
    problems = {rollout.problem.id: rollout.problem for rollout in rollouts}
    prompts = {identity: ctx.prompts.encode(problem) for identity, problem in problems.items()}
    sequences = [prompts[rollout.problem.id] + rollout.completion.token_ids for rollout in rollouts]
    outcomes = ctx.fleet.scorer(settings.pair.scored_by).score(sequences)
    return [outcome.value for outcome in outcomes if outcome.value is not None]
