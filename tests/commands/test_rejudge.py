"""`pns evaluate --rejudge`: stored completions under the verifier of today."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pns import cli
from pns.algo.scores import summarise
from pns.config import Decoding
from pns.files import read_json, read_jsonl, write_json, write_jsonl
from pns.records import Answered, Problem, Verdict

DECODING = Decoding(1, 0.0, 1.0, 9)


def answered(name: str, gold: str, completion: str, verdict: str, reason: str) -> Answered:
    problem = Problem(name, "?", gold, "s")
    finish = "length" if reason == "truncated" else "stop"
    return Answered(problem, 0, 0, completion, 7, finish, None, Verdict(verdict), reason)


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    """As another verifier has left it."""
    rows = [
        answered("a", "1/2", r"\boxed{0.5}", "unverified", "undecided"),
        answered("b", "2", r"\boxed{3}", "correct", "equal"),
        answered("c", "4", r"\boxed{4}", "correct", "equal"),
        answered("d", "4", r"\boxed{4}", "wrong", "truncated"),
        answered("e", "4", "", "wrong", "prompt_too_long"),
    ]
    folder = tmp_path / "run" / "evaluate"
    folder.mkdir(parents=True)
    write_jsonl(folder / "m.jsonl", rows)
    write_json(folder / "suites.json", {"s": {"decoding": vars(DECODING)}})
    write_json(folder / "scores.json", summarise({"m": rows}, {"s": DECODING}, seed=3))
    return tmp_path / "run"


def test_what_changed_is_shown_and_what_was_there_stays(
    evaluation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (evaluation / "evaluate/m.jsonl").read_bytes()
    assert cli.main(["evaluate", "--rejudge", str(evaluation)]) == 0
    out = evaluation / "rejudged"
    verdicts = {row["problem"]["id"]: (row["verdict"], row["reason"]) for row in read_jsonl(out / "m.jsonl")}
    assert verdicts == {
        "a": ("correct", "equal"),
        "b": ("wrong", "different"),
        "c": ("correct", "equal"),
        "d": ("wrong", "truncated"),
        "e": ("wrong", "prompt_too_long"),
    }
    changed = [(row["problem"]["id"], row["verdict_before"]) for row in read_jsonl(out / "changed.jsonl")]
    assert changed == [("a", "unverified"), ("b", "correct")]
    scores = read_json(out / "scores.json")
    assert (scores["s"]["m"]["accuracy"], scores["s"]["m"]["seed"]) == (0.4, 3)
    assert (out / "browse/index.html").is_file()
    assert (evaluation / "evaluate/m.jsonl").read_bytes() == before
    assert cli.main(["evaluate", "--rejudge", str(evaluation / "evaluate")]) == 0  # the folder itself, again
    assert "2 rows" in capsys.readouterr().out


def test_gold_answers_that_differ_now_are_told_and_count_where_asked(
    evaluation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def right(*words: str) -> float:
        assert cli.main(["evaluate", "--rejudge", str(evaluation), *words]) == 0
        return read_json(evaluation / "rejudged/scores.json")["s"]["m"]["accuracy"]

    assert right() == 0.4
    assert "gold answers are the stored ones (recipe" in capsys.readouterr().out
    problems = [{"id": "a", "problem": "?", "answer": "1/2"}, {"id": "b", "problem": "?", "answer": "3"}]
    problems += [{"id": "c", "problem": "?", "answer": "4"}, {"id": "e", "problem": "?", "answer": "4"}]
    write_jsonl(evaluation / "suite.jsonl", problems)
    config = "data: {source: jsonl, jsonl: {suites: {s: suite.jsonl}}}"
    (evaluation / "config.yaml").write_text(config)
    assert right() == 0.4
    line = "s: of 5 gold answers 1 differ now (b), 1 are gone; the stored ones count (--new-golds"
    assert line in capsys.readouterr().out
    assert right("--new-golds") == 0.6
    (row,) = [row for row in read_jsonl(evaluation / "rejudged/m.jsonl") if row["problem"]["id"] == "b"]
    assert (row["problem"]["answer"], row["verdict"]) == ("3", "correct")
    (evaluation / "suite.jsonl").unlink()
    capsys.readouterr()
    assert cli.main(["evaluate", "--rejudge", str(evaluation), "--new-golds"]) == 2
    assert cli.main(["evaluate", "model", "--new-golds"]) == 2
    missing, misplaced = capsys.readouterr().err.strip().split("\n")
    assert "suite.jsonl" in missing
    assert "--new-golds is of --rejudge" in misplaced


def test_wrong_use_is_one_line(evaluation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "--rejudge", str(evaluation / "nowhere")]) == 2
    assert cli.main(["evaluate", "model", "--rejudge", str(evaluation)]) == 2
    assert cli.main(["evaluate"]) == 2
    (evaluation / "evaluate/m.jsonl").unlink()
    assert cli.main(["evaluate", "--rejudge", str(evaluation)]) == 2
    said = capsys.readouterr().err.strip().split("\n")
    words = ("no evaluate/scores.json", "leave model out", "name a MODEL", "m.jsonl is missing")
    assert len(said) == len(words)
    assert all(word in line for word, line in zip(words, said, strict=True))


def test_it_needs_no_model_library(evaluation: Path) -> None:
    heavy = ("torch", "ray", "transformers", "vllm", "verl")
    script = (
        "import sys; from pns import cli; code = cli.main(sys.argv[1:]);"
        f"print([name for name in {heavy} if name in sys.modules]); sys.exit(code)"
    )
    words = [sys.executable, "-c", script, "evaluate", "--rejudge", str(evaluation)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1].replace("'", '"')) == []
