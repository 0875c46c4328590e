"""What the stages hand to each other: frozen records, each with one JSON form.

Axes used in names throughout the project: `_P` problems, `_G` completions of one problem, `_B` rows of a
batch, `_T` tokens.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Verdict(Enum):
    """What a verifier says of a final answer. UNVERIFIED is neither correct nor wrong: it is never turned
    into a number."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNVERIFIED = "unverified"


@dataclass(frozen=True)
class AnswerRule:
    """How a benchmark wants an answer compared. `unordered`: the gold answer is a list whose order does not
    count, with or without brackets around it. `tolerance`: two numbers are the same up to this absolute
    difference (0: exactly). `unit`: what numbers without a unit are in, as the benchmark spells it ("cm",
    "%")."""

    unordered: bool = False
    tolerance: float = 0.0
    unit: str = ""


@dataclass(frozen=True)
class Problem:
    """A question with its gold answer.

    `prompt` is the plain problem text (no chat template), `answer` the gold final answer as the source spells
    it, `suite` the benchmark or suite it belongs to, `solution` a worked solution, `subject` and `level`
    (difficulty) where the source has them, `rule` how its answer is compared.
    """

    id: str
    prompt: str
    answer: str
    suite: str = ""
    solution: str | None = None
    subject: str = ""
    level: str = ""
    rule: AnswerRule = AnswerRule()  # frozen: one serves all


@dataclass(frozen=True)
class Completion:
    """One sampled completion. `token_ids` (T,) include the end token when `finish_reason` is "stop"; `text`
    is their decoding without special tokens; `log_probs` (T,) are natural-log probabilities of the sampled
    tokens at temperature 1 under the weights of `weights_version`."""

    id: str
    problem_id: str
    text: str
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish_reason: str
    weights_version: int = 0


@dataclass(frozen=True)
class Reward:
    """One completion's reward with its unweighted terms (the composite reward of reverse RL, arXiv
    2602.03516).

    `value` is None when the completion is masked: no reward, no gradient, counted. `terms` holds the score of
    every term that was computed, by name; `missing` maps each term that was needed and failed to its cause.
    `raw` is what services gave, by term: a reward model's score r; a judge's `scores` and `probabilities`.
    """

    value: float | None
    format_ok: bool
    verdict: Verdict
    terms: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)

    @property
    def masked(self) -> bool:
        return self.value is None


@dataclass(frozen=True)
class Rollout:
    """A completion with its reward: kept of every sample, so that rewards can be audited."""

    step: int
    problem: Problem
    completion: Completion
    reward: Reward


@dataclass(frozen=True)
class LabelledStep:
    """One step of a wrong completion: text[start:end], token_ids[first_token:end_token].

    `judge` and `process_reward` (a probability) are what the services say of it, None where they were not
    asked or failed; `correct` is the consensus; `exact` is the checker's word where there is one.
    """

    start: int
    end: int
    first_token: int
    end_token: int
    judge: bool | None = None
    process_reward: float | None = None
    correct: bool = False
    exact: bool | None = None


@dataclass(frozen=True)
class LabelledCompletion:
    """A wrong completion in steps, which tile it. `missing` maps each service that failed to its cause: then
    no step is labelled."""

    completion_id: str
    problem_id: str
    steps: tuple[LabelledStep, ...]
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PreferencePair:
    """chosen and rejected completions (texts without the end token) of one problem. `margin_end` is the
    number of leading characters of `rejected` that take part in the margin (None = all of it); `score_chosen`
    and `score_rejected` are raw reward-model scores."""

    problem_id: str
    prompt: str
    chosen: str
    rejected: str
    source: str = "pns"
    margin_end: int | None = None
    score_chosen: float | None = None
    score_rejected: float | None = None

    @property
    def score_gap(self) -> float | None:
        """score_chosen - score_rejected; None where one is missing."""
        if self.score_chosen is None or self.score_rejected is None:
            return None
        return self.score_chosen - self.score_rejected


@dataclass(frozen=True)
class Answered:
    """One sampled completion of an evaluation (text up to `data.stop`) and what became of it.

    `reason` says why the verdict is what it is: `equal`, `different`, `truncated`, `no_answer` or
    `prompt_too_long` (wrong), or the verifier's cause (unverified); `detail` is what the verifier says of the
    answers, in words. `thinking_cut`: its reasoning block was closed by `evaluate.thinking_budget`.
    """

    problem: Problem
    sample: int
    seed: int
    completion: str
    num_tokens: int
    finish_reason: str
    extracted: str | None
    verdict: Verdict
    reason: str
    detail: str = ""
    thinking_cut: bool = False


@dataclass(frozen=True)
class Score:
    """Accuracy in [0, 1] with a 95 % Wilson interval [low, high] over n problems."""

    accuracy: float
    low: float
    high: float
    n: int


def to_json(record: Any) -> Any:
    """The record as JSON values (dict, list, str, number, None); `from_json` is the inverse."""
    if isinstance(record, Enum):
        return record.value
    if is_record(record):
        return {name: to_json(value) for name, value in fields_of(record).items()}
    if isinstance(record, dict):
        return {key: to_json(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [to_json(value) for value in record]
    return record


def is_record(value: Any) -> bool:
    # `is_dataclass` holds for a class, too.
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def fields_of(record: Any) -> dict[str, Any]:
    """Name -> value of a record's fields, in their order."""
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def from_json(cls: type, value: dict[str, Any]) -> Any:
    """Build a record of class `cls` from `to_json`'s form. Raises TypeError for unknown or missing fields."""
    converted: dict[str, Any] = {}
    for key, item in value.items():
        if (cls, key) in _NESTED:
            item = from_json(_NESTED[cls, key], item)
        elif (cls, key) in _LISTED:
            item = tuple(from_json(_LISTED[cls, key], own) for own in item)
        elif key == "verdict":
            item = Verdict(item)
        elif isinstance(item, list):  # JSON has no tuples, and frozen records hold no lists
            item = tuple(item)
        converted[key] = item
    return cls(**converted)


_NESTED: dict[tuple[type, str], type] = {
    (Rollout, "problem"): Problem,
    (Rollout, "completion"): Completion,
    (Rollout, "reward"): Reward,
    (Problem, "rule"): AnswerRule,
    (Answered, "problem"): Problem,
}

_LISTED: dict[tuple[type, str], type] = {(LabelledCompletion, "steps"): LabelledStep}
