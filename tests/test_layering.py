"""Imports point one way, from the command to plain records; each heavy library has named owners; and what is
pure loads none of them."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    path.relative_to(ROOT).as_posix()
    for package in ("pns", "workers")
    for path in sorted((ROOT / package).rglob("*.py"))
]
MODULES = {path.removesuffix(".py").replace("/", "."): path for path in FILES}

# From the top: a room imports those below it, and itself. Of two that hold a file the longer name counts.
ROOMS = (
    "pns/cli.py",
    "pns/commands/",
    "pns/preflight.py",
    "pns/planning/",
    "pns/driver.py",
    "pns/methods.py",
    "pns/tiny/outcome_reward.py",
    "pns/tiny/deepened.py",
    "pns/tiny/process_reward.py",
    "pns/tiny/warm_start.py",
    "pns/tiny/step_judge.py",
    "pns/stages/",
    "pns/report/",
    "pns/run/",
    "workers/check_gpu.py",
    "workers/fleet.py",
    "workers/cluster.py",
    "workers/jobs.py",
    "workers/training/",
    "workers/rewards/",
    "workers/rollout/",
    "workers/broadcast.py",
    "workers/weights.py",
    "workers/probe.py",
    "workers/reservation.py",
    "workers/phases.py",
    "workers/placement.py",
    "workers/packing.py",
    "workers/metric_backends.py",
    "workers/node_memory.py",
    "workers/actor_logs.py",
    "workers/http_client.py",
    "workers/checkpoints.py",
    "workers/runtime.py",
    "workers/sizes.py",
    "pns/data/",
    "pns/algo/",
    "pns/answers/",
    "pns/tiny/",
    "pns/model_files.py",
    "pns/recipe.py",
    "pns/files.py",
    "pns/config.py",
    "pns/fields.py",
    "pns/preference_losses.py",
    "pns/offline_objectives.py",
    "pns/records.py",
    "pns/errors.py",
)
# Rooms beside each other: none knows the others.
STRANGERS = ("workers/training/", "workers/rewards/", "workers/rollout/")

OWNERS = {
    "verl": {
        "workers/metric_backends.py",
        "workers/training/batching.py",
        "workers/training/policy.py",
        "workers/training/rank.py",
        "workers/training/verl_cpu.py",
        "workers/training/verl_engine.py",
    },
    "vllm": {"workers/rewards/vllm_grades.py", "workers/rollout/engine_vllm.py"},
    "openai": {"workers/http_client.py"},
    "wtpsplit": {"pns/data/sat.py"},
    "ray": {
        "workers/cluster.py",
        "workers/jobs.py",
        "workers/metric_backends.py",
        "workers/node_memory.py",
        "workers/probe.py",
        "workers/reservation.py",
        "workers/rewards/service.py",
        "workers/rollout/pool.py",
        "workers/training/policy.py",
        "workers/broadcast.py",
        "workers/weights.py",
    },
    "torch": {
        "pns/algo/losses.py",
        "pns/tiny/deepened.py",
        "pns/tiny/outcome_reward.py",
        "pns/tiny/warm_start.py",
        "workers/check_gpu.py",
        "workers/cluster.py",
        "workers/rewards/process_reward.py",
        "workers/rewards/reward_head.py",
        "workers/rewards/reward_model.py",
        "workers/rewards/verdict_model.py",
        "workers/rollout/engine.py",
        "workers/rollout/engine_transformers.py",
        "workers/rollout/engine_vllm.py",
        "workers/training/attention.py",
        "workers/training/log_probs.py",
        "workers/training/objectives.py",
        "workers/training/rank.py",
        "workers/training/state_files.py",
        "workers/training/verl_cpu.py",
        "workers/training/verl_engine.py",
        "workers/broadcast.py",
        "workers/weights.py",
    },
    "transformers": {
        "pns/data/prompts.py",
        "pns/tiny/deepened.py",
        "pns/tiny/outcome_reward.py",
        "pns/tiny/tokenizer.py",
        "pns/tiny/warm_start.py",
        "workers/check_gpu.py",
        "workers/rewards/verdict_model.py",
        "workers/rewards/reward_head.py",
        "workers/rewards/reward_model.py",
        "workers/rollout/engine_transformers.py",
        "workers/training/attention.py",
        "workers/training/rank.py",
        "workers/training/verl_engine.py",
    },
}
# These rooms import a heavy library where they use it, if at all: `pns --help`, a wrong recipe and a test of
# pure functions load none. Only the losses are tensors.
PURE = (
    *(room for room in ROOMS[ROOMS.index("pns/data/") :] if room != "pns/tiny/"),
    "pns/tiny/world.py",
    "pns/tiny/settings.py",
    "pns/cli.py",
    "pns/preflight.py",
    "pns/planning/",
    "pns/report/",
    "pns/run/",
    "pns/commands/config.py",
    "pns/commands/export.py",
    "pns/commands/plan.py",
    "pns/commands/rescore.py",
    "pns/commands/init.py",
    "pns/commands/recipes.py",
    "pns/commands/run.py",
    "pns/commands/services.py",
    "pns/commands/submit.py",
    "workers/placement.py",
    "workers/runtime.py",
    "workers/sizes.py",
)
NOT_PURE = ("pns/algo/losses.py",)


def imported_names(path: str) -> set[str]:
    """Every dotted name that a file imports, also inside functions and for the type checker alone."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


