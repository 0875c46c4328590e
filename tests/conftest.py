"""One Ray instance for the whole test run: starting it costs seconds, and actors are shared by module
fixtures."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray with logical CPUs enough for every pool of the tests."""
    import ray

    ray.init(
        address="local",
        num_cpus=64,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()
