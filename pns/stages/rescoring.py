"""Services asked again, of completions that a stage has kept: what other rules of the reward need and nobody
has measured."""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from pns.algo.rescoring import answered, by_step, rewarded_anew, unknown_terms
from pns.algo.reward import KINDS, Question
from pns.config import Config, RewardConfig, TermKind
from pns.data.prompts import Prompts
from pns.records import Reward, Rollout, Verdict
from pns.stages.scoring import rollout_key
from pns.stages.stream import Unfinished
from workers.cluster import Cluster
from workers.fleet import Fleet
from workers.runtime import runtime_of

_PROGRESS_SECONDS = 15.0
_PART_ROWS = 1000  # that are asked at once: enough for every replica, and few where a service fails for all

Arrived = SimpleQueue[tuple[str, str, Future[Any]]]


class Scorer(Protocol):
    """What a pool of `workers.rewards.service` offers."""

    def submit(self, items: Sequence[Any]) -> list[Future[Any]]: ...


@contextmanager
def services(
    config: Config, names: Collection[str], own_reward_model: str, directory: Path
) -> Iterator[Fleet]:
    """The services of the terms `names` alone, with their models, for the run in `directory`. Raises
    UserError where they cannot be placed."""
    with ExitStack() as stack:
        device = stack.enter_context(Cluster(config, names))
        fleet = Fleet(config, runtime_of(config, device, directory))
        stack.callback(fleet.shutdown)  # before `start`, which may fail half-way
        fleet.start(names)
        for name in names:
            term = config.reward.terms[name]
            if term.kind is TermKind.reward_model and not term.model:
                fleet.scorer(name).load(own_reward_model)
        yield fleet


class Rescorer:
    """Asks `scorer(name)` for what completions lack under `rules`, a few steps at a time.

    A row is in the file `unfinished` as soon as all that it was asked for is there; a row of that file is not
    asked again. `note` takes lines of progress.
    """

    def __init__(
        self,
        rules: RewardConfig,
        prompts: Prompts,
        scorer: Callable[[str], Scorer],
        unfinished: Path,
        note: Callable[[str], None],
    ) -> None:
        self._rules, self._prompts, self._scorer, self._note = rules, prompts, scorer, note
        self._unfinished: Unfinished[Rollout] = Unfinished(unfinished, Rollout, rollout_key)
        self._prompt_ids: dict[str, tuple[int, ...]] = {}
        self._num_asked = self._num_answered = 0
        self._shown = time.monotonic()

    def answer(self, rollouts: Sequence[Rollout], group_size: int, stage: str) -> list[Rollout]:
        """Measured rows with what they lacked. Raises TooManyMaskedError as soon as the steps that have been
        asked show that a service fails for too many."""
        self._num_asked = sum(bool(unknown_terms(rollout, self._rules)) for rollout in rollouts)
        whole: list[Rollout] = []
        part: list[Rollout] = []
        for _, rows in by_step(rollouts):
            part += rows
            if sum(bool(unknown_terms(rollout, self._rules)) for rollout in part) >= _PART_ROWS:
                whole, part = whole + self._answer_part(part, group_size, stage), []
        return whole + self._answer_part(part, group_size, stage)

    def _answer_part(self, rollouts: Sequence[Rollout], group_size: int, stage: str) -> list[Rollout]:
        rows = {rollout_key(rollout): self._with_kept(rollout) for rollout in rollouts}
        asked = {key: unknown_terms(rollout, self._rules) for key, rollout in rows.items()}
        num_open = Counter({key: len(names) for key, names in asked.items()})
        arrived: Arrived = SimpleQueue()
        for key, names in asked.items():
            for name in names:
                self._submit(name, key, rows[key], arrived)
        for _ in range(num_open.total()):
            key, name, future = arrived.get()
            rows[key] = answered(rows[key], self._outcome(name, future), [name])
            num_open[key] -= 1
            if not num_open[key]:
                self._take(rows[key], asked[key])
        rewarded_anew(list(rows.values()), group_size, self._rules, stage)  # raises: stop here
        return list(rows.values())

    def _with_kept(self, rollout: Rollout) -> Rollout:
        """`rollout` with the answers that an interruption left."""
        names, kept = unknown_terms(rollout, self._rules), self._unfinished.rows.get(rollout_key(rollout))
        if not names or kept is None or kept.completion != rollout.completion:
            return rollout
        self._num_answered += 1
        return answered(rollout, kept.reward, names)

    def _submit(self, name: str, key: str, rollout: Rollout, arrived: Arrived) -> None:
        problem = rollout.problem
        if problem.id not in self._prompt_ids:
            self._prompt_ids[problem.id] = self._prompts.encode(problem)
        prompt_ids, messages = self._prompt_ids[problem.id], self._prompts.messages(problem)
        question = Question(prompt_ids, messages, problem, rollout.completion)
        term = self._rules.terms[name]
        [future] = self._scorer(name).submit([KINDS[term.kind].item(term, question)])
        # In a thread of the pool: all else is done in this one.
        future.add_done_callback(lambda done: arrived.put((key, name, done)))

    def _outcome(self, name: str, future: Future[Any]) -> Reward:
        outcome, kind = future.result(), KINDS[self._rules.terms[name].kind]
        raw = {} if outcome.value is None else {name: kind.raw(outcome.value)}
        missing = {name: outcome.cause or "unknown"} if outcome.value is None else {}
        return Reward(None, True, Verdict.UNVERIFIED, raw=raw, missing=missing)

    def _take(self, rollout: Rollout, asked: Sequence[str]) -> None:
        """Put a whole row on disk, unless something failed: that is asked again after an interruption."""
        if not rollout.reward.missing.keys() & set(asked):
            self._unfinished.add([rollout])
        self._num_answered += 1
        is_last = self._num_answered == self._num_asked
        if is_last or time.monotonic() - self._shown >= _PROGRESS_SECONDS:
            self._shown = time.monotonic()
            self._note(f"{self._num_answered}/{self._num_asked} completions answered")
