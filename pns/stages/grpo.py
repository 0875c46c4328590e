"""The loop of `rl` and `reverse_rl`: roll out, reward, group advantages, update, new weights to rollout."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pns.algo.advantages import rollout_advantages
from pns.algo.masks import mask_report
from pns.config import GrpoConfig, RatioLevel, RewardConfig
from pns.errors import UserError
from pns.files import append_jsonl, cut_rows, rows_from
from pns.records import Problem, Reward, Rollout, Verdict, from_json
from pns.stages.ahead import Ahead
from pns.stages.artefacts import TrainedModel
from pns.stages.context import Context, draw
from pns.stages.refresh import Refresher
from pns.stages.scoring import Draws, roll_out, rollout_key, unfinished_rollouts
from pns.stages.stream import Unfinished, stable_seed
from workers.rollout.engine import Sampling
from workers.training.batching import Batch
from workers.training.objectives import GrpoObjective, GspoObjective, Objective

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
        num_completions = self.settings.completions_per_problem
        return Draws(self.name, num_completions, sampling, self.max_masked_fraction, self.rules)


def train(
    ctx: Context,
    run: GrpoRun,
    trained: TrainedModel,
    start_model: str,
    problems: list[Problem],
    describe: Describe,
    stop: StopCondition = lambda step, metrics: False,
    refresher: Refresher | None = None,
) -> None:
    """Train `start_model` for at most `run.settings.steps` steps and export it to `trained`.

    Every step's rollouts are kept with all reward terms; `describe` gives the step's metrics from them, and
    `stop(step, metrics)` ends the stage early; it is told every step once, in order, also after a resume.
    `refresher` exchanges the reward model between steps. Continues after the stage's last complete
    checkpoint. With `settings.overlap` a step is sampled while the one before is trained on, from weights
    that are one step older (the form of slime's train_async.py).
    """
    settings, policy = run.settings, ctx.fleet.policy
    ctx.fleet.rollout.load(start_model)
    first_step = load_policy(ctx, run, start_model)
    if first_step:
        sync_weights(ctx, first_step)
    unfinished = unfinished_rollouts(ctx)
    take_back(trained, unfinished, first_step)
    history = ctx.track.begin(run.name, settings.steps, first_step)
    # A stop condition has a memory, which an interruption has wiped.
    for step, values in enumerate(history):
        stop(step, values)
    sampling = Ahead(lambda step: sample_step(ctx, run, problems, unfinished, step))
    for step in ctx.steps(first_step, settings.steps):
        began = time.monotonic()
        if refresher is not None:
            if refresher.is_due(step):
                # The policy's processes are lent to the reward model, and take the generator up again.
                ctx.checkpoint_policy(step)
                refresher.refresh(step)
                load_policy(ctx, run, start_model)
            refresher.serve(step)
        rollouts, used = sampling.take(step)
        ctx.settle_checkpoint()  # of the step before, written meanwhile
        check_versions(run, step, rollouts)
        sampled = time.monotonic()
        rewards = [rollout.reward for rollout in rollouts]
        # First where they stay, then out of the unfinished: an interruption between the two loses none.
        append_jsonl(trained.rollouts_file, rollouts)
        unfinished.drop(map(rollout_key, rollouts))
        if settings.overlap and step + 1 < settings.steps:
            sampling.begin(step + 1)
        metrics = describe(rollouts) | masked_counts(rewards) | update(ctx, run, used)
        updated = time.monotonic()
        # Weights change when no request runs. The next step's rollouts are on disk by then, and so before the
        # step's checkpoint: a run that goes on from there trains on the same ones.
        sampling.wait()
        metrics |= sync_weights(ctx, step + 1) | step_times(rollouts, began, sampled, updated)
        ctx.track.log(step, metrics)
        history.append(metrics)
        check_progress(run, step, history, rollouts)
        if stop(step, metrics):
            unfinished.clear()  # of a step that will not be trained
            break
        ctx.save_policy(step + 1, settings.checkpoint_every, settings.steps)
    ctx.track.end()
    policy.export(trained.model)


def load_policy(ctx: Context, run: GrpoRun, start_model: str) -> int:
    """The policy and its reference, at the last complete checkpoint: the steps that are done."""
    settings, policy = run.settings, ctx.fleet.policy
    policy.load(start_model, "language_model", settings.optimizer, settings.steps, ctx.seed)
    if settings.kl_coefficient:
        policy.load_reference(start_model)
    return ctx.resume()


def sample_step(
    ctx: Context, run: GrpoRun, problems: Sequence[Problem], unfinished: Unfinished[Rollout], step: int
) -> tuple[list[Rollout], list[Rollout]]:
    """All rollouts of a step, and those that are trained on: with `settings.dynamic_sampling` groups whose
    rewards differ, of as many draws as give `problems_per_step` of them."""
    settings, group_size = run.settings, run.settings.completions_per_problem
    rollouts: list[Rollout] = []
    used: list[Rollout] = []
    for drawn in range(1 + settings.dynamic_sampling):
        # Every draw is a function of seed, step and its number: an interruption changes none.
        seed = stable_seed(ctx.seed, "drawn again", drawn) if drawn else ctx.seed
        problems_P = draw(problems, settings.problems_per_step, step, seed)
        first = drawn * settings.problems_per_step
        sampled = roll_out(ctx, run.draws, problems_P, unfinished, step, first_problem=first)
        rollouts += sampled
        if not settings.dynamic_sampling:
            return rollouts, rollouts
        groups = [sampled[start : start + group_size] for start in range(0, len(sampled), group_size)]
        for group in groups:
            if any(rollout_advantages(group, settings, run.max_new_tokens)):
                used += group
        if len(used) >= settings.problems_per_step * group_size:
            break
    return rollouts, used[: settings.problems_per_step * group_size]


def take_back(trained: TrainedModel, unfinished: Unfinished[Rollout], first_step: int) -> None:
    """Steps after the checkpoint are made again from the rollouts they had; masked ones are asked again."""
    if not trained.rollouts_file.exists():
        return
    cut_rows(trained.rollouts_file)  # first the line that a crash cut, which cannot be read
    later = [from_json(Rollout, row) for row in rows_from(trained.rollouts_file, first_step)]
    unfinished.add(rollout for rollout in later if not rollout.reward.missing)
    cut_rows(trained.rollouts_file, first_step)


def sync_weights(ctx: Context, num_steps: int) -> dict[str, float]:
    """The policy's weights after `num_steps` steps into every rollout replica; seconds and bytes. Their
    version is that number, also after an interruption: rollouts say which weights they are of."""
    began = time.monotonic()
    num_bytes = ctx.fleet.rollout.update_weights(ctx.fleet.policy, num_steps)
    return {"sync_seconds": time.monotonic() - began, "sync_bytes": float(num_bytes)}


def update(ctx: Context, run: GrpoRun, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """`settings.updates_per_step` optimizer steps on one batch of rollouts.

    Masked rows take no part; rows without advantage take part only where a KL term pulls on them, but always
    count in the mean. `no_signal` is 1 where no group's rewards differ, `no_update` where nothing was left to
    train on.
    """
    settings, policy = run.settings, ctx.fleet.policy
    advantages = rollout_advantages(rollouts, settings, run.max_new_tokens)
    no_signal = float(not any(advantages))
    unmasked = [
        (rollout, advantage)
        for rollout, advantage in zip(rollouts, advantages, strict=True)
        if not rollout.reward.masked
    ]
    if no_signal and not (settings.kl_coefficient and unmasked):
        policy.pass_step()
        return {"no_signal": no_signal, "no_update": 1.0}
    rows = [row for row in unmasked if row[1] != 0 or settings.kl_coefficient]
    # The loss is a mean over all unmasked rows: those left out would add nothing to its sum.
    share = mean_weight(rows, settings.ratio) / mean_weight(unmasked, settings.ratio)
    weighted = [(rollout, advantage * share) for rollout, advantage in rows]
    batch, of_batch = training_batch(ctx, settings, weighted)
    objective = grpo_objective(settings)
    metrics: dict[str, float] = {}
    num_skipped = 0.0
    for number in range(settings.updates_per_step):
        last = number == settings.updates_per_step - 1
        metrics = policy.train_step(batch, objective, end_of_step=last)
        num_skipped += metrics["update_skipped"]
    counts = {"no_signal": no_signal, "no_update": 0.0, "update_skipped": num_skipped}
    return metrics | of_batch | counts


def mean_weight(rows: Sequence[tuple[Rollout, float]], ratio: RatioLevel) -> int:
    """What the loss divides by: tokens, or rows where a ratio is a row's."""
    if ratio is RatioLevel.sequence:
        return len(rows)
    return sum(len(rollout.completion.token_ids) for rollout, _ in rows)


def training_batch(
    ctx: Context, settings: GrpoConfig, rows: Sequence[tuple[Rollout, float]]
) -> tuple[Batch, dict[str, float]]:
    """Rollouts with their advantages as the policy takes them, and metrics of the importance weights.

    The old policy's log-probabilities are the rollout engine's own: the importance ratio then also corrects
    what differs between the two. They are the policy's where it is to be corrected with a bound
    (`importance_cap`), and at a temperature other than 1, at which the engine does not give them.
    """
    policy, temperature = ctx.fleet.policy, settings.temperature
    problems = {rollout.problem.id: rollout.problem for rollout, _ in rows}
    prompt_ids = {identity: ctx.prompts.encode(problem) for identity, problem in problems.items()}
    batch = Batch(
        prompt_ids=[prompt_ids[rollout.problem.id] for rollout, _ in rows],
        completion_ids=[rollout.completion.token_ids for rollout, _ in rows],
        row_values={"advantages": [advantage for _, advantage in rows]},
    )
    engine_log_probs = [np.asarray(rollout.completion.log_probs, np.float32) for rollout, _ in rows]
    old_log_probs = engine_log_probs
    metrics: dict[str, float] = {}
    if settings.importance_cap or temperature != 1:
        old_log_probs = policy.log_probs(batch, temperature)
    if settings.importance_cap:
        pairs = zip(old_log_probs, engine_log_probs, strict=True)
        ratios = [np.exp(old - engine) for old, engine in pairs]
        batch.token_values["importance"] = [np.minimum(ratio, settings.importance_cap) for ratio in ratios]
        metrics = importance_metrics(np.concatenate(ratios), settings.importance_cap)
    batch.token_values["old_log_probs"] = old_log_probs
    if settings.kl_coefficient:
        batch.token_values["ref_log_probs"] = policy.reference_log_probs(batch, temperature)
    return batch, metrics


def importance_metrics(ratios_T: np.ndarray, cap: float) -> dict[str, float]:
    """Of the policy's over the engine's probability of every token."""
    return {
        "importance/mean": float(ratios_T.mean()),
        "importance/max": float(ratios_T.max()),
        "importance/capped": float((ratios_T > cap).mean()),
    }


def grpo_objective(settings: GrpoConfig) -> Objective:
    bounds = settings.clip_low, settings.clip_high, settings.kl_coefficient
    if settings.ratio is RatioLevel.sequence:
        return GspoObjective(*bounds, settings.temperature)
    return GrpoObjective(*bounds, settings.dual_clip, settings.temperature)


def check_versions(run: GrpoRun, step: int, rollouts: Sequence[Rollout]) -> None:
    """A completion is of one version of the weights: the last, or with `overlap` the one before. RuntimeError
    for another: the ratio would be of weights that are not the ones that are trained."""
    oldest = step - 1 if run.settings.overlap else step
    versions = {rollout.completion.weights_version for rollout in rollouts}
    if not versions <= set(range(oldest, step + 1)):
        raise RuntimeError(f"{run.name}: step {step} has rollouts of weights version {sorted(versions)}")


def check_progress(
    run: GrpoRun, step: int, history: Sequence[Mapping[str, float | None]], rollouts: Sequence[Rollout]
) -> None:
    """Raises UserError with the cause where the loop trains on nothing: too many updates without a finite
    gradient, or too many steps in a row whose rewards do not differ."""
    settings = run.settings
    num_skipped = sum(metrics.get("update_skipped") or 0 for metrics in history)
    if num_skipped > settings.max_skipped_updates:
        raise UserError(
            f"{run.name}: the gradient of step {step} is not finite ({num_skipped:g} updates skipped so "
            f"far): lower {run.name}.optimizer.learning_rate, or allow {run.name}.max_skipped_updates"
        )
    patience = settings.max_steps_without_signal
    last = history[-patience:] if patience else []
    if len(last) == patience > 0 and all(metrics.get("no_signal") for metrics in last):
        raise UserError(
            f"{run.name}: in {patience} steps in a row no two completions of a problem had different rewards "
            f"({verdict_shares(rollouts)}): give problems that the model solves sometimes, check that "
            f"data.reasoning and data.prompt fit it, or raise {run.name}.max_steps_without_signal"
        )


def verdict_shares(rollouts: Sequence[Rollout]) -> str:
    """What the completions of the last step are, in words."""
    counts = Counter(r.reward.verdict.value if r.reward.format_ok else "malformed" for r in rollouts)
    return ", ".join(f"{count / len(rollouts):.0%} {name}" for name, count in counts.most_common())


def masked_counts(rewards: Sequence[Reward]) -> dict[str, float]:
    """Masked completions by term and cause, as flat metrics."""
    counts: dict[str, float] = {}
    for term, causes in mask_report(rewards).items():
        counts |= {f"masked/{term}/{cause}": float(count) for cause, count in causes.items()}
    return counts


def step_times(rollouts: Sequence[Rollout], began: float, sampled: float, updated: float) -> dict[str, float]:
    """Seconds and tokens of a step that began, had its rollouts and was trained at these times (monotonic
    seconds)."""
    now = time.monotonic()
    num_tokens = sum(len(rollout.completion.token_ids) for rollout in rollouts)
    return {
        "completions": float(len(rollouts)),
        "rollout_seconds": sampled - began,
        "update_seconds": updated - sampled,
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
