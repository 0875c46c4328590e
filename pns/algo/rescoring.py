"""Rewards made anew, under other rules, from what was kept of completions; and what that changes.

Axes: rows are the completions of whole steps in the order in which they were kept, those of one problem one
after the other.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np

from pns.algo.masks import ROLLOUT, VERDICT, check_failures
from pns.algo.metrics import rank_correlation
from pns.algo.reward import KINDS, needed, reads_tokens, rewarded
from pns.config import Grading, RewardConfig, RewardTerm, TermKind
from pns.records import Reward, Rollout


def source(term: RewardTerm) -> tuple[Any, ...]:
    """What decides the raw values of a term: two of one source give the same. Weight, condition,
    normalisation and grading come later, and a pool only says where it is computed."""
    is_reward_model = term.kind is TermKind.reward_model
    return term.kind, term.model, is_reward_model and reads_tokens(term), term.endpoint.url


def changed_terms(before: RewardConfig, after: RewardConfig) -> frozenset[str]:
    """The terms of `after` whose raw values are not those of the same name in `before`."""
    same = {
        name
        for name, term in after.terms.items()
        if name in before.terms and source(before.terms[name]) == source(term)
    }
    return frozenset(after.terms) - same


def measured(
    rollout: Rollout, before: RewardConfig, after: RewardConfig, ask_failed: bool = False
) -> Rollout:
    """What the rewards of `before` leave known of a completion for those of `after`: format, verdict, and of
    the terms that mean the same the values and failures (`ask_failed`: without failures)."""
    known, changed = rollout.reward, changed_terms(before, after)
    failures = {ROLLOUT, VERDICT} if ask_failed else {*known.missing} - changed
    raw = {name: value for name, value in known.raw.items() if _serves(name, value, changed, after)}
    missing = {name: cause for name, cause in known.missing.items() if name in failures}
    return replace(rollout, reward=Reward(None, known.format_ok, known.verdict, missing=missing, raw=raw))


def _serves(name: str, value: Any, changed: frozenset[str], after: RewardConfig) -> bool:
    """Whether the raw value of a term is one under `after`: an expectation needs probabilities."""
    term = after.terms.get(name, RewardTerm())
    is_expected = term.kind is TermKind.judge and term.grading is Grading.expected
    return name not in changed and not (is_expected and not value["probabilities"])


def unknown_terms(rollout: Rollout, rules: RewardConfig) -> tuple[str, ...]:
    """The terms of services that a completion needs under `rules` and that nothing is known of, neither a
    value nor why there is none."""
    known = {*rollout.reward.raw, *rollout.reward.missing}
    names = needed(rollout, rules)
    return tuple(name for name in names if rules.terms[name].kind in KINDS and name not in known)


def answered(rollout: Rollout, other: Reward, names: Sequence[str]) -> Rollout:
    """`rollout` with what `other` knows of the terms `names`."""
    reward = rollout.reward
    raw = reward.raw | {name: other.raw[name] for name in names if name in other.raw}
    missing = reward.missing | {name: other.missing[name] for name in names if name in other.missing}
    return replace(rollout, reward=replace(reward, raw=raw, missing=missing))


def by_step(rollouts: Sequence[Rollout]) -> Iterator[tuple[int, list[Rollout]]]:
    """(step, its rows), in order."""
    for step, rows in groupby(rollouts, key=lambda rollout: rollout.step):
        yield step, list(rows)


def rewarded_anew(
    rollouts: Sequence[Rollout], group_size: int, rules: RewardConfig, name: str
) -> list[Rollout]:
    """Measured rows with their rewards. Raises TooManyMaskedError, which names the stage `name`, where a term
    failed for too many of a step."""
    rows: list[Rollout] = []
    for step, measured_rows in by_step(rollouts):
        own = rewarded(measured_rows, group_size, rules)
        rewards = [rollout.reward for rollout in own]
        check_failures(rewards, rules.max_masked_fraction, f"{name}, step {step}")
        rows += own
    return rows


# What it changes.


@dataclass(frozen=True)
class Change:
    """A figure under the rules of the run and under others; None: of no row."""

    before: float | None
    after: float | None


@dataclass(frozen=True)
class AdvantageChange:
    """Counts of rows: `changed_sign` is of `num_both`, whose advantage is not 0 before and after."""

    num_both: int
    changed_sign: int
    became_zero: int
    became_nonzero: int


@dataclass(frozen=True)
class Comparison:
    """`asked`: rows of which each service was asked; `terms`: the mean score of each term over the rows that
    have it; `rank_correlation`: Spearman's, of the rewards of the `num_rewarded_in_both` rows that are masked
    neither before nor after; `advantages` None: of a stage that trains on none."""

    num_rollouts: int
    asked: Mapping[str, int]
    masked: Change
    reward: Change
    terms: Mapping[str, Change]
    num_rewarded_in_both: int
    rank_correlation: float | None
    advantages: AdvantageChange | None


def compare(
    before: Sequence[Rollout],
    after: Sequence[Rollout],
    asked: Mapping[str, int],
    advantages: Callable[[Sequence[Rollout]], list[float]] | None,
) -> Comparison:
    """`after` are the rows of `before` with other rewards; `advantages` gives those of one step's rows."""
    sides = before, after
    values = [[row.reward.value for row in rows] for rows in sides]
    pairs = [(b, a) for b, a in zip(*values, strict=True) if b is not None and a is not None]
    names = dict.fromkeys(name for rows in sides for row in rows for name in row.reward.terms)
    scores = {
        name: [[row.reward.terms[name] for row in rows if name in row.reward.terms] for rows in sides]
        for name in names
    }
    return Comparison(
        num_rollouts=len(before),
        asked=dict(asked),
        masked=Change(*(float(sum(value is None for value in own)) for own in values)),
        reward=Change(*(_mean([value for value in own if value is not None]) for own in values)),
        terms={name: Change(*map(_mean, own)) for name, own in scores.items()},
        num_rewarded_in_both=len(pairs),
        rank_correlation=rank_correlation([b for b, _ in pairs], [a for _, a in pairs]),
        advantages=None if advantages is None else compare_advantages(before, after, advantages),
    )


def compare_advantages(
    before: Sequence[Rollout],
    after: Sequence[Rollout],
    advantages: Callable[[Sequence[Rollout]], list[float]],
) -> AdvantageChange:
    sides = [[a for _, rows in by_step(side) for a in advantages(rows)] for side in (before, after)]
    old, new = np.asarray(sides[0]), np.asarray(sides[1])
    return AdvantageChange(
        num_both=int(((old != 0) & (new != 0)).sum()),
        changed_sign=int((old * new < 0).sum()),
        became_zero=int(((old != 0) & (new == 0)).sum()),
        became_nonzero=int(((old == 0) & (new != 0)).sum()),
    )


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
