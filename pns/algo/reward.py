"""The composite reward of reverse RL, and the ordinary reward of RL.

A completion meets the gates first (`reward.gates`): one that holds is its whole reward. Past them the reward
is the sum of weight times score over the terms (`reward.terms`). `KINDS` says of each kind of term what its
service is asked, or by which rule it is computed, and how its value becomes a score. A term that could not be
computed is never a number: it masks the completion, with its cause.

Values are kept as services gave them (`Reward.raw`), and a reward is composed of them once all completions of
a step are there, as some scores are of a group or of the step. So rewards can be composed anew at any time.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pns.algo.judging import expected_score, rubric_score
from pns.algo.masks import ROLLOUT, VERDICT
from pns.algo.negatives import box_only_flip, error_kind
from pns.config import (
    Config,
    Endpoint,
    Grading,
    Normalisation,
    RewardConfig,
    RewardInput,
    RewardTerm,
    ServicePool,
    TermKind,
    When,
)
from pns.records import Completion, Problem, Reward, Rollout, Verdict, to_json

# By name, in the order in which they are asked: whether one holds. `pns.recipe` knows the same names.
_GATES: dict[str, Callable[[Rollout], bool]] = {
    "malformed": lambda rollout: not rollout.reward.format_ok,
    "correct": lambda rollout: rollout.reward.verdict is Verdict.CORRECT,
    "box_only_flip": lambda rollout: _is_wrong(rollout) and _is_flip(rollout),
}
# Values of a group that differ by no more have no z-score: dividing by less would make a signal of rounding.
_MIN_SPREAD = 1e-9


def _is_wrong(rollout: Rollout) -> bool:
    return rollout.reward.format_ok and rollout.reward.verdict is Verdict.WRONG


def _is_flip(rollout: Rollout) -> bool:
    return box_only_flip(rollout.completion.text, rollout.problem.answer)


def reward_rules(config: Config) -> RewardConfig:
    """The reward as stages depend on it: without terms of weight 0, and without where terms are computed."""
    weighted = {name: term for name, term in config.reward.terms.items() if term.weight > 0}
    return replace(config.reward, terms={name: _placeless(term) for name, term in weighted.items()})


def _placeless(term: RewardTerm) -> RewardTerm:
    """`term` with the default pool: a stage counts as another one only where its rewards would be."""
    endpoint = Endpoint(url=term.endpoint.url, max_tokens=term.endpoint.max_tokens)
    return replace(term, pool=ServicePool(), endpoint=endpoint)


def sigmoid(value: float) -> float:
    """1 / (1 + exp(-value)), without overflow."""
    return float(0.5 * (1 + np.tanh(value / 2)))


def deciding_gate(rollout: Rollout, rules: RewardConfig) -> str | None:
    """The first gate of `rules` that holds: its number is the reward. None: the terms decide."""
    for name, holds in _GATES.items():
        if rules.gates.get(name) is not None and holds(rollout):
            return name
    return None


def weighted_terms(rules: RewardConfig) -> tuple[str, ...]:
    """The terms that count, in the order of the configuration. One of weight 0 is not asked for."""
    return tuple(name for name, term in rules.terms.items() if term.weight > 0)


def service_terms(rules: RewardConfig) -> tuple[str, ...]:
    """Those of them that a service computes: the roles of a stage."""
    return tuple(name for name in weighted_terms(rules) if rules.terms[name].kind in KINDS)


def needed(rollout: Rollout, rules: RewardConfig) -> tuple[str, ...]:
    """The terms that a verified completion needs for its reward: none where a gate decides alone, or where
    there is no verdict."""
    verdict = rollout.reward.verdict
    if verdict is Verdict.UNVERIFIED or deciding_gate(rollout, rules):
        return ()
    met = {When.any, When.wrong if verdict is Verdict.WRONG else When.correct}
    return tuple(name for name in weighted_terms(rules) if rules.terms[name].when in met)


# Terms that a service computes.


@dataclass(frozen=True)
class Question:
    """What a service may be asked of: a completion, and how its problem was put to the policy, in token ids
    and as a conversation."""

    prompt_ids: tuple[int, ...]
    messages: Sequence[dict[str, str]]
    problem: Problem
    completion: Completion


@dataclass(frozen=True)
class Kind:
    """How a kind of term meets its service: `item(term, question)` is what it is asked, `raw(value)` what is
    kept of the answer, in JSON's values, and `value(term, raw)` the number in it."""

    item: Callable[[RewardTerm, Question], Any]
    raw: Callable[[Any], Any]
    value: Callable[[RewardTerm, Any], float]


