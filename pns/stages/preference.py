"""Preference optimisation of the RL-trained backbone on the pairs: DPO (arXiv 2305.18290) over verl's FSDP worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pns.algo.pairs import margin_masks, num_margin_tokens
from pns.errors import UserError
from pns.records import PreferencePair, Problem, from_json
from pns.run.directory import read_jsonl, write_jsonl
from pns.stages.context import Context, draw
from pns.stages.models import target
from workers.policy import Batch, Dpo


def run(ctx: Context) -> None:
    """Writes `preference/model` and `preference/reference.jsonl` (the reference log-probabilities, computed once)."""
    settings, policy, directory = ctx.config.preference, ctx.fleet.policy, ctx.run.stage_dir("preference")
    pairs = [from_json(PreferencePair, row) for row in read_jsonl(ctx.run.stage_dir("pair") / "pairs.jsonl")]
    if not pairs:
        raise UserError("preference: pair/pairs.jsonl has no pairs; raise synthesize.samples_per_problem or pair.samples_per_problem")
    by_id = {problem.id: problem for problem in ctx.problems.preference}
    policy.load(target(ctx), "language_model", settings.optimizer, settings.steps, ctx.config.seed)
    reference = reference_log_probs(ctx, by_id, pairs)
    first_step = 0
    if checkpoint := ctx.run.latest_checkpoint("preference"):
        policy.restore(checkpoint.path)
        first_step = checkpoint.step
    loss = Dpo(settings.beta, settings.nll_weight, settings.label_smoothing)
    ctx.track.begin("preference", settings.steps, first_step)
    for step in range(first_step, settings.steps):
        indices = draw(range(len(pairs)), settings.pairs_per_step, step, ctx.config.seed)
        batch = pair_batch(ctx, by_id, [pairs[i] for i in indices])
        batch.token_values["ref_log_probs"] = [row for i in indices for row in reference[i]]
        ctx.track.log(step, policy.train_step(batch, loss))
        if (step + 1) % settings.checkpoint_every == 0 and step + 1 < settings.steps:
            with ctx.run.checkpoint("preference", step + 1) as checkpoint_dir:
                policy.save(checkpoint_dir)
    ctx.track.end()
    policy.export(directory / "model")
    ctx.run.count("preference", pairs=len(pairs))


def pair_batch(ctx: Context, by_id: dict[str, Problem], pairs: Sequence[PreferencePair]) -> Batch:
    """Rows chosen, rejected, chosen, rejected, ... with the margin mask of `preference.margin`."""
    prompts: list[tuple[int, ...]] = []
    completions: list[tuple[int, ...]] = []
    margins: list[np.ndarray] = []
    for pair in pairs:
        prompt = ctx.prompts.encode(by_id[pair.problem_id])
        chosen, rejected = ctx.prompts.encode_completion(pair.chosen), ctx.prompts.encode_completion(pair.rejected)
        num_rejected = num_margin_tokens(ctx.prompts.token_starts(pair.rejected), pair.margin_end)
        masks = margin_masks(chosen, rejected, ctx.config.preference.margin, None if pair.margin_end is None else num_rejected)
        prompts += [prompt, prompt]
        completions += [chosen, rejected]
        margins += masks
    return Batch(prompts, completions, {"margin_mask": margins})


def reference_log_probs(ctx: Context, by_id: dict[str, Problem], pairs: Sequence[PreferencePair]) -> list[tuple[Any, Any]]:
    """Per pair the (chosen, rejected) log-probabilities of every completion token under the policy before its first step, kept on disk."""
    path = ctx.run.stage_dir("preference") / "reference.jsonl"
    if not path.exists():
        batch = pair_batch(ctx, by_id, pairs)
        rows = ctx.fleet.policy.log_probs(batch)
        write_jsonl(path, [{"log_probs": np.asarray(row, dtype=np.float64).tolist()} for row in rows])
    rows = [row["log_probs"] for row in read_jsonl(path)]
    return list(zip(rows[::2], rows[1::2], strict=True))
