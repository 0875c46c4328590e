"""Imports point one way, and each heavy library has named owners."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path.relative_to(ROOT) for package in ("pns", "workers") for path in (ROOT / package).rglob("*.py")
)
OWNERS = {
    "verl": {
        "workers/training/policy.py",
        "workers/training/rank.py",
        "workers/training/batching.py",
        "workers/training/verl_engine.py",
        "workers/training/verl_cpu.py",
        "workers/metric_backends.py",
    },
    "vllm": {"workers/rollout/engine_vllm.py"},
}
PURE = (
    "pns/records.py",
    "pns/config.py",
    "pns/preference_losses.py",
    "pns/fields.py",
    "pns/recipe.py",
    "pns/errors.py",
    "pns/preflight.py",
    "pns/algo/",
)
LAYERS = (
    "pns/cli.py",
    "pns/driver.py",
    "pns/stages/",
    "workers/",
    "pns/algo/",
    "pns/config.py",
    "pns/records.py",
    "pns/errors.py",
)


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer(name: str) -> int | None:
    return next((rank for rank, prefix in enumerate(LAYERS) if name.startswith(prefix)), None)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_heavy_libraries_have_owners(path: Path) -> None:
    roots = {name.split(".")[0] for name in imported(path)}
    for library, owners in OWNERS.items():
        assert library not in roots or str(path) in owners
    if str(path).startswith(PURE):
        assert not roots & {"ray", "verl", "vllm", "transformers"}
        assert "torch" not in roots or str(path) == "pns/algo/losses.py"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_one_way(path: Path) -> None:
    own = layer(str(path))
    if own is None:
        return
    for name in imported(path):
        other = layer(
            name.replace(".", "/") + (".py" if (ROOT / (name.replace(".", "/") + ".py")).is_file() else "/")
        )
        assert other is None or other >= own, f"{path} imports {name}"


def test_packages_are_empty() -> None:
    assert [str(path) for path in FILES if path.name == "__init__.py" and (ROOT / path).read_text()] == []


def test_pure_modules_load_no_heavy_library() -> None:
    modules = [
        str(path.with_suffix("")).replace("/", ".")
        for path in FILES
        if str(path).startswith(PURE) and path.name != "losses.py"
    ]
    code = f"import sys, {', '.join(modules)}; print([m for m in ('torch', 'ray', 'verl', 'vllm', 'transformers') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
