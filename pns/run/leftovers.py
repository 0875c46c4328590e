"""The processes of a local run, known by a variable in their environment: also when its driver is killed and
leaves them without a parent."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from pns.run.stopping import current_request

MARK = "PNS_RUN"  # the absolute path of the run's page
_KILL_SECONDS, _LOOK_SECONDS = 3.0, 0.05  # for the kernel to end what is killed, and between looks


@contextmanager
def marked_processes(page: Path) -> Iterator[None]:
    """Inside, what this process starts has the page's mark; what is left of it when the block fails is ended.

    For who holds the page's lock: what has the mark at the beginning belonged to a driver that has died, is
    ended, and said in a line."""
    value = str(page.absolute())
    if num_ended := end_marked(value):
        ended = (
            "1 process that an earlier start left was"
            if num_ended == 1
            else (f"{num_ended} processes that an earlier start left were")
        )
        print(f"{page}: {ended} ended", file=sys.stderr, flush=True)
    request, before = current_request(), os.environ.get(MARK)
    os.environ[MARK] = value
    request.end_processes = lambda: end_marked(value)
    try:
        yield
    except BaseException:
        end_marked(value)
        raise
    finally:
        if before is None:
            del os.environ[MARK]
        else:
            os.environ[MARK] = before
        request.end_processes = lambda: None


def end_marked(value: str) -> int:
    """Kill the processes with this mark but this one and its parents; how many there were. Ray's own start
    others while they end, so it looks again."""
    ended: set[int] = set()
    until = time.monotonic() + _KILL_SECONDS
    while (processes := marked(value)) and time.monotonic() < until:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        ended |= {process.pid for process in processes}
        time.sleep(_LOOK_SECONDS)
    return len(ended)


def marked(value: str) -> list[psutil.Process]:
    """The processes of this user that have the mark in their environment."""
    this = psutil.Process()
    kept = {this.pid, *(parent.pid for parent in this.parents())}
    return [
        process for process in psutil.process_iter() if process.pid not in kept and _mark(process) == value
    ]


def _mark(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK)
    except (psutil.Error, OSError):  # of another user, or it has just ended
        return None