def reads_tokens(term: RewardTerm) -> bool:
    """Whether a reward model reads the policy's token ids; else it reads the chat, by its own tokenizer."""
    own_model = not term.model
    return term.input is RewardInput.tokens or (term.input is RewardInput.auto and own_model)


def _reward_model_item(term: RewardTerm, question: Question) -> Any:
    if reads_tokens(term):
        return (*question.prompt_ids, *question.completion.token_ids)
    answer = {"role": "assistant", "content": question.completion.text}
    return (*question.messages, answer)


def _judge_value(term: RewardTerm, judgement: Mapping[str, Any]) -> float:
    if term.grading is Grading.expected:
        return expected_score(judgement["probabilities"])
    relevance, coherence, completeness, clarity = judgement["scores"]
    return rubric_score((relevance, coherence, completeness, clarity))


KINDS: dict[TermKind, Kind] = {
    TermKind.reward_model: Kind(item=_reward_model_item, raw=float, value=lambda term, raw: raw),
    TermKind.judge: Kind(
        item=lambda term, question: (question.problem.prompt, question.completion.text),
        raw=to_json,
        value=_judge_value,
    ),
}


# Terms that are rules on the completions themselves.


def _verdicts(term: RewardTerm, rollouts: Sequence[Rollout]) -> list[float]:
    """The inverted accuracy: 1 for a wrong answer, 0 for a right one."""
    return [float(rollout.reward.verdict is Verdict.WRONG) for rollout in rollouts]


def _length_scores(term: RewardTerm, rollouts: Sequence[Rollout]) -> list[float]:
    """1 from `shortest` to `longest` tokens; below tokens / shortest, above longest / tokens."""
    scores = []
    for rollout in rollouts:
        num_tokens = len(rollout.completion.token_ids)
        too_short = num_tokens / term.shortest if term.shortest else 1.0
        too_long = term.longest / num_tokens if term.longest and num_tokens else 1.0
        scores.append(min(1.0, too_short, too_long))
    return scores


def _diversities(term: RewardTerm, rollouts: Sequence[Rollout]) -> list[float]:
    """Of a wrong completion the share of the other wrong ones whose error is another; 0 of a right one."""
    kinds = [error_kind(rollout) if _is_wrong(rollout) else None for rollout in rollouts]
    counts = Counter(kind for kind in kinds if kind is not None)
    num_others = counts.total() - 1
    return [0.0 if k is None else 1 - (counts[k] - 1) / max(num_others, 1) for k in kinds]


RULES: dict[TermKind, Callable[[RewardTerm, Sequence[Rollout]], list[float]]] = {
    TermKind.verdict: _verdicts,
    TermKind.length: _length_scores,
    TermKind.diversity: _diversities,
}


# From values to rewards.


