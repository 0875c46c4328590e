"""The reward model and the held-out one: centre-regularised Bradley-Terry on (correct, incorrect) pairs of
the RL-trained backbone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pns.algo.metrics import expected_calibration_error
from pns.algo.pairs import match_by_length
from pns.errors import UserError
from pns.files import read_jsonl, write_json, write_jsonl
from pns.records import PreferencePair, Problem, Rollout, Verdict, from_json
from pns.stages.context import Context, draw
from pns.stages.models import target
from pns.stages.pair import by_problem
from pns.stages.scoring import RewardKind, by_verdict, roll_out, sigmoid, stable_seed
from workers.training.batching import Batch
from workers.training.policy import BradleyTerry


def run(ctx: Context) -> None:
    """Writes `reward_model/{main,held_out}` (models), `rollouts.jsonl`, `pairs.jsonl` and `quality.json`
    (accuracy, calibration)."""
    settings, directory = ctx.config.reward_model, ctx.run.stage_dir("reward_model")
    problems, too_long = ctx.prompts.fitting(ctx.problems.reward)
    pairs = sample_pairs(ctx, problems)
    write_jsonl(directory / "pairs.jsonl", pairs)
    # The two models see disjoint problems: the held-out one measures what the other may have been hacked by.
    ids = list(dict.fromkeys(pair.problem_id for pair in pairs))
    order = [ids[i] for i in np.random.default_rng(ctx.config.seed).permutation(len(ids))]
    halves = {"main": set(order[::2]), "held_out": set(order[1::2])}
    quality = {}
    for index, (which, own) in enumerate(halves.items()):
        if (directory / which / "config.json").exists():
            quality[which] = ctx.run.read_json(directory / f"{which}.json")
            continue
        quality[which] = train_one(ctx, which, index, [pair for pair in pairs if pair.problem_id in own])
        write_json(directory / f"{which}.json", quality[which])
    write_json(directory / "quality.json", quality)
    ctx.run.count(
        "reward_model",
        pairs=len(pairs),
        prompts_too_long=too_long,
        samples=len(problems) * settings.samples_per_problem,
    )


def sample_pairs(ctx: Context, problems: list[Problem]) -> list[PreferencePair]:
    """(correct, incorrect) completions of the RL-trained backbone, and of its last `rl_steps` training steps,
    matched in length, each used once."""
    settings = ctx.config.reward_model
    ctx.fleet.rollout.load(target(ctx))
    rollouts = roll_out(
        ctx,
        problems,
        settings.samples_per_problem,
        settings.temperature,
        RewardKind.CORRECTNESS,
        "reward_model",
    )
    write_jsonl(ctx.run.stage_dir("reward_model") / "rollouts.jsonl", rollouts)
    rollouts += rl_rollouts(ctx, settings.rl_steps)
    prompts = {rollout.problem.id: rollout.problem.prompt for rollout in rollouts}
    correct, wrong = (
        by_problem(by_verdict(rollouts, Verdict.CORRECT)),
        by_problem(by_verdict(rollouts, Verdict.WRONG)),
    )
    pairs = []
    for identity, rights in correct.items():
        wrongs = wrong.get(identity, [])
        lengths = [len(c.token_ids) for c in rights], [len(c.token_ids) for c in wrongs]
        for a, b in match_by_length(*lengths, settings.max_length_ratio):
            pairs.append(PreferencePair(identity, prompts[identity], rights[a].text, wrongs[b].text, "rs"))
    return pairs


def rl_rollouts(ctx: Context, num_steps: int) -> list[Rollout]:
    """The rollouts of the last `num_steps` steps of the `rl` stage."""
    if not num_steps:
        return []
    rows = read_jsonl(ctx.run.stage_dir("rl") / "rollouts.jsonl")
    last = max(row["step"] for row in rows)
    return [from_json(Rollout, row) for row in rows if row["step"] > last - num_steps]


def train_one(ctx: Context, which: str, index: int, pairs: list[PreferencePair]) -> dict[str, float]:
    """Train one reward model, export it, and return its quality on the held-out problems."""
    settings, seed = ctx.config.reward_model, stable_seed(ctx.config.seed, which)
    ids = list(dict.fromkeys(pair.problem_id for pair in pairs))
    held_out_ids = set(ids[: round(len(ids) * settings.held_out_fraction)])
    held_out = [pair for pair in pairs if pair.problem_id in held_out_ids]
    training = [pair for pair in pairs if pair.problem_id not in held_out_ids]
    if not training:
        raise UserError(
            f"reward_model: no (correct, incorrect) pairs for the {which} model; raise reward_model.samples_per_problem"
        )
    by_id = {problem.id: problem for problem in ctx.problems.train + ctx.problems.reward}
    policy = ctx.fleet.policy
    policy.load(
        ctx.config.models.reward_model or target(ctx), "score", settings.optimizer, settings.steps, seed
    )
    stage = "reward_model" if index == 0 else "reward_model_held_out"
    ctx.track.begin(stage, settings.steps, 0)
    for step in range(settings.steps):
        rows = draw(training, settings.pairs_per_step, step, seed)
        ctx.track.log(step, policy.train_step(pair_batch(ctx, by_id, rows), BradleyTerry(settings.centre)))
    ctx.track.end()
    quality = {"training_pairs": float(len(training)), "held_out_pairs": float(len(held_out))}
    if held_out:
        scores = np.array(policy.scores(pair_batch(ctx, by_id, held_out))).reshape(-1, 2)
        probabilities = np.array([sigmoid(margin) for margin in scores[:, 0] - scores[:, 1]])
        quality |= {
            "pairwise_accuracy": float((scores[:, 0] > scores[:, 1]).mean()),
            "calibration_error": expected_calibration_error(probabilities, np.ones(len(probabilities))),
            "chosen_mean": float(scores[:, 0].mean()),
            "rejected_mean": float(scores[:, 1].mean()),
        }
    policy.export(ctx.run.stage_dir("reward_model") / which)
    return quality


def pair_batch(ctx: Context, by_id: dict[str, Problem], pairs: Sequence[PreferencePair]) -> Batch:
    """Rows chosen, rejected, chosen, rejected, ..."""
    prompts = [ctx.prompts.encode(by_id[pair.problem_id]) for pair in pairs]
    return Batch(
        prompt_ids=[prompt for prompt in prompts for _ in range(2)],
        completion_ids=[
            ctx.prompts.encode_completion(text) for pair in pairs for text in (pair.chosen, pair.rejected)
        ],
    )
