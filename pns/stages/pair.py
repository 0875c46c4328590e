"""Preference pairs: chosen = the RL-trained backbone's own verified-correct solution, rejected = a plausible
negative."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pns.algo.metrics import auroc
from pns.algo.pairs import balance_flow, build_pairs, first_divergence, one_sidedness, token_flow
from pns.config import DataSource
from pns.data.preference import pair_rows
from pns.errors import UserError
from pns.files import read_jsonl, write_json, write_jsonl
from pns.records import Completion, PreferencePair, Problem, Rollout, Verdict, from_json
from pns.stages.context import Context
from pns.stages.models import reward_model, target
from pns.stages.scoring import RewardKind, by_verdict, roll_out
from pns.tiny import world as tiny_world


def run(ctx: Context) -> None:
    """Writes `pair/rollouts.jsonl` (the target's samples), `pairs.jsonl`, `preference.jsonl` (the standard
    conversational format), `scores.json` (reward-model scores per source) and `quality.json`."""
    settings, directory = ctx.config.pair, ctx.run.stage_dir("pair")
    ctx.track.begin("pair", 1, 0)
    problems, too_long = ctx.prompts.fitting(ctx.problems.preference)
    negatives = [
        from_json(Rollout, row) for row in read_jsonl(ctx.run.stage_dir("synthesize") / "negatives.jsonl")
    ]
    ctx.fleet.rollout.load(target(ctx))
    rollouts = roll_out(
        ctx, problems, settings.samples_per_problem, settings.temperature, RewardKind.CORRECTNESS, "pair"
    )
    write_jsonl(directory / "rollouts.jsonl", rollouts)
    chosen, rejected = by_problem(by_verdict(rollouts, Verdict.CORRECT)), by_problem(negatives)
    if settings.prefer_shared_prefix:
        for problem in problems:
            if problem.id in chosen and problem.id in rejected:
                chosen[problem.id], rejected[problem.id] = nearest_first(
                    chosen[problem.id], rejected[problem.id]
                )
    pairs, counts = build_pairs(
        problems, chosen, rejected, settings.max_length_ratio, settings.pairs_per_problem
    )
    if settings.balance_flow:
        pairs = [pairs[i] for i in balance_flow([token_ids(ctx, pair) for pair in pairs])]
    if not pairs:
        raise UserError(
            f"pair: no pairs ({counts}); raise pair.samples_per_problem or synthesize.samples_per_problem"
        )
    if ctx.config.data.source is DataSource.tiny:
        by_id = {problem.id: problem for problem in problems}
        pairs = [
            replace(pair, margin_end=tiny_world.check(by_id[pair.problem_id], pair.rejected).first_wrong_end)
            for pair in pairs
        ]
    pairs = scored(ctx, pairs)
    write_jsonl(directory / "pairs.jsonl", pairs)
    write_jsonl(directory / "preference.jsonl", pair_rows(pairs, ctx.config.data))
    counts["kept"] = len(pairs)
    write_json(directory / "quality.json", {"counts": counts, **measure(ctx, pairs, negatives, rollouts)})
    ctx.track.log(0, {"pairs": float(len(pairs))})
    ctx.track.end()
    ctx.run.count("pair", samples=len(rollouts), prompts_too_long=too_long, **counts)


def scored(ctx: Context, pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """The pairs with the raw scores of both sides, where the reward model gave both."""
    ctx.fleet.reward_model.load(reward_model(ctx))
    by_id = {problem.id: problem for problem in ctx.problems.preference}
    sequences = [
        ctx.prompts.encode(by_id[pair.problem_id]) + ctx.prompts.encode_completion(side)
        for pair in pairs
        for side in (pair.chosen, pair.rejected)
    ]
    pool = ctx.fleet.reward_model
    values = [
        outcome.value for outcome in pool.collect(pool.submit(sequences), ctx.config.reward.deadline_seconds)
    ]
    return [
        replace(pair, score_chosen=chosen, score_rejected=rejected)
        if chosen is not None and rejected is not None
        else pair
        for pair, chosen, rejected in zip(pairs, values[::2], values[1::2], strict=True)
    ]


def by_problem(rollouts: Sequence[Rollout]) -> dict[str, list[Completion]]:
    found: dict[str, list[Completion]] = {}
    for rollout in rollouts:
        found.setdefault(rollout.problem.id, []).append(rollout.completion)
    return found


def nearest_first(
    chosen: Sequence[Completion], rejected: Sequence[Completion]
) -> tuple[list[Completion], list[Completion]]:
    """Both sides reordered so that the two with the longest common prefix come first: where many solutions
    are right, the first divergence of such a pair is more likely an error than another right way."""

    def shared(right: Completion, wrong: Completion) -> int:
        divergence = first_divergence(right.token_ids, wrong.token_ids)
        return len(right.token_ids) if divergence is None else divergence

    best_chosen, best_rejected = max(
        ((c, r) for c in chosen for r in rejected), key=lambda pair: shared(*pair)
    )
    return (
        sorted(chosen, key=lambda c: c is not best_chosen),
        sorted(rejected, key=lambda r: r is not best_rejected),
    )


def token_ids(ctx: Context, pair: PreferencePair) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return ctx.prompts.encode_completion(pair.chosen), ctx.prompts.encode_completion(pair.rejected)


def measure(
    ctx: Context, pairs: Sequence[PreferencePair], negatives: Sequence[Rollout], rollouts: Sequence[Rollout]
) -> dict[str, object]:
    """Quality of the negatives beside the backbone's own wrong completions: reward-model scores, how well the
    held-out reward model tells them from correct ones (AUROC; 0.5: not at all), length, and one-sidedness of
    the pairs' first divergence."""
    sources: dict[str, Sequence[Rollout]] = {
        "correct": by_verdict(rollouts, Verdict.CORRECT),
        "rs": by_verdict(rollouts, Verdict.WRONG),
        "pns": negatives,
    }
    scores: dict[str, dict[str, list[float]]] = {}
    for which in ("main", "held_out"):
        ctx.fleet.reward_model.load(reward_model(ctx, which))
        scores[which] = {source: score(ctx, found) for source, found in sources.items()}
    write_json(ctx.run.stage_dir("pair") / "scores.json", scores["main"])
    held_out = scores["held_out"]
    unscored = sum(
        len(found) - len(of_model[source])
        for of_model in scores.values()
        for source, found in sources.items()
    )
    flow = token_flow([token_ids(ctx, pair) for pair in pairs])
    return {
        "auroc_held_out": {
            s: auroc(held_out["correct"], held_out[s])
            for s in ("rs", "pns")
            if held_out[s] and held_out["correct"]
        },
        "reward_model_mean": {
            source: float(np.mean(found)) for source, found in scores["main"].items() if found
        },
        "tokens_mean": {
            source: float(np.mean([len(r.completion.token_ids) for r in found]))
            for source, found in sources.items()
            if found
        },
        "one_sidedness": one_sidedness(flow),
        "unscored": unscored,
    }


def score(ctx: Context, rollouts: Sequence[Rollout]) -> list[float]:
    """Raw reward-model scores; a completion without a score is left out (and counted by `measure`)."""
    prompts: dict[str, tuple[int, ...]] = {}

    def prompt(problem: Problem) -> tuple[int, ...]:
        if problem.id not in prompts:
            prompts[problem.id] = ctx.prompts.encode(problem)
        return prompts[problem.id]

    pool = ctx.fleet.reward_model
    handle = pool.submit([prompt(r.problem) + r.completion.token_ids for r in rollouts])
    return [
        outcome.value
        for outcome in pool.collect(handle, ctx.config.reward.deadline_seconds)
        if outcome.value is not None
    ]
