"""Which sampled completions may serve as negatives, and how a generator of negatives degenerates."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from pns.answers.compare import exact_value, normalise_answer, same_answer
from pns.answers.extract import boxed_span, extract_boxed
from pns.records import Rollout, Verdict

REASONS = (
    "malformed",
    "correct",
    "unverified",
    "verifiers_disagree",
    "second_verifier_undecided",
    "box_only_flip",
    "duplicate",
    "no_plausibility",
    "implausible",
)
_NUMBER = re.compile(
    r"(?:(?<![\w)}\]])-)?(?:\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(?:\.\d+)?(?:/\d+)?%?|-?\\[dt]?frac\s*\{[^{}]+\}\s*\{[^{}]+\}"
)
_MAX_CHARACTERS = 300  # of the right side of an equation that is read as an answer
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")


def box_only_flip(text: str, gold: str, think_tags: tuple[str, str] = ("<think>", "</think>")) -> bool:
    """Whether the reasoning ends in the gold answer while the box states another: a negative whose reasoning
    is right.

    A heuristic on text: the reasoning is what stands before the closing tag (without one, before the box); it
    ends in the gold answer if its last number, the right side of its last equation, its last box or, for a
    gold answer in words, its last word equals it.
    """
    span = boxed_span(text)
    if span is None or same_answer(gold, text[slice(*span)]) is True:
        return False
    opening, closing = think_tags
    reasoning = text.partition(closing)[0] if closing in text else text[: text.rindex("\\", 0, span[0])]
    reasoning = reasoning.rpartition(opening)[2]
    stated = [extract_boxed(reasoning, think_tags) or ""]
    if "=" in reasoning:
        stated.append(
            re.split(
                r"[.,;!?]?(?:\s*\$|\s*\\[\])]|\n|\.\s|\.$)",
                reasoning.rpartition("=")[2][:_MAX_CHARACTERS].strip().lstrip("$ "),
            )[0]
        )
    if numbers := _NUMBER.findall(reasoning):
        stated.append(numbers[-1])
    if exact_value(gold) is None and (words := _WORD.findall(reasoning)):
        stated.append(words[-1])
    return any(same_answer(gold, answer) is True for answer in stated)


def filter_negatives(
    rollouts: Sequence[Rollout],
    min_plausibility_quantile: float = 0.0,
    drop_box_only_flips: bool = True,
    think_tags: tuple[str, str] = ("<think>", "</think>"),
) -> tuple[list[Rollout], dict[str, int]]:
    """The completions that are safe to use as negatives, in order, and how many were dropped for each of
    `REASONS`.

    Kept are well-formed completions that the first verifier (`reward.verdict`) calls wrong and the second
    (`same_answer`) calls different: a doubtful one is dropped. Then box-only flips, repeated texts of a
    problem (up to white space) and, where `min_plausibility_quantile` in [0, 1] is above 0, those whose
    plausibility is unknown or below that quantile of the rest's. The counts and the number kept add up to the
    number of rollouts.
    """
    counts = dict.fromkeys(REASONS, 0)
    kept: list[Rollout] = []
    seen: set[tuple[str, str]] = set()
    for rollout in rollouts:
        text, gold = rollout.completion.text, rollout.problem.answer
        spelling = (rollout.problem.id, " ".join(text.split()))
        reason = _verdict_reason(rollout, think_tags)
        if not reason and drop_box_only_flips and box_only_flip(text, gold, think_tags):
            reason = "box_only_flip"
        if not reason and spelling in seen:
            reason = "duplicate"
        if reason:
            counts[reason] += 1
        else:
            seen.add(spelling)
            kept.append(rollout)
    if min_plausibility_quantile > 0:
        known = [rollout for rollout in kept if rollout.reward.plausibility is not None]
        counts["no_plausibility"] = len(kept) - len(known)
        plausibilities = np.array([rollout.reward.plausibility for rollout in known], dtype=np.float64)
        threshold = np.quantile(plausibilities, min_plausibility_quantile) if known else 0.0
        kept = [
            rollout
            for rollout, plausibility in zip(known, plausibilities, strict=True)
            if plausibility >= threshold
        ]
        counts["implausible"] = len(known) - len(kept)
    return kept, counts


def _verdict_reason(rollout: Rollout, think_tags: tuple[str, str]) -> str:
    if not rollout.reward.format_ok:
        return "malformed"
    if rollout.reward.verdict is not Verdict.WRONG:
        return rollout.reward.verdict.value
    answer = extract_boxed(rollout.completion.text, think_tags)
    same = same_answer(rollout.problem.answer, answer) if answer else None
    if same is False:
        return ""
    return "verifiers_disagree" if same else "second_verifier_undecided"


def degeneration(
    rollouts: Sequence[Rollout], think_tags: tuple[str, str] = ("<think>", "</think>"), distinct_n: int = 4
) -> dict[str, float]:
    """What a generator turns into, over one step's completions. A figure with nothing to average is left out;
    no completions: {}.

    Over all completions, in [0, 1]: `format_rate` (well-formed), `wrong_rate` (well-formed and verified
    wrong), `correct_rate` (well-formed and verified correct), `masked_rate`; `length_mean` and `length_max`
    in tokens; `distinct_<n>` (different token n-grams over all n-grams, arXiv 1510.03055; low: the
    completions repeat each other). Over wrong well-formed completions, in [0, 1]: `box_only_flip_rate`;
    `top_offset_share` (share of the most frequent difference between stated and gold number, or of the most
    frequent answer where either is not a number; near 1: mode collapse); `reward_model_mean` (plausibility)
    and `judge_mean` (coherence), each over those that have the term.
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
        flips = sum(
            box_only_flip(rollout.completion.text, rollout.problem.answer, think_tags) for rollout in wrong
        )
        offsets = Counter(_offset(rollout, think_tags) for rollout in wrong)
        figures["box_only_flip_rate"] = flips / len(wrong)
        figures["top_offset_share"] = offsets.most_common(1)[0][1] / len(wrong)
    for name, terms in (
        ("reward_model_mean", [rollout.reward.plausibility for rollout in wrong]),
        ("judge_mean", [rollout.reward.coherence for rollout in wrong]),
    ):
        known = [term for term in terms if term is not None]
        if known:
            figures[name] = sum(known) / len(known)
    return figures


def distinct_ngrams(sequences: Sequence[Sequence[int]], n: int) -> float | None:
    """Different n-grams over all n-grams of `sequences`, in (0, 1]; None where every sequence is shorter than
    n."""
    ngrams = Counter(
        tuple(sequence[start : start + n]) for sequence in sequences for start in range(len(sequence) - n + 1)
    )
    return len(ngrams) / ngrams.total() if ngrams else None


def _offset(rollout: Rollout, think_tags: tuple[str, str]) -> str:
    answer = extract_boxed(rollout.completion.text, think_tags) or ""
    stated, gold = exact_value(answer), exact_value(rollout.problem.answer)
    if stated is None or gold is None:
        return "answer " + normalise_answer(answer)
    return f"{stated - gold}"
