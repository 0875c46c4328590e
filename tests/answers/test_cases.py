"""The table of answer pairs, and `pns verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pns import cli
from pns.answers.compare import same_answer
from pns.answers.extract import extract_answer
from pns.records import AnswerRule

FOLDER = Path(__file__).parents[1] / "cases"
CASES = FOLDER / "answers.jsonl"
READINGS = FOLDER / "readings.jsonl"  # a class of notation or of kinds at a time


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def fits(case: dict[str, Any], verdict: str) -> bool:
    """Whether the verdict is the expected one; "not correct" leaves open whether both verifiers can tell."""
    return verdict == case["expected"] or (
        case["expected"] == "not correct" and verdict in ("wrong", "unverified")
    )


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them in one file."""
    file = tmp_path_factory.mktemp("cases") / "cases.jsonl"
    file.write_text(
        CASES.read_text(encoding="utf-8") + READINGS.read_text(encoding="utf-8"), encoding="utf-8"
    )
    return file


@pytest.fixture(scope="module")
def verdicts(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("verify") / "verdicts.jsonl"
    assert cli.main(["verify", str(cases), "--out", str(out), "--processes", "2", "--seconds", "3"]) == 0
    return rows(out)


def test_every_case_of_the_table_has_its_verdict(cases: Path, verdicts: list[dict[str, Any]]) -> None:
    table = rows(cases)
    assert len(table) >= 700
    assert len({json.dumps(case, sort_keys=True) for case in table}) == len(table)
    assert all(case["reason"] for case in table)
    assert len(verdicts) == len(table)
    missed = [
        (case, found) for case, found in zip(table, verdicts, strict=True) if not fits(case, found["verdict"])
    ]
    assert missed == []


def test_verdicts_carry_what_they_rest_on(cases: Path, verdicts: list[dict[str, Any]]) -> None:
    for case, found in zip(rows(cases), verdicts, strict=True):
        assert list(found) == ["verdict", "extracted", "reason", "seconds"]
        assert found["extracted"] == extract_answer(case["prediction"])
        assert found["reason"]
        assert found["seconds"] >= 0
    assert {found["verdict"] for found in verdicts} == {"correct", "wrong", "unverified"}


def test_the_exact_comparison_alone_is_never_against_the_table(cases: Path) -> None:
    for case in rows(cases):
        answer = extract_answer(case["prediction"])
        rule = AnswerRule(case.get("unordered", False), case.get("tolerance", 0.0), case.get("unit", ""))
        same = same_answer(case["gold"], answer, rule) if answer else None
        assert same is not (case["expected"] != "correct"), case


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not a JSON object (Expecting property name"),
        ("[1]", "line 2: not a JSON object (a list)"),
        ('{"gold": "5"}', "line 2: prediction is missing"),
        ('{"gold": null, "prediction": "5"}', "line 2: gold is null; it must be a string"),
        ('{"gold": "5", "prediction": "5", "tolerance": -1}', "line 2: tolerance is -1"),
        ('{"gold": "5", "prediction": "5", "unordered": "yes"}', "line 2: unordered is 'yes'"),
        ('{"gold": "5", "prediction": "5", "unit": 3}', "line 2: unit is 3"),
    ],
)
def test_a_malformed_case_is_named_by_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    cases = tmp_path / "cases.jsonl"
    cases.write_text('{"gold": "5", "prediction": "5"}\n' + line + "\n", encoding="utf-8")
    assert cli.main(["verify", str(cases), "--out", str(tmp_path / "out.jsonl"), "--processes", "1"]) == 2
    assert message in capsys.readouterr().err


def test_wrong_use_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases, out = tmp_path / "cases.jsonl", tmp_path / "out.jsonl"
    assert cli.main(["verify", str(cases), "--out", str(out)]) == 2
    cases.write_text(
        '{"gold": "5", "prediction": "5"}\n\n{"gold": "5", "prediction": "\\\\boxed{6}"}\n', encoding="utf-8"
    )
    out.write_text("kept")
    assert cli.main(["verify", str(cases), "--out", str(out)]) == 2
    assert out.read_text() == "kept"
    assert cli.main(["verify", str(cases), "--out", str(cases), "--force"]) == 2
    assert cli.main(["verify", str(cases), "--out", str(tmp_path / "missing" / "out.jsonl")]) == 2
    assert cli.main(["verify", str(cases), "--out", str(out), "--processes", "0"]) == 2
    said = capsys.readouterr().err.strip().split("\n")
    assert [
        "does not exist" in said[0],
        "--force" in said[1],
        "itself" in said[2],
        "cannot write" in said[3],
        "positive" in said[4],
    ] == [True] * 5
    assert cli.main(["verify", str(cases), "--out", str(out), "--processes", "1", "--force"]) == 0
    assert [found["verdict"] for found in rows(out)] == ["correct", "wrong"]
    assert "2 cases: 1 correct (50.0%), 1 wrong (50.0%), 0 unverified (0.0%)" in capsys.readouterr().err
