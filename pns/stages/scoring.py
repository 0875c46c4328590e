"""Rewards while others still decode: format, verdict, then the terms that the verdict asks for."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pns.algo.formatting import check_format
from pns.algo.reward import KINDS, VERDICT, compose, correctness, needed
from pns.config import Config, Pool, RewardConfig, TermKind
from pns.records import Completion, Problem, Rollout, Verdict
from pns.run.place import UNFINISHED
from pns.stages.context import Context
from pns.stages.stream import Ask, Unfinished, stable_seed, stream
from workers.rollout.engine import Sample, Sampling


def reward_rules(config: Config) -> RewardConfig:
    """The reward as stages depend on it: without terms of weight 0, and without where terms are computed."""
    weighted = {name: term for name, term in config.reward.terms.items() if term.weight > 0}
    # Every pool the default one: a stage counts as another only where its rewards would be.
    terms = {name: replace(term, pool=Pool()) for name, term in weighted.items()}
    return replace(config.reward, terms=terms)


@dataclass
class _UnderWay:
    """A completion on its way through the gates."""

    ask: Ask
    completion: Completion
    format_ok: bool
    verdict: Verdict = Verdict.UNVERIFIED
    terms: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # verdict or term -> cause
    open_terms: int = 0


class RewardScorer:
    """Gives every completion its reward: the composite one of `rules`, or (None) that of ordinary RL."""

    def __init__(self, ctx: Context, rules: RewardConfig | None, step: int) -> None:
        self._fleet, self._prompts, self._rules, self._step = ctx.fleet, ctx.prompts, rules, step
        self._under_way: dict[str, _UnderWay] = {}
        self._verifying: list[tuple[list[str], Any]] = []
        self._computing: list[tuple[str, list[str], Any]] = []  # term, keys, handle
        self._whole: list[tuple[str, Rollout]] = []

    def submit(self, samples: Sequence[tuple[Ask, Sample]]) -> None:
        keys, answers = [], []
        for ask, sample in samples:
            text = self._prompts.decode(sample.token_ids)
            own_id, problem_id = f"{ask.problem.id}#{ask.sample}", ask.problem.id
            drawn = sample.token_ids, sample.log_probs, sample.finish_reason, sample.weights_version
            completion = Completion(own_id, problem_id, text, *drawn)
            format_ok = check_format(text, sample.finish_reason).ok
            self._under_way[ask.key] = _UnderWay(ask, completion, format_ok)
            if format_ok:
                keys.append(ask.key)
                answers.append((ask.problem.answer, text, ask.problem.rule))
            else:
                self._settle(ask.key)
        if keys:
            self._verifying.append((keys, self._fleet.verifier.submit(answers)))

    def finished(self, wait: bool) -> list[tuple[str, Rollout]]:
        self._collect_verdicts(wait)
        self._collect_terms(wait)
        whole, self._whole = self._whole, []
        return whole

    def _collect_verdicts(self, wait: bool) -> None:
        still_verifying = []
        for keys, handle in self._verifying:
            if wait or self._fleet.verifier.done(handle):
                self._take_verdicts(keys, self._fleet.verifier.collect(handle))
            else:
                still_verifying.append((keys, handle))
        self._verifying = still_verifying

    def _take_verdicts(self, keys: list[str], results: Sequence[Any]) -> None:
        asked: dict[str, list[str]] = {}
        for key, result in zip(keys, results, strict=True):
            scored = self._under_way[key]
            scored.verdict = result.verdict
            if result.verdict is Verdict.UNVERIFIED:
                scored.missing[VERDICT] = result.cause or "unknown"
            names = needed(True, result.verdict, self._rules) if self._rules else ()
            scored.open_terms = len(names)
            for name in names:
                asked.setdefault(name, []).append(key)
            if not names:
                self._settle(key)
        for name, term_keys in asked.items():
            self._computing.append((name, term_keys, self._ask_term(name, term_keys)))

    def _ask_term(self, name: str, keys: list[str]) -> Any:
        assert self._rules is not None
        kind = KINDS[self._rules.terms[name].kind]
        questions = []
        for key in keys:
            scored = self._under_way[key]
            problem = scored.ask.problem
            questions.append(kind.item(self._prompts.encode(problem), problem, scored.completion))
        return self._fleet.scorer(name).submit(questions)

    def _collect_terms(self, wait: bool) -> None:
        # One limit for everything that is still open, not one for each chunk and service.
        end = time.monotonic() + self._rules.deadline_seconds if self._rules else 0.0
        still_computing = []
        for name, keys, handle in self._computing:
            pool = self._fleet.scorer(name)
            if wait or pool.done(handle):
                outcomes = pool.collect(handle, max(0.0, end - time.monotonic()))
                self._take_term(name, keys, outcomes)
            else:
                still_computing.append((name, keys, handle))
        self._computing = still_computing

    def _take_term(self, name: str, keys: list[str], outcomes: Sequence[Any]) -> None:
        assert self._rules is not None
        kind = KINDS[self._rules.terms[name].kind]
        for key, outcome in zip(keys, outcomes, strict=True):
            scored = self._under_way[key]
            if outcome.value is None:
                scored.missing[name] = outcome.cause or "unknown"
            else:
                scored.terms[name] = kind.score(outcome.value)
            scored.open_terms -= 1
            if not scored.open_terms:
                self._settle(key)

    def _settle(self, key: str) -> None:
        scored = self._under_way.pop(key)
        if self._rules is None:
            reward = correctness(scored.format_ok, scored.verdict, scored.missing)
        else:
            reward = compose(scored.format_ok, scored.verdict, scored.terms, scored.missing, self._rules)
        self._whole.append((key, Rollout(self._step, scored.ask.problem, scored.completion, reward)))


def rollout_key(rollout: Rollout) -> str:
    return f"{rollout.step}/{rollout.completion.id}"


def unfinished_rollouts(ctx: Context, name: str = "rollouts") -> Unfinished[Rollout]:
    """Rollouts that have been sampled and scored, and not yet written to the stage's own file `name`."""
    return Unfinished(ctx.directory / f"{name}{UNFINISHED}", Rollout, rollout_key)


@dataclass(frozen=True)
class Draws:
    """How many completions are drawn of every problem and how, and what rewards them: the composite reward of
    `rules`, or (None) the ordinary one. Seeds depend on `name`."""

    name: str
    num_completions: int
    sampling: Sampling
    rules: RewardConfig | None = None


def roll_out(
    ctx: Context,
    draws: Draws,
    problems_P: Sequence[Problem],
    unfinished: Unfinished[Rollout] | None = None,
    step: int = 0,
    model: str | None = None,
) -> list[Rollout]:
    """Sample and score; rows in order, problem by problem. A completion that lacks a term it needs is masked
    (`reward.value` None) with the cause. `unfinished` (None: the stage's own), `model`: see `stream`."""
    asks = []
    for p, problem in enumerate(problems_P):
        for g in range(draws.num_completions):
            # The row's number, not g: one problem may be drawn twice in a step.
            row = p * draws.num_completions + g
            seed = stable_seed(ctx.seed, draws.name, step, problem.id, p, g)
            asks.append(Ask(f"{step}/{problem.id}#{row}", problem, row, seed, draws.sampling))
    scorer, rows = RewardScorer(ctx, draws.rules, step), unfinished or unfinished_rollouts(ctx)
    return stream(ctx, asks, scorer, rows, lambda rollout: not rollout.reward.masked, model)


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
