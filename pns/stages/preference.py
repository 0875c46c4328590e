"""Preference optimisation on the pairs, with the loss of `preference.loss`, over verl's FSDP worker."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pns.algo.pairs import margin_masks
from pns.config import Config, Layout, MarginMask, PreferenceConfig, hyper_parameters
from pns.data.decontamination import Overlaps
from pns.data.preference import TokenPair, load_pairs
from pns.files import write_json
from pns.preference_losses import PREFERENCE_LOSSES
from pns.run.stage import stage
from pns.stages.artefacts import AnyModel, Pairs, PreferenceTrained
from pns.stages.context import Context, Problems, draw
from pns.stages.fixed_rows import kept_reference, select_rows, stop_after_skipped
from workers.training.batching import Batch
from workers.training.objectives import PreferenceObjective, estimate_kl, mismatched_rows

_WINDOW = 10  # steps over which a fall of the chosen side's likelihood is judged
_FALLEN_NATS = 1.0  # per completion, against the reference
_RISEN = 1.1  # factor of the NLL per token, where there is no reference


@dataclass(frozen=True)
class PreferenceSettings:
    preference: PreferenceConfig
    # Which pairs are dropped as too long depends on these two.
    max_tokens_per_micro_batch: int
    layout: Layout


def preference_settings(config: Config) -> PreferenceSettings:
    policy = config.policy
    return PreferenceSettings(config.preference, policy.max_tokens_per_micro_batch, policy.layout)


@stage(PreferenceTrained, preference_settings, lambda settings: ("policy",))
def preference(
    ctx: Context,
    settings: PreferenceSettings,
    start: AnyModel,
    own_pairs: Pairs | None,
    problems: Problems,
    benchmarks: Problems | None,
) -> PreferenceTrained:
    """`start` trained on `own_pairs` of `problems`, or (None) on those of `preference.data`, without the rows
    whose prompt is in `benchmarks` (None: all rows)."""
    trained, own, policy = PreferenceTrained(ctx.directory), settings.preference, ctx.fleet.policy
    loaded = load_pairs(
        own,
        settings.max_tokens_per_micro_batch,
        settings.layout,
        ctx.prompts,
        problems.by_id,
        own_pairs.pairs_file if own_pairs else None,
        Overlaps(benchmarks.problems) if benchmarks else None,
    )
    pairs = loaded.pairs
    if loaded.in_template:
        note = f"{loaded.in_template} pairs of plain strings are put into the model's chat template"
        ctx.track.note(f"preference: {note}; as they are with preference.data.chat_template=false")
    if len(pairs) < own.pairs_per_step:
        note = (
            f"a step takes preference.pairs_per_step={own.pairs_per_step} pairs, and there are {len(pairs)}"
        )
        ctx.track.note(f"preference: {note}: each is taken several times a step")
    write_json(trained.data_file, loaded.summary())
    rows = pair_batch(pairs, own.margin)
    policy.load(start.model, "language_model", own.optimizer, own.steps, ctx.seed)
    loss = PREFERENCE_LOSSES[own.loss]
    if loss.needs_reference:
        rows.token_values["ref_log_probs"] = kept_reference(ctx, start.model, rows)
    mismatched = None
    if loss.needs_kl:
        mismatched = mismatched_rows(rows)
        mismatched.token_values["ref_log_probs"] = kept_reference(ctx, start.model, mismatched)
    optimise(ctx, own, pairs, rows, mismatched)
    policy.export(trained.model)
    ctx.place.count(pairs=len(pairs), **loaded.dropped)
    return trained


def optimise(
    ctx: Context,
    settings: PreferenceConfig,
    pairs: Sequence[TokenPair],
    rows: Batch,
    mismatched: Batch | None,
) -> None:
    """The stage's steps, from its last complete checkpoint on."""
    policy = ctx.fleet.policy
    first_step = ctx.resume()
    parameters, warned = hyper_parameters(settings), ""
    history = ctx.track.begin("preference", settings.steps, first_step)
    for step in ctx.steps(first_step, settings.steps):
        indices = draw(range(len(pairs)), settings.pairs_per_step, step, ctx.seed)
        kl = 0.0
        if mismatched:
            own_mismatched = select_pairs(mismatched, indices)
            kl = estimate_kl(policy.log_probs(own_mismatched), own_mismatched)
        objective = PreferenceObjective(settings.loss, parameters, kl)
        batch = select_pairs(rows, indices)
        metrics = policy.train_step(batch, objective)
        if mismatched:
            metrics["kto_kl"] = kl
        ctx.track.log(step, metrics)
        history.append(metrics)
        if metrics["update_skipped"] or not math.isfinite(metrics["loss"]):
            places = [pairs[index].where for index in indices for _ in range(2)]
            stop_after_skipped(ctx, "preference", settings.max_skipped_updates, step, history, batch, places)
        if not warned and (warned := chosen_falls(history)):
            ctx.track.note(f"preference: {warned}; preference.loss=rpo keeps them up")
        ctx.save_policy(step + 1, settings.checkpoint_every, settings.steps)
    ctx.track.end()


def pair_batch(pairs: Sequence[TokenPair], margin: MarginMask) -> Batch:
    """Rows chosen, rejected, ... with the margin mask, and score gaps where all pairs have one."""
    prompts, completions, gaps = [], [], []
    masks: list[np.ndarray] = []
    for pair in pairs:
        prompts += [pair.prompt_ids] * 2
        completions += [pair.chosen_ids, pair.rejected_ids]
        masks += margin_masks(pair.chosen_ids, pair.rejected_ids, margin, pair.margin_tokens)
        if pair.score_gap is not None:
            gaps += [pair.score_gap] * 2
    row_values: dict[str, Sequence[float]] = {"score_gap": gaps} if len(gaps) == len(prompts) else {}
    return Batch(prompts, completions, {"margin_mask": masks}, row_values)


def select_pairs(rows: Batch, indices: Sequence[int]) -> Batch:
    """Both rows of the pairs `indices`."""
    return select_rows(rows, [row for index in indices for row in (2 * index, 2 * index + 1)])


def chosen_falls(history: Sequence[Mapping[str, float | None]]) -> str:
    """What to say when the chosen completions have become less likely than at the start, judged over the last
    steps; empty while they have not. Without a reference the first steps stand for the start."""
    if len(history) < _WINDOW:
        return ""
    last, first = history[-_WINDOW:], history[:_WINDOW]
    ratios = [ratio for metrics in last if (ratio := metrics.get("chosen_log_ratio")) is not None]
    if ratios:
        fallen = -sum(ratios) / len(ratios)
        now_less = f"chosen completions are {fallen:.1f} nats less likely than at the start"
        return now_less if fallen > _FALLEN_NATS else ""
    nll_before, nll = (np.mean([row["chosen_nll"] or math.nan for row in steps]) for steps in (first, last))
    change = f"from {nll_before:.3g} to {nll:.3g} a token"
    return f"the NLL of chosen completions has risen {change}" if nll > _RISEN * nll_before else ""
