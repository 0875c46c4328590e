"""Synthesis: the generator's plausible negatives, kept only when two independent verifiers agree that they
are wrong."""

from __future__ import annotations

from pns.algo.negatives import filter_negatives
from pns.errors import UserError
from pns.files import write_json, write_jsonl
from pns.stages.context import Context
from pns.stages.models import generator, reward_model
from pns.stages.scoring import RewardKind, roll_out


def run(ctx: Context) -> None:
    """Writes `synthesize/rollouts.jsonl` (every sample), `negatives.jsonl` (the kept) and `counts.json` (why
    the others were dropped)."""
    settings, directory = ctx.config.synthesize, ctx.run.stage_dir("synthesize")
    problems, too_long = ctx.prompts.fitting(ctx.problems.preference)
    ctx.track.begin("synthesize", 1, 0)
    ctx.fleet.reward_model.load(reward_model(ctx))
    ctx.fleet.rollout.load(generator(ctx))
    rollouts = roll_out(
        ctx, problems, settings.samples_per_problem, settings.temperature, RewardKind.COMPOSITE, "synthesize"
    )
    write_jsonl(directory / "rollouts.jsonl", rollouts)
    negatives, counts = filter_negatives(
        rollouts, settings.min_plausibility_quantile, settings.drop_box_only_flips
    )
    if not negatives:
        raise UserError(
            f"synthesize: no negative was kept ({counts}); train the generator longer or sample more per problem"
        )
    write_jsonl(directory / "negatives.jsonl", negatives)
    write_json(directory / "counts.json", counts)
    ctx.track.log(0, {"kept": float(len(negatives)), "kept_share": len(negatives) / len(rollouts)})
    ctx.track.end()
    ctx.run.count(
        "synthesize", samples=len(rollouts), kept=len(negatives), prompts_too_long=too_long, **counts
    )
