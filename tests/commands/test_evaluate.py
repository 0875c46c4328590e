"""`pns evaluate`: wrong use, comparisons, and a tiny model killed, continued, and counted again by hand."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pns import cli
from pns.algo.scores import summarise
from pns.commands.evaluate import compare_evaluations
from pns.config import Decoding
from pns.errors import UserError
from pns.files import write_jsonl
from pns.records import Answered, Problem, Verdict

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/tiny-qwen2.yaml"
MODEL = ROOT / "recipes/tiny/qwen2"
KEYS = [
    "data.tiny.num_test_per_suite=5",
    "rollout.engine=transformers",
    "rollout.max_batch=16",
    "placement.device=cpu",
    "placement.verifier_processes=1",
    "evaluate.temperature=0.9",
    "evaluate.top_p=0.95",
    "evaluate.samples_per_problem=16",
    "evaluate.per_suite.short.samples_per_problem=1",
    "evaluate.per_suite.short.temperature=0",
    "evaluate.per_suite.mul.max_new_tokens=20",
]
TINY = ["data.source=tiny", "data.prompt=none", "evaluate.max_new_tokens=40"]
BUDGET = ["evaluate.thinking_budget=9"]
NUM_COMPLETIONS = 5 + 6 * 5 * 16

Row = dict[str, Any]


def rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def greedy(verdicts: dict[str, str]) -> list[Answered]:
    """One sample of each problem."""
    return [
        Answered(Problem(name, "?", "1", "s"), 0, 0, "", 7, "stop", "1", Verdict(verdict), "equal")
        for name, verdict in verdicts.items()
    ]


def test_another_evaluation_must_have_asked_the_same() -> None:
    mine = greedy({"a": "correct", "b": "wrong"})
    scores = summarise({"m": mine}, {"s": Decoding(1, 0.0, 1.0, 9)}, seed=0)
    compared = compare_evaluations(scores, "m", mine, "m", list(reversed(mine)))
    assert compared["s"]["m"]["against"]["m (other)"]["difference"] == 0.0
    others = (mine[:1], [*mine, *greedy({"a": "wrong"})], greedy({"a": "correct", "z": "wrong"}))
    for other in others:
        with pytest.raises(UserError, match="differ in the problems or samples of s"):
            compare_evaluations(scores, "m", mine, "o", other)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["absent/model/here", "benchmarks=[gsm8k]"], ("MODEL", "absent/model/here")),
        ([str(MODEL)], ("name at least one suite",)),
        ([str(MODEL), "benchmarks=[gsm9k]"], ("gsm9k", "gsm8k")),
        ([str(MODEL), "benchmarks=[college_math]"], ("college_math", "data.root=DIR")),
        ([str(MODEL), "benchmarks=[gsm8k]", "data.root=/nowhere"], ("/nowhere", "NAME.jsonl")),
        ([str(MODEL), *TINY, "evaluate.thinking_budget=40"], ("40 leaves no token of max_new_tokens, 40",)),
        ([str(MODEL), *TINY, *BUDGET, "data.think_tags=[<t>,</t>]"], ("thinking_budget: 9", "<t> and </t>")),
        ([str(MODEL), *TINY, "data.think_tags=[[T],[/T]]"], ("data.think_tags", "not two different texts")),
        (
            ["http://localhost/v1", "--model=m", *TINY, *BUDGET],
            ("thinking_budget: 9", "no request to a server"),
        ),
    ],
)
def test_wrong_use(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], words: tuple[str, ...]
) -> None:
    assert cli.main(["evaluate", *arguments, f"out={tmp_path / 'out'}"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for word in words:
        assert word in message
    assert not (tmp_path / "out").exists()


def test_show_prompt(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    suite = tmp_path / "own.jsonl"
    suite.write_text('{"problem": "Gus has 12. How many has Gus?", "answer": "12"}\n')
    keys = [f"data.jsonl.suites.own={suite}", "data.prompt=none", "evaluate.max_new_tokens=50"]
    assert cli.main(["evaluate", str(MODEL), "--show-prompt", *keys, f"out={tmp_path / 'out'}"]) == 0
    shown = capsys.readouterr().out
    # The tiny tokenizer has no question mark without a space.
    assert "<bos>Gus has 12. How many has Gus<solve>\n" in shown
    assert "'max_new_tokens': 50" in shown
    assert not (tmp_path / "out").exists()


def arguments(out: Path, *words: str) -> list[str]:
    return ["evaluate", str(MODEL), "--recipe", str(RECIPE), *KEYS, f"out={out}", *words]


def evaluated(out: Path, *words: str) -> str:
    """What a whole process prints that is not interrupted."""
    command = [sys.executable, "-m", "pns.cli", *arguments(out, *words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def whole_lines(path: Path) -> list[str]:
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("\n")]


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """The directory of an evaluation that was killed and continued, how many completions the first process
    left, and what the second printed."""
    out = tmp_path_factory.mktemp("evaluations") / "killed"
    unfinished, log = out / "evaluate/qwen2.unfinished.jsonl", out.parent / "log"
    with open(log, "w") as file:
        killed = subprocess.Popen(
            [sys.executable, "-m", "pns.cli", *arguments(out, "placement.rollout.replicas=1")],
            cwd=ROOT,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        deadline = time.monotonic() + 200
        try:
            while len(whole_lines(unfinished)) < 40:
                assert killed.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.05)
        finally:
            os.killpg(killed.pid, signal.SIGKILL)
            killed.wait()
    num_left = len(whole_lines(unfinished))
    assert not (out / "evaluate/scores.json").exists()
    with open(unfinished, "a") as file:
        file.write('{"problem": {"id": "a line that was not')
    return out, num_left, evaluated(out, "placement.rollout.replicas=1")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same evaluation without an interruption, with two replicas."""
    out = tmp_path_factory.mktemp("evaluations") / "straight"
    evaluated(out, "placement.rollout.replicas=2")
    return out


