"""Statistics of an evaluation: figures of models on suites, and paired differences between models."""

from collections.abc import Mapping, Sequence
from math import fsum  # sums that do not depend on the order
from typing import Any

from pns.algo.metrics import majority, mean_score, paired_difference, pass_at_k, score
from pns.answers.compare import same_answer
from pns.answers.extract import boxed_span
from pns.config import Decoding, described_decoding
from pns.records import Answered, AnswerRule, Score, Verdict, to_json

COUNTED = ("truncated", "no_answer", "prompt_too_long", "unverified")  # reasons, then a verdict
BOXED_TRUNCATED = "boxed_truncated"  # of the truncated: a whole box stands before the cut
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
    `high`] (Wilson over the n problems, which is on the safe side with several samples), counts of
    completions (`boxed_truncated` are among the truncated) and a `warning` where many were cut off, how they
    were decoded; with several samples `pass_at` and `majority_at`; `by_subject` and
    `by_level` where the problems have them; `against` earlier models: `Difference` and verdict.
    """
    scores: SuiteScores = {suite: {} for suite in [*decodings, MEAN]}
    accuracies: dict[str, dict[str, list[float]]] = {}
    for name, rows in answered.items():
        accuracies[name] = {}
        for suite, decoding in decodings.items():
            own = [row for row in rows if row.problem.suite == suite]
            figures = suite_figures(own) | described_decoding(decoding) | {"seed": seed}
            scores[suite][name] = figures | truncation_warning(figures)
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
    for suite in scores:
        compared = suites if suite == MEAN else [suite]
        before = [accuracies[earlier][own] for own in compared]
        after = [accuracies[name][own] for own in compared]
        difference = paired_difference(before, after)
        against = scores[suite][name].setdefault("against", {})
        against[earlier] = vars(difference) | {"verdict": difference.verdict}


def suite_figures(rows: Sequence[Answered]) -> Figures:
    """The figures of one model on one suite."""
    by_problem = grouped_by_problem(rows)
    shares = right_shares(rows)
    unverified = [row.problem.id for row in rows if row.verdict is Verdict.UNVERIFIED]
    figures: Figures = to_json(score(fsum(shares.values()), len(shares))) | {"completions": len(rows)}
    for reason in COUNTED[:-1]:
        figures[reason] = sum(row.reason == reason for row in rows)
    cut = [row for row in rows if row.reason == "truncated"]
    figures[BOXED_TRUNCATED] = sum(boxed_span(row.completion) is not None for row in cut)
    figures["unverified"] = len(unverified)
    figures["unverified_problems"] = list(dict.fromkeys(unverified))
    figures["mean_tokens"] = sum(row.num_tokens for row in rows) / len(rows)
    num_samples = len(rows) // len(by_problem)
    if num_samples > 1:
        figures |= figures_of_samples(list(by_problem.values()), num_samples)
    for what in ("subject", "level"):
        groups: dict[str, list[float]] = {}
        for identity, own in by_problem.items():
            if group := getattr(own[0].problem, what):
                groups.setdefault(group, []).append(shares[identity])
        if groups:
            figures[f"by_{what}"] = {
                group: to_json(score(fsum(groups[group]), len(groups[group]))) for group in sorted(groups)
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
