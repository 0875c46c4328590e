"""The rollouts of the next step, made while the policy trains on those of the present one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Made = TypeVar("Made")


class Ahead(Generic[Made]):
    """`make(step)`, at most one step ahead of who takes it."""

    def __init__(self, make: Callable[[int], Made]) -> None:
        self._make = make
        self._step = -1  # that is made in the background
        self._thread: threading.Thread | None = None
        self._made: list[Made] = []
        self._failure: list[BaseException] = []

    def begin(self, step: int) -> None:
        """Make the step in the background; what was begun before has been taken."""
        assert self._thread is None
        # A daemon: an interrupted run does not wait for completions that nobody will read.
        self._step = step
        self._thread = threading.Thread(target=self._run, args=(step,), name="rollouts ahead", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until what was begun is there; raises what it failed with. No request of it runs any more."""
        if self._thread is not None:
            self._thread.join()
            if self._failure:
                raise self._failure[0]

    def take(self, step: int) -> Made:
        """The step's, begun before or made now."""
        if self._thread is None:
            return self._make(step)
        assert self._step == step
        self.wait()
        self._thread = None
        return self._made.pop()

    def _run(self, step: int) -> None:
        try:
            self._made.append(self._make(step))
        except BaseException as failure:  # raised where it is waited for
            self._failure.append(failure)
