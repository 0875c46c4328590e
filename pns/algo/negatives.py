"""Which sampled completions may serve as negatives, and how a generator of negatives degenerates."""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import chain, zip_longest

import numpy as np

from pns.algo.formatting import THINK_TAGS
from pns.answers.compare import exact_value, normalise_answer, same_answer
from pns.answers.extract import boxed_span, extract_boxed
from pns.records import Rollout, Verdict

# As they are looked at: what the two verifiers say, then the text, then quantile and log-probability.
_OF_VERDICTS = ("malformed", "correct", "unverified", "verifiers_disagree", "second_verifier_undecided")
_OF_TERMS = ("no_quantile_term", "below_quantile", "log_prob_out_of_range")
REASONS = (*_OF_VERDICTS, "box_only_flip", "duplicate", *_OF_TERMS)
# 1,234.5, 3/4, 12% or \frac{a}{b}; a minus behind a word, a digit or a bracket subtracts.
_NUMBER = re.compile(
    r"(?:(?<![\w)}\]])-)?(?:\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(?:\.\d+)?(?:/\d+)?%?"
    r"|-?\\[dt]?frac\s*\{[^{}]+\}\s*\{[^{}]+\}"
)
_UP_TO_DIGIT = re.compile(r".*\d", re.DOTALL)
# A full stop with a digit behind it is a decimal point.
_END_OF_EQUATION = re.compile(r"[.,;!?]?(?:\s*\$|\s*\\[\])]|\n|\.\s|\.$)")
_MAX_CHARACTERS = 300  # of the right side of an equation that is read as an answer
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")


def box_only_flip(text: str, gold: str) -> bool:
    """Whether the reasoning ends in the gold answer while the box states another: its reasoning is right.

    A heuristic on text: the reasoning is what stands before the closing tag (without one, before the box); it
    ends in the gold answer if its last number, the right side of its last equation, its last box or, for a
    gold answer in words, its last word equals it.
    """
    span = boxed_span(text)
    if span is None or same_answer(gold, text[slice(*span)]) is True:
        return False
    opening, closing = THINK_TAGS
    reasoning = text.partition(closing)[0] if closing in text else text[: text.rindex("\\", 0, span[0])]
    reasoning = reasoning.rpartition(opening)[2]
    stated = [extract_boxed(reasoning) or ""]
    if "=" in reasoning:
        right_side = reasoning.rpartition("=")[2][:_MAX_CHARACTERS].strip().lstrip("$ ")
        stated.append(_END_OF_EQUATION.split(right_side)[0])
    stated += _last_number(reasoning)
    if exact_value(gold) is None and (words := _WORD.findall(reasoning)):
        stated.append(words[-1])
    return any(same_answer(gold, answer) is True for answer in stated)


def _last_number(text: str) -> list[str]:
    """The last number of `text`; empty where there is none."""
    if "frac" not in text:  # no other number holds white space: from the last word with a digit on is enough
        up_to_digit = _UP_TO_DIGIT.match(text)
        if up_to_digit is None:
            return []
        text = up_to_digit[0].rsplit(maxsplit=1)[-1] + text[up_to_digit.end() :]
    return _NUMBER.findall(text)[-1:]


def filter_negatives(
    rollouts: Sequence[Rollout],
    min_quantile: float = 0.0,
    quantile_term: str = "plausibility",
    drop_box_only_flips: bool = True,
) -> tuple[list[Rollout], dict[str, int]]:
    """The completions that are safe as negatives, in order, and how many were dropped for each of `REASONS`.

    Kept are well-formed completions that the first verifier (`reward.verdict`) calls wrong and the second
    (`same_answer`) calls different: a doubtful one is dropped. Then box-only flips, repeated texts of a
    problem (up to white space) and, where `min_quantile` in [0, 1] is above 0, those whose reward term
    `quantile_term` is unknown or below that quantile of the rest's.
    """
    counts = dict.fromkeys(REASONS, 0)
    kept: list[Rollout] = []
    seen: set[tuple[str, str]] = set()
    for rollout in rollouts:
        text, gold = rollout.completion.text, rollout.problem.answer
        spelling = (rollout.problem.id, _spelling(rollout))
        reason = _verdict_reason(rollout)
        if not reason and drop_box_only_flips and box_only_flip(text, gold):
            reason = "box_only_flip"
        if not reason and spelling in seen:
            reason = "duplicate"
        if reason:
            counts[reason] += 1
        else:
            # Only what is kept counts as seen: a copy of a dropped text has that text's own reason.
            seen.add(spelling)
            kept.append(rollout)
    if min_quantile > 0:
        # Last, so that the quantile is one of completions that could be used.
        known = [rollout for rollout in kept if quantile_term in rollout.reward.terms]
        counts["no_quantile_term"] = len(kept) - len(known)
        scores = np.array([rollout.reward.terms[quantile_term] for rollout in known], dtype=np.float64)
        threshold = np.quantile(scores, min_quantile) if known else 0.0
        kept = [rollout for rollout, score in zip(known, scores, strict=True) if score >= threshold]
        counts["below_quantile"] = len(known) - len(kept)
    return kept, counts


def in_log_prob_range(
    log_probs_B: Sequence[float], min_log_prob: float | None, max_log_prob: float | None
) -> list[bool]:
    """Which mean log-probabilities per token are within the bounds, ends included (None: no bound); NaN is in
    no range."""
    low = -math.inf if min_log_prob is None else min_log_prob
    high = math.inf if max_log_prob is None else max_log_prob
    return [low <= log_prob <= high for log_prob in log_probs_B]