def test_a_killed_evaluation_gives_the_same_scores(continued: tuple[Path, int, str], straight: Path) -> None:
    out, num_left, _ = continued
    mine, expected = rows(out / "evaluate/qwen2.jsonl"), rows(straight / "evaluate/qwen2.jsonl")
    assert 40 <= num_left < len(mine) == NUM_COMPLETIONS
    by_key = {(row["problem"]["suite"], row["problem"]["id"], row["sample"]): row for row in mine}
    assert len(by_key) == len(mine)
    differ = [
        row for row in expected if by_key[row["problem"]["suite"], row["problem"]["id"], row["sample"]] != row
    ]
    assert len(differ) <= 1, differ  # another batch may round one near-tie otherwise
    if not differ:
        assert scores_of(out) == scores_of(straight)
    assert not list(out.rglob("*unfinished*"))


def scores_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "evaluate/scores.json").read_text())


def test_samples_differ(continued: tuple[Path, int, str]) -> None:
    completions = rows(continued[0] / "evaluate/qwen2.jsonl")
    assert len({row["seed"] for row in completions}) == len(completions)
    texts = Counter(row["completion"] for row in completions if row["problem"]["suite"] == "long")
    assert len(texts) > 40  # of 80


def test_a_score_equals_a_hand_count(continued: tuple[Path, int, str]) -> None:
    """Over all stored completions, with a box search and a comparison of whole numbers of its own."""
    scores = scores_of(continued[0])
    completions = rows(continued[0] / "evaluate/qwen2.jsonl")
    assert set(scores) == {row["problem"]["suite"] for row in completions} | {"mean"}
    for suite, models in scores.items():
        if suite == "mean":
            continue
        own = [row for row in completions if row["problem"]["suite"] == suite]
        right: dict[str, list[bool]] = {}
        for row in own:
            boxes = re.findall(r"\\boxed\{(-?\d+)\}", row["completion"])
            boxed_right = bool(boxes) and int(boxes[-1]) == int(row["problem"]["answer"])
            correct = boxed_right and row["finish_reason"] == "stop"
            assert (row["verdict"] == "correct") is correct, row
            right.setdefault(row["problem"]["id"], []).append(correct)
        accuracy = sum(sum(samples) / len(samples) for samples in right.values()) / len(right)
        figures = models["qwen2"]
        assert figures["accuracy"] == pytest.approx(accuracy, abs=1e-12)
        assert figures["n"] == len(right) == 5
        assert figures["truncated"] == sum(row["finish_reason"] == "length" for row in own)
        assert figures["mean_tokens"] == pytest.approx(sum(row["num_tokens"] for row in own) / len(own))
    means = [models["qwen2"]["accuracy"] for suite, models in scores.items() if suite != "mean"]
    assert scores["mean"]["qwen2"]["accuracy"] == pytest.approx(sum(means) / len(means))


