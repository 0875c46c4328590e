"""`pns doctor`: what of this machine would stop a run or slow it down, each with a way out. Nothing heavy is
imported: versions come from the packages' metadata, GPUs from nvidia-smi."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pns.config import Config, Device, stages
from pns.errors import UserError
from pns.preflight import check_address, check_inputs, check_machine, check_runs
from pns.recipe import load

WIDTH = 110
GPU_SECONDS = 5.0  # for nvidia-smi to answer
HEAD_SECONDS = 1.5  # for the head of a Ray cluster to answer
LEAST_MEMORY_GB = 4.0  # the driver, Ray and a process for each role of a tiny recipe
LEAST_SHM_GB = 1.0  # Docker gives 0.06
LEAST_SPACE_GB, AMPLE_SPACE_GB = 1.0, 20.0
MOST_DIFFERING = 6  # packages in the row of differing ones
_ROOT = Path(__file__).parents[2]
_NVIDIA = Path("/proc/driver/nvidia/gpus")  # a directory for each GPU of this machine
_LISTS = "docker/requirements-{}.txt"  # exact versions, beside an installation from a checkout


class Severity(StrEnum):
    """`note`: a run starts, and may be slower, or other than expected; `fault`: it fails."""

    ok = "ok"
    note = "note"
    fault = "fault"


@dataclass(frozen=True)
class Row:
    what: str
    found: str
    severity: Severity = Severity.ok
    way_out: str = ""


def examine(recipe: Path | None, overrides: Sequence[str], over: Sequence[Path], in_json: bool) -> int:
    """Print a row for each thing examined; the exit code is 2 where one of them is a fault."""
    rows = list(all_rows(recipe, overrides, over))
    if in_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print_rows(rows)
    return 2 if any(row.severity is Severity.fault for row in rows) else 0


def all_rows(recipe: Path | None, overrides: Sequence[str], over: Sequence[Path]) -> Iterator[Row]:
    gpus = find_gpus()
    yield python_row()
    yield from package_rows(with_gpu=bool(gpus))
    yield cores_row()
    yield memory_row()
    yield from gpu_rows(gpus)
    yield shm_row()
    yield from ray_rows()
    config, recipe_fault = Config(name="doctor"), ""
    if recipe is not None:
        try:
            config = load(recipe, list(overrides), over=over)
        except UserError as error:
            recipe_fault = str(error)
    yield runs_row(config)
    yield from environment_rows(len(gpus))
    if recipe is not None:
        yield recipe_row(recipe, config, recipe_fault)


def print_rows(rows: Sequence[Row]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("what", "found", "severity", "way out"):
        table.add_column(name, overflow="fold")
    styles = {Severity.ok: "green", Severity.note: "yellow", Severity.fault: "bold red"}
    for row in rows:
        table.add_row(row.what, Text(row.found), Text(row.severity, styles[row.severity]), Text(row.way_out))
    Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False).print(table)
    counts = {severity: sum(row.severity is severity for row in rows) for severity in Severity}
    print(f"{counts[Severity.fault]} faults, {counts[Severity.note]} notes")


def python_row() -> Row:
    if (3, 11) <= sys.version_info < (3, 13):
        return Row("Python", platform.python_version())
    return Row(
        "Python", platform.python_version(), Severity.fault, "make an environment of Python 3.11 or 3.12"
    )


def package_rows(with_gpu: bool) -> Iterator[Row]:
    """What pns's own metadata asks for, with the extra that this machine is for; beside a checkout also the
    exact versions of its list."""
    extra = "gpu" if with_gpu else "cpu"
    install = "docker/README.md says how to install for GPUs" if with_gpu else "make setup"
    tested = exact_versions(_ROOT / _LISTS.format(extra))
    asked: dict[str, list[tuple[Requirement, bool]]] = {}
    for text in importlib.metadata.requires("pns") or []:
        requirement = Requirement(text)
        of_extra = requirement.marker is not None
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            asked.setdefault(canonicalize_name(requirement.name), []).append((requirement, of_extra))
    fine = []
    for name, requirements in sorted(asked.items()):
        found = installed(name)
        wanted = tested.get(name) or " and ".join(str(one.specifier) for one, _ in requirements)
        if found is None:
            optional = all(of_extra for _, of_extra in requirements)  # an engine: the other one needs none
            severity = Severity.note if optional else Severity.fault
            way_out = f"{install}, or set rollout.engine=transformers" if optional else install
            yield Row(name, "not installed", severity, way_out)
            continue
        refused = [of_extra for one, of_extra in requirements if not one.specifier.contains(found, True)]
        if not all(refused):
            yield Row(name, f"{found}; works with {wanted} alone", Severity.fault, install)
        elif refused or (name in tested and found.partition("+")[0] != tested[name]):
            yield Row(name, f"{found}; tested: {wanted}", Severity.note, install)
        else:
            fine.append(f"{name} {found}")
    if with_gpu and "+cpu" in (installed("torch") or ""):
        yield Row("torch", f"{installed('torch')}: built without CUDA", Severity.fault, install)
    yield Row(f"packages ({extra})", ", ".join(fine) or "none as tested")
    differing = []
    for name, version in tested.items():
        found = installed(name)
        if name not in asked and found != version:
            differing.append(f"{name} {found or 'missing'} (tested: {version})")
    if differing:
        more = f" and {len(differing) - MOST_DIFFERING} more" if len(differing) > MOST_DIFFERING else ""
        said = ", ".join(differing[:MOST_DIFFERING]) + more
        yield Row("what they need", said, Severity.note, install)


def exact_versions(path: Path) -> dict[str, str]:
    """Package -> version of a list of NAME==VERSION lines; empty where there is no list."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    found = (re.match(r"([\w.-]+)(?:\[[\w,.-]+\])?==([\w.+!-]+)", line) for line in lines)
    return {canonicalize_name(line[1]): line[2] for line in found if line}


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cores_row() -> Row:
    may_use, all_cores = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    found = f"{may_use} of {all_cores}"
    quota = cgroup_cores()
    if quota is not None and quota < may_use:
        return Row("cores", f"{found}, and a cgroup leaves {quota:g}", Severity.note, slow_cores())
    if may_use < 2:
        return Row("cores", found, Severity.note, "roles take turns: expect twice the time of two cores")
    return Row("cores", found)


