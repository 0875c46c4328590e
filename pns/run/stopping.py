"""SIGTERM (`pns job stop`, a preempted node, the end of a Slurm job) ends a command as Ctrl-C does; a loop of
training first ends its step, for a checkpoint."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

# For the step under way. Who sends the signal may have less: then it kills, and the last checkpoint counts.
STEP_SECONDS = 60


class StopRequest:
    """The handler of SIGTERM, and of the alarm that ends its patience. `came`: it is to be obeyed soon."""

    def __init__(self) -> None:
        self.came = False
        self.finishes_step = False

    def __call__(self, signum: int, frame: object) -> None:
        if self.came or not self.finishes_step:
            self.obey()
        self.came = True
        print("SIGTERM: the run ends with this step, or at once with a second one", flush=True)
        signal.alarm(STEP_SECONDS)

    def obey(self) -> None:
        signal.alarm(0)
        raise KeyboardInterrupt


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Inside, SIGTERM is KeyboardInterrupt. For the main thread."""
    request = StopRequest()
    before = {which: signal.signal(which, request) for which in (signal.SIGTERM, signal.SIGALRM)}
    try:
        yield
    finally:
        signal.alarm(0)
        for which, handler in before.items():
            signal.signal(which, handler)


@contextmanager
def finishing_steps() -> Iterator[StopRequest]:
    """Inside, the first SIGTERM is only noted: the caller ends its step, and obeys. With a second one, and
    after STEP_SECONDS, it is interrupted all the same."""
    request = current_request()
    request.finishes_step = True
    try:
        yield request
    finally:
        request.finishes_step = False


def current_request() -> StopRequest:
    """The one of `sigterm_interrupts`; outside, one that never comes."""
    handler = signal.getsignal(signal.SIGTERM)
    return handler if isinstance(handler, StopRequest) else StopRequest()
