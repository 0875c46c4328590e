"""Where a stage's output lies: complete or absent, checked when it is read, and made by one process at a
time."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pns.errors import UserError
from pns.files import read_json, write_json
from pns.run.place import Place, versions

ROOT = Path(__file__).parents[2]
WAY_OUT = "make it again with --from write"
NOTHING: dict[str, Any] = {"stage": "write", "inputs": []}


def finished(directory: Path, text: str = "weights", made_from: dict[str, Any] = NOTHING) -> Place:
    """A place whose stage wrote `text` into two files."""
    place = Place(directory)
    with place.making(made_from):
        (directory / "model").mkdir()
        (directory / "model" / "shard").write_text(text)
        (directory / "counts.json").write_text("{}")
    return place


def test_the_manifest_comes_last_and_tells_what_was_made_from_what(tmp_path: Path) -> None:
    place = Place(tmp_path / "write-1")
    made_from = {**NOTHING, "settings": {"steps": 5}, "seed": 3}
    with place.making(made_from):
        (place.directory / "text").write_text("weights")
        (place.directory / "metrics.jsonl").write_text("")
        place.count(samples=7, kept=1)
        place.count(kept=2)
        assert place.manifest() is None
        assert not place.is_done(made_from, WAY_OUT)
    manifest = place.manifest()
    assert manifest is not None
    hashes = {name: entry["sha256"] for name, entry in manifest["outputs"].items()}
    assert hashes["text"] == hashlib.sha256(b"weights").hexdigest()
    assert sorted(hashes) == ["metrics.jsonl", "text"]
    assert (manifest["settings"], manifest["seed"]) == ({"steps": 5}, 3)
    assert manifest["counts"] == {"samples": 7, "kept": 2}
    assert manifest["seconds"] >= 0
    assert manifest["started"] <= manifest["ended"]
    assert manifest["versions"]["torch"]
    assert sorted(path.name for path in place.directory.iterdir()) == [
        "lock",
        "manifest.json",
        "metrics.jsonl",
        "text",
    ]
    assert place.is_done(made_from, WAY_OUT)


def fail_after(place: Place, error: BaseException) -> None:
    with place.making(NOTHING):
        (place.directory / "half").write_text("x")
        (place.directory / "rows.unfinished.jsonl").write_text("{}\n")
        place.count(before=1)
        (place.begin_checkpoint(4) / "shard").write_text("4")
        place.end_checkpoint(4)
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("lost")], ids=["ctrl-c", "failure"])
def test_an_interrupted_stage_goes_on_with_its_files_counts_and_time(
    tmp_path: Path, error: BaseException
) -> None:
    place = Place(tmp_path / "write-1")
    with pytest.raises(type(error)):
        fail_after(place, error)
    assert not place.is_done(NOTHING, WAY_OUT)
    progress = read_json(place.directory / "progress.json")
    write_json(place.directory / "progress.json", progress | {"seconds": 1000.0})
    with place.making(NOTHING):
        checkpoint = place.latest_checkpoint()
        assert checkpoint is not None
        assert checkpoint.step == 4
        assert (checkpoint.path / "shard").read_text() == "4"
        assert (place.directory / "half").read_text() == "x"
        assert (place.directory / "rows.unfinished.jsonl").exists()
        place.count(after=2)
    manifest = place.manifest()
    assert manifest is not None
    assert manifest["counts"] == {"before": 1, "after": 2}
    assert manifest["seconds"] >= 1000
    assert manifest["started"] == progress["started"]
    assert list(manifest["outputs"]) == ["half"]
    assert not (place.directory / "rows.unfinished.jsonl").exists()


def test_checkpoints_are_complete_and_two_are_kept(tmp_path: Path) -> None:
    place = Place(tmp_path / "write-1")
    with place.making(NOTHING):
        assert place.latest_checkpoint() is None
        for step in (2, 4, 10):
            (place.begin_checkpoint(step) / "shard").write_text(str(step))
            place.end_checkpoint(step)
        (place.begin_checkpoint(12) / "shard").write_text("half")  # and never ended
        latest = place.latest_checkpoint()
        assert latest is not None
        assert (latest.step, (latest.path / "shard").read_text()) == (10, "10")
        kept = sorted(path.name for path in place.directory.glob("checkpoints/step-*"))
        assert kept == ["step-00000004", "step-00000010"]
        assert list(place.begin_checkpoint(12).iterdir()) == []  # begun again
    assert not (place.directory / "checkpoints").exists()


def test_what_a_crash_left_half_written_is_removed_at_the_start(tmp_path: Path) -> None:
    place = Place(tmp_path / "write-1")
    partial = place.directory / "checkpoints" / ".partial-step-00000012"
    partial.mkdir(parents=True)
    (partial / ".partial-shard").write_text("half")
    (place.directory / ".partial-scores.json").write_text("{")
    with place.making(NOTHING):
        assert not list(place.directory.rglob("*partial*"))
        assert place.latest_checkpoint() is None


def other_process(place: Place) -> subprocess.CompletedProcess[str]:
    """What happens where another process wants to make the same stage."""
    code = (
        "import sys; from pathlib import Path; from pns.run.place import Place\n"
        "with Place(Path(sys.argv[1])).making({'inputs': []}): pass"
    )
    command = [sys.executable, "-c", code, str(place.directory)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_one_process_makes_a_stage(tmp_path: Path) -> None:
    place = Place(tmp_path / "write-1")
    with place.making(NOTHING):
        refused = other_process(place)
        assert refused.returncode != 0
        assert f"{place.directory} is in use by process {os.getpid()} on" in refused.stderr
        assert "its output will be used" in refused.stderr
    with pytest.raises(UserError, match="finished meanwhile"), place.making(NOTHING):
        pass


def test_storage_without_locks_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: Any, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(UserError, match=r"write-1/lock cannot be locked .*No locks available.*runs=DIR"):
        finished(tmp_path / "write-1")
    assert Place(tmp_path / "write-1").manifest() is None


def test_the_lock_of_a_process_that_has_died_holds_nobody(tmp_path: Path) -> None:
    place = Place(tmp_path / "write-1")
    place.directory.mkdir()
    (place.directory / "lock").write_text("process 1 on elsewhere\n")
    with place.making(NOTHING):
        assert f"process {os.getpid()} on" in (place.directory / "lock").read_text()


@pytest.mark.parametrize("name", ["model/shard", "counts.json"])
@pytest.mark.parametrize("damage", ["truncated", "deleted", "changed"])
def test_damaged_output_is_named_with_the_way_out(tmp_path: Path, name: str, damage: str) -> None:
    place = finished(tmp_path / "write-1")
    file = place.directory / name
    if damage == "deleted":
        file.unlink()
    else:
        text = file.read_text()
        file.write_text("" if damage == "truncated" else text.replace(text[0], "X"))
        os.utime(file, (1, 1))  # a change within one tick of the clock would go unseen
    with pytest.raises(UserError) as raised:
        place.is_done(NOTHING, WAY_OUT)
    assert str(file) in str(raised.value)
    assert str(raised.value).endswith(WAY_OUT)


def test_another_time_with_the_same_content_is_no_damage(tmp_path: Path) -> None:
    place = finished(tmp_path / "write-1")
    os.utime(place.directory / "model" / "shard", (1, 1))
    assert place.is_done(NOTHING, WAY_OUT)


@pytest.mark.parametrize("nested", [False, True], ids=["input", "dict of inputs"])
def test_an_input_that_was_made_anew_since_is_noticed(tmp_path: Path, nested: bool) -> None:
    described = {"stage": "write-1", "digest": "d"}
    inputs = [None, {"digest": "problems"}, {"result": described} if nested else described]
    made_from = {"stage": "follow", "inputs": inputs}
    finished(tmp_path / "write-1")
    follow = finished(tmp_path / "follow-1", made_from=made_from)
    assert follow.is_done(made_from, WAY_OUT)
    (tmp_path / "write-1" / "manifest.json").unlink()
    assert follow.is_done(made_from, WAY_OUT)  # an input that is gone contradicts nothing
    with Place(tmp_path / "write-1").making(NOTHING):
        (tmp_path / "write-1" / "model" / "shard").write_text("other weights")
    with pytest.raises(UserError, match=r"follow-1 was made from another output of write-1: make it again"):
        follow.is_done(made_from, WAY_OUT)


def test_versions_are_those_installed() -> None:
    known = versions()
    assert known["python"] == ".".join(map(str, sys.version_info[:3]))
    assert known["ray"]
    assert known["transformers"]
    assert json.dumps(known)
