"""The example of `pns/algo/README.md` runs as it stands, and learns what its text says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOADED = (
    "import sys; print([name for name in ('ray', 'verl', 'vllm', 'transformers') if name in sys.modules])"
)


def test_the_example_runs_without_heavy_libraries() -> None:
    text = (ROOT / "pns" / "algo" / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    done = subprocess.run(
        [sys.executable, "-c", f"{example}\n{LOADED}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *lines, loaded = done.stdout.splitlines()
    assert loaded == "[]"
    plausible, right, negative, margin = map(float, re.findall(r"\d\.\d\d", " ".join(lines)))
    assert plausible > 0.5
    assert right > 0.5 > negative
    assert margin > 1
