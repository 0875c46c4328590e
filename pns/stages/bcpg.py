"""Offline training on samples, by one of the objectives in `pns.offline_objectives`."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pns.algo.offline import OfflineSample, offline_samples, right_wrong_pairs, token_advantages
from pns.config import OWN, Bcpg, BcpgArm, Config, Optimizer, arm_parameters
from pns.errors import UserError
from pns.files import write_json
from pns.offline_objectives import OFFLINE_OBJECTIVES
from pns.records import LabelledCompletion
from pns.run.stage import stage
from pns.stages.artefacts import AnyModel, BcpgTrained, Negatives, Samples, StepLabels
from pns.stages.context import Context, draw
from pns.stages.fixed_rows import kept_reference, select_rows, stop_after_skipped
from workers.training.batching import Batch
from workers.training.objectives import (
    BcpgObjective,
    Objective,
    PreferenceObjective,
    SftObjective,
    WeightedReinforceObjective,
)


@dataclass(frozen=True)
class BcpgSettings:
    arm: BcpgArm
    steps: int
    problems_per_step: int
    max_skipped_updates: int
    checkpoint_every: int
    optimizer: Optimizer
    max_length_ratio: float | None  # of pairs, where the objective takes any


def bcpg_settings(config: Config) -> BcpgSettings:
    own: Bcpg = config.bcpg
    [arm] = own.arms.values()  # the method asks for one arm at a time
    return BcpgSettings(
        arm,
        own.steps,
        own.problems_per_step,
        own.max_skipped_updates,
        own.checkpoint_every,
        own.optimizer,
        config.pair.max_length_ratio if arm.objective == "rpo" else None,
    )


@stage(BcpgTrained, bcpg_settings, lambda settings: ("policy",))
def bcpg(
    ctx: Context,
    settings: BcpgSettings,
    policy: AnyModel,
    samples: Samples,
    others: Mapping[str, Negatives],
    labels: StepLabels | None,
) -> BcpgTrained:
    """`policy` trained on its `samples` and on the negatives of `others` (source -> negatives). `labels` are
    given where the objective reads those of steps."""
    trained, arm, rollouts = BcpgTrained(ctx.directory), settings.arm, samples.rollouts()
    negatives = {source: artefact.negatives() for source, artefact in others.items()}
    found = offline_samples(rollouts, negatives, OWN in arm.negatives)
    chosen = choose_rows(settings, found, labels.labels() if labels else ())
    batch = sample_batch(ctx, found)
    ctx.fleet.policy.load(policy.model, "language_model", settings.optimizer, settings.steps, ctx.seed)
    figures = chosen.figures()
    if OFFLINE_OBJECTIVES[arm.objective].needs_reference:
        # Of all there are, and not of those chosen alone: most arms then find them in the cache.
        reference = batch.token_values["ref_log_probs"] = kept_reference(ctx, policy.model, batch)
        figures["behaviour_gap"] = behaviour_gap(found, reference)
    write_json(trained.data_file, figures | {"masked": sum(own.reward.masked for own in rollouts)})
    rows = select_rows(batch, chosen.indices)
    if chosen.advantages:
        rows.token_values["token_advantages"] = chosen.advantages
    optimise(ctx, settings, chosen, rows)
    ctx.fleet.policy.export(trained.model)
    counts = {name: value for name, value in figures.items() if isinstance(value, int)}
    ctx.place.count(**counts)
    return trained


@dataclass(frozen=True)
class ChosenRows:
    """The samples that an arm trains on, as `indices` into all, with their advantages (a row each; none of
    pairs, whose rows take turns: right, wrong, right, ...). `labels` are those of the wrong ones;
    `unlabelled` counts, by cause, wrong ones that are left out for want of labels."""

    samples: Sequence[OfflineSample]
    indices: list[int]
    advantages: list[NDArray[np.float32]]
    labels: list[LabelledCompletion]
    unlabelled: Counter[str] = field(default_factory=Counter)

    def by_problem(self) -> dict[str, list[int]]:
        """Problem id -> its rows."""
        rows: dict[str, list[int]] = {}
        for row, index in enumerate(self.indices):
            rows.setdefault(self.samples[index].rollout.problem.id, []).append(row)
        return rows

    def figures(self) -> dict[str, Any]:
        """Numbers of problems, of right and wrong completions (`wrong_by_source`), of labelled ones, of those
        left out by cause (`unlabelled`), of tokens by the sign of their advantage; of the labelled ones
        `mean_steps` and `correct_token_share`, the share of their tokens in steps labelled correct. None
        where the objective reads no such thing."""
        wrong = Counter(self.samples[index].source for index in self.indices if not self.samples[index].right)
        figures: dict[str, Any] = {
            "problems": len(self.by_problem()),
            "right": len(self.indices) - wrong.total(),
            "wrong": wrong.total(),
            "wrong_by_source": dict(wrong),
            "labelled": len(self.labels),
            "unlabelled": dict(self.unlabelled),
            "tokens": None,
            "mean_steps": None,
            "correct_token_share": None,
            "behaviour_gap": None,
        }
        if self.advantages:
            signs = Counter(chain.from_iterable(np.sign(row_T).tolist() for row_T in self.advantages))
            figures["tokens"] = {"positive": signs[1.0], "zero": signs[0.0], "negative": signs[-1.0]}
        if self.labels:
            steps = [step for own in self.labels for step in own.steps]
            num_correct = sum(step.end_token - step.first_token for step in steps if step.correct)
            num_tokens = sum(step.end_token - step.first_token for step in steps)  # steps tile completions
            figures["mean_steps"] = len(steps) / len(self.labels)
            figures["correct_token_share"] = num_correct / num_tokens
        return figures


def choose_rows(
    settings: BcpgSettings, samples: Sequence[OfflineSample], labels: Sequence[LabelledCompletion]
) -> ChosenRows:
    """The rows of the arm. Raises UserError where there is nothing that it could learn from."""
    if settings.max_length_ratio is not None:
        return choose_pairs(samples, settings.max_length_ratio)
    objective, parameters = settings.arm.objective, arm_parameters(settings.arm)
    labels_by_id = {own.completion_id: own for own in labels}
    reads_steps = OFFLINE_OBJECTIVES[objective].reads_steps
    chosen = ChosenRows(samples, [], [], [])
    for index, sample in enumerate(samples):
        if objective == "rft" and not sample.right:
            continue
        label = None
        if reads_steps and not sample.right:
            label = labels_by_id.get(sample.id)
            if label is None or label.missing:
                missing = label.missing if label else {"label_steps": "not_asked"}
                chosen.unlabelled.update(f"{service}/{cause}" for service, cause in missing.items())
                continue
            chosen.labels.append(label)
        chosen.indices.append(index)
        steps = label.steps if label else ()
        chosen.advantages.append(token_advantages(sample, objective, parameters, steps))
    if objective != "rft" and all(samples[index].right for index in chosen.indices):
        without = f", without labels: {dict(chosen.unlabelled)}" if chosen.unlabelled else ""
        fault = f"objective={objective} has no wrong completion beside {len(chosen.indices)} right ones"
        way_out = "raise bcpg.samples_per_problem, or let the arm take negatives of other sources"
        raise UserError(f"bcpg: {fault}{without}: {way_out}")
    return chosen


def choose_pairs(samples: Sequence[OfflineSample], max_length_ratio: float) -> ChosenRows:
    pairs = right_wrong_pairs(samples, max_length_ratio)
    if not pairs:
        fault = f"no right and wrong completion of one problem within {max_length_ratio:g} times the other"
        way_out = "raise bcpg.samples_per_problem or pair.max_length_ratio"
        raise UserError(f"bcpg: {fault}'s length: {way_out}")
    return ChosenRows(samples, list(chain.from_iterable(pairs)), [], [])


def sample_batch(ctx: Context, samples: Sequence[OfflineSample]) -> Batch:
    """A row a sample."""
    problems = {sample.rollout.problem.id: sample.rollout.problem for sample in samples}
    prompt_ids = {identity: ctx.prompts.encode(problem) for identity, problem in problems.items()}
    return Batch(
        [prompt_ids[sample.rollout.problem.id] for sample in samples],
        [sample.rollout.completion.token_ids for sample in samples],
    )


def behaviour_gap(samples: Sequence[OfflineSample], reference: Sequence[np.ndarray]) -> float | None:
    """Mean over the tokens of the policy's own completions of |log pi_ref - log pi_engine|: how far the
    log-probabilities of the engine that sampled are from those trained against. None for none."""
    gaps = [
        np.abs(reference_T - np.asarray(sample.rollout.completion.log_probs))
        for sample, reference_T in zip(samples, reference, strict=True)
        if sample.source == OWN
    ]
    return float(np.concatenate(gaps).mean()) if gaps else None


def optimise(ctx: Context, settings: BcpgSettings, chosen: ChosenRows, rows: Batch) -> None:
    """The stage's steps, from its last complete checkpoint on; each is on all rows of its problems."""
    by_problem = list(chosen.by_problem().values())
    objective, first_step = arm_objective(settings.arm), ctx.resume()
    history = ctx.track.begin("bcpg", settings.steps, first_step)
    for step in ctx.steps(first_step, settings.steps):
        drawn = draw(by_problem, settings.problems_per_step, step, ctx.seed)
        indices = list(chain.from_iterable(drawn))
        batch = select_rows(rows, indices)
        metrics = ctx.fleet.policy.train_step(batch, objective)
        ctx.track.log(step, metrics)
        history.append(metrics)
        if metrics["update_skipped"] or not math.isfinite(metrics["loss"]):
            places = [chosen.samples[chosen.indices[row]].id for row in indices]
            stop_after_skipped(ctx, "bcpg", settings.max_skipped_updates, step, history, batch, places)
        ctx.save_policy(step + 1, settings.checkpoint_every, settings.steps)
    ctx.track.end()


def arm_objective(arm: BcpgArm) -> Objective:
    parameters = arm_parameters(arm)
    if arm.objective == "rft":
        return SftObjective()
    if arm.objective == "rpo":
        return PreferenceObjective("rpo", parameters)
    if arm.objective == "w_reinforce":
        return WeightedReinforceObjective()
    return BcpgObjective(parameters["beta"], arm.constraint)
