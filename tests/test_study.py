"""A small study: its arms in one run, what they share, and its page."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pns import driver
from pns.commands.study import report_study
from pns.files import read_json, read_jsonl, write_jsonl
from pns.recipe import load
from tests.test_end_to_end import SMALL

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes/tiny-qwen2.yaml"
ARMS = ("rs", "pns", "rft", "given", "own")


@pytest.fixture(scope="module")
def run(without_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of one run with every kind of arm."""
    root = tmp_path_factory.mktemp("study")
    given = root / "given.jsonl"
    config = load(RECIPE, SMALL)
    problems = driver.load_problem_sets(config).preference
    rows = []
    for own in problems:
        assert own.solution
        wrong = own.solution.replace(f"boxed{{{own.answer}}}", f"boxed{{{own.answer}1}}")
        rows.append({"problem": own.prompt, "completion": wrong})
    write_jsonl(given, rows)
    words = [
        *SMALL,
        f"runs={root / 'runs'}",
        "rollout.engine=transformers",
        "method=study",
        "study.arms.rs=[negatives=rs]",
        "pair.perplexity_samples=0",
        "study.arms.pns=[]",
        "study.arms.rft=[negatives=rs,preference.loss=sft]",
        f"study.arms.given=[negatives=file,sources.file={given},synthesize.drop_box_only_flips=false]",
        "study.arms.own=[negatives=rs,study.pairs=own,preference.loss=simpo]",
    ]
    return driver.run(load(RECIPE, words))


def pairs(run: Path, arm: str) -> list[dict[str, Any]]:
    return list(read_jsonl(run / f"pair_{arm}" / "pairs.jsonl"))


def test_arms_have_problems_and_right_sides_in_common(run: Path) -> None:
    first = [(row["problem_id"], row["chosen"]) for row in pairs(run, "pns")]
    assert first
    for arm in ARMS[:-1]:
        assert [(row["problem_id"], row["chosen"]) for row in pairs(run, arm)] == first, arm
    assert {row["problem_id"] for row in pairs(run, "own")} >= {identity for identity, _ in first}
    assert all(row["rejected"].endswith("1}") for row in pairs(run, "given"))
    assert {row["source"] for row in pairs(run, "own")} == {"rs"}


def test_what_arms_have_in_common_is_made_once(run: Path) -> None:
    def place(step: str) -> Path:
        return (run / step).resolve()

    assert place("synthesize_rs") == place("synthesize_rft") == place("synthesize_own")
    assert place("pair_rs") == place("pair_rft")
    assert place("preference_rs") != place("preference_rft")


def test_every_arm_is_scored_beside_the_target(run: Path) -> None:
    mean = read_json(run / "evaluate" / "scores.json")["mean"]
    assert list(mean) == ["backbone", "target", *ARMS]


def test_the_studys_page(run: Path, tmp_path: Path) -> None:
    shown = io.StringIO()
    report_study(tmp_path / "study", {"qwen2": [run]}, Console(file=shown, width=200))
    assert "pns" in shown.getvalue()
    figures = read_json(tmp_path / "study" / "study.json")["qwen2"]
    own = figures["negatives"]["pns"]
    assert own["pairs"] == len(pairs(run, "pns"))
    assert 0 <= own["single error"] <= 1
    covered = figures["coverage"]
    assert covered["given"]["all"] == 1.0
    assert 0 < covered["rs"]["all"] <= 1.0
    errors = figures["first_errors"]
    assert errors["given"].keys() == errors["rs"].keys()
    # A right derivation and another number in the box, which may be that of another quantity.
    assert errors["given"]["answer"] + errors["given"].get("query", 0.0) == pytest.approx(1)
    assert sum(errors["pns"].values()) == pytest.approx(1)
    page = (tmp_path / "study" / "report.html").read_text(encoding="utf-8")
    for said in ("qwen2: results", "qwen2: negatives", "qwen2: side by side", "<svg", "<mark"):
        assert said in page
    tables = (tmp_path / "study" / "tables.md").read_text(encoding="utf-8")
    assert "| pns |" in tables
    assert "| first error, share of negatives |" in tables
    rft = figures["suites"]["mean"]["pns"]["against"]["rft"]
    assert f"{100 * rft['difference']:+.1f} [" in tables
