"""The composite reward of reverse RL, the ordinary reward of RL, and the accounting of masked completions.

The terms of the composite reward are data (`reward.terms`): a name, a weight and a kind. `KINDS` says of each
kind what its service is asked and how its answer becomes a score. A term that could not be computed is never
a number: it masks the completion, with its cause.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pns.algo import judging
from pns.config import RewardConfig, TermKind
from pns.errors import UserError
from pns.records import Completion, Problem, Reward, Verdict

# In `Reward.missing`, beside the names of terms.
VERDICT = "verdict"
ROLLOUT = "rollout"  # the engine failed: there is no completion


class TooManyMaskedError(UserError):
    """A term failed for more than `reward.max_masked_fraction` of the completions that it was asked for."""


@dataclass(frozen=True)
class Kind:
    """How a kind of term meets its service: `item(prompt_ids, problem, completion)` is what it is asked,
    `score(value)` makes its answer a number in [0, 1]."""

    item: Callable[[Sequence[int], Problem, Completion], Any]
    score: Callable[[Any], float]


def sigmoid(value: float) -> float:
    """1 / (1 + exp(-value)), without overflow."""
    return float(0.5 * (1 + np.tanh(value / 2)))


KINDS: dict[TermKind, Kind] = {
    TermKind.reward_model: Kind(
        item=lambda prompt_ids, problem, completion: (*prompt_ids, *completion.token_ids), score=sigmoid
    ),
    TermKind.judge: Kind(
        item=lambda prompt_ids, problem, completion: (problem.prompt, completion.text),
        score=lambda judgement: judging.rubric_score(judgement.scores),
    ),
}


def weighted_terms(rules: RewardConfig) -> tuple[str, ...]:
    """The terms that count, in the order of the configuration. One of weight 0 is not asked for."""
    return tuple(name for name, term in rules.terms.items() if term.weight > 0)


def needed(format_ok: bool, verdict: Verdict, rules: RewardConfig) -> tuple[str, ...]:
    """The terms that a completion of this verdict needs for its reward. None where a gate decides alone
    (malformed; correct and `rules.gated`) or where there is no verdict."""
    gated = verdict is Verdict.CORRECT and rules.gated
    if not format_ok or gated or verdict is Verdict.UNVERIFIED:
        return ()
    return weighted_terms(rules)


def compose(
    format_ok: bool,
    verdict: Verdict,
    terms: Mapping[str, float],
    missing: Mapping[str, str],
    rules: RewardConfig,
) -> Reward:
    """The reward of one of the generator's completions; its gates in the order of the method.

    `terms` are the unweighted terms that were computed, in [0, 1]; `missing` maps what could not be computed
    (a term or `VERDICT`) to its cause.

    gated (default): malformed -> `rules.malformed`; correct -> `rules.correct`; unverified -> masked; a
    needed term missing -> masked; wrong -> w_wrong + sum of w_i * term_i. additive (`gated: false`, the
    ablation): without the gate on correct, w_wrong * [wrong] + sum of w_i * term_i, so that a correct
    completion earns the terms as well.

    Raises ValueError for a term outside its range (or NaN), or given and also reported missing.
    """
    for name, term in terms.items():
        if not 0.0 <= term <= 1.0:
            raise ValueError(f"{name} {term} is outside [0, 1]")
        if name in missing:
            raise ValueError(f"{name} is {term} and also reported missing: {missing[name]}")
    causes: dict[str, str] = {}
    value: float | None = None  # masked
    names = needed(format_ok, verdict, rules)
    if not format_ok:
        value = rules.malformed
    elif verdict is Verdict.CORRECT and rules.gated:
        value = rules.correct
    elif verdict is Verdict.UNVERIFIED:  # neither correct nor wrong: no number stands for it
        causes = {VERDICT: missing.get(VERDICT, "unverified")}
    else:
        causes = {name: missing.get(name, "not computed") for name in names if name not in terms}
        if not causes:
            # Added one by one: `sum` compensates rounding, and would give other last digits.
            value = rules.wrong * float(verdict is Verdict.WRONG)
            for name in names:
                value += rules.terms[name].weight * terms[name]
    return Reward(value, format_ok, verdict, dict(terms), causes)


def correctness(format_ok: bool, verdict: Verdict, missing: Mapping[str, str] | None = None) -> Reward:
    """The reward of ordinary RL (and of evaluation): 1 for a well-formed correct completion, 0 for a wrong or
    malformed one; a well-formed one that could not be verified is masked."""
    if format_ok and verdict is Verdict.UNVERIFIED:
        cause = (missing or {}).get(VERDICT, "unverified")
        return Reward(None, format_ok, verdict, missing={VERDICT: cause})
    return Reward(float(format_ok and verdict is Verdict.CORRECT), format_ok, verdict)


def mask_report(rewards: Sequence[Reward]) -> dict[str, dict[str, int]]:
    """How many masked completions each term's failure caused: {term: {cause: count}}, most frequent cause
    first. A completion that lacks two terms counts under both."""
    counts: dict[str, Counter[str]] = {}
    for reward in rewards:
        if reward.masked:
            for term, cause in reward.missing.items():
                counts.setdefault(term, Counter())[cause] += 1
    return {term: dict(counts[term].most_common()) for term in sorted(counts)}


def check_failures(rewards: Sequence[Reward], max_fraction: float, where: str) -> None:
    """Raise TooManyMaskedError if a term, the verifier or the rollout engine failed for more than
    `max_fraction` of the completions of `rewards` that it was asked for; `where` names stage and step.

    The share is of what was asked, not of all: a judge that always fails would else go unnoticed in a step
    whose completions are mostly right. A single failure stops nothing, however few were asked.
    """
    asked: Counter[str] = Counter()
    causes: dict[str, Counter[str]] = {}
    for reward in rewards:
        asked[ROLLOUT] += 1
        asked[VERDICT] += reward.format_ok
        asked.update({*reward.terms, *reward.missing} - {ROLLOUT, VERDICT})
        for name, cause in reward.missing.items():
            causes.setdefault(name, Counter())[cause] += 1
    for name, counts in causes.items():
        num_failed = counts.total()
        if num_failed > 1 and num_failed > max_fraction * asked[name]:
            listed = ", ".join(f"{count} x {cause}" for cause, count in counts.most_common())
            raise TooManyMaskedError(
                f"{where}: {name} failed for {num_failed} of the {asked[name]} completions that it was asked "
                f"for ({num_failed / asked[name]:.0%}; reward.max_masked_fraction allows "
                f"{max_fraction:.0%}): {listed}"
            )
