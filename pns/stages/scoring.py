"""Completions are measured while others still decode: format, verdict, then the terms that it asks for."""

import functools
import math
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pns.algo.formatting import check_format
from pns.algo.masks import ROLLOUT, VERDICT, check_failures
from pns.algo.reward import KINDS, Question, needed, rewarded, service_terms
from pns.config import RewardConfig, TermKind
from pns.records import Completion, Problem, Reward, Rollout, Verdict
from pns.run.place import UNFINISHED
from pns.stages.context import Context
from pns.stages.stream import Ask, Unfinished, stable_seed, stream
from workers.rollout.engine import Sample, Sampling

_SAY_SECONDS = 30.0  # of waiting for a reward, before it is said what for


@dataclass
class _UnderWay:
    """A completion on its way: its rollout as far as it is measured, and what each service is asked of it."""

    rollout: Rollout
    questions: dict[str, Any] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)  # term -> what its service gave
    missing: dict[str, str] = field(default_factory=dict)  # verdict or term -> cause
    num_open_terms: int = 0


class RewardScorer:
    """Measures every completion: format, verdict, and what the services of `rules` that it needs say of it
    (None: the ordinary reward, which asks none). `pns.algo.reward.rewarded` makes the rewards of it.

    Each goes on by itself: a verdict asks the services at once, whatever the other completions wait for. The
    verdicts and scores arrive in threads of the verifier and the pools.
    """

    def __init__(self, ctx: Context, rules: RewardConfig | None, step: int) -> None:
        self._fleet, self._prompts, self._rules, self._step = ctx.fleet, ctx.prompts, rules, step
        self._prompt_ids: dict[str, tuple[int, ...]] = {}
        self._changed = threading.Condition(threading.RLock())
        self._under_way: dict[str, _UnderWay] = {}
        self._whole: list[tuple[str, Rollout]] = []
        self._failure: Exception | None = None

    def submit(self, samples: Sequence[tuple[Ask, Sample]]) -> None:
        for ask, sample in samples:
            failure = sample_failure(sample)
            text = self._prompts.decode(sample.token_ids)
            own_id, problem_id = f"{ask.problem.id}#{ask.sample}", ask.problem.id
            log_probs = () if failure else sample.log_probs
            drawn = sample.token_ids, log_probs, sample.finish_reason, sample.weights_version
            completion = Completion(own_id, problem_id, text, *drawn)
            if failure:
                measured = Reward(None, False, Verdict.UNVERIFIED, missing={ROLLOUT: failure})
                with self._changed:
                    self._whole.append((ask.key, Rollout(self._step, ask.problem, completion, measured)))
                continue
            format_ok = check_format(text, sample.finish_reason, self._prompts.reasoning_block).ok
            rollout = Rollout(
                self._step, ask.problem, completion, Reward(None, format_ok, Verdict.UNVERIFIED)
            )
            with self._changed:
                self._under_way[ask.key] = _UnderWay(rollout, self._questions(ask.problem, completion))
            if format_ok:
                [verdict] = self._fleet.verifier.submit([(ask.problem.answer, text, ask.problem.rule)])
                verdict.add_done_callback(functools.partial(self._arrived, self._take_verdict, ask.key))
            else:
                self._settle(ask.key)

    def finished(self, wait: bool) -> list[tuple[str, Rollout]]:
        with self._changed:
            while wait and self._under_way and not self._whole and not self._failure:
                if not self._changed.wait(_SAY_SECONDS):
                    print(self._awaited(), file=sys.stderr, flush=True)
            if self._failure:
                raise self._failure
            whole, self._whole = self._whole, []
            return whole

    def _questions(self, problem: Problem, completion: Completion) -> dict[str, Any]:
        """What each term's service may be asked. Made here, in one thread: tokenizers are not for several."""
        if self._rules is None:
            return {}
        if problem.id not in self._prompt_ids:
            self._prompt_ids[problem.id] = self._prompts.encode(problem)
        messages = self._prompts.messages(problem)
        question = Question(self._prompt_ids[problem.id], messages, problem, completion)
        terms = {name: self._rules.terms[name] for name in service_terms(self._rules)}
        return {name: KINDS[term.kind].item(term, question) for name, term in terms.items()}

    def _arrived(self, take: Callable[..., None], key: str, *arguments: Any) -> None:
        """Take in what a future gives, the last of `arguments`; a failure is raised by `finished`."""
        *names, future = arguments
        with self._changed:
            try:
                take(key, *names, future.result())
            except Exception as error:  # in a thread of the verifier or a pool, where it would be lost
                self._failure = self._failure or error
            self._changed.notify_all()

    def _take_verdict(self, key: str, result: Any) -> None:
        scored = self._under_way[key]
        reward = replace(scored.rollout.reward, verdict=result.verdict)
        scored.rollout = replace(scored.rollout, reward=reward)
        if result.verdict is Verdict.UNVERIFIED:
            scored.missing[VERDICT] = result.cause or "unknown"
        names = [name for name in self._needed(scored.rollout) if name in scored.questions]
        scored.num_open_terms = len(names)
        for name in names:
            [score] = self._fleet.scorer(name).submit([scored.questions[name]])
            score.add_done_callback(functools.partial(self._arrived, self._take_term, key, name))
        if not names:
            self._settle(key)

    def _needed(self, rollout: Rollout) -> tuple[str, ...]:
        return needed(rollout, self._rules) if self._rules else ()

    def _take_term(self, key: str, name: str, outcome: Any) -> None:
        assert self._rules is not None
        scored = self._under_way[key]
        if outcome.value is None:
            scored.missing[name] = outcome.cause or "unknown"
        else:
            scored.raw[name] = KINDS[self._rules.terms[name].kind].raw(outcome.value)
        scored.num_open_terms -= 1
        if not scored.num_open_terms:
            self._settle(key)

    def _settle(self, key: str) -> None:
        with self._changed:
            scored = self._under_way.pop(key)
            # In the order of the configuration, not of arrival: the kept rows are the same to the byte.
            raw = {name: scored.raw[name] for name in scored.questions if name in scored.raw}
            measured = replace(scored.rollout.reward, missing=scored.missing, raw=raw)
            self._whole.append((key, replace(scored.rollout, reward=measured)))

    def _awaited(self) -> str:
        open_terms: Counter[str] = Counter()
        for scored in self._under_way.values():
            still_open = set(scored.questions) - set(scored.raw) - set(scored.missing)
            open_terms.update(still_open if scored.num_open_terms else [VERDICT])
        counts = ", ".join(f"{count} of {name}" for name, count in open_terms.most_common())
        return f"waiting for rewards of {len(self._under_way)} completions: {counts}"


