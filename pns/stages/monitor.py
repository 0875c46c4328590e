"""The thread that shows a run's services to other processes, and does what `pns scale` asks of them."""

import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

from pns.errors import UserError
from pns.records import to_json
from pns.run.place import lock_holder
from pns.run.services import DONE, WRITE_SECONDS, Board, ScaleRequest, read_request


class RunningService(Protocol):
    """What a scorer of the fleet can do beside scoring."""

    def stats(self) -> Any:
        """A record of figures."""
        ...

    def resize(self, replicas: int) -> None:
        """Raises UserError or TimeoutError where that cannot be."""
        ...


class ServiceMonitor:
    """Inside the context the page's services.json follows `services` (reward term -> its service, None while
    it is not up), and requests are carried out. A file that cannot be written or read is said once; it never
    ends the run."""

    def __init__(
        self,
        page: Path,
        services: Callable[[], Mapping[str, RunningService | None]],
        interval_seconds: float = WRITE_SECONDS,
    ) -> None:
        self._page, self._services, self._interval_seconds = page, services, interval_seconds
        self._board = Board(uuid.uuid4().hex, lock_holder(page / "lock"))
        self._lock = threading.Lock()  # of the board
        self._said: set[str] = set()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="services", daemon=True)

    def __enter__(self) -> Self:
        self._try(self._write)  # from now on nothing on the page speaks of an earlier start
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopping.set()
        self._thread.join()
        with self._lock:
            self._board.holder = ""  # the run goes on to its report, without services
        self._try(self._write)

    def _follow(self) -> None:
        while not self._stopping.wait(self._interval_seconds):
            self._try(self._take_request)
            self._try(self._write)

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except (OSError, UserError, TypeError) as error:  # of disks, and of files that others write
            if str(error) not in self._said:
                self._said.add(str(error))
                print(f"services of the run: {error}", file=sys.stderr, flush=True)

    def _write(self) -> None:
        services = self._services()
        figures = {name: to_json(service.stats()) if service else None for name, service in services.items()}
        with self._lock:
            self._board.services, self._board.written = figures, time.time()
            self._board.write(self._page)

    def _take_request(self) -> None:
        request = read_request(self._page, self._board.start)
        if request is None or request.id == self._board.request:
            return
        with self._lock:
            self._board.request, self._board.outcomes = request.id, dict.fromkeys(request.replicas, "")
        for name, replicas in request.replicas.items():
            # Each by itself: replicas may take minutes to come up.
            resizing = threading.Thread(target=self._resize, args=(request, name, replicas), daemon=True)
            resizing.start()

    def _resize(self, request: ScaleRequest, name: str, replicas: int) -> None:
        try:
            while (service := self._services().get(name)) is None:
                if name not in self._services():
                    raise UserError(f"{name}: this run uses no such service")
                if self._stopping.wait(self._interval_seconds):
                    return
            service.resize(replicas)
            outcome = DONE
        except Exception as error:  # in this thread it would be lost
            outcome = str(error) or type(error).__name__
        with self._lock:
            if self._board.request == request.id:
                self._board.outcomes[name] = outcome
