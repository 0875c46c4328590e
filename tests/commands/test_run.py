"""`pns runs` and `gc`: what runs keep, and what may go."""

from __future__ import annotations

import io
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pns import cli
from pns.commands.run import collect_garbage, readable_age, readable_size
from pns.config import Config
from pns.run.page import RunPage
from pns.run.place import Place
from pns.run.stage import Artefact, Step, stage

DAY = 86400


@stage(Artefact, lambda config: None, lambda settings: ())
def write(ctx: Any, settings: None) -> Artefact:
    raise AssertionError("no command makes a stage here")


def made_step(
    runs: Path, name: str, number: int, inputs: list[Step] | None = None, done: bool = True
) -> Step:
    """A step whose output is there, or (not `done`) was interrupted."""
    place = Place(runs / "stages" / f"{name}-{number}")
    described = [{"stage": step.place.directory.name, "digest": "d"} for step in inputs or []]
    step = Step(name, name, write, None, (), place, {"inputs": described})
    with ExitStack() as stack:
        if not done:
            stack.enter_context(pytest.raises(KeyboardInterrupt))
        with place.making(step.made_from):
            (place.directory / "model").write_bytes(b"x" * 3000)
            if not done:
                raise KeyboardInterrupt
    return step


def link(runs: Path, page_name: str, *steps: Step) -> None:
    with RunPage.open(runs / page_name) as page:
        page.begin(Config(), {})
        for step in steps:
            page.link(step)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two arms that share `rl`; the second one's `pair` was interrupted; three outputs that nobody needs."""
    runs = tmp_path / "runs"
    shared = made_step(runs, "rl", 1)
    link(runs, "first", shared, made_step(runs, "pair", 1, [shared]))
    link(runs, "second", shared, made_step(runs, "pair", 2, [shared], done=False))
    made_step(runs, "rl", 8)
    made_step(runs, "pair", 8)
    made_step(runs, "pair", 9, done=False)
    return runs


def kept(runs: Path) -> set[str]:
    return {path.name for path in (runs / "stages").iterdir() if path.is_dir()}


NEEDED = {"rl-1", "pair-1", "pair-2"}
NOT_NEEDED = {"rl-8", "pair-8", "pair-9"}


def test_runs_lists_runs_their_stages_and_what_nobody_needs(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weeks_ago = (runs / "stages" / "rl-1").stat().st_mtime - 14 * DAY
    os.utime(runs / "stages" / "rl-1", (weeks_ago, weeks_ago))
    assert cli.main(["runs", "--runs", str(runs)]) == 0
    linked, _, unlinked = capsys.readouterr().out.partition("led to by no run")
    lines = linked.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == ["first", "second"]
    words = [line.split() for line in lines if line.startswith(" ")]
    assert [line[:3] for line in words] == [
        ["pair", "pair-1", "done"],
        ["rl", "rl-1", "done"],
        ["pair", "pair-2", "unfinished"],
        ["rl", "rl-1", "done"],
    ]
    assert words[1][-4:-2] == ["4", "KiB"]
    assert words[1][-2:] == ["14", "d"]
    assert {line.split()[0] for line in unlinked.splitlines()[1:]} == NOT_NEEDED


@pytest.mark.parametrize("answer", ["", "n", "no"])
def test_gc_asks_first(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{answer}\n"))
    assert cli.main(["gc", "--runs", str(runs)]) == 0
    shown = capsys.readouterr().out
    assert "remove these 3 outputs (" in shown
    assert "nothing was removed" in shown
    assert kept(runs) == NEEDED | NOT_NEEDED


def test_gc_removes_what_no_run_needs(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    collect_garbage(runs, yes=False)
    assert kept(runs) == NEEDED
    capsys.readouterr()
    assert cli.main(["gc", "--runs", str(runs)]) == 0
    assert "every output is led to by a run" in capsys.readouterr().out


def test_gc_yes_does_not_ask(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert cli.main(["gc", "--yes", "--runs", str(runs)]) == 0
    assert kept(runs) == NEEDED


def test_gc_keeps_what_is_being_made(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = Place(runs / "stages" / "pair-9")
    with place.making({"inputs": []}):
        collect_garbage(runs, yes=True)
    assert kept(runs) == NEEDED | {"pair-9"}
    assert f"pair-9 is in use by process {os.getpid()}" in capsys.readouterr().out


def test_gc_keeps_what_a_needed_output_was_made_from(runs: Path) -> None:
    """A run that is half way to another configuration: its `rl` is new, its `pair` of the old one."""
    link(runs, "first", made_step(runs, "rl", 2))
    (runs / "second").rename(runs.parent / "second")
    collect_garbage(runs, yes=True)
    assert kept(runs) == {"rl-2", "pair-1", "rl-1"}


def test_gc_frees_what_only_a_removed_run_led_to(runs: Path) -> None:
    for path in (runs / "second").iterdir():
        path.unlink()
    (runs / "second").rmdir()
    collect_garbage(runs, yes=True)
    assert kept(runs) == {"rl-1", "pair-1"}


def test_runs_of_nothing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("runs", "gc"):
        assert cli.main([name, "--runs", str(tmp_path)]) == 2
        assert "--runs DIR" in capsys.readouterr().err


def test_an_output_that_was_removed_by_hand_is_left_out(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs / "stages" / "pair-1").rename(runs.parent / "elsewhere")
    assert cli.main(["runs", "--runs", str(runs)]) == 0
    assert "pair-1" not in capsys.readouterr().out


def test_sizes_and_ages_are_readable() -> None:
    sizes = [readable_size(num) for num in (0, 1023, 1024, 5 * 1024**2, 3.25 * 1024**3, 2000 * 1024**3)]
    assert sizes == ["0 B", "1023 B", "1 KiB", "5 MiB", "3.2 GiB", "2000.0 GiB"]
    assert [readable_age(seconds) for seconds in (5, 90, 7200, 10 * DAY)] == ["5 s", "2 min", "2 h", "10 d"]