def mix_negatives(parts: Mapping[str, Sequence[Rollout]]) -> tuple[list[tuple[str, Rollout]], dict[str, int]]:
    """The union of several sources of negatives as (source, negative), and how many were dropped because
    another source has the same text of the problem (up to white space), by source.

    Problem by problem, in the order in which they first come; the sources of a problem take turns, and at
    every next problem another one begins, so that whoever takes the first few takes of all sources.
    """
    names = list(parts)
    queues: dict[str, dict[str, list[Rollout]]] = {}  # problem -> source -> its negatives
    for name, rollouts in parts.items():
        for rollout in rollouts:
            own = queues.setdefault(rollout.problem.id, {part: [] for part in names})
            own[name].append(rollout)
    mixed: list[tuple[str, Rollout]] = []
    num_dropped = dict.fromkeys(names, 0)
    for number, by_source in enumerate(queues.values()):
        first = number % len(names)
        in_turn = [*names[first:], *names[:first]]
        seen: set[str] = set()
        for turn in zip_longest(*(by_source[name] for name in in_turn)):
            for name, rollout in zip(in_turn, turn, strict=True):
                if rollout is None:  # this source has no more
                    continue
                spelling = _spelling(rollout)
                if spelling in seen:
                    num_dropped[name] += 1
                else:
                    seen.add(spelling)
                    mixed.append((name, rollout))
    return mixed, num_dropped


def _spelling(rollout: Rollout) -> str:
    return " ".join(rollout.completion.text.split())


def _verdict_reason(rollout: Rollout) -> str:
    if not rollout.reward.format_ok:
        return "malformed"
    if rollout.reward.verdict is not Verdict.WRONG:
        return rollout.reward.verdict.value
    answer = extract_boxed(rollout.completion.text)
    same = same_answer(rollout.problem.answer, answer) if answer else None
    if same is False:
        return ""
    return "verifiers_disagree" if same else "second_verifier_undecided"


def degeneration(
    rollouts: Sequence[Rollout], averaged: Collection[str], distinct_n: int = 4
) -> dict[str, float]:
    """What a generator turns into, over one step's completions. A figure of nothing is left out.

    Over all completions, in [0, 1]: `format_rate` (well-formed), `wrong_rate` (well-formed and verified
    wrong), `correct_rate` (well-formed and verified correct), `masked_rate`; `length_mean` and `length_max`
    in tokens; `distinct_<n>` (different token n-grams over all n-grams, arXiv 1510.03055; low: the
    completions repeat each other). Over wrong well-formed completions, in [0, 1]: `box_only_flip_rate`;
    `top_offset_share` (share of the most frequent difference between stated and gold number, or of the most
    frequent answer where either is not a number; near 1: mode collapse); `<term>_mean` of each reward term
    of `averaged`, over those that have it.
    """
    if not rollouts:
        return {}
    formed = [rollout for rollout in rollouts if rollout.reward.format_ok]
    wrong = [rollout for rollout in formed if rollout.reward.verdict is Verdict.WRONG]
    lengths = [len(rollout.completion.token_ids) for rollout in rollouts]
    num = len(rollouts)
    figures = {
        "format_rate": len(formed) / num,
        "wrong_rate": len(wrong) / num,
        "correct_rate": sum(rollout.reward.verdict is Verdict.CORRECT for rollout in formed) / num,
        "masked_rate": sum(rollout.reward.masked for rollout in rollouts) / num,
        "length_mean": sum(lengths) / num,
        "length_max": float(max(lengths)),
    }
    distinct = distinct_ngrams([rollout.completion.token_ids for rollout in rollouts], distinct_n)
    if distinct is not None:
        figures[f"distinct_{distinct_n}"] = distinct
    if wrong:
        flips = sum(box_only_flip(rollout.completion.text, rollout.problem.answer) for rollout in wrong)
        offsets = Counter(map(error_kind, wrong))
        figures["box_only_flip_rate"] = flips / len(wrong)
        figures["top_offset_share"] = offsets.most_common(1)[0][1] / len(wrong)
    for term in averaged:
        scores = [rollout.reward.terms[term] for rollout in wrong if term in rollout.reward.terms]
        if scores:
            figures[f"{term}_mean"] = sum(scores) / len(scores)
    return figures


def distinct_ngrams(sequences: Sequence[Sequence[int]], n: int) -> float | None:
    """Different n-grams over all n-grams of `sequences`, in (0, 1]; None where there is none."""
    lengths = [len(sequence) for sequence in sequences]
    if max(lengths, default=0) < n:
        return None
    tokens = np.fromiter(chain.from_iterable(sequences), np.uint64, sum(lengths))
    num_windows = len(tokens) - n + 1
    # A hash of 64 bits: that two of ten million different n-grams have the same has a chance of 1e-5.
    factors = np.random.default_rng(0).integers(2**64, size=n, dtype=np.uint64) | np.uint64(1)
    hashes = np.zeros(num_windows, np.uint64)
    for place, factor in enumerate(factors):
        hashes += tokens[place : place + num_windows] * factor
    ends = np.repeat(np.cumsum(lengths), lengths)  # of each token's sequence
    is_whole = np.arange(num_windows) + n <= ends[:num_windows]
    ngrams = np.sort(hashes[is_whole])
    return (1 + np.count_nonzero(np.diff(ngrams))) / len(ngrams)


def error_kind(rollout: Rollout) -> str:
    answer = extract_boxed(rollout.completion.text) or ""
    stated, gold = exact_value(answer), exact_value(rollout.problem.answer)
    # Exact values: 0.1 + 0.2 and 0.3 are one offset.
    if stated is None or gold is None:
        return "answer " + normalise_answer(answer)
    return f"{stated - gold}"