def rewarded(rollouts: Sequence[Rollout], group_size: int, rules: RewardConfig | None) -> list[Rollout]:
    """The completions of a step, `group_size` of each problem one after the other, with their rewards, from
    what has been measured of them (`format_ok`, `verdict`, `raw`, `missing`); None: the ordinary reward."""
    if rules is None:
        return [replace(rollout, reward=correctness(rollout.reward)) for rollout in rollouts]
    names = [needed(rollout, rules) for rollout in rollouts]
    scores: list[dict[str, float]] = [{} for _ in rollouts]
    for name in weighted_terms(rules):
        rows = [row for row, own in enumerate(names) if name in own and _is_known(rollouts[row], name, rules)]
        values = _values(rules.terms[name], name, [rollouts[row] for row in rows])
        groups = [row // group_size for row in rows]
        for row, score in zip(rows, _normalised(rules.terms[name], values, groups), strict=True):
            scores[row][name] = score
    return [
        replace(rollout, reward=compose(rollout, own, rules))
        for rollout, own in zip(rollouts, scores, strict=True)
    ]


def _is_known(rollout: Rollout, name: str, rules: RewardConfig) -> bool:
    return rules.terms[name].kind in RULES or name in rollout.reward.raw


def _values(term: RewardTerm, name: str, rollouts: Sequence[Rollout]) -> list[float]:
    if term.kind in RULES:
        return RULES[term.kind](term, rollouts)
    value = KINDS[term.kind].value
    return [value(term, rollout.reward.raw[name]) for rollout in rollouts]


def _normalised(term: RewardTerm, values: Sequence[float], groups: Sequence[int]) -> list[float]:
    """Scores of values, each of which belongs to a group. z_score: over those of its group, 0 where they are
    fewer than two or do not differ."""
    normalise = term.normalise
    if normalise is Normalisation.auto:
        unbounded = term.kind is TermKind.reward_model
        normalise = Normalisation.sigmoid if unbounded else Normalisation.none
    if normalise is Normalisation.sigmoid:
        return [sigmoid(value) for value in values]
    if normalise is Normalisation.none:
        return list(values)
    members: dict[int, list[float]] = {}
    for group, value in zip(groups, values, strict=True):
        members.setdefault(group, []).append(value)
    means = {group: float(np.mean(own)) for group, own in members.items()}
    spreads = {group: float(np.std(own)) for group, own in members.items()}
    return [
        (value - means[group]) / spreads[group] if spreads[group] > _MIN_SPREAD else 0.0
        for group, value in zip(groups, values, strict=True)
    ]


def compose(rollout: Rollout, scores: Mapping[str, float], rules: RewardConfig) -> Reward:
    """The reward of one completion from the `scores` of its terms; the gates in the order of the method.

    malformed -> `gates.malformed`; correct -> `gates.correct`; unverified -> masked; a needed term missing ->
    masked; else the sum of weight * score. Without the gate on correct ones (`gates.correct=null`, the
    additive form of the ablation) those earn their terms as well.

    Raises ValueError for a score that is not finite, or that is given and also reported missing.
    """
    measured = rollout.reward
    if ROLLOUT in measured.missing:  # there is no completion to be rewarded
        return measured
    for name, score in scores.items():
        if not math.isfinite(score):
            raise ValueError(f"{name} {score} is not finite")
        if name in measured.missing:
            raise ValueError(f"{name} is {score} and also reported missing: {measured.missing[name]}")
    causes: dict[str, str] = {}
    value: float | None = None  # masked
    gate = deciding_gate(rollout, rules)
    if gate:
        value = rules.gates[gate]
    elif measured.verdict is Verdict.UNVERIFIED:  # neither correct nor wrong: no number stands for it
        causes = {VERDICT: "unverified"} | measured.missing
    else:
        names = needed(rollout, rules)
        causes = {name: measured.missing.get(name, "not computed") for name in names if name not in scores}
        if not causes:
            value = 0.0
            for name in names:  # one by one: `sum` compensates rounding, and would give other last digits
                value += rules.terms[name].weight * scores[name]
    return replace(measured, value=value, terms=dict(scores), missing=causes)


def correctness(measured: Reward) -> Reward:
    """The reward of ordinary RL (and of evaluation): 1 for a well-formed correct completion, 0 for a wrong or
    malformed one; a well-formed one that could not be verified is masked."""
    if ROLLOUT in measured.missing:
        return measured
    if measured.format_ok and measured.verdict is Verdict.UNVERIFIED:
        return replace(measured, value=None, missing={VERDICT: "unverified"} | measured.missing)
    right = measured.format_ok and measured.verdict is Verdict.CORRECT
    return replace(measured, value=float(right), missing={})
