"""What a checker of derivations knows of a text, beyond whether its final answer is right."""

from collections.abc import Sequence
from typing import Protocol

from pns.records import Problem


class CheckedStep(Protocol):
    """A step: text[start:end]; `right`: it has no error of its own and is not built on one."""

    @property
    def start(self) -> int: ...

    @property
    def end(self) -> int: ...

    @property
    def right(self) -> bool: ...


class StepCheck(Protocol):
    """`first_wrong_step`: index of the first wrong step (the number of steps for the final answer), and
    `first_wrong_end`: characters of the text up to and including it; None where all are right.
    `kinds`: of all errors, in the order of the text. `single_error`: whether the text is well formed and has
    exactly one error. `steps` are those that could be
    read, in order and without gaps."""

    @property
    def steps(self) -> Sequence[CheckedStep]: ...

    @property
    def first_wrong_step(self) -> int | None: ...

    @property
    def first_wrong_end(self) -> int | None: ...

    @property
    def kinds(self) -> Sequence[str]: ...

    @property
    def single_error(self) -> bool: ...


class Checker(Protocol):
    """Step-by-step judgements on solutions, for problems whose derivations can be checked exactly."""

    def check(self, problem: Problem, text: str) -> StepCheck: ...

    def rubric(self, problem: Problem, text: str) -> tuple[int, int, int, int]:
        """The grades of `pns.algo.judging.DIMENSIONS` that the text deserves, each 0-3."""
        ...
