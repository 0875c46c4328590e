"""`pns study`: its runs as processes, and what is refused before any of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pns import cli
from pns.commands.study import Cell, last_line, leave, make_cells, study_cells
from pns.errors import UserError
from pns.recipe import load, study_arms

ROOT = Path(__file__).parents[2]
TINY = ROOT / "recipes" / "tiny-qwen2.yaml"
ARMS = ["method=study", "study.arms.rs=[negatives=rs]", "study.arms.simpo=[preference.loss=simpo]"]


def test_every_backbone_has_every_seed(tmp_path: Path) -> None:
    words = [*ARMS, "study.seeds=[3,1]", "study.backbones={a: A, b: B}", f"runs={tmp_path}", "name=s"]
    cells = study_cells(load(TINY, words))
    assert [cell.page.name for cell in cells] == ["s-a-3", "s-a-1", "s-b-3", "s-b-1"]
    assert cells[2].words == [f"models.backbone={Path.cwd() / 'B'}", "seed=3", "name=s-b-3"]
    assert cells[0].log == tmp_path / "s" / "a-3.log"


def test_an_arm_differs_by_its_words_alone() -> None:
    config = load(TINY, ARMS)
    arms = study_arms(config)
    assert arms["rs"].negatives == "rs"
    assert arms["rs"].preference == config.preference
    assert arms["simpo"].negatives == "pns"
    # SimPO's own numbers, not those of the recipe's loss.
    assert (arms["simpo"].preference.beta, arms["simpo"].preference.target_margin) == (2.0, 1.0)
    assert arms["simpo"].preference.nll_weight is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "study.arms is empty"),
        (["study.arms.a=[negatives=nowhere]"], "negatives: 'nowhere' is no source of negatives"),
        (["study.arms.a=[rl.steps=3]"], "study.arms.a: rl.steps=3: all arms have the same rl"),
        (["study.arms.target=[]"], "study.arms.target: 'target' must be a plain word"),
        (["study.arms.a=[preference.lss=ipo]"], "study.arms.a: preference.lss: unknown key"),
        (["study.arms.a=[preference.loss=ipo,preference.nll_weight=1]"], "not read by preference.loss=ipo"),
        (["study.arms.a=[negatives=file]"], "sources.file: '' is not a file"),
        (["study.arms.a=[]", "study.seeds=[1,1]"], "study.seeds: [1, 1] must be numbers"),
        (["study.arms.a=[]", "study.backbones.x=/nowhere"], "models.backbone: /nowhere is neither"),
    ],
)
def test_what_no_study_can_be_made_of_is_refused_first(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["study", str(TINY), "method=study", f"runs={tmp_path}", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_another_method_is_no_study(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["study", str(TINY)]) == 2
    assert "a study has method=study" in capsys.readouterr().err


def test_a_run_that_fails_stops_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [
        Cell("a", seed, [str(seed)], tmp_path / f"a-{seed}", tmp_path / "logs" / f"a-{seed}.log")
        for seed in range(3)
    ]
    program = "import sys; print('made', sys.argv[1]); sys.exit(sys.argv[1] == '1')"
    failed = make_cells(cells, [sys.executable, "-c", program], at_once=2)
    assert failed == [cells[1]]
    assert [last_line(cell.log) for cell in cells] == ["made 0", "made 1", "made 2"]
    shown = capsys.readouterr().out
    assert "a, seed 1: failed: made 1" in shown
    assert "3 of 3" in shown


def test_an_interruption_leaves_no_process() -> None:
    sleeping = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) for _ in range(2)]
    leave(sleeping)
    assert all(process.returncode is not None for process in sleeping)


def test_a_run_without_output_says_so(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("\n\n")
    assert last_line(tmp_path / "log") == "it printed nothing"
    with pytest.raises(UserError, match=r"study\.seeds"):
        study_cells(load(TINY, [*ARMS, "study.seeds=[]"]))