IMPORTED_NAMES = {path: imported_names(path) for path in FILES}
IMPORTED_FILES = {path: {MODULES[name] for name in IMPORTED_NAMES[path] & MODULES.keys()} for path in FILES}


def room_of(path: str) -> str:
    """The room of a file; empty where it has none."""
    return max((room for room in ROOMS if path.startswith(room)), key=len, default="")


def test_every_file_is_in_a_room_and_every_room_has_a_file() -> None:
    with_code = [path for path in FILES if (ROOT / path).read_text(encoding="utf-8")]
    assert [path for path in with_code if not room_of(path)] == []
    assert {room_of(path) for path in with_code} == set(ROOMS)


@pytest.mark.parametrize("path", FILES)
def test_imports_point_one_way(path: str) -> None:
    own = room_of(path)
    for imported in IMPORTED_FILES[path]:
        room = room_of(imported)
        if own and room and room != own:
            assert ROOMS.index(own) < ROOMS.index(room), f"{path} imports {imported}"
            assert not {own, room} <= set(STRANGERS), f"{path} imports {imported}"


def test_no_circle_of_files() -> None:
    try:
        order = list(TopologicalSorter(IMPORTED_FILES).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")
    assert set(order) == set(FILES)


@pytest.mark.parametrize("library", OWNERS)
def test_heavy_libraries_have_owners(library: str) -> None:
    importers = {
        path for path, names in IMPORTED_NAMES.items() if library in {name.split(".")[0] for name in names}
    }
    assert importers == OWNERS[library]


def test_packages_are_empty() -> None:
    packages = [path for path in FILES if path.endswith("__init__.py")]
    assert [path for path in packages if (ROOT / path).read_text(encoding="utf-8")] == []


def loaded_heavy(modules: list[str]) -> str:
    """The heavy libraries that a fresh process has loaded after it imported `modules`."""
    code = (
        f"import sys, {', '.join(modules)}; print(*[name for name in {list(OWNERS)} if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout.strip()


def test_pure_rooms_load_no_heavy_library() -> None:
    pure = [
        module for module, path in MODULES.items() if path.startswith(PURE) and not path.startswith(NOT_PURE)
    ]
    assert len(pure) > 40
    assert loaded_heavy(pure) == ""


def test_the_losses_load_torch_alone() -> None:
    assert loaded_heavy(["pns.algo.losses"]) == "torch"
