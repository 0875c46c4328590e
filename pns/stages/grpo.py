"""The loop of `rl` and `reverse_rl`: roll out, reward, group advantages, update, new weights to rollout."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pns.algo.advantages import group_advantages
from pns.algo.reward import check_masked, mask_report
from pns.config import GrpoConfig, RewardConfig
from pns.files import append_jsonl, cut_rows, read_jsonl
from pns.records import Problem, Reward, Rollout, Verdict, from_json
from pns.stages.artefacts import TrainedModel
from pns.stages.context import Context, draw
from pns.stages.scoring import Draws, roll_out, rollout_key, unfinished_rollouts
from pns.stages.stream import Unfinished
from workers.rollout.engine import Sampling
from workers.training.batching import Batch
from workers.training.objectives import GrpoObjective

Describe = Callable[[Sequence[Rollout]], dict[str, float]]
StopCondition = Callable[[int, Mapping[str, float | None]], bool]


@dataclass(frozen=True)
class GrpoRun:
    """What one use of the loop is: its name in metrics and seeds, settings, limits, and the reward (None:
    ordinary)."""

    name: str
    settings: GrpoConfig
    max_new_tokens: int
    max_masked_fraction: float
    rules: RewardConfig | None = None

    @property
    def draws(self) -> Draws:
        sampling = Sampling(self.settings.temperature, self.settings.top_p, self.max_new_tokens)
        return Draws(self.name, self.settings.completions_per_problem, sampling, self.rules)


def train(
    ctx: Context,
    run: GrpoRun,
    trained: TrainedModel,
    start_model: str,
    problems: list[Problem],
    describe: Describe,
    stop: StopCondition = lambda step, metrics: False,
) -> None:
    """Train `start_model` for at most `run.settings.steps` steps and export it to `trained`.

    Every step's rollouts are kept with all reward terms; `describe` gives the step's metrics from them, and
    `stop(step, metrics)` ends the stage early; it is told every step once, in order, also after a resume.
    Continues after the stage's last complete checkpoint.
    """
    settings, policy = run.settings, ctx.fleet.policy
    ctx.fleet.rollout.load(start_model)
    policy.load(start_model, "language_model", settings.optimizer, settings.steps, ctx.seed)
    if settings.kl_coefficient:
        policy.load_reference(start_model)
    first_step = ctx.resume()
    if first_step:
        sync_weights(ctx)
    unfinished = unfinished_rollouts(ctx)
    take_back(trained, unfinished, first_step)
    # A stop condition has a memory, which an interruption has wiped.
    for step, values in enumerate(ctx.track.begin(run.name, settings.steps, first_step)):
        stop(step, values)
    for step in range(first_step, settings.steps):
        began = time.monotonic()
        problems_P = draw(problems, settings.problems_per_step, step, ctx.seed)
        rollouts = roll_out(ctx, run.draws, problems_P, unfinished, step)
        sampled = time.monotonic()
        rewards = [rollout.reward for rollout in rollouts]
        # Before they are kept: the next start asks again for the masked ones.
        check_masked(rewards, run.max_masked_fraction, f"{run.name}, step {step}")
        # First where they stay, then out of the unfinished: an interruption between the two loses none.
        append_jsonl(trained.rollouts_file, rollouts)
        unfinished.drop(map(rollout_key, rollouts))
        metrics = describe(rollouts) | masked_counts(rewards) | update(ctx, settings, rollouts)
        sync_weights(ctx)
        metrics |= step_times(rollouts, began, sampled)
        ctx.track.log(step, metrics)
        if stop(step, metrics):
            break
        ctx.save_policy(step + 1, settings.checkpoint_every, settings.steps)
    ctx.track.end()
    policy.export(trained.model)


def take_back(trained: TrainedModel, unfinished: Unfinished[Rollout], first_step: int) -> None:
    """Steps after the checkpoint are made again from the rollouts they had; masked ones are asked again."""
    if not trained.rollouts_file.exists():
        return
    cut_rows(trained.rollouts_file)  # first the line that a crash cut, which cannot be read
    rows = read_jsonl(trained.rollouts_file)
    later = [from_json(Rollout, row) for row in rows if row["step"] >= first_step]
    unfinished.add(rollout for rollout in later if not rollout.reward.masked)
    cut_rows(trained.rollouts_file, first_step)


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
    # NaN stands for a masked reward, which `group_advantages` leaves out of its group.
    rewards_PG = np.array([np.nan if r.reward.value is None else r.reward.value for r in rollouts])
    groups_PG = rewards_PG.reshape(-1, settings.completions_per_problem)
    advantages = group_advantages(groups_PG, settings.normalise_by_std).reshape(-1).tolist()
    pulled = bool(settings.kl_coefficient)
    placed = zip(rollouts, advantages, strict=True)
    rows = [(r, advantage) for r, advantage in placed if not r.reward.masked and (advantage or pulled)]
    if not rows:
        return {"no_update": 1.0}
    prompts = {rollout.problem.id: rollout.problem for rollout, _ in rows}
    prompt_ids = {identity: ctx.prompts.encode(problem) for identity, problem in prompts.items()}
    drawn = [rollout.completion for rollout, _ in rows]
    batch = Batch(
        prompt_ids=[prompt_ids[completion.problem_id] for completion in drawn],
        completion_ids=[completion.token_ids for completion in drawn],
        token_values={"old_log_probs": [completion.log_probs for completion in drawn]},
        row_values={"advantages": [advantage for _, advantage in rows]},
    )
    if settings.kl_coefficient:
        batch.token_values["ref_log_probs"] = ctx.fleet.policy.reference_log_probs(batch)
    objective = GrpoObjective(settings.clip_low, settings.clip_high, settings.kl_coefficient)
    metrics: dict[str, float] = {}
    for _ in range(settings.updates_per_step):
        metrics = ctx.fleet.policy.train_step(batch, objective)
    return {"no_update": 0.0, **metrics}


def masked_counts(rewards: Sequence[Reward]) -> dict[str, float]:
    """Masked completions by term and cause, as flat metrics."""
    counts: dict[str, float] = {}
    for term, causes in mask_report(rewards).items():
        counts |= {f"masked/{term}/{cause}": float(count) for cause, count in causes.items()}
    return counts


def step_times(rollouts: Sequence[Rollout], began: float, sampled: float) -> dict[str, float]:
    """Seconds and tokens of a step that began and had its rollouts at these times (monotonic seconds)."""
    now = time.monotonic()
    num_tokens = sum(len(rollout.completion.token_ids) for rollout in rollouts)
    return {
        "rollout_seconds": sampled - began,
        "update_seconds": now - sampled,
        "completion_tokens": num_tokens / len(rollouts),
        "step_tokens_per_second": num_tokens / (now - began),
    }


def accuracy(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Rates over all completions: correct, well-formed, masked, and the mean reward of the unmasked."""
    rewards = [rollout.reward for rollout in rollouts]
    values = [reward.value for reward in rewards if reward.value is not None]
    num = len(rollouts)
    return {
        "accuracy": sum(r.verdict is Verdict.CORRECT and r.format_ok for r in rewards) / num,
        "format_rate": sum(r.format_ok for r in rewards) / num,
        "masked_rate": sum(r.masked for r in rewards) / num,
        "reward": float(np.mean(values)) if values else float("nan"),
        "truncated_rate": sum(r.completion.finish_reason == "length" for r in rollouts) / num,
    }
