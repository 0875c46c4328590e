"""SIGTERM (`pns job stop`, a preempted node, the end of a Slurm job) ends a command as Ctrl-C does; a training
loop first ends its step, for a checkpoint."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

# For the step under way. Who sends the signal may have less: then it kills, and the last checkpoint counts.
STEP_SECONDS = 60


class StopRequest:
    """Handles SIGTERM inside `finishing_steps`."""

    def __init__(self) -> None:
        self.came = False

    def __call__(self, signum: int, frame: object) -> None:
        if self.came:
            raise KeyboardInterrupt
        self.came = True
        print("SIGTERM: the run ends with this step, or at once with a second one", flush=True)
        signal.alarm(STEP_SECONDS)


def interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Inside, SIGTERM is KeyboardInterrupt. For the main thread."""
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def finishing_steps() -> Iterator[StopRequest]:
    """Inside, where SIGTERM interrupts, the first one is only noted: the caller ends its step. It has
    STEP_SECONDS for it; after them, and with a second SIGTERM, it is interrupted."""
    request = StopRequest()
    if signal.getsignal(signal.SIGTERM) is not interrupt:
        yield request
        return
    alarm = signal.signal(signal.SIGALRM, interrupt)
    signal.signal(signal.SIGTERM, request)
    try:
        yield request
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGTERM, interrupt)
        signal.signal(signal.SIGALRM, alarm)
