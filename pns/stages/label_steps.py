"""The steps of wrong completions, each labelled by the consensus of a judge and a process reward model (arXiv
2505.14403; that the consensus is AND by default is ours)."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from pns.algo.agreement import agreement, consensus, label_quality
from pns.algo.masks import check_missing
from pns.algo.offline import OfflineSample, offline_samples
from pns.algo.segments import Splitter, segment, sentences, token_offsets
from pns.config import (
    OWN,
    Config,
    Endpoint,
    SegmentRules,
    ServicePool,
    SplitterKind,
    StepJudgeConfig,
    StepRule,
    step_services,
)
from pns.data.checker import CheckedStep, Checker
from pns.data.prompts import Prompts
from pns.errors import UserError
from pns.files import write_json, write_jsonl
from pns.records import LabelledCompletion, LabelledStep
from pns.run.place import UNFINISHED
from pns.run.stage import stage
from pns.stages.artefacts import Negatives, Samples, StepLabels
from pns.stages.context import Context, Problems
from pns.stages.stream import Unfinished

_CHUNK = 64  # completions between two lines of progress, and two writes
_TAGS = ("<think>", "</think>")  # they belong to steps, and say nothing


@dataclass(frozen=True)
class LabelSettings:
    segments: SegmentRules
    rule: StepRule
    judge: StepJudgeConfig | None  # without its place; None: not asked
    process_reward: str | None  # the model; None: not asked
    threshold: float
    own_negatives: bool
    max_masked_fraction: float

    @property
    def services(self) -> tuple[str, ...]:
        asked = {"step_judge": self.judge, "process_reward": self.process_reward}
        return tuple(name for name, model in asked.items() if model is not None)


def label_settings(config: Config) -> LabelSettings:
    own, services = config.bcpg, step_services(config)
    judge, limit = own.step_judge, config.reward.max_masked_fraction
    endpoint = Endpoint(url=judge.endpoint.url, max_tokens=judge.endpoint.max_tokens)
    return LabelSettings(
        own.segments,
        own.rule,
        replace(judge, endpoint=endpoint, pool=ServicePool()) if "step_judge" in services else None,
        own.process_reward.model if "process_reward" in services else None,
        own.process_reward.threshold,
        any(OWN in arm.negatives for arm in own.arms.values()),
        limit,
    )


@stage(StepLabels, label_settings, lambda settings: settings.services)
def label_steps(
    ctx: Context,
    settings: LabelSettings,
    samples: Samples,
    others: Mapping[str, Negatives],
    problems: Problems,
) -> StepLabels:
    """Labels of every wrong completion of `samples` (where the settings take those) and of `others` (source
    -> negatives). Raises UserError where there is none, and where a service fails for too many."""
    artefact = StepLabels(ctx.directory)
    negatives = {source: of_source.negatives() for source, of_source in others.items()}
    found = offline_samples(samples.rollouts(), negatives, settings.own_negatives)
    wrong = [sample for sample in found if not sample.right]
    if not wrong:
        way_out = "raise bcpg.samples_per_problem, or let the arm take negatives of other sources"
        raise UserError(f"label_steps: none of {len(found)} completions is wrong: {way_out}")
    unfinished: Unfinished[LabelledCompletion] = Unfinished(
        ctx.directory / f"labels{UNFINISHED}", LabelledCompletion, lambda row: row.completion_id
    )
    rows = label_missing(ctx, settings, wrong, unfinished, problems.checker)
    labels = [rows[sample.id] for sample in wrong]
    check_missing([row.missing for row in labels], settings.max_masked_fraction, "label_steps")
    write_jsonl(artefact.labels_file, labels)
    figures = quality(labels, settings.threshold)
    write_json(artefact.quality_file, figures)
    ctx.place.count(completions=len(labels), steps=figures["steps"])
    unfinished.drop(list(unfinished.rows))
    return artefact


def label_missing(
    ctx: Context,
    settings: LabelSettings,
    wrong: Sequence[OfflineSample],
    unfinished: Unfinished[LabelledCompletion],
    checker: Checker | None,
) -> dict[str, LabelledCompletion]:
    """The rows of all by their id: what is not in `unfinished` is asked at once, read in order, and kept
    there; but for rows that a service failed for, which are asked again after an interruption."""
    known = dict(unfinished.rows)
    split = splitter(settings.segments)
    missing = [sample for sample in wrong if sample.id not in unfinished.rows]
    chunks = [missing[first : first + _CHUNK] for first in range(0, len(missing), _CHUNK)]
    asked = []
    for chunk in chunks:
        rows = [in_steps(ctx.prompts, settings.segments, split, sample, checker) for sample in chunk]
        handles = {
            name: ctx.fleet.scorer(name).submit(
                [ITEMS[name](ctx.prompts, own, row) for own, row in zip(chunk, rows, strict=True)]
            )
            for name in settings.services
        }
        asked.append((rows, handles))
    num_chunks = -(-len(wrong) // _CHUNK)
    ctx.track.begin("label_steps", num_chunks, num_chunks - len(chunks))
    for number, (rows, handles) in enumerate(asked, start=num_chunks - len(chunks)):
        outcomes = {name: ctx.fleet.scorer(name).collect(handle) for name, handle in handles.items()}
        labelled = [
            with_labels(row, {name: of_rows[index] for name, of_rows in outcomes.items()}, settings)
            for index, row in enumerate(rows)
        ]
        known |= {row.completion_id: row for row in labelled}
        unfinished.add(row for row in labelled if not row.missing)
        steps = list(reasoning(labelled))
        metrics = {"steps": float(len(steps))}
        if steps:
            metrics["correct_share"] = sum(step.correct for step in steps) / len(steps)
        ctx.track.log(number, metrics)
    ctx.track.end()
    return known


def splitter(settings: SegmentRules) -> Splitter:
    """Raises UserError where the Segment-any-Text model cannot be used."""
    if settings.splitter is SplitterKind.sentences:
        return sentences
    from pns.data.sat import sat_splitter  # brings in torch and transformers

    return sat_splitter(settings.sat_model)


def in_steps(
    prompts: Prompts, settings: SegmentRules, split: Splitter, sample: OfflineSample, checker: Checker | None
) -> LabelledCompletion:
    """The completion's steps, with the checker's word on each where there is a checker."""
    completion, problem = sample.rollout.completion, sample.rollout.problem
    before = len(prompts.prefix)  # the text begins with it, the tokens do not
    own_text = completion.text[before:]
    offsets = token_offsets(completion.token_ids, lambda ids: prompts.decode(ids)[before:], own_text)
    segments = segment(own_text, offsets, settings.min_tokens, settings.max_tokens, split)
    checked = checker.check(problem, completion.text).steps if checker else None
    steps = []
    for number, own in enumerate(segments):
        start, end = own.start + before if number else 0, own.end + before
        exact = None if checked is None else exact_label(completion.text, start, end, checked)
        steps.append(LabelledStep(start, end, own.first_token, own.end_token, exact=exact))
    return LabelledCompletion(sample.id, problem.id, tuple(steps))


def exact_label(text: str, start: int, end: int, checked: Sequence[CheckedStep]) -> bool:
    """Whether text[start:end], but for the tags in it, is made of right steps alone."""
    inside = [step for step in checked if step.start < end and start < step.end]
    num_checked = sum(min(end, step.end) - max(start, step.start) for step in inside)
    own_text = text[start:end]
    for tag in _TAGS:
        own_text = own_text.replace(tag, "")
    return bool(inside) and all(step.right for step in inside) and num_checked == len(own_text)


def step_texts(sample: OfflineSample, row: LabelledCompletion) -> tuple[str, ...]:
    text = sample.rollout.completion.text
    return tuple(text[step.start : step.end] for step in row.steps)


# Service -> what it is asked of a completion in steps.
ITEMS: dict[str, Callable[[Prompts, OfflineSample, LabelledCompletion], Any]] = {
    "step_judge": lambda prompts, own, row: (own.rollout.problem.prompt, step_texts(own, row)),
    "process_reward": lambda prompts, own, row: (prompts.messages(own.rollout.problem), step_texts(own, row)),
}


def with_labels(
    row: LabelledCompletion, outcomes: Mapping[str, Any], settings: LabelSettings
) -> LabelledCompletion:
    """`row` with what the services say and the consensus of it. The last step holds the final answer, which
    is wrong, whatever they say."""
    missing = {name: own.cause or "unknown" for name, own in outcomes.items() if own.value is None}
    if missing:
        return replace(row, missing=missing)
    said = {name: own.value for name, own in outcomes.items()}
    steps = []
    for number, step in enumerate(row.steps):
        judge = said["step_judge"][number] if "step_judge" in said else None
        process_reward = said["process_reward"][number] if "process_reward" in said else None
        correct = consensus(judge, process_reward, settings.rule, settings.threshold)
        is_last = number == len(row.steps) - 1
        labelled = replace(step, judge=judge, process_reward=process_reward, correct=correct and not is_last)
        steps.append(labelled)
    return replace(row, steps=tuple(steps))


def reasoning(labels: Sequence[LabelledCompletion]) -> Iterator[LabelledStep]:
    """The labelled steps before the final answers."""
    return chain.from_iterable(row.steps[:-1] for row in labels if not row.missing)


def quality(labels: Sequence[LabelledCompletion], threshold: float) -> dict[str, Any]:
    """Figures of the steps before the final answers: how many, how long and how many of them are correct; how
    the two annotators agree, where both were asked; how good each and the consensus are, where a checker
    knows (`exact`); and `missing`, service -> cause -> completions."""
    steps = list(reasoning(labels))
    labelled = [row for row in labels if not row.missing]
    causes = Counter((name, cause) for row in labels for name, cause in row.missing.items())
    missing: dict[str, dict[str, int]] = {}
    for (name, cause), count in sorted(causes.items()):
        missing.setdefault(name, {})[cause] = count
    num_tokens = sum(step.end_token - step.first_token for step in steps)
    num_with_correct = sum(any(step.correct for step in row.steps) for row in labelled)
    figures: dict[str, Any] = {
        "completions": len(labels),
        "steps": len(steps),
        "steps_per_completion": len(steps) / len(labelled) if labelled else None,
        "tokens_per_step": num_tokens / len(steps) if steps else None,
        "correct_share": sum(step.correct for step in steps) / len(steps) if steps else None,
        "with_correct_step": num_with_correct / len(labelled) if labelled else None,
        "missing": missing,
    }
    annotators: dict[str, Sequence[bool | None]] = {
        "judge": [step.judge for step in steps],
        "process_reward": [says_correct(step.process_reward, threshold) for step in steps],
        "consensus": [step.correct for step in steps],
    }
    asked = {name: known for name, own in annotators.items() if (known := all_known(own)) is not None}
    if {"judge", "process_reward"} <= asked.keys():
        figures["agreement"] = agreement(asked["judge"], asked["process_reward"])
    if exact := all_known([step.exact for step in steps]):
        figures["exact"] = {name: label_quality(own, exact) for name, own in asked.items()}
        figures["exact_share"] = sum(exact) / len(exact)
    return figures


def says_correct(probability: float | None, threshold: float) -> bool | None:
    return None if probability is None else probability >= threshold


def all_known(labels: Sequence[bool | None]) -> list[bool] | None:
    """`labels` where none is missing."""
    known = [label for label in labels if label is not None]
    return known if len(known) == len(labels) else None
