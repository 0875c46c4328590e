"""Reverse RL: the generator learns to write solutions that look right and end wrong (arXiv 2602.03516)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pns.algo.negatives import degeneration
from pns.config import DataSource, ReverseRl
from pns.files import write_json
from pns.records import Rollout, Verdict
from pns.stages import grpo
from pns.stages.context import Context
from pns.stages.models import generator, generator_start, reward_model
from pns.stages.scoring import RewardKind, roll_out
from pns.tiny import world as tiny_world


def run(ctx: Context) -> None:
    """Writes `reverse_rl/model`, `reverse_rl/rollouts.jsonl` and `reverse_rl/generator.json` (the generator
    before and after)."""
    settings = ctx.config.reverse_rl
    ctx.fleet.reward_model.load(reward_model(ctx))
    problems, too_long = ctx.prompts.fitting(ctx.problems.train)
    before_file = ctx.run.stage_dir("reverse_rl") / "before.json"
    if not before_file.exists():
        write_json(before_file, measure(ctx, generator_start(ctx)))
    describe = checked_degeneration if ctx.config.data.source is DataSource.tiny else degeneration
    grpo.train(
        ctx,
        "reverse_rl",
        settings,
        generator_start(ctx),
        problems,
        RewardKind.COMPOSITE,
        describe,
        StopRule(settings),
    )
    after = measure(ctx, generator(ctx))
    write_json(
        ctx.run.stage_dir("reverse_rl") / "generator.json",
        {"before": ctx.run.read_json(before_file), "after": after},
    )
    ctx.run.count("reverse_rl", prompts_too_long=too_long)


class StopRule:
    """Stop when the wrong rate and the format rate are reached and plausibility no longer rises."""

    def __init__(self, settings: ReverseRl) -> None:
        self._settings = settings
        self._best = 0.0
        self._since = 0

    def __call__(self, step: int, metrics: Mapping[str, float | None]) -> bool:
        s = self._settings
        wrong_rate, format_rate = metrics.get("wrong_rate") or 0.0, metrics.get("format_rate") or 0.0
        plausibility = metrics.get("reward_model_mean") or 0.0
        if wrong_rate >= s.max_hold_wrong_rate:
            return True
        if wrong_rate < s.stop_wrong_rate or format_rate < s.stop_format_rate or not s.stop_patience:
            return False
        if plausibility > self._best:
            self._best, self._since = plausibility, 0
        else:
            self._since += 1
        return self._since >= s.stop_patience


def measure(ctx: Context, model: str) -> dict[str, float]:
    """The generator's rates and scores on `evaluate.generator_samples` completions of preference problems,
    taken in turn."""
    ctx.fleet.rollout.load(model)
    num = ctx.config.evaluate.generator_samples
    pool, _ = ctx.prompts.fitting(ctx.problems.preference)
    rollouts = roll_out(
        ctx,
        [pool[i % len(pool)] for i in range(num)],
        1,
        ctx.config.evaluate.generator_temperature,
        RewardKind.COMPOSITE,
        "generator",
    )
    figures = (
        checked_degeneration(rollouts)
        if ctx.config.data.source is DataSource.tiny
        else degeneration(rollouts)
    )
    return {**figures, "num_completions": float(len(rollouts))}


def checked_degeneration(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """`degeneration` with what only a checker knows: the share of wrong well-formed completions that have a
    single error."""
    wrong = [r for r in rollouts if r.reward.format_ok and r.reward.verdict is Verdict.WRONG]
    checks = [tiny_world.check(r.problem, r.completion.text) for r in wrong]
    rubrics = [sum(tiny_world.rubric(r.problem, r.completion.text)) / 12 for r in wrong]
    share = sum(c.single_error for c in checks) / len(checks) if checks else float("nan")
    return {
        **degeneration(rollouts),
        "single_error_share": share,
        "checker_rubric_mean": sum(rubrics) / len(rubrics) if rubrics else float("nan"),
    }
