"""What a step costs the driver itself grows with completions, not faster, and does not loop over tokens: by
counts of calls and of bytes. `tests/bench/driver_scale.py` has the seconds."""

from __future__ import annotations

import gc
import runpy
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
OURS = (f"{ROOT}/pns/", f"{ROOT}/workers/")


@pytest.fixture(scope="module")
def step() -> Callable[[int, int], None]:
    """A step of so many completions of so many tokens, between the benchmark's fakes."""
    bench = runpy.run_path(str(ROOT / "tests/bench/driver_scale.py"))
    tokenizer = bench["make_tokenizer"]()

    def one_step(num_completions: int, num_tokens: int) -> None:
        bench["one_step"](tokenizer, bench["Clock"](False), num_completions, num_tokens)

    one_step(32, 64)  # what is loaded late is loaded now
    return one_step


def num_calls(function: Callable[..., Any], *arguments: int) -> int:
    """Calls by and of our own code."""
    num = 0

    def count(frame: FrameType, event: str, _: Any) -> None:
        nonlocal num
        num += event in ("call", "c_call") and frame.f_code.co_filename.startswith(OURS)

    sys.setprofile(count)
    try:
        function(*arguments)
    finally:
        sys.setprofile(None)
    return num


def test_calls_are_linear_in_completions_and_do_not_count_tokens(step: Callable[[int, int], None]) -> None:
    calls = num_calls(step, 64, 64)
    assert num_calls(step, 128, 64) < 2.1 * calls
    assert num_calls(step, 64, 1024) < 1.1 * calls


def test_memory_is_linear_in_completions(step: Callable[[int, int], None]) -> None:
    def peak(num_completions: int) -> int:
        gc.collect()
        tracemalloc.start()
        step(num_completions, 256)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(64) < 2.2 * peak(32)
