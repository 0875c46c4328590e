"""Ctrl-C and SIGTERM (`pns job stop`, a preempted node, the end of a Slurm job) end a command within a limit.
After SIGTERM a loop of training first ends its step, for a checkpoint."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

# After SIGTERM, for the step under way. Who sends it may have less: it kills, and the last checkpoint counts.
STEP_SECONDS, LOCAL_STEP_SECONDS = 60, 3
# For a command that is interrupted to end by itself: with both limits a local run is gone after 10 s.
END_SECONDS, LOCAL_END_SECONDS = 60.0, 6.0

_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}  # 128 and the signal's number, as shells have it
_SHOW_CURSOR = "\x1b[?25h"  # a line that is drawn again and again hides it


class StopRequest:
    """The handler of both signals, and of the alarm that ends its patience.

    The first one raises KeyboardInterrupt, and begins `end_seconds`; after them, and at once with a second
    one, `end_processes` is called and this process ends, whatever it is doing."""

    def __init__(self) -> None:
        local = not os.environ.get("RAY_ADDRESS")
        self.step_seconds = LOCAL_STEP_SECONDS if local else STEP_SECONDS
        self.end_seconds = LOCAL_END_SECONDS if local else END_SECONDS
        self.came = False  # SIGTERM is to be obeyed soon
        self.exit_code = _CODES[signal.SIGINT]
        self.finishes_step = False
        self.way_out: Callable[[], str] = lambda: ""  # how to go on
        self.end_processes: Callable[[], object] = lambda: None  # those that this one has started
        self._patience: threading.Timer | None = None
        self._ends = threading.Lock()  # by one thread alone

    def __call__(self, signum: int, frame: object) -> None:
        if self.obeyed:
            self.end_now()
        self.exit_code = _CODES.get(signal.Signals(signum), self.exit_code)
        if signum == signal.SIGTERM and self.finishes_step and not self.came:
            self.came = True
            words = "SIGTERM: the run ends with this step, or at once with a second one"
            print(words, file=sys.stderr, flush=True)
            signal.alarm(self.step_seconds)
            return
        self.obey()

    def obey(self) -> NoReturn:
        signal.alarm(0)
        self._patience = threading.Timer(self.end_seconds, self.end_now)
        self._patience.daemon = True
        self._patience.start()
        raise KeyboardInterrupt

    def end_now(self) -> NoReturn:
        if not self._ends.acquire(blocking=False):
            threading.Event().wait()  # the other thread ends this one, too
        try:
            self.end_processes()
            sys.stdout.write(_SHOW_CURSOR if sys.stdout.isatty() else "")
            print(self.words(), file=sys.stderr, flush=True)
            sys.stdout.flush()
        finally:
            os._exit(self.exit_code)

    @property
    def obeyed(self) -> bool:
        return self._patience is not None

    def words(self) -> str:
        return "; ".join(filter(None, ["pns: interrupted", self.way_out()]))

    def leave(self) -> None:
        """The command has ended by itself."""
        signal.alarm(0)
        if self._patience is not None:
            self._patience.cancel()


@contextmanager
def interruptible(request: StopRequest) -> Iterator[None]:
    """Inside, both signals go to `request`. For the main thread."""
    signals = [signal.SIGTERM, signal.SIGALRM]
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a shell's own background command has it
        signals.append(signal.SIGINT)
    before = {which: signal.signal(which, request) for which in signals}
    try:
        yield
    except Exception as error:
        if request.obeyed:  # what a library has made of the interruption
            raise KeyboardInterrupt from error
        raise
    finally:
        request.leave()
        for which, handler in before.items():
            signal.signal(which, handler)


@contextmanager
def finishing_steps() -> Iterator[StopRequest]:
    """Inside, the first SIGTERM is only noted: the caller ends its step, and obeys. With a second one, and
    after `step_seconds`, it is interrupted all the same."""
    request = current_request()
    request.finishes_step = True
    try:
        yield request
    finally:
        request.finishes_step = False


def current_request() -> StopRequest:
    """The one of `interruptible`; outside, one that never comes."""
    handler = signal.getsignal(signal.SIGTERM)
    return handler if isinstance(handler, StopRequest) else StopRequest()
