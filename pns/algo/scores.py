"""Statistics of an evaluation: figures of models on suites, and paired differences between models."""

from collections.abc import Mapping, Sequence
from math import fsum  # sums that do not depend on the order
from typing import Any

from pns.algo.metrics import (
    Difference,
    effective_problems,
    holm,
    majority,
    mean_score,
    paired_difference,
    pass_at_k,
    score_of_shares,
)
from pns.answers.compare import same_answer
from pns.answers.extract import boxed_span
from pns.answers.qwen_harness import counts_as_right
from pns.config import Decoding, described_decoding
from pns.records import Answered, AnswerRule, Score, Verdict, to_json

COUNTED = ("truncated", "no_answer", "prompt_too_long", "unverified")  # reasons, then a verdict
BOXED_TRUNCATED = "boxed_truncated"  # of the truncated: a whole box stands before the cut
THINKING_CUT = "thinking_cut"  # completions whose reasoning block `evaluate.thinking_budget` closed
MAX_TRUNCATED = 0.05  # share of completions above which a suite's figures carry a warning
MEAN = "mean"  # beside the suites' names

Figures = dict[str, Any]
SuiteScores = dict[str, dict[str, Figures]]  # suite (and "mean") -> model -> figures
# Model -> suite -> share of right samples of each problem, in order.
Accuracies = Mapping[str, Mapping[str, Sequence[float]]]


def summarise(
    answered: Mapping[str, Sequence[Answered]], decodings: Mapping[str, Decoding], seed: int
) -> SuiteScores:
    """Figures per suite and model, and under "mean" their unweighted mean over suites.

    `accuracy` (pass@1: the mean over problems of the share of right samples) with its 95 % interval [`low`,
    `high`] (`score_of_shares`), `qwen_accuracy` (as `pns.answers.qwen_harness` counts), counts of completions
    (`boxed_truncated` are among the truncated; `thinking_cut` where there was a thinking budget) and a
    `warning` where many were cut off, how they were decoded; with several samples `effective_n` (problems),
    `pass_at` and `majority_at`; `by_subject` and `by_level` where the problems have them; `against` earlier
    models: `described`.
    """
    scores: SuiteScores = {suite: {} for suite in [*decodings, MEAN]}
    accuracies: dict[str, dict[str, list[float]]] = {}
    for name, rows in answered.items():
        accuracies[name] = {}
        for suite, decoding in decodings.items():
            own = [row for row in rows if row.problem.suite == suite]
            figures = suite_figures(own) | described_decoding(decoding) | {"seed": seed}
            scores[suite][name] = figures | truncation_warning(figures)
            if decoding.thinking_budget:
                scores[suite][name][THINKING_CUT] = sum(row.thinking_cut for row in own)
            accuracies[name][suite] = list(right_shares(own).values())
        of_suites = [scores[suite][name] for suite in decodings]
        mean = mean_score([Score(f["accuracy"], f["low"], f["high"], f["n"]) for f in of_suites])
        totals = {
            what: sum(f[what] for f in of_suites) for what in ("completions", *COUNTED, BOXED_TRUNCATED)
        }
        scores[MEAN][name] = to_json(mean) | totals
        for earlier in list(accuracies)[:-1]:
            add_difference(scores, accuracies, earlier, name)
    return scores


def truncation_warning(figures: Figures) -> Figures:
    """`warning` where more than MAX_TRUNCATED of a suite's completions were cut off; else nothing."""
    share = figures["truncated"] / figures["completions"]
    if share <= MAX_TRUNCATED:
        return {}
    boxed = f"{figures[BOXED_TRUNCATED]} of {figures['truncated']} had an answer in a box"
    cut = f"{100 * share:.1f} % of completions were cut off at {figures['max_new_tokens']} tokens ({boxed})"
    return {"warning": f"{cut}: raise evaluate.max_new_tokens"}


def add_difference(scores: SuiteScores, accuracies: Accuracies, earlier: str, name: str) -> None:
    """Add to the figures of `name` its difference from `earlier` on the same problems in the same order."""
    suites = [suite for suite in scores if suite != MEAN]
    differences = {}
    for suite in scores:
        compared = suites if suite == MEAN else [suite]
        before = [accuracies[earlier][own] for own in compared]
        after = [accuracies[name][own] for own in compared]
        differences[suite] = paired_difference(before, after)
    for suite, figures in described(differences).items():
        scores[suite][name].setdefault("against", {})[earlier] = figures


def described(differences: Mapping[str, Difference]) -> dict[str, Figures]:
    """The figures of one model's differences from another, by suite, with `p_corrected` and the `verdict`
    that rests on it. The suites are so many chances to find something: their p-values are corrected
    (`holm`). The mean over them is one test of its own."""
    suites = [suite for suite in differences if suite != MEAN]
    corrected = dict(zip(suites, holm([differences[suite].p_value for suite in suites]), strict=True))
    found = {}
    for suite, difference in differences.items():
        p_value = corrected.get(suite, difference.p_value)
        found[suite] = vars(difference) | {"p_corrected": p_value, "verdict": difference.verdict(p_value)}
    return found


