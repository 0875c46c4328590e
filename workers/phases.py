"""Whose turn it is, where rollout and policy have the same GPUs (`placement.colocate`)."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Phases:
    """Work of two roles in turns. A role that is asked for something takes its turn first: the role that has
    it puts its memory away, and then the other one fetches its own. No stage has to know of it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._roles: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {}
        self._present = ""  # the role whose memory is on the GPUs
        self._num_working = 0  # calls of the present role that have not ended

    def add(self, role: str, leave: Callable[[], None], come: Callable[[], None]) -> None:
        """A role that has nothing on the GPUs yet. `leave` and `come` return when the memory has moved."""
        with self._lock:
            self._roles[role] = leave, come

    @contextmanager
    def turn(self, role: str) -> Iterator[None]:
        """For as long as the context lasts the GPUs are the role's. RuntimeError while another one works."""
        with self._lock:
            if role != self._present:
                self._give_to(role)
            self._num_working += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_working -= 1

    def _give_to(self, role: str) -> None:
        if self._num_working:
            raise RuntimeError(
                f"{role} was asked for while {self._present} works on the same GPUs: finish one before the "
                "other, or place them apart (placement.colocate=[])"
            )
        if self._present:
            leave, _ = self._roles[self._present]
            leave()
        self._present = ""  # where the next one cannot come, nobody is there
        _, come = self._roles[role]
        come()
        self._present = role
