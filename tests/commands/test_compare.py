"""Several runs in one table, from evaluations on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pns import cli
from pns.algo.metrics import paired_difference, score
from pns.files import write_json, write_jsonl
from pns.records import Answered, Problem, Verdict

DECODING = {"samples_per_problem": 1, "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 9}
# Of the models on ten problems of each suite: right ones at the beginning.
RIGHT = {"backbone": {"s": 4, "t": 6}, "nsa": {"s": 6, "t": 7}}


def make_run(
    runs: Path, name: str, right: dict[str, dict[str, int]], seed: int = 0, decoding: object = DECODING
) -> Path:
    """A page with a finished evaluation; the problems of suite `s` are the seed's own."""
    page, place = runs / name, runs / "stages" / f"evaluate-{name}"
    page.mkdir()
    place.mkdir(parents=True)
    (page / "config.yaml").write_text(f"seed: {seed}\n")
    (page / "evaluate").symlink_to(place)
    suites = next(iter(right.values()))
    for model, of_suites in right.items():
        rows = []
        for suite, num_right in of_suites.items():
            for number in range(10):
                text = f"{suite} {number} {seed if suite == 's' else ''}"
                asked = Problem(f"p{number}", text, "1", suite)
                verdict = Verdict.CORRECT if number < num_right else Verdict.WRONG
                rows.append(Answered(asked, 0, 0, "1", 1, "stop", "1", verdict, "equal"))
        write_jsonl(place / f"{model}.jsonl", rows)
    described = {"source": "x", "count": 10, "sha256": str(seed), "without_answer": []}
    write_json(place / "suites.json", {suite: described | {"decoding": decoding} for suite in suites})
    write_json(place / "scores.json", {"mean": dict.fromkeys(right, 0)})
    write_json(place / "manifest.json", {})
    return page


def fail(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert cli.main(["report", *map(str, words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_runs_of_several_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    runs = [
        make_run(tmp_path, f"r{seed}", RIGHT | {"nsa": {"s": 6 + seed, "t": 7}}, seed) for seed in (0, 1, 2)
    ]
    file = tmp_path / "compared.json"
    assert cli.main(["report", *map(str, runs), "--json", str(file), "--against", "nsa"]) == 0
    shown, found = capsys.readouterr().out, json.loads(file.read_text())
    assert list(found) == ["s", "t", "mean"]
    assert found["s"]["nsa"]["runs"] == pytest.approx([0.6, 0.7, 0.8])
    assert found["mean"]["nsa"]["accuracy"] == pytest.approx(0.7)
    assert found["mean"]["nsa"]["n"] == 20
    against = found["mean"]["nsa"]["against"]["backbone"]
    assert against["difference"] == pytest.approx(0.2)
    assert against["verdict"] == "better"
    assert found["mean"]["backbone"]["against"]["nsa"]["difference"] == pytest.approx(-0.2)
    assert (
        "against" not in found["mean"]["backbone"] or "backbone" not in found["mean"]["backbone"]["against"]
    )
    # The problems of `t` are the same in every run, and came out alike: the chance of ten problems is left.
    half = (found["t"]["backbone"]["high"] - found["t"]["backbone"]["low"]) / 2
    assert half == pytest.approx(1.96 * (0.24 / 10) ** 0.5, abs=0.06)
    assert "over 3 runs" in shown
    assert "Against backbone, paired" in shown
    assert "+20.0" in shown


def test_one_run_has_the_intervals_of_its_evaluation(tmp_path: Path) -> None:
    run, file = make_run(tmp_path, "r", RIGHT), tmp_path / "compared.json"
    assert cli.main(["report", str(run), "--json", str(file)]) == 0
    found = json.loads(file.read_text())["s"]
    expected = score(4, 10)
    assert (found["backbone"]["low"], found["backbone"]["high"]) == (expected.low, expected.high)
    before, after = ([1.0] * num + [0.0] * (10 - num) for num in (4, 6))
    assert found["nsa"]["against"]["backbone"]["p_value"] == paired_difference([before], [after]).p_value


def test_runs_that_do_not_compare_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = make_run(tmp_path, "first", RIGHT)
    other = make_run(tmp_path, "other", {"backbone": RIGHT["backbone"], "rft": RIGHT["nsa"]})
    assert "other has the models backbone, rft, and" in fail(capsys, first, other)
    fewer = make_run(tmp_path, "fewer", {model: {"s": 5} for model in RIGHT})
    assert fail(capsys, first, fewer).endswith("first s, t: compare runs of one recipe")
    longer = make_run(tmp_path, "longer", RIGHT, decoding=DECODING | {"max_new_tokens": 18})
    assert "longer has decoding of s " in fail(capsys, first, longer)
    twice = tmp_path / "twice"
    twice.mkdir()
    (twice / "config.yaml").write_text("")
    assert "twice has no finished evaluation" in fail(capsys, first, twice)
    (twice / "evaluate").symlink_to(tmp_path / "stages" / "evaluate-first")
    assert "different seeds, each once" in fail(capsys, first, twice)
    assert "no such model; did you mean nsa?" in fail(capsys, first, "--against", "nsaa")
    assert "is not a run directory" in fail(capsys, first, tmp_path)
