"""Sampling and scoring of completions: rollout streams into the verifier, the reward model and the judge
while others still decode."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np

from pns.algo import reward
from pns.algo.formatting import check_format
from pns.records import Completion, Problem, Rollout, Verdict
from pns.stages.context import Context
from workers.rollout.pool import Request, Sampling


class RewardKind(Enum):
    COMPOSITE = "composite"
    CORRECTNESS = "correctness"


def stable_seed(*parts: object) -> int:
    """A 31-bit seed from any printable parts, the same on every machine."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "big") >> 1


def sample(
    ctx: Context,
    problems_P: Sequence[Problem],
    num_completions: int,
    temperature: float,
    seed_parts: Sequence[object],
    top_p: float = 1.0,
) -> Iterator[list[tuple[int, Problem, Completion]]]:
    """Yield chunks of (row, problem, completion) as they finish; row = index of the problem * num_completions
    + index of the completion.

    Every completion has its own seed, from the run's seed, `seed_parts`, the problem and the row."""
    sampling = Sampling(temperature, top_p, ctx.config.rollout.max_new_tokens)
    requests = []
    for p, problem in enumerate(problems_P):
        prompt_ids = ctx.prompts.encode(problem)
        for g in range(num_completions):
            requests.append(
                Request(
                    str(p * num_completions + g),
                    prompt_ids,
                    stable_seed(ctx.config.seed, *seed_parts, problem.id, p, g),
                )
            )
    for chunk in ctx.fleet.rollout.stream(requests, sampling):
        found = []
        for item in chunk:
            row = int(item.id)
            problem = problems_P[row // num_completions]
            text = ctx.prompts.decode(item.token_ids)
            completion = Completion(
                f"{problem.id}#{row}",
                problem.id,
                text,
                item.token_ids,
                item.log_probs,
                item.finish_reason,
                item.weights_version,
            )
            found.append((row, problem, completion))
        yield found


@dataclass
class Scored:
    """A completion on its way through the gates."""

    problem: Problem
    completion: Completion
    format_ok: bool
    verdict: Verdict = Verdict.UNVERIFIED
    plausibility: float | None = None
    coherence: float | None = None
    missing: dict[str, str] = field(default_factory=dict)


class Scorer:
    """Takes finished completions while others decode, and gives every one its terms.

    The kind of reward decides what is asked for. "composite" (reverse RL): the verdict of well-formed
    completions, reward model and judge for the wrong ones (for correct ones too unless `config.gated`).
    "correctness" (ordinary RL): the verdict of well-formed completions.
    """

    def __init__(self, ctx: Context, kind: RewardKind) -> None:
        self._fleet, self._prompts, self._config, self._kind = ctx.fleet, ctx.prompts, ctx.config.reward, kind
        self._scored: dict[int, Scored] = {}
        self._verifying: list[tuple[list[int], Any]] = []
        self._modelling: list[tuple[list[int], Any, Any]] = []

    def submit(self, chunk: Sequence[tuple[int, Problem, Completion]]) -> None:
        """Begin scoring a chunk of (row, problem, completion)."""
        rows, items = [], []
        for row, problem, completion in chunk:
            ok = check_format(completion.text, completion.finish_reason).ok
            self._scored[row] = Scored(problem, completion, ok)
            if ok:
                rows.append(row)
                items.append((problem.answer, completion.text, problem.rule))
        if rows:
            self._verifying.append((rows, self._fleet.verifier.submit(items)))
        self._advance(wait=False)

    def finish(self) -> dict[int, Scored]:
        """Wait for every term (at most `deadline_seconds`) and return the scored completions by row."""
        self._advance(wait=True)
        deadline = self._config.deadline_seconds
        for rows, reward_model_handle, judge_handle in self._modelling:
            scores = self._fleet.reward_model.collect(reward_model_handle, deadline)
            grades = self._fleet.judge.collect(judge_handle, deadline)
            for row, score, grade in zip(rows, scores, grades, strict=True):
                scored = self._scored[row]
                if score.value is None:
                    scored.missing[reward.PLAUSIBILITY] = score.cause or "unknown"
                else:
                    scored.plausibility = sigmoid(score.value)
                if grade.value is None:
                    scored.missing[reward.COHERENCE] = grade.cause or "unknown"
                else:
                    scored.coherence = sum(grade.value) / 12
        return self._scored

    def _advance(self, wait: bool) -> None:
        waiting = []
        for rows, handle in self._verifying:
            if not (wait or self._fleet.verifier.done(handle)):
                waiting.append((rows, handle))
                continue
            asked = []
            for row, result in zip(rows, self._fleet.verifier.collect(handle), strict=True):
                scored = self._scored[row]
                scored.verdict = result.verdict
                if result.verdict is Verdict.UNVERIFIED:
                    scored.missing[reward.VERDICT] = result.cause or "unknown"
                if result.verdict is Verdict.WRONG or (
                    result.verdict is Verdict.CORRECT and not self._config.gated
                ):
                    asked.append(row)
            if self._kind is RewardKind.COMPOSITE and asked:
                self._ask_models(asked)
        self._verifying = waiting

    def _ask_models(self, rows: list[int]) -> None:
        scored = [self._scored[row] for row in rows]
        sequences = [self._prompts.encode(s.problem) + s.completion.token_ids for s in scored]
        graded = [(s.problem.prompt, s.completion.text) for s in scored]
        self._modelling.append(
            (rows, self._fleet.reward_model.submit(sequences), self._fleet.judge.submit(graded))
        )


def sigmoid(value: float) -> float:
    """1 / (1 + exp(-value)), without overflow."""
    return float(0.5 * (1 + np.tanh(value / 2)))


def roll_out(
    ctx: Context,
    problems_P: Sequence[Problem],
    num_completions: int,
    temperature: float,
    kind: RewardKind,
    name: str,
    step: int = 0,
    top_p: float = 1.0,
) -> list[Rollout]:
    """Sample and score `num_completions` completions of every problem; rows in order, problem by problem.

    The seeds depend on `name` and `step`. A completion that lacks a term it needs is masked (`reward.value`
    None) with the cause.
    """
    scorer = Scorer(ctx, kind)
    for chunk in sample(ctx, problems_P, num_completions, temperature, (name, step), top_p):
        scorer.submit(chunk)
    scored = scorer.finish()
    rollouts = []
    for row in range(len(problems_P) * num_completions):
        s = scored[row]
        if kind is RewardKind.COMPOSITE:
            value = reward.compose(
                s.format_ok, s.verdict, s.plausibility, s.coherence, s.missing, ctx.config.reward
            )
        else:
            value = reward.correctness(s.format_ok, s.verdict, s.missing)
        rollouts.append(Rollout(step, s.problem, s.completion, value))
    return rollouts


def by_verdict(rollouts: Sequence[Rollout], verdict: Verdict) -> list[Rollout]:
    """The well-formed rollouts of that verdict."""
    return [r for r in rollouts if r.reward.format_ok and r.reward.verdict is verdict]
