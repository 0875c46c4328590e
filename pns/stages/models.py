"""Which model a stage starts from."""

from __future__ import annotations

from pns.config import GeneratorStart, external_pairs
from pns.stages.context import Context


def backbone(ctx: Context) -> str:
    """The backbone before any RL: the warm-started one where the run made it, else `models.backbone`."""
    if ctx.config.warm_start.steps:
        return str(ctx.run.stage_dir("warm_start") / "model")
    return ctx.config.models.backbone


def target(ctx: Context) -> str:
    """What preference optimisation starts from: the RL-trained backbone; with pairs given from outside, the
    backbone itself."""
    if external_pairs(ctx.config):
        return backbone(ctx)
    return str(ctx.run.stage_dir("rl") / "model")


def generator_start(ctx: Context) -> str:
    """What reverse RL starts from."""
    start = ctx.config.reverse_rl.start
    if start is GeneratorStart.path:
        return ctx.config.models.generator
    return target(ctx) if start is GeneratorStart.target else backbone(ctx)


def generator(ctx: Context) -> str:
    """The generator of plausible negatives."""
    return str(ctx.run.stage_dir("reverse_rl") / "model")


def reward_model(ctx: Context, which: str = "main") -> str:
    """A trained reward model: "main" (in the reward) or "held_out" (only measures)."""
    return str(ctx.run.stage_dir("reward_model") / which)
