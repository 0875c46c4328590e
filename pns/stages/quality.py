"""Quality of negatives: how they differ from right completions, beside the backbone's own wrong ones."""

from collections.abc import Mapping, Sequence

import numpy as np

from pns.algo.detector import detect
from pns.algo.metrics import auroc
from pns.algo.pairs import nearest_pairs, one_sidedness, one_sidedness_by_chance, token_flow
from pns.config import PairStage
from pns.data.checker import Checker
from pns.files import sha256_of_json
from pns.records import Rollout, to_json
from pns.stages.artefacts import RewardModels
from pns.stages.context import Context
from pns.stages.likelihood import log_probs_under
from pns.stages.scoring import by_problem
from pns.stages.stream import stable_seed

CORRECT = "correct"
Sources = Mapping[str, Sequence[Rollout]]  # CORRECT and what else there is -> its completions
TokenIds = Sequence[int]


def text_quality(ctx: Context, sources: Sources, checker: Checker | None) -> dict[str, object]:
    """By source: length, how well a detector trained afresh tells it from `correct`, and the first wrong step
    where a checker knows it."""
    wrong = {source: own for source, own in sources.items() if source != CORRECT}
    right_ids = token_ids_by_problem(sources[CORRECT])
    detected = {
        source: detect(right_ids, token_ids_by_problem(own), stable_seed(ctx.seed, "detector", source))
        for source, own in wrong.items()
    }
    lengths = {source: [len(r.completion.token_ids) for r in own] for source, own in sources.items() if own}
    return {
        "tokens_mean": {source: float(np.mean(own)) for source, own in lengths.items()},
        "detector": {source: to_json(own) for source, own in detected.items() if own},
        "first_wrong_step": {
            s: first_wrong_step(own, checker) for s, own in wrong.items() if own and checker
        },
    }


def token_ids_by_problem(rollouts: Sequence[Rollout]) -> dict[str, list[TokenIds]]:
    grouped = by_problem(rollouts)
    return {identity: [completion.token_ids for completion in own] for identity, own in grouped.items()}


def first_wrong_step(rollouts: Sequence[Rollout], checker: Checker) -> dict[str, float | None]:
    """Over completions with a wrong step: mean `index` of the first one (0: nothing before it), and mean
    `share` of the text up to its end, in (0, 1]; `known`: their share of all, in [0, 1]."""
    checks = [(checker.check(own.problem, own.completion.text), own.completion.text) for own in rollouts]
    indices, shares = [], []
    for check, text in checks:
        if check.first_wrong_step is not None and check.first_wrong_end is not None:
            indices.append(check.first_wrong_step)
            shares.append(check.first_wrong_end / len(text))
    return {
        "index": float(np.mean(indices)) if indices else None,
        "share": float(np.mean(shares)) if shares else None,
        "known": len(indices) / len(rollouts),
    }


def flow_quality(sources: Sources, pairs: Sequence[tuple[TokenIds, TokenIds]]) -> dict[str, object]:
    """One-sidedness of the first divergences: of the `pairs`, and of all negatives of each source beside the
    right completions that they are nearest to; and what is to be expected of so many by chance."""
    rights = by_problem(sources[CORRECT])
    flows = {"pairs": token_flow(pairs)}
    for source, own in sources.items():
        if source != CORRECT:
            flows[source] = token_flow(nearest_pairs(rights, by_problem(own)))
    flows = {source: flow for source, flow in flows.items() if flow}
    return {
        "one_sidedness": {source: one_sidedness(flow) for source, flow in flows.items()},
        "one_sidedness_by_chance": {source: one_sidedness_by_chance(flow) for source, flow in flows.items()},
    }


def score_quality(
    ctx: Context, settings: PairStage, rewards: RewardModels, sources: Sources
) -> tuple[dict[str, object], dict[str, list[float]]]:
    """Reward-model scores by source, and how well the held-out reward model tells each from `correct` (AUROC;
    0.5: not at all); and the raw scores of the reward model by source."""
    scores: dict[str, dict[str, list[float]]] = {}
    num_unscored = 0
    for name in rewards.names:
        scores[name] = raw_scores(ctx, settings, rewards.model(name), sources)
        num_unscored += sum(len(own) - len(scores[name][source]) for source, own in sources.items())
    held_out = scores["held_out"]
    right = held_out[CORRECT]
    wrong = {source: own for source, own in held_out.items() if source != CORRECT and own and right}
    quality = {
        "auroc_held_out": {source: auroc(right, own) for source, own in wrong.items()},
        "reward_model_mean": {source: float(np.mean(own)) for source, own in scores["main"].items() if own},
        "unscored": num_unscored,
    }
    return quality, scores["main"]


def raw_scores(ctx: Context, settings: PairStage, model: str, sources: Sources) -> dict[str, list[float]]:
    """Raw scores of the reward model `model` by source; a completion without one is left out, and counted by
    the caller. What the session has scored before is not asked again. A source is asked as a whole, as the
    last bits of a score depend on what is scored beside it."""
    pool = ctx.fleet.scorer(settings.scored_by)
    loaded = False
    by_source: dict[str, list[float]] = {}
    for source, own in sources.items():
        problems = {rollout.problem.id: rollout.problem for rollout in own}
        prompts = {identity: ctx.prompts.encode(problem) for identity, problem in problems.items()}
        sequences = [prompts[rollout.problem.id] + rollout.completion.token_ids for rollout in own]
        digest = sha256_of_json([settings.scored_by, model, sequences])
        scores = ctx.scores.get(digest)
        if scores is None:
            if not loaded:
                pool.load(model)
                loaded = True
            outcomes = pool.score(sequences)
            scores = [outcome.value for outcome in outcomes if outcome.value is not None]
            if len(scores) == len(own):  # else the next one asks again
                ctx.scores[digest] = scores
        by_source[source] = scores
    return by_source


def perplexities(ctx: Context, model: str, sources: Sources, num_samples: int) -> dict[str, float]:
    """Perplexity under `model` by source: exp of the mean negative log-likelihood of all tokens of at most
    `num_samples` of its completions, drawn by the seed."""
    drawn = {
        source: sample(own, num_samples, stable_seed(ctx.seed, source)) for source, own in sources.items()
    }
    log_probs = iter(log_probs_under(ctx, model, [own for part in drawn.values() for own in part]))
    by_source = {source: [next(log_probs) for _ in own] for source, own in drawn.items() if own}
    means = {source: float(np.concatenate(own).mean(dtype=np.float64)) for source, own in by_source.items()}
    return {source: float(np.exp(-mean)) for source, mean in means.items()}


def sample(rollouts: Sequence[Rollout], num: int, seed: int) -> list[Rollout]:
    """At most `num` of them, in their order."""
    drawn = np.random.default_rng(seed).permutation(len(rollouts))[:num]
    return [rollouts[index] for index in sorted(drawn)]
