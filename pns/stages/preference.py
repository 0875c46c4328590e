"""Preference optimisation of the RL-trained backbone on the pairs, with the loss of `preference.loss`, over
verl's FSDP worker."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from pns.algo.losses import kto_kl
from pns.algo.pairs import margin_masks
from pns.config import DataSource, PreferenceLoss, external_pairs, reference_free
from pns.data.preference import TokenPair, load_pairs
from pns.data.problems import benchmark_overlaps
from pns.errors import UserError
from pns.files import write_json
from pns.run import reference_cache
from pns.stages.context import Context, draw
from pns.stages.models import target
from workers.rollout.engine import local_directory
from workers.training.batching import Batch
from workers.training.policy import Preference, compute_dtype

_WINDOW = 10  # steps over which a fall of the chosen side's likelihood is judged
_FALLEN_NATS = 1.0  # per completion, against the reference
_RISEN = 1.1  # factor of the NLL per token, where there is no reference


def run(ctx: Context) -> None:
    """Writes `preference/model` and `preference/data.json` (where the pairs come from, their hash, how many
    were dropped and why)."""
    settings, policy, directory = ctx.config.preference, ctx.fleet.policy, ctx.run.stage_dir("preference")
    problems = {problem.id: problem for problem in ctx.problems.preference}
    data = ctx.config.data
    decontaminated = external_pairs(ctx.config) and data.decontaminate and data.source is DataSource.jsonl
    overlaps = benchmark_overlaps(ctx.problems.suites, data) if decontaminated else None
    loaded = load_pairs(
        ctx.config, ctx.prompts, problems, ctx.run.stage_dir("pair") / "pairs.jsonl", overlaps
    )
    pairs, start = loaded.pairs, target(ctx)
    write_json(directory / "data.json", loaded.summary())
    rows = pair_batch(ctx, pairs)
    policy.load(start, "language_model", settings.optimizer, settings.steps, ctx.config.seed)
    if not reference_free(settings.loss):
        rows.token_values["ref_log_probs"] = reference_log_probs(ctx, start, rows)
    mismatched = mismatched_rows(ctx, start, rows) if settings.loss is PreferenceLoss.kto else None
    first_step = 0
    if checkpoint := ctx.run.latest_checkpoint("preference"):
        policy.restore(checkpoint.path)
        first_step = checkpoint.step
    warned = ""
    history: list[Mapping[str, float | None]] = list(
        ctx.track.begin("preference", settings.steps, first_step)
    )
    for step in range(first_step, settings.steps):
        indices = draw(range(len(pairs)), settings.pairs_per_step, step, ctx.config.seed)
        kl = estimate_kl(ctx, select(mismatched, indices)) if mismatched else 0.0
        metrics = policy.train_step(select(rows, indices), Preference(settings, kl)) | (
            {"kto_kl": kl} if mismatched else {}
        )
        ctx.track.log(step, metrics)
        history.append(metrics)
        if metrics["update_skipped"] or not math.isfinite(metrics["loss"]):
            stop_after_skipped(ctx, step, history, [pairs[i] for i in indices])
        if not warned and (warned := chosen_falls(history)):
            ctx.track.note(f"preference: {warned}; preference.loss=rpo keeps them up")
        if (step + 1) % settings.checkpoint_every == 0 and step + 1 < settings.steps:
            with ctx.run.checkpoint("preference", step + 1) as checkpoint_dir:
                policy.save(checkpoint_dir)
    ctx.track.end()
    policy.export(directory / "model")
    ctx.run.count("preference", pairs=len(pairs), **loaded.dropped)


def pair_batch(ctx: Context, pairs: Sequence[TokenPair]) -> Batch:
    """Rows chosen, rejected, chosen, rejected, ... with the margin mask of `preference.margin`, and score
    gaps where all pairs have one."""
    prompts = [pair.prompt_ids for pair in pairs for _ in range(2)]
    completions = [ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    masks = [
        margin_masks(pair.chosen_ids, pair.rejected_ids, ctx.config.preference.margin, pair.margin_tokens)
        for pair in pairs
    ]
    gaps = [pair.score_gap for pair in pairs for _ in range(2) if pair.score_gap is not None]
    row_values: dict[str, Sequence[float]] = {"score_gap": gaps} if len(gaps) == 2 * len(pairs) else {}
    return Batch(
        prompts, completions, {"margin_mask": [mask for of_pair in masks for mask in of_pair]}, row_values
    )


def select(rows: Batch, indices: Sequence[int]) -> Batch:
    """Both rows of the pairs `indices`."""
    taken = [row for index in indices for row in (2 * index, 2 * index + 1)]
    return Batch(
        [rows.prompt_ids[row] for row in taken],
        [rows.completion_ids[row] for row in taken],
        {name: [values[row] for row in taken] for name, values in rows.token_values.items()},
        {name: [values[row] for row in taken] for name, values in rows.row_values.items()},
    )


def reference_log_probs(ctx: Context, model: str, rows: Batch) -> Sequence[np.ndarray]:
    """Log-probabilities of every completion token under `model`, which the policy holds untrained: from the
    cache, which all runs below `runs` share, or computed and kept there."""
    directory = Path(ctx.config.runs) / "reference_cache"
    dtype = compute_dtype(ctx.config.policy.dtype, ctx.fleet.device)
    checkpoint = local_directory(model)
    key = reference_cache.reference_key(checkpoint, checkpoint, rows.prompt_ids, rows.completion_ids, dtype)
    found: Sequence[np.ndarray] | None = reference_cache.load(
        directory, key, [len(ids) for ids in rows.completion_ids]
    )
    if found is None:
        found = ctx.fleet.policy.log_probs(rows)
        reference_cache.save(directory, key, found)
    return found


def mismatched_rows(ctx: Context, model: str, rows: Batch) -> Batch:
    """Every prompt with both completions of the next pair, for KTO's estimate of the KL divergence, and their
    reference."""
    if len(rows) < 4:
        raise UserError(
            "preference.loss=kto: one pair is not enough to estimate the KL divergence; give more, or choose another loss"
        )
    following = [(row + 2) % len(rows) for row in range(len(rows))]
    masks = [rows.token_values["margin_mask"][row] for row in following]
    batch = Batch(rows.prompt_ids, [rows.completion_ids[row] for row in following], {"margin_mask": masks})
    batch.token_values["ref_log_probs"] = reference_log_probs(ctx, model, batch)
    return batch


def estimate_kl(ctx: Context, mismatched: Batch) -> float:
    """KTO's reference point for one step, under the policy as it is."""
    values = zip(ctx.fleet.policy.log_probs(mismatched), *mismatched.token_values.values(), strict=True)
    return float(
        kto_kl(torch.tensor([float(np.dot(mask, own - reference)) for own, mask, reference in values]))
    )


