"""What all tests share: the directory of the published problem sets, and one Ray instance, as starting it
costs seconds."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# The published sets are no part of the project. Test modules read this variable; without the sets, tests that
# need all of them are skipped, and others use the 32 problems of tests/cases/problems.jsonl.
os.environ.setdefault("PNS_DATA", str(Path(__file__).parents[2] / "shared" / "data"))
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# A script's background command ignores Ctrl-C, and so would every command that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def start_ray() -> None:
    import ray

    ray.init(
        address="local",
        num_cpus=64,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray with logical CPUs enough for every pool of the tests."""
    import ray

    start_ray()
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def without_ray() -> Iterator[None]:
    """For as long as a module's tests join clusters of their own, this process is connected to no Ray."""
    import ray

    was_connected = ray.is_initialized()
    ray.shutdown()
    yield
    ray.shutdown()
    if was_connected:
        start_ray()
