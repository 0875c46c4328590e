"""RL of the backbone with the ordinary correctness reward: the RL-trained backbone that everything after it
starts from."""

from __future__ import annotations

from pns.stages import grpo
from pns.stages.context import Context
from pns.stages.models import backbone
from pns.stages.scoring import RewardKind


def run(ctx: Context) -> None:
    """Writes `rl/model`, `rl/rollouts.jsonl`."""
    problems, too_long = ctx.prompts.fitting(ctx.problems.train)
    grpo.train(
        ctx,
        "rl",
        ctx.config.rl,
        backbone(ctx),
        problems,
        RewardKind.CORRECTNESS,
        grpo.accuracy,
        stop=lambda step, metrics: False,
    )
    ctx.run.count("rl", prompts_too_long=too_long)
