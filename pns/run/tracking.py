"""Metrics: a row a step in metrics.jsonl, the same to tracking backends, and progress on the terminal."""

import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from pns.config import Tracking
from pns.files import append_jsonl, cut_rows, read_jsonl, write_jsonl
from pns.run.terminal import PlainTerminal, Progress, Terminal

METRICS = "metrics.jsonl"


class Backends(Protocol):
    """What verl's `Tracking` offers."""

    def log(self, data: dict[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


OpenBackends = Callable[[str, str, list[str]], Backends]
"""(project, name of the run, backends) -> open backends."""


class Tracker:
    """`enter` a stage's directory, `begin` a series of steps, `log` its steps, `end` it.

    A row of metrics.jsonl is {"stage", "step", "time" (seconds since 1970), "values"}; a value that is not
    finite is null there. Backends get `<stage>/<metric>` at the running number of the row, which never falls
    from one stage to the next.
    """

    def __init__(
        self,
        page: Path,
        settings: Tracking,
        open_backends: OpenBackends,
        num_rows: int = 0,
        terminal: Terminal | None = None,
    ) -> None:
        """`page` is the run's; `num_rows` of metrics are there already."""
        self.terminal = terminal or PlainTerminal()
        self._backends: Backends | None = None
        if settings.backends:
            # Where verl's tensorboard backend writes, read while it opens; a directory that the user has set
            # stays, and ours does not lead the next run of this process.
            chosen = os.environ.get("TENSORBOARD_DIR")
            os.environ["TENSORBOARD_DIR"] = chosen or str(page / "tensorboard")
            names = [backend.value for backend in settings.backends]
            self._backends = open_backends(settings.project, page.name, names)
            if chosen is None:
                del os.environ["TENSORBOARD_DIR"]
        self._path = page / METRICS
        self._stage, self._total, self._first_step, self._num_rows = "", 0, 0, num_rows
        self._began = 0.0

    def enter(self, directory: Path) -> None:
        """Write to metrics.jsonl of `directory` from now on."""
        self._path = directory / METRICS

    def begin(self, stage: str, total: int, first_step: int) -> list[Mapping[str, float | None]]:
        """Start (or resume at `first_step`) a series of `total` steps: rows from `first_step` on are dropped,
        they come again. Returns the values of the steps before."""
        rows = []
        if self._path.is_file():
            cut_rows(self._path)  # a row that a crash cut cannot be read
            rows = read_jsonl(self._path)
        kept = [row for row in rows if row["stage"] != stage or row["step"] < first_step]
        write_jsonl(self._path, kept)
        self._stage, self._total, self._first_step = stage, total, first_step
        self._began = time.monotonic()
        return [row["values"] for row in kept if row["stage"] == stage]

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record step `step` (from 0) of the stage."""
        values = {key: float(value) if math.isfinite(value) else None for key, value in metrics.items()}
        row = {"stage": self._stage, "step": step, "time": time.time(), "values": values}
        append_jsonl(self._path, [row])
        if self._backends:
            known = {f"{self._stage}/{key}": value for key, value in values.items() if value is not None}
            self._backends.log(known, self._num_rows)
        self._num_rows += 1
        done = step + 1
        self.terminal.progress(Progress(self._stage, done, self._total, self._seconds_left(done), values))

    def part(self, label: str, done: int, total: int) -> None:
        """How far a step is that takes long."""
        self.terminal.progress(Progress(label, done, total, None, {}))

    def note(self, text: str) -> None:
        """A line of its own on the terminal, for what the user should know at once."""
        self.terminal.note(text)

    def end(self) -> None:
        """The stage's last step is done."""
        self.terminal.end_stage()

    def close(self) -> None:
        """Flush and close the backends."""
        if self._backends:
            self._backends.finish()
            self._backends = None

    def _seconds_left(self, done: int) -> float:
        # Of the steps since this start alone: those before an interruption were in another process.
        seconds_a_step = (time.monotonic() - self._began) / max(done - self._first_step, 1)
        return seconds_a_step * (self._total - done)
