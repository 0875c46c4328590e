"""The step judge as a service: of each step of a completion whether it is correct, all in one verdict.

A prompt is read once, and a step costs a forward pass of the few tokens of its number. Prompt and verdict
must fit the model's context: beyond the text, a step takes about fifteen tokens for the line before it and
four in the verdict, so that 300 steps of 30 tokens need about 15,000.

The tiny world's judge, too small to check a step at a glance, first writes a solution of its own, once a
problem, and notes each step's result and its own before the grade.
"""

import functools
from collections.abc import Sequence

from pns.algo.judging import Template
from pns.algo.step_judging import (
    NUM_NOTED,
    VERDICTS,
    StepsAsked,
    parse_steps,
    render_steps,
    render_tiny,
    render_tiny_problem,
    step_nonce,
    verdict_parts,
)
from pns.config import RewardConfig, ServicePool
from pns.errors import UserError
from workers.rewards.service import Outcome, ScoringPool
from workers.rewards.verdict_model import CHARACTERS_PER_TOKEN, VerdictModel
from workers.runtime import Runtime

_TOKENS_OF_A_LINE = 20  # before a step, and of its grade
_SOLUTION_TOKENS = 96  # of the tiny judge's own solution, at most

StepLabels = tuple[bool, ...]


class StepJudge(VerdictModel):
    """A language model that grades steps; what it raises is said in `VerdictModel`."""

    def __init__(self, model_path: str, runtime: Runtime, seed: int = 0, forward_tokens: int = 0) -> None:
        super().__init__("step judge", model_path, runtime, seed, forward_tokens, VERDICTS)
        self._solved = functools.lru_cache(maxsize=4096)(self._solve)  # completions of a problem share it
        self._num_noted = NUM_NOTED[self._template]
        self._digits_V = self._tokens("0123456789")
        begun, grades = self._encode("1="), self._grades_V.tolist()
        if self._template is Template.TEXT and any(
            self._tokenizer.decode([*begun, grade]) != f"1={text}"
            for grade, text in zip(grades, VERDICTS[self._template], strict=True)
        ):
            said = f"write {' or '.join(VERDICTS[self._template])} as one token after another character"
            raise UserError(f"step judge {model_path} does not {said}: name another model")

    def score(self, items_B: Sequence[StepsAsked]) -> list[Outcome[StepLabels]]:
        """Of each step of (problem text, one step or more), in order, whether it is correct. Missing:
        "too_long" (for the model's context with the verdict), "not_finite", "unparsable"."""
        outcomes: list[Outcome[StepLabels]] = [
            Outcome(None, "too_long" if steps else "unparsable") for _, steps in items_B
        ]
        nonces, prompts, lengths = {}, {}, {}
        context = self._max_tokens
        for row, (problem, steps) in enumerate(items_B):
            nonces[row] = step_nonce(self._seed, problem, steps, self._template)
            prompts[row] = self._prompt(problem, steps, nonces[row])
            length = len(prompts[row]) + self._reply_tokens(len(steps))
            if steps and length <= context:
                lengths[row] = length
        for rows in self._batches(lengths):
            # Rows with fewer steps go on to the end with the others, and what they say there is cut off.
            num_steps = max(len(items_B[row][1]) for row in rows)
            choices = ([self._digits_V] * self._num_noted + [self._grades_V]) * num_steps
            replies = self._fill_in([prompts[row] for row in rows], self._between(num_steps), choices)
            for row, reply in zip(rows, replies, strict=True):
                ids = None if reply is None else reply[0]
                outcomes[row] = self._read(ids, nonces[row], len(items_B[row][1]))
        return outcomes

    def _prompt(self, problem: str, steps: Sequence[str], nonce: str) -> list[int]:
        """Token ids up to the first step's grade."""
        if self._template is Template.TINY:
            return self._solved(problem) + self._encode(render_tiny(steps, nonce))
        messages = render_steps(problem, steps, nonce, self._without_added)
        return self._encode_chat(messages, verdict_parts(self._template, nonce, len(steps))[0])

    def _solve(self, problem: str) -> list[int]:
        """The problem and the model's own solution of it, the likeliest tokens: what the tiny world's judge
        compares steps with."""
        return self._continued(self._encode(render_tiny_problem(problem)), _SOLUTION_TOKENS)

    def _between(self, num_steps: int) -> list[list[int]]:
        """The fixed text before every place of the verdict but the first."""
        numbers = verdict_parts(self._template, "", num_steps)[:num_steps]
        return [ids for number in numbers for ids in (self._encode(number), *[[]] * self._num_noted)][1:]

    def _reply_tokens(self, num_steps: int) -> int:
        return (self._num_noted + 1) * num_steps + sum(map(len, self._between(num_steps)))

    def _read(self, ids: list[int] | None, nonce: str, num_steps: int) -> Outcome[StepLabels]:
        if ids is None:
            return Outcome(None, "not_finite")
        before, *_, after = verdict_parts(self._template, nonce, num_steps)
        reply = before + self._tokenizer.decode(ids[: self._reply_tokens(num_steps)]) + after
        labels = parse_steps(reply, nonce, num_steps, self._template)
        return Outcome(labels) if labels else Outcome(None, "unparsable")


def _num_tokens(item: StepsAsked) -> int:
    problem, steps = item
    characters = len(problem) + sum(map(len, steps))
    return characters // CHARACTERS_PER_TOKEN + _TOKENS_OF_A_LINE * len(steps) + 1


class StepJudgePool(ScoringPool[StepsAsked, StepLabels]):
    """Step judge actors: items are (problem text, steps), values of each step whether it is correct."""

    def __init__(
        self,
        name: str,
        pool: ServicePool,
        runtime: Runtime,
        seed: int,
        deadline_seconds: float = RewardConfig.deadline_seconds,
    ) -> None:
        build = functools.partial(StepJudge, runtime=runtime, seed=seed, forward_tokens=pool.batch_tokens)
        super().__init__(name, pool, runtime, build, _num_tokens, deadline_seconds)
