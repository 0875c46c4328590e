"""Processes of Ray actors, seen from outside."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil
import pytest


@pytest.fixture
def actor_processes(ray_session: None) -> Callable[..., set[psutil.Process]]:
    """A function: the running processes whose actor is of the named class, once there are `number` of them
    (killed ones take a while to go)."""

    def of_class(name: str, number: int | None = None) -> set[psutil.Process]:
        end = time.monotonic() + 1800
        while True:
            running = set()
            for process in psutil.Process().children(recursive=True):
                try:
                    if "".join(process.cmdline()[:1]).startswith(f"ray::{name}"):
                        running.add(process)
                except (psutil.NoSuchProcess, psutil.ZombieProcess):  # it ended meanwhile
                    continue
            if number in (None, len(running)) or time.monotonic() > end:
                return running
            time.sleep(0.05)

    return of_class
