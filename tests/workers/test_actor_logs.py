"""What actors print, in files of the run's directory."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pns.config import ServicePool
from workers.rewards.service import Outcome, PoolFailedError, ScoringPool
from workers.runtime import Runtime


def test_a_restarted_actor_goes_on_in_the_same_file(
    ray_session: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flag = tmp_path / "flag"
    runtime = Runtime(start_timeout_seconds=1800, logs=str(tmp_path / "logs"))

    def dies_once(model_path: str) -> Any:
        class Model:
            def score(self, items: Sequence[str]) -> list[Outcome[str]]:
                print("out", *items)
                os.write(2, f"err {items[0]}\n".encode())
                subprocess.run(["echo", "child", items[0]], check=True)
                if items[0] == "always" or not flag.exists():
                    flag.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return [Outcome(item) for item in items]

        return Model()

    pool = ScoringPool[str, str]("judge", ServicePool(), runtime, dies_once, len)
    try:
        pool.load("-")
        assert pool.score(["first"]) == [Outcome("first")]
        file = tmp_path / "logs" / "judge-0.log"
        said = re.sub(r"--- \S+ process (\d+) on \S+", "---", file.read_text()).split("\n")
        once = ["---", "out first", "err first", "child first"]
        assert said == [*once, *once, ""]  # what was printed before the SIGKILL, and after the restart
        assert "first" not in "".join(capfd.readouterr())
        with pytest.raises(PoolFailedError, match=rf"died \(\w+\) \(what it printed: {file}\)"):
            pool.collect([entry for _ in range(5) for entry in pool.submit(["always"])])
    finally:
        pool.shutdown()
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["judge-0.log"]
