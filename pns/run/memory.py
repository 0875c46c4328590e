"""Peak memory of this process and all its descendants: driver, Ray and every actor of a local run."""

import threading
from pathlib import Path
from typing import Self

import psutil

INTERVAL_SECONDS = 3.0  # the kernel walks all pages of a process for one reading


class PeakMemory:
    """While the block runs, `gib` becomes the highest sum of proportional set sizes (shared pages once)."""

    def __init__(self) -> None:
        self.gib = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.gib = max(self.gib, total_gib())
            if self._stop.wait(INTERVAL_SECONDS):
                return


def total_gib() -> float:
    """Proportional set size of this process and its descendants; one that ends meanwhile counts nothing."""
    me = psutil.Process()
    total_kib = 0
    for process in [me, *me.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # has ended, or is another user's
            continue
        total_kib += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total_kib / 2**20
