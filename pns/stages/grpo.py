"""The loop that `rl` and `reverse_rl` share: roll out, reward, group advantages, a policy update, new weights
to rollout."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from pns.algo.advantages import group_advantages
from pns.algo.reward import check_masked, mask_report
from pns.config import GrpoConfig
from pns.records import Problem, Reward, Rollout, Verdict
from pns.stages.context import Context, draw
from pns.stages.scoring import RewardKind, roll_out
from workers.training.batching import Batch
from workers.training.policy import Grpo as GrpoLoss

StopRule = Callable[[int, Mapping[str, float | None]], bool]


def train(
    ctx: Context,
    stage: str,
    settings: GrpoConfig,
    start_model: str,
    problems: list[Problem],
    reward_kind: RewardKind,
    describe: Callable[[Sequence[Rollout]], dict[str, float]],
    stop: StopRule,
) -> Path:
    """Train `start_model` for `settings.steps` and return the directory of the trained model.

    Every step's rollouts are kept with all reward terms in `<stage>/rollouts.jsonl`; `describe` gives the
    step's metrics from them, and `stop(step, metrics)` ends the stage early; it is told every step once, in
    order, also after a resume. Continues after the stage's last complete checkpoint.
    """
    policy, rollout, run = ctx.fleet.policy, ctx.fleet.rollout, ctx.run
    rollout.load(start_model)
    policy.load(start_model, "language_model", settings.optimizer, settings.steps, ctx.config.seed)
    if settings.kl_coefficient:
        policy.load_reference(start_model)
    first_step = 0
    if checkpoint := run.latest_checkpoint(stage):
        policy.restore(checkpoint.path)
        sync_weights(ctx)
        first_step = checkpoint.step
    rollouts_file = run.append_rows(stage, "rollouts.jsonl", keep_below_step=first_step)
    for step, values in enumerate(ctx.track.begin(stage, settings.steps, first_step)):
        stop(step, values)
    for step in range(first_step, settings.steps):
        began = time.monotonic()
        problems_P = draw(problems, settings.problems_per_step, step, ctx.config.seed)
        rollouts = roll_out(
            ctx,
            problems_P,
            settings.completions_per_problem,
            settings.temperature,
            reward_kind,
            stage,
            step,
            settings.top_p,
        )
        sampled = time.monotonic()
        rollouts_file.append(rollouts)
        rewards = [r.reward for r in rollouts]
        check_masked(rewards, ctx.config.reward.max_masked_fraction, f"{stage}, step {step}")
        metrics = describe(rollouts) | masked_counts(rewards)
        metrics |= update(ctx, settings, rollouts)
        sync_weights(ctx)
        num_tokens = sum(len(r.completion.token_ids) for r in rollouts)
        metrics |= {
            "rollout_seconds": sampled - began,
            "update_seconds": time.monotonic() - sampled,
            "completion_tokens": num_tokens / len(rollouts),
            "tokens_per_second": num_tokens / (time.monotonic() - began),
        }
        ctx.track.log(step, metrics)
        done = step + 1
        stopping = stop(step, metrics)
        if done % settings.checkpoint_every == 0 and done < settings.steps and not stopping:
            with run.checkpoint(stage, done) as directory:
                policy.save(directory)
        if stopping:
            break
    ctx.track.end()
    model = run.stage_dir(stage) / "model"
    policy.export(model)
    return model


def sync_weights(ctx: Context) -> None:
    """The policy's current weights into every rollout replica, through the object store."""
    version, reference = ctx.fleet.policy.weights()
    ctx.fleet.rollout.update_weights([reference], version)


def update(ctx: Context, settings: GrpoConfig, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """`settings.updates_per_step` optimizer steps on one batch of rollouts.

    The behaviour policy's log-probabilities are the rollout engine's own: the importance ratio then also
    corrects what differs between the engines. Masked rows take no part; rows without advantage take part only
    where a KL term pulls on them.
    """
    rewards_PG = np.array([np.nan if r.reward.value is None else r.reward.value for r in rollouts])
    advantages_PG = group_advantages(
        rewards_PG.reshape(-1, settings.completions_per_problem), settings.normalise_by_std
    )
    rows = [
        (rollout, advantage)
        for rollout, advantage in zip(rollouts, advantages_PG.reshape(-1).tolist(), strict=True)
        if not rollout.reward.masked and (advantage != 0 or settings.kl_coefficient)
    ]
    if not rows:
        return {"no_update": 1.0}
    prompts: dict[str, tuple[int, ...]] = {}
    for rollout, _ in rows:
        if rollout.problem.id not in prompts:
            prompts[rollout.problem.id] = ctx.prompts.encode(rollout.problem)
    batch = Batch(
        prompt_ids=[prompts[rollout.problem.id] for rollout, _ in rows],
        completion_ids=[rollout.completion.token_ids for rollout, _ in rows],
        token_values={"old_log_probs": [rollout.completion.log_probs for rollout, _ in rows]},
        row_values={"advantages": [advantage for _, advantage in rows]},
    )
    if settings.kl_coefficient:
        batch.token_values["ref_log_probs"] = ctx.fleet.policy.reference_log_probs(batch)
    loss = GrpoLoss(settings.clip_low, settings.clip_high, settings.kl_coefficient)
    metrics: dict[str, float] = {}
    for _ in range(settings.updates_per_step):
        metrics = ctx.fleet.policy.train_step(batch, loss)
    return {"no_update": 0.0, **metrics}


def masked_counts(rewards: Sequence[Reward]) -> dict[str, float]:
    """Masked completions by term and cause, as flat metrics."""
    return {
        f"masked/{term}/{cause}": float(num)
        for term, causes in mask_report(rewards).items()
        for cause, num in causes.items()
    }


def accuracy(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Rates over all completions: correct, well-formed, masked, and the mean reward of the unmasked."""
    values = [r.reward.value for r in rollouts if r.reward.value is not None]
    num = len(rollouts)
    return {
        "accuracy": sum(r.reward.verdict is Verdict.CORRECT and r.reward.format_ok for r in rollouts) / num,
        "format_rate": sum(r.reward.format_ok for r in rollouts) / num,
        "masked_rate": sum(r.reward.masked for r in rollouts) / num,
        "reward": float(np.mean(values)) if values else float("nan"),
        "truncated_rate": sum(r.completion.finish_reason == "length" for r in rollouts) / num,
    }
