"""A real run that is interrupted: how it ends, that nothing of it stays, and that the next start goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from pns.run.leftovers import MARK, end_marked, marked

ROOT = Path(__file__).parents[1]
LIMIT_SECONDS = 240.0  # generous: for a start, and for an end
KEYS = [
    "rollout.engine=transformers",
    "placement.rollout.replicas=1",
    "placement.policy.replicas=1",
    "data.tiny.num_train=50",
    "rl.steps=40",
    "rl.problems_per_step=4",
    "rl.completions_per_problem=2",
    "rl.checkpoint_every=2",
]


def wait_until(holds: Callable[[], bool], driver: subprocess.Popen[str]) -> None:
    until = time.monotonic() + LIMIT_SECONDS
    while not holds():
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.usefixtures("without_ray")
def test_an_interrupted_run_leaves_no_process_and_goes_on(tmp_path: Path) -> None:
    page = tmp_path / "run"
    words = ["run", str(ROOT / "recipes/tiny-qwen2.yaml"), f"runs={tmp_path}", "name=run", *KEYS]
    command = [sys.executable, "-m", "pns.cli", *words, "--until", "rl"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", MARK)}

    def start() -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        # A group of its own, as a terminal gives to a command.
        return subprocess.Popen(
            command, text=True, cwd=ROOT, env=environment, start_new_session=True, **pipes
        )

    def num_steps() -> int:
        metrics = page / "rl" / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.is_file() else 0

    def is_loading() -> bool:
        with suppress(psutil.Error):  # one of them has just ended
            return any("RolloutActor" in " ".join(process.cmdline()) for process in marked(str(page)))
        return False

    driver = start()
    try:
        wait_until(is_loading, driver)
        os.killpg(driver.pid, signal.SIGINT)  # Ctrl-C
        said, _ = driver.communicate(timeout=LIMIT_SECONDS)
        assert driver.returncode == 130, said
        assert said.splitlines()[-1].startswith("pns: interrupted; "), said
        assert marked(str(page)) == []

        driver = start()
        wait_until(lambda: num_steps() >= 3, driver)
        driver.kill()
        driver.communicate()
        before = num_steps()

        driver = start()
        wait_until(lambda: num_steps() > before, driver)
        driver.terminate()
        said, _ = driver.communicate(timeout=LIMIT_SECONDS)
        assert driver.returncode == 143, said
        assert said.splitlines()[-1].startswith(
            "pns: interrupted; the same command goes on with rl after its step "
        )
        assert marked(str(page)) == []
    finally:
        driver.kill()
        end_marked(str(page))