def stop_after_skipped(
    ctx: Context, step: int, history: Sequence[Mapping[str, float | None]], pairs: Sequence[TokenPair]
) -> None:
    """Raises UserError, naming pairs of `step`, once more than `preference.max_skipped_updates` updates were
    skipped because the loss or its gradient was not finite. The weights are as they were before the step."""
    skipped = sum(bool(metrics.get("update_skipped")) for metrics in history)
    ctx.run.count("preference", updates_skipped=skipped)
    if skipped <= ctx.config.preference.max_skipped_updates:
        return
    log_probs = ctx.fleet.policy.log_probs(pair_batch(ctx, pairs))
    broken = [
        pair.where
        for place, pair in enumerate(pairs)
        if not all(np.isfinite(row).all() for row in log_probs[2 * place :][:2])
    ]
    places = broken or [pair.where for pair in pairs]
    raise UserError(
        f"preference: the loss or its gradient is not finite at step {step} ({places[0]}"
        + (f" and {len(places) - 1} more)" if len(places) > 1 else ")")
        + ": lower preference.optimizer.learning_rate and start again with --from preference, or allow preference.max_skipped_updates"
    )


def chosen_falls(history: Sequence[Mapping[str, float | None]]) -> str:
    """What to say when the chosen completions have become less likely than at the start, judged over the last
    steps; empty while they have not. Without a reference the first steps stand for the start."""
    last, first = history[-_WINDOW:], history[:_WINDOW]
    if len(history) < _WINDOW:
        return ""
    if ratios := [ratio for metrics in last if (ratio := metrics.get("chosen_log_ratio")) is not None]:
        fallen = -sum(ratios) / len(ratios)
        return (
            f"chosen completions are {fallen:.1f} nats less likely than at the start"
            if fallen > _FALLEN_NATS
            else ""
        )
    now, before = (
        float(np.mean([metrics["chosen_nll"] or math.nan for metrics in steps])) for steps in (last, first)
    )
    return (
        f"the NLL of chosen completions has risen from {before:.3g} to {now:.3g} a token"
        if now > _RISEN * before
        else ""
    )