def suite_figures(rows: Sequence[Answered]) -> Figures:
    """The figures of one model on one suite."""
    by_problem = grouped_by_problem(rows)
    shares = right_shares(rows)
    unverified = [row.problem.id for row in rows if row.verdict is Verdict.UNVERIFIED]
    num_samples = len(rows) // len(by_problem)
    in_order = list(shares.values())
    figures: Figures = to_json(score_of_shares(in_order, num_samples)) | {"completions": len(rows)}
    for reason in COUNTED[:-1]:
        figures[reason] = sum(row.reason == reason for row in rows)
    cut = [row for row in rows if row.reason == "truncated"]
    figures[BOXED_TRUNCATED] = sum(boxed_span(row.completion) is not None for row in cut)
    figures["unverified"] = len(unverified)
    figures["unverified_problems"] = list(dict.fromkeys(unverified))
    published = [counts_as_right(row.problem.answer, row.completion) for row in rows]
    figures["qwen_accuracy"] = sum(published) / len(rows)
    figures["mean_tokens"] = sum(row.num_tokens for row in rows) / len(rows)
    if num_samples > 1:
        figures["effective_n"] = effective_problems(in_order, num_samples)
        figures |= figures_of_samples(list(by_problem.values()), num_samples)
    for what in ("subject", "level"):
        groups: dict[str, list[float]] = {}
        for identity, own in by_problem.items():
            if group := getattr(own[0].problem, what):
                groups.setdefault(group, []).append(shares[identity])
        if groups:
            figures[f"by_{what}"] = {
                group: to_json(score_of_shares(groups[group], num_samples)) for group in sorted(groups)
            }
    return figures


def figures_of_samples(problems: Sequence[Sequence[Answered]], num_samples: int) -> Figures:
    """pass@k for powers of two up to the number of samples, and the accuracy of the majority's answer."""
    right = [[row.verdict is Verdict.CORRECT for row in rows] for rows in problems]
    counts = [sum(own) for own in right]
    ks = sorted({2**i for i in range(num_samples.bit_length())} | {num_samples})
    pass_at = {str(k): fsum(pass_at_k(num_samples, count, k) for count in counts) / len(counts) for k in ks}
    votes = [majority(answer_classes(rows), own) for rows, own in zip(problems, right, strict=True)]
    return {"pass_at": pass_at, "majority_at": {str(num_samples): fsum(votes) / len(votes)}}


def answer_classes(rows: Sequence[Answered]) -> list[int | None]:
    """The answers of one problem's samples as numbers, equal ones the same; None without one. Right answers
    are equal to each other; of others only those that `same_answer` finds equal."""
    rule = rows[0].problem.rule
    representatives: list[tuple[bool, str]] = []
    classes: list[int | None] = []
    for row in rows:
        if row.extracted is None or row.reason == "truncated":
            classes.append(None)
            continue
        own = (row.verdict is Verdict.CORRECT, row.extracted)
        equal = (i for i, other in enumerate(representatives) if _same_class(own, other, rule))
        number = next(equal, len(representatives))
        if number == len(representatives):
            representatives.append(own)
        classes.append(number)
    return classes


def _same_class(own: tuple[bool, str], other: tuple[bool, str], rule: AnswerRule) -> bool:
    if own[0] or other[0]:
        return own[0] and other[0]
    return own[1] == other[1] or same_answer(own[1], other[1], rule) is True


def grouped_by_problem(rows: Sequence[Answered]) -> dict[str, list[Answered]]:
    groups: dict[str, list[Answered]] = {}
    for row in rows:
        groups.setdefault(row.problem.id, []).append(row)
    return groups


def right_shares(rows: Sequence[Answered]) -> dict[str, float]:
    """Problem id -> share of its samples that are right, in order."""
    shares = {}
    for identity, own in grouped_by_problem(rows).items():
        shares[identity] = sum(row.verdict is Verdict.CORRECT for row in own) / len(own)
    return shares


def final_verdict(
    verdict: Verdict, cause: str | None, extracted: str | None, finish_reason: str
) -> tuple[Verdict, str]:
    """The verdict that counts, and its reason, from the verifier's."""
    if finish_reason == "length":
        return Verdict.WRONG, "truncated"
    if finish_reason != "stop":  # the engine failed: that is no answer of the model's
        return Verdict.UNVERIFIED, finish_reason or "no_finish_reason"
    if extracted is None:
        return Verdict.WRONG, "no_answer"
    if verdict is Verdict.UNVERIFIED:
        return verdict, cause or "unknown"
    return verdict, "equal" if verdict is Verdict.CORRECT else "different"
