"""Processes that are known by the run they belong to."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pns.run.leftovers import MARK, marked, marked_processes

SLEEPS = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def sleeping(tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """One of the run `mine`, one of the run `other`, one of none."""
    marks = [{MARK: str(tmp_path / "mine")}, {MARK: str(tmp_path / "other")}, {}]
    processes = [subprocess.Popen(SLEEPS, env=os.environ | mark) for mark in marks]
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def test_what_an_earlier_start_left_is_ended_and_nothing_else(
    tmp_path: Path, sleeping: list[subprocess.Popen[bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    with marked_processes(tmp_path / "mine"):
        assert os.environ[MARK] == str(tmp_path / "mine")
    mine, *others = sleeping
    assert mine.wait(10) == -9
    assert [process.poll() for process in others] == [None, None]
    assert MARK not in os.environ
    assert capsys.readouterr().err == f"{tmp_path / 'mine'}: 1 process that an earlier start left was ended\n"


def test_a_block_that_fails_leaves_nothing(tmp_path: Path) -> None:
    started = []

    def start_and_fail() -> None:
        with marked_processes(tmp_path / "run"):
            started.append(subprocess.Popen(SLEEPS))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start_and_fail()
    assert started[0].wait(10) == -9


def test_an_interruption_that_is_lost_ends_the_process_all_the_same(tmp_path: Path) -> None:
    """As where a library takes KeyboardInterrupt for an error of its own."""
    code = (
        "import os, signal, subprocess, sys, time\n"
        "from pathlib import Path\n"
        "from pns.run.leftovers import marked_processes\n"
        "from pns.run.stopping import StopRequest, interruptible\n"
        "stop = StopRequest()\n"
        "stop.end_seconds, stop.way_out = 0.1, lambda: 'go on'\n"
        f"with interruptible(stop), marked_processes(Path({str(tmp_path)!r})):\n"
        f"    child = subprocess.Popen({SLEEPS!r})\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(60)\n"
        "    except KeyboardInterrupt:\n"
        "        time.sleep(60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stderr) == (143, "pns: interrupted; go on\n")
    assert marked(str(tmp_path)) == []


def test_a_signal_that_is_ignored_stays_so() -> None:
    code = (
        "import os, signal\n"
        "from pns.run.stopping import StopRequest, interruptible\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "with interruptible(StopRequest()):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=50, check=False).returncode == 0