def sample_failure(sample: Sample) -> str:
    """Why a sample is the engine's failure, and not a completion; empty where it is one."""
    if sample.finish_reason not in ("stop", "length"):
        return sample.finish_reason or "no_finish_reason"
    return "" if all(map(math.isfinite, sample.log_probs)) else "log_probs_not_finite"


def rollout_key(rollout: Rollout) -> str:
    return f"{rollout.step}/{rollout.completion.id}"


def unfinished_rollouts(ctx: Context, name: str = "rollouts") -> Unfinished[Rollout]:
    """Rollouts that have been sampled and scored, and not yet written to the stage's own file `name`."""
    return Unfinished(ctx.directory / f"{name}{UNFINISHED}", Rollout, rollout_key)


@dataclass(frozen=True)
class Draws:
    """How many completions are drawn of every problem and how, and what rewards them: the composite reward of
    `rules`, or (None) the ordinary one. Seeds depend on `name`. `max_masked_fraction`: see
    `pns.algo.reward.check_failures`."""

    name: str
    num_completions: int
    sampling: Sampling
    max_masked_fraction: float
    rules: RewardConfig | None = None


def roll_out(
    ctx: Context,
    draws: Draws,
    problems_P: Sequence[Problem],
    unfinished: Unfinished[Rollout] | None = None,
    step: int = 0,
    model: str | None = None,
    first_problem: int = 0,
) -> list[Rollout]:
    """Sample and reward; rows in order, problem by problem from number `first_problem` on. A completion that
    lacks a term it needs is masked (`reward.value` None) with the cause. `unfinished` (None: the stage's own;
    its rows are measured, not yet rewarded), `model`: see `stream`. Raises TooManyMaskedError where a term
    failed for too many; the others are kept."""
    asks = []
    for p, problem in enumerate(problems_P, first_problem):
        for g in range(draws.num_completions):
            # The row's number, not g: one problem may be drawn twice in a step.
            row = p * draws.num_completions + g
            seed = stable_seed(ctx.seed, draws.name, step, problem.id, p, g)
            asks.append(Ask(f"{step}/{problem.id}#{row}", problem, row, seed, draws.sampling))
    scorer, rows = RewardScorer(ctx, draws.rules, step), unfinished or unfinished_rollouts(ctx)
    measured = stream(ctx, asks, scorer, rows, lambda rollout: not rollout.reward.missing, model)
    rollouts = rewarded(measured, draws.num_completions, draws.rules)
    rewards = [rollout.reward for rollout in rollouts]
    check_failures(rewards, draws.max_masked_fraction, f"{draws.name}, step {step}")
    return rollouts


def load_terms(ctx: Context, rules: RewardConfig, own_reward_model: str) -> None:
    """Give the services of `rules` their models: the run's own reward model to those that name no other."""
    for name, term in rules.terms.items():
        if term.kind is TermKind.reward_model and not term.model:
            ctx.fleet.scorer(name).load(own_reward_model)


def by_verdict(rollouts: Sequence[Rollout], verdict: Verdict) -> list[Rollout]:
    """The well-formed rollouts of that verdict."""
    return [r for r in rollouts if r.reward.format_ok and r.reward.verdict is verdict]


def by_problem(rollouts: Sequence[Rollout]) -> dict[str, list[Completion]]:
    """Problem id -> its completions, in order."""
    grouped: dict[str, list[Completion]] = {}
    for rollout in rollouts:
        grouped.setdefault(rollout.problem.id, []).append(rollout.completion)
    return grouped
