"""A run's page: names that lead to places, what the run is made with, and one process at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pns.config import Config
from pns.errors import UserError
from pns.files import read_json, write_json
from pns.run.page import RunPage, linked_places, pages
from pns.run.place import Place
from pns.run.stage import Artefact, Step, stage

ROOT = Path(__file__).parents[2]


@stage(Artefact, lambda config: None, lambda settings: ())
def write(ctx: Any, settings: None) -> Artefact:
    raise AssertionError("no page makes a stage")


def step_at(runs: Path, number: int, name: str = "rl") -> Step:
    """A step whose output is there."""
    place = Place(runs / "stages" / f"{name}-{number}")
    made_from = {"inputs": [], "number": number}
    if place.manifest() is None:
        with place.making(made_from):
            pass
    return Step(name, name, write, None, (), place, made_from)


def test_names_are_relative_links_that_follow_the_run(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    first, second = step_at(runs, 1), step_at(runs, 2)
    with RunPage.open(runs / "small") as page:
        assert page.previous("rl") is None
        assert not page.leads_to(first)
        page.link(first)
        page.link(first)
        assert page.leads_to(first)
        assert (page.path / "rl" / "manifest.json").is_file()
        page.link(second)
        assert page.leads_to(second)
        assert not page.leads_to(first)
        previous = page.previous("rl")
        assert previous is not None
        assert previous["number"] == 2
    assert first.is_done()  # the output before is kept
    runs.rename(tmp_path / "moved")
    places = linked_places(tmp_path / "moved" / "small")
    assert places == {"rl": tmp_path / "moved" / "stages" / "rl-2"}


def test_what_stands_in_the_place_of_a_link_is_not_removed(tmp_path: Path) -> None:
    step = step_at(tmp_path, 1)
    own = tmp_path / "small" / "rl" / "own.txt"
    own.parent.mkdir(parents=True)
    own.write_text("work of years")
    with RunPage.open(tmp_path / "small") as page:
        assert not page.leads_to(step)
        with pytest.raises(UserError, match=r"small/rl is no link: .*name=NAME"):
            page.link(step)
    assert own.read_text() == "work of years"


def test_a_page_speaks_of_a_configuration_once_the_run_has_begun(tmp_path: Path) -> None:
    with RunPage.open(tmp_path / "small") as page:
        assert [path.name for path in page.path.iterdir()] == ["lock"]
        assert pages(tmp_path) == []
        page.begin(Config(seed=7), {"rl": 2})
    assert pages(tmp_path) == [tmp_path / "small"]
    assert "seed: 7" in (tmp_path / "small" / "config.yaml").read_text()
    assert RunPage(tmp_path / "small").attempts == {"rl": 2}


def test_time_and_memory_add_up_over_processes(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"wall_seconds": 100.0, "peak_memory_gib": 5.0})
    with RunPage.open(tmp_path) as page:
        page.save(peak_memory_gib=3.0)
    kept = read_json(tmp_path / "run.json")
    assert kept["wall_seconds"] > 100
    assert kept["peak_memory_gib"] == 5.0
    with RunPage.open(tmp_path) as page:
        page.save(peak_memory_gib=6.0)
        page.save()
    assert read_json(tmp_path / "run.json")["peak_memory_gib"] == 6.0


def test_one_process_works_on_a_run(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pns.run.page import RunPage\n"
        "with RunPage.open(Path(sys.argv[1])): pass"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with RunPage.open(tmp_path):
        refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert refused.returncode != 0
    assert f"in use by process {os.getpid()} on" in refused.stderr
    assert "name=NAME" in refused.stderr
    with RunPage.open(tmp_path):
        pass


def test_links_to_what_was_removed_are_left_out(tmp_path: Path) -> None:
    step = step_at(tmp_path, 1)
    with RunPage.open(tmp_path / "small") as page:
        page.link(step)
        step.place.directory.rename(tmp_path / "elsewhere")
        assert linked_places(page.path) == {}
        assert page.previous("rl") is None
