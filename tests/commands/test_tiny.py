"""`pns tiny make`: what it refuses before anything starts, and one whole command."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from pns import cli
from pns.files import sha256_of_tree, stat_of_tree
from pns.run.page import linked_places
from pns.run.place import Place

SMALL = ["steps=2", "hidden_size=8", "layers=1", "feed_forward_size=8", "batch_size=2", "seed=3"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["architecture=gpt2"], "architecture"),
        (["heads=3"], "hidden_size: 128 must be an even multiple of heads, 3"),
        (["steps=0"], "steps: 0 must be 1 or more"),
        (["stepz=3"], "stepz: unknown key"),
        (["misconceptions.plus=0.5"], "misconceptions.plus: the relations are fewer, times and half"),
        (["task=judge"], "samples_from is empty"),
        (["task=judge", "samples_from=./nowhere"], "samples_from: .*nowhere is neither a directory"),
    ],
)
def test_wrong_settings_are_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tiny", "make", str(tmp_path / "out"), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    folder.mkdir()
    for path in (file, folder / "model.safetensors"):
        path.write_text("mine")
    for out in (file, folder):
        assert cli.main(["tiny", "make", str(out), *SMALL]) == 2
        assert capsys.readouterr().err == f"pns: {out} exists: remove it, or name another directory\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_model_is_made_and_kept_with_how_it_was_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "solver"
    out.mkdir()  # an empty one is no obstacle
    arguments = ["tiny", "make", str(out), *SMALL]
    command = [sys.executable, "-m", "pns.cli", *arguments]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert f"{out}: the model" in done.stdout
    assert AutoModelForCausalLM.from_pretrained(out).config.hidden_size == 8
    place = linked_places(tmp_path / "solver.run")["warm_start"]
    manifest = Place(place).manifest()
    assert manifest is not None
    assert (manifest["seed"], manifest["settings"]["steps"]) == (3, 2)
    # The finished model is copied again, not made again.
    made, content = stat_of_tree(place), sha256_of_tree(out)
    assert cli.main(arguments) == 2
    for file in out.iterdir():
        file.unlink()
    assert cli.main(arguments) == 0
    assert (stat_of_tree(place), sha256_of_tree(out)) == (made, content)
    assert capsys.readouterr().out.count("the model") == 1