def test_decoding_of_each_suite(continued: tuple[Path, int, str]) -> None:
    out = continued[0]
    scores, completions = scores_of(out), rows(out / "evaluate/qwen2.jsonl")
    per_suite = Counter(row["problem"]["suite"] for row in completions)
    assert (per_suite["short"], per_suite["mul"]) == (5, 80)
    lengths = [row["num_tokens"] for row in completions if row["problem"]["suite"] == "mul"]
    assert max(lengths) <= 20 < max(row["num_tokens"] for row in completions)
    assert scores["mul"]["qwen2"]["truncated"] > 0
    assert "pass_at" not in scores["short"]["qwen2"]
    assert set(scores["mul"]["qwen2"]["pass_at"]) == {"1", "2", "4", "8", "16"}
    short = json.loads((out / "evaluate/suites.json").read_text())["short"]
    greedy_decoding = {"samples_per_problem": 1, "temperature": 0.0, "top_p": 0.95, "max_new_tokens": 96}
    assert short["decoding"] == greedy_decoding
    assert len(short["sha256"]) == 64


def test_tables_and_pages(continued: tuple[Path, int, str], capsys: pytest.CaptureFixture[str]) -> None:
    out, _, printed = continued
    assert "shuffle" in printed
    assert "accuracy" in printed
    assert (out / "evaluate/browse/index.html").is_file()
    for suite in ("short", "mul"):
        assert "tiny-" in (out / f"evaluate/browse/qwen2.{suite}.html").read_text()
    # A finished evaluation is printed again, and nothing of it is made anew.
    manifest = (out / "evaluate/manifest.json").read_text()
    assert cli.main(arguments(out, "placement.rollout.replicas=2")) == 0
    assert "shuffle" in capsys.readouterr().out
    assert (out / "evaluate/manifest.json").read_text() == manifest
    assert len(list((out / "stages").glob("evaluate-*"))) == 1


def test_against_another_evaluation(
    continued: tuple[Path, int, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = continued[0]
    worse = [row | {"verdict": "wrong", "reason": "different"} for row in rows(out / "evaluate/qwen2.jsonl")]
    other = tmp_path / "other/evaluate"
    other.mkdir(parents=True)
    write_jsonl(other / "bad.jsonl", worse)
    shutil.copy(out / "evaluate/suites.json", other)
    assert cli.main(arguments(out, "--against", str(tmp_path / "other"))) == 0
    assert "qwen2 against bad" in capsys.readouterr().out
    comparison = json.loads((out / "comparison.json").read_text())
    assert comparison["mean"]["bad"]["verdict"] == "better"
    accuracy = scores_of(out)["mean"]["qwen2"]["accuracy"]
    assert comparison["mean"]["bad"]["difference"] == pytest.approx(accuracy)
    suites = json.loads((other / "suites.json").read_text())
    suites["mul"]["decoding"]["temperature"] = 0.5
    (other / "suites.json").write_text(json.dumps(suites))
    for wrong in (tmp_path / "absent", out, tmp_path / "other"):
        assert cli.main(arguments(out, "--against", str(wrong))) == 2
        assert "--against" in capsys.readouterr().err


def test_the_longest_completion_follows_from_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = write_suite(tmp_path / "suite.jsonl")
    words = ["evaluate", str(MODEL), f"data.jsonl.suites.own={suite}", "data.prompt=none", "--show-prompt"]
    context = json.loads((MODEL / "config.json").read_text())["max_position_embeddings"]
    cli.main(words)
    assert f"max_new_tokens={context}, for a reasoning model with a context of" in capsys.readouterr().out
    for key in ("rollout.max_new_tokens=9", "evaluate.max_new_tokens=9"):
        cli.main([*words, key])
        out = capsys.readouterr().out
        assert "'max_new_tokens': 9" in out
        assert "for a reasoning model" not in out


def write_suite(path: Path) -> Path:
    path.write_text(json.dumps({"problem": "What is half of four?", "answer": "2"}) + "\n")
    return path