def slow_cores() -> str:
    return "more processes than that take turns: lower placement.*.replicas, or raise the limit"


def memory_row() -> Row:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    total, free = kib["MemTotal"] * 1024 / 1e9, kib["MemAvailable"] * 1024 / 1e9
    found = f"{free:.1f} GB free of {total:.1f}"
    if (left := cgroup_memory_gb()) is not None and left < total:
        found, free = f"{found}; a cgroup leaves {left:.1f} GB", min(free, left)
    if free < LEAST_MEMORY_GB:
        way_out = f"end what else runs, or raise the limit: a tiny run takes {LEAST_MEMORY_GB:g} GB"
        return Row("memory", found, Severity.note, way_out)
    return Row("memory", found)


def cgroup_memory_gb() -> float | None:
    """What the limits of this process's control groups leave, in GB; None without a limit."""
    left = []
    for directory in cgroups("memory"):
        for limit, used in (
            ("memory.max", "memory.current"),  # version 2
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            most, now = number_in(directory / limit), number_in(directory / used)
            if most is not None and now is not None and most < 2**60:  # version 1 writes no limit as 2^63
                left.append((most - now) / 1e9)
    return max(min(left), 0.0) if left else None


def cgroup_cores() -> float | None:
    """Cores' worth of time that control groups give this process; None without a limit."""
    quotas = []
    for directory in cgroups("cpu"):
        file = directory / "cpu.max"
        quota, period = (file.read_text(encoding="ascii").split() if file.is_file() else ["max", "1"])[:2]
        if quota != "max":
            quotas.append(int(quota) / int(period))
        old, old_period = (
            number_in(directory / "cpu.cfs_quota_us"),
            number_in(directory / "cpu.cfs_period_us"),
        )
        if old is not None and old > 0 and old_period:
            quotas.append(old / old_period)
    return min(quotas, default=None)


def cgroups(controller: str) -> Iterator[Path]:
    """The directories of this process's groups and of those around it, version 2 and 1."""
    lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup") / (controller if controllers else "")
        own = root / name.lstrip("/")
        yield from (path for path in (own, *own.parents) if path.is_relative_to(root) and path.is_dir())


def number_in(file: Path) -> int | None:
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def find_gpus() -> list[str]:
    """A line `kind, memory MiB, driver` for each GPU of this machine, whatever CUDA_VISIBLE_DEVICES hides.

    A GPU of the driver that nvidia-smi does not list is `""`."""
    by_driver = [""] * len(list(_NVIDIA.iterdir())) if _NVIDIA.is_dir() else []
    command = shutil.which("nvidia-smi")
    if command is None:
        return by_driver
    query = [command, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.run(query, capture_output=True, text=True, timeout=GPU_SECONDS, check=False)
    except (subprocess.TimeoutExpired, OSError):
        return by_driver
    return asked.stdout.strip().splitlines() if asked.returncode == 0 else by_driver


def gpu_rows(gpus: Sequence[str]) -> Iterator[Row]:
    if not gpus:
        yield Row("GPUs", "none: for placement.device=cpu and small models")
        return
    if "" in gpus:
        way_out = (
            "nvidia-smi itself says why; mend the driver, or give the container its devices (--gpus all)"
        )
        yield Row(
            "GPUs", f"{len(gpus)} by the driver, and nvidia-smi does not answer", Severity.fault, way_out
        )
        return
    kinds: dict[str, int] = {}
    for line in gpus:
        name, mib, driver = (part.strip() for part in line.rsplit(",", 2))
        memory = f"{int(mib) / 1024:.0f} GiB" if mib.isdigit() else mib  # a GPU of shared memory has none
        kind = f"{name}, {memory}, driver {driver}"
        kinds[kind] = kinds.get(kind, 0) + 1
    yield Row("GPUs", "; ".join(f"{count} × {kind}" for kind, count in kinds.items()))
    if version := installed("flash-attn"):
        yield Row("flash-attn", version)
    else:
        found = "not installed: packed rows go through torch's own kernel"
        yield Row("flash-attn", found, Severity.note, "optional; docker/README.md says how to build it")


def shm_row() -> Row:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return Row(
            "/dev/shm", "missing", Severity.fault, "mount a tmpfs there: Ray's object store lies in it"
        )
    usage = shutil.disk_usage(shm)
    found = f"{usage.free / 1e9:.1f} GB free of {usage.total / 1e9:.1f}"
    if usage.free / 1e9 < LEAST_SHM_GB:
        way_out = "give the container --shm-size=8g or --ipc=host, or remove what lies in /dev/shm"
        return Row("/dev/shm", f"{found}: Ray would keep objects on the disk", Severity.note, way_out)
    return Row("/dev/shm", found)


def ray_rows() -> Iterator[Row]:
    address = os.environ.get("RAY_ADDRESS", "")
    dashboard = os.environ.get("RAY_API_SERVER_ADDRESS", "")
    named = {"RAY_ADDRESS": address, "RAY_API_SERVER_ADDRESS": dashboard}
    named = {name: value for name, value in named.items() if value}
    if not named:
        yield Row("Ray", "RAY_ADDRESS is not set: pns run starts Ray here")
        return
    for name, value in named.items():
        url = re.match(r"https?://([^/]+)", value)
        try:
            check_address(url[1] if url else value, HEAD_SECONDS, name)
        except UserError as error:
            found, _, way_out = str(error).removeprefix(f"{name}: ").rpartition(": ")
            yield Row(name, found, Severity.fault, way_out)
        else:
            yield Row(name, f"{value} answers" if value not in ("auto", "local") else value)
    yield token_row()


def token_row() -> Row:
    """Where Ray's client finds the token of a cluster that asks for one; the token itself is not read."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    default = Path("~/.ray/auth_token").expanduser()
    way_out = "ray get-auth-token on the head prints it: put it into RAY_AUTH_TOKEN or ~/.ray/auth_token"
    if os.environ.get("RAY_AUTH_TOKEN"):
        found = "RAY_AUTH_TOKEN"
    elif path:
        if not os.access(path, os.R_OK):
            return Row("Ray's token", f"RAY_AUTH_TOKEN_PATH: {path} cannot be read", Severity.fault, way_out)
        found = path
    elif os.access(default, os.R_OK):
        found = str(default)
    else:
        asked = os.environ.get("RAY_AUTH_MODE") == "token"
        severity = Severity.fault if asked else Severity.note
        return Row(
            "Ray's token", "none", severity, way_out + ("" if asked else ", if the cluster asks for one")
        )
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return Row(
            "Ray's token", f"{found}; RAY_AUTH_MODE is not token", Severity.note, "set RAY_AUTH_MODE=token"
        )
    return Row("Ray's token", found)


def runs_row(config: Config) -> Row:
    runs = Path(config.runs).absolute()
    try:
        check_runs(config)
    except UserError as error:
        found, _, way_out = str(error).removeprefix("runs: ").rpartition(": ")
        return Row("runs", found, Severity.fault, way_out)
    there = next(path for path in (runs, *runs.parents) if path.exists())
    free = shutil.disk_usage(there).free / 1e9
    found = f"{free:.1f} GB free at {runs}"
    if free < AMPLE_SPACE_GB:
        severity = Severity.fault if free < LEAST_SPACE_GB else Severity.note
        return Row("runs", found, severity, "pns gc removes old outputs; runs=DIR chooses another place")
    return Row("runs", found)


def environment_rows(num_gpus: int) -> Iterator[Row]:
    """Variables that change a run without a word."""
    before = "environment"
    cores, threads = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > cores:
        yield Row(
            before, f"OMP_NUM_THREADS={threads} on {cores} cores", Severity.note, "unset it, or set it to 1"
        )
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        if os.environ.get(name, "0") not in ("", "0"):
            way_out = "unset it, or name directories: only what is in the cache is found"
            yield Row(before, f"{name}={os.environ[name]}", Severity.note, way_out)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if num_gpus and visible in ("", "-1", "NoDevFiles"):
        found = f"CUDA_VISIBLE_DEVICES={visible} hides {num_gpus} GPUs"
        yield Row(before, found, Severity.note, "unset it, or leave it so for placement.device=cpu")
    if os.environ.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0"):
        yield Row(
            before, "CUDA_LAUNCH_BLOCKING is set: kernels wait for each other", Severity.note, "unset it"
        )


def recipe_row(recipe: Path, config: Config, fault: str) -> Row:
    """What `pns plan` would say of the recipe on this machine, in a row."""
    if not fault:
        try:
            check_inputs(config, stages(config))
            if not os.environ.get("RAY_ADDRESS"):
                check_machine(config, stages(config))
                if config.placement.device is Device.cuda and not find_gpus():
                    raise UserError(
                        "placement.device is cuda, and this machine has no GPU: set it to cpu or auto"
                    )
        except UserError as error:
            fault = str(error)
    if fault:
        return Row(str(recipe), "does not start here", Severity.fault, fault)
    return Row(str(recipe), "models, problems, prompts and placement go with this machine")
