"""Evaluation: figures by hand on made-up rows, and a tiny model through `pns evaluate`, killed, continued,
counted again by hand."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pns import cli, config
from pns.commands import evaluate as evaluation
from pns.config import Decoding
from pns.data.problems import ProblemSets, load_suites
from pns.errors import UserError
from pns.files import write_jsonl
from pns.recipe import load
from pns.records import Problem, Verdict, to_json
from pns.run.directory import RunDirectory
from pns.run.tracking import Tracker
from pns.stages import evaluate
from pns.stages.context import Context
from pns.stages.evaluate import Answered, answer_classes, figures, judge, summarise
from workers.fleet import Fleet

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "tiny-qwen2.yaml"
MODEL = ROOT / "recipes" / "tiny" / "qwen2"
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

Row = dict[str, Any]


def rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def row(
    problem: str, sample: int, verdict: str, extracted: str | None = "1", reason: str = "", **fields: str
) -> Row:
    stated = Problem(problem, "?", "1", "s", subject=fields.get("subject", ""), level=fields.get("level", ""))
    found = Answered(
        stated,
        sample,
        0,
        f"\\boxed{{{extracted}}}",
        7,
        "stop",
        extracted,
        Verdict(verdict),
        reason or "equal",
    )
    return to_json(found)


# ------------------------------------------------------------------------------------------------------------------------- by hand


def test_what_counts() -> None:
    assert judge(Verdict.CORRECT, None, "2", "stop") == (Verdict.CORRECT, "equal")
    assert judge(Verdict.WRONG, None, "2", "stop") == (Verdict.WRONG, "different")
    assert judge(Verdict.CORRECT, None, "2", "length") == (Verdict.WRONG, "truncated")
    assert judge(Verdict.UNVERIFIED, "no_answer", None, "stop") == (Verdict.WRONG, "no_answer")
    assert judge(Verdict.UNVERIFIED, "timeout", "2", "stop") == (Verdict.UNVERIFIED, "timeout")


def test_figures_by_hand() -> None:
    """Three problems, four samples each: 4, 2 and 0 right."""
    found = figures(
        [
            *(row("a", i, "correct", level="1") for i in range(4)),
            *(row("b", i, "correct", level="2") for i in range(2)),
            *(row("b", i, "wrong", "5", level="2") for i in (2, 3)),
            row("c", 0, "wrong", None, "no_answer", level="2"),
            row("c", 1, "wrong", "7", "truncated", level="2"),
            row("c", 2, "unverified", "x", "timeout", level="2"),
            row("c", 3, "wrong", "8", "different", level="2"),
        ]
    )
    assert (found["accuracy"], found["n"], found["completions"]) == (0.5, 3, 12)
    assert (found["truncated"], found["no_answer"], found["unverified"], found["prompt_too_long"]) == (
        1,
        1,
        1,
        0,
    )
    assert found["unverified_problems"] == ["c"]
    # pass@2 of b: 1 - C(2,2) / C(4,2) = 5/6
    assert found["pass_at"] == {"1": 0.5, "2": pytest.approx((1 + 5 / 6) / 3), "4": pytest.approx(2 / 3)}
    assert found["majority_at"] == {"4": pytest.approx((1 + 0.5 + 0) / 3)}
    assert found["by_level"]["1"]["accuracy"] == 1.0
    assert (found["by_level"]["2"]["accuracy"], found["by_level"]["2"]["n"]) == (0.25, 2)
    assert "by_subject" not in found


def test_answer_classes() -> None:
    samples = [
        row("a", 0, "correct", "1"),
        row("a", 1, "correct", "1.0"),
        row("a", 2, "wrong", "5"),
        row("a", 3, "wrong", "5.0"),
        row("a", 4, "wrong", "6"),
        row("a", 5, "wrong", None, "no_answer"),
        row("a", 6, "wrong", "5", "truncated"),
        row("a", 7, "unverified", "x^", "unparsable"),
        row("a", 8, "unverified", "x^", "unparsable"),
    ]
    assert answer_classes(samples) == [0, 0, 1, 1, 2, None, None, 3, 3]


def test_unverified_and_long_problems_stay_in_the_denominator() -> None:
    found = figures(
        [
            row("a", 0, "correct"),
            row("b", 0, "unverified", "x", "timeout"),
            row("c", 0, "wrong", None, "prompt_too_long"),
        ]
    )
    assert (found["accuracy"], found["n"]) == (pytest.approx(1 / 3), 3)
    assert (found["unverified"], found["prompt_too_long"]) == (1, 1)


def test_models_are_compared_problem_by_problem() -> None:
    good = [row(f"p{i}", 0, "correct") for i in range(30)]
    bad = [row(f"p{i}", 0, "correct" if i % 2 else "wrong") for i in range(30)]
    scores = summarise({"start": bad, "end": good}, {"s": Decoding(1, 0.0, 1.0, 9)}, seed=4)
    assert scores["s"]["end"]["against"]["start"]["verdict"] == "better"
    assert scores["s"]["end"]["against"]["start"]["difference"] == 0.5
    assert scores["mean"]["end"]["against"]["start"] == scores["s"]["end"]["against"]["start"]
    assert scores["s"]["end"]["seed"] == 4
    assert "against" not in scores["s"]["start"]
    same = summarise({"start": bad, "end": bad}, {"s": Decoding(1, 0.0, 1.0, 9)}, seed=4)
    assert same["mean"]["end"]["against"]["start"]["verdict"] == "not distinguishable"


def test_the_mean_is_over_suites() -> None:
    other = [replace_suite(row(f"q{i}", 0, "wrong"), "t") for i in range(10)]
    decodings = {name: Decoding(1, 0.0, 1.0, 9) for name in ("s", "t")}
    scores = summarise({"m": [row("a", 0, "correct"), row("b", 0, "correct"), *other]}, decodings, seed=0)
    assert scores["mean"]["m"]["accuracy"] == 0.5
    assert scores["mean"]["m"]["n"] == 12


def replace_suite(found: Row, suite: str) -> Row:
    return found | {"problem": found["problem"] | {"suite": suite}}


def test_another_evaluation_must_have_asked_the_same() -> None:
    mine = [row("a", 0, "correct"), row("b", 0, "wrong")]
    scores = summarise({"m": mine}, {"s": Decoding(1, 0.0, 1.0, 9)}, seed=0)
    compared = evaluation.compare(scores, "m", mine, "m", list(reversed(mine)))
    assert compared["s"]["m"]["against"]["m (other)"]["difference"] == 0.0
    for other in (mine[:1], [*mine, row("a", 1, "wrong")], [row("a", 0, "correct"), row("z", 0, "wrong")]):
        with pytest.raises(UserError, match="differ in the problems or samples of s"):
            evaluation.compare(scores, "m", mine, "o", other)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["absent/model/here", "benchmarks=[gsm8k]"], ("MODEL", "absent/model/here")),
        ([str(MODEL)], ("name at least one suite",)),
        ([str(MODEL), "benchmarks=[gsm9k]"], ("gsm9k", "gsm8k")),
        ([str(MODEL), "benchmarks=[college_math]"], ("college_math", "data.root=DIR")),
        ([str(MODEL), "benchmarks=[gsm8k]", "data.root=/nowhere"], ("/nowhere", "gsm8k.jsonl")),
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
    keys = [
        f"data.jsonl.suites.own={suite}",
        "data.prompt=none",
        f"out={tmp_path / 'out'}",
        "evaluate.max_new_tokens=50",
    ]
    assert cli.main(["evaluate", str(MODEL), "--show-prompt", *keys]) == 0
    shown = capsys.readouterr().out
    assert (
        "<bos>Gus has 12. How many has Gus<solve>\n" in shown
    )  # the tiny tokenizer has no question mark without a space
    assert "'max_new_tokens': 50" in shown
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------- a model, for real


def command(out: Path, *arguments: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "pns.cli",
        "evaluate",
        str(MODEL),
        "--recipe",
        str(RECIPE),
        *KEYS,
        f"out={out}",
        *arguments,
    ]


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """The directory of an evaluation that was killed and continued, how many completions the first process
    left, and what the second printed."""
    out = tmp_path_factory.mktemp("evaluations") / "killed"
    unfinished, log = out / "evaluate" / "qwen2.unfinished.jsonl", out.parent / "log"
    with open(log, "w") as file:
        killed = subprocess.Popen(
            command(out, "placement.rollout.replicas=1"),
            cwd=ROOT,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        deadline = time.monotonic() + 200
        try:
            while len(rows_so_far(unfinished)) < 40:
                assert killed.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.05)
        finally:
            os.killpg(killed.pid, signal.SIGKILL)
            killed.wait()
    left = len(rows_so_far(unfinished))
    assert not (out / "evaluate" / "scores.json").exists()
    with open(unfinished, "a") as file:
        file.write('{"problem": {"id": "a line that was not')
    done = subprocess.run(
        command(out, "placement.rollout.replicas=1"), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return out, left, done.stdout


def rows_so_far(path: Path) -> list[str]:
    return (
        [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if path.exists()
        else []
    )


@pytest.fixture(scope="module")
def straight(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same evaluation without an interruption, with two replicas and the problems in reverse order."""
    keys = [f"models.backbone={MODEL}", *KEYS, "placement.rollout.replicas=2"]
    settings = load(RECIPE, keys, training=False)
    suites, identities = load_suites(settings)
    problems = ProblemSets(
        [], [], [], {suite: found[::-1] for suite, found in reversed(suites.items())}, identities
    )
    prompts = evaluation.load_prompts(settings)
    with RunDirectory.open(
        tmp_path_factory.mktemp("evaluations") / "straight", config.to_dict(settings)
    ) as directory:
        fleet = Fleet(settings, "cpu")
        try:
            with directory.stage("evaluate", (), ()):
                ctx = Context(
                    settings, directory, fleet, problems, prompts, Tracker(directory, settings.tracking)
                )
                evaluate.measure(ctx, {"qwen2": str(MODEL)})
        finally:
            fleet.shutdown()
        yield directory.path


def test_a_killed_evaluation_gives_the_same_scores(continued: tuple[Path, int, str], straight: Path) -> None:
    out, left, _ = continued
    found, expected = rows(out / "evaluate" / "qwen2.jsonl"), rows(straight / "evaluate" / "qwen2.jsonl")
    assert 40 <= left < len(found) == 5 + 6 * 5 * 16
    key = {(r["problem"]["suite"], r["problem"]["id"], r["sample"]): r for r in found}
    assert len(key) == len(found)
    differ = [r for r in expected if key[r["problem"]["suite"], r["problem"]["id"], r["sample"]] != r]
    assert len(differ) <= 1, differ  # another batch may round one near-tie otherwise
    if not differ:
        mine, other = (
            json.loads((path / "evaluate" / "scores.json").read_text()) for path in (out, straight)
        )
        assert mine == {suite: other[suite] for suite in mine}
    assert not list(out.rglob("*unfinished*"))


def test_seeds_belong_to_samples(continued: tuple[Path, int, str]) -> None:
    found = rows(continued[0] / "evaluate" / "qwen2.jsonl")
    assert len({r["seed"] for r in found}) == len(found)
    texts = Counter(r["completion"] for r in found if r["problem"]["suite"] == "long")
    assert len(texts) > 40  # of 80: samples differ


def test_a_score_equals_a_hand_count(continued: tuple[Path, int, str]) -> None:
    """Over all stored completions, with a box search and a comparison of whole numbers of its own."""
    out = continued[0]
    scores = json.loads((out / "evaluate" / "scores.json").read_text())
    found = rows(out / "evaluate" / "qwen2.jsonl")
    assert len(found) >= 50
    assert set(scores) == {r["problem"]["suite"] for r in found} | {"mean"}
    for suite, models in scores.items():
        if suite == "mean":
            continue
        own = [r for r in found if r["problem"]["suite"] == suite]
        right: dict[str, list[bool]] = {}
        for r in own:
            boxes = re.findall(r"\\boxed\{(-?\d+)\}", r["completion"])
            correct = (
                bool(boxes) and int(boxes[-1]) == int(r["problem"]["answer"]) and r["finish_reason"] == "stop"
            )
            assert (r["verdict"] == "correct") is correct, r
            right.setdefault(r["problem"]["id"], []).append(correct)
        accuracy = sum(sum(samples) / len(samples) for samples in right.values()) / len(right)
        assert models["qwen2"]["accuracy"] == pytest.approx(accuracy, abs=1e-12)
        assert models["qwen2"]["n"] == len(right) == 5
        assert models["qwen2"]["truncated"] == sum(r["finish_reason"] == "length" for r in own)
        assert models["qwen2"]["mean_tokens"] == pytest.approx(sum(r["num_tokens"] for r in own) / len(own))
    means = [models["qwen2"]["accuracy"] for suite, models in scores.items() if suite != "mean"]
    assert scores["mean"]["qwen2"]["accuracy"] == pytest.approx(sum(means) / len(means))


def test_decoding_of_each_suite(continued: tuple[Path, int, str]) -> None:
    out = continued[0]
    scores = json.loads((out / "evaluate" / "scores.json").read_text())
    found = rows(out / "evaluate" / "qwen2.jsonl")
    per_suite = Counter(r["problem"]["suite"] for r in found)
    assert (per_suite["short"], per_suite["mul"]) == (5, 80)
    assert (
        max(r["num_tokens"] for r in found if r["problem"]["suite"] == "mul")
        <= 20
        < max(r["num_tokens"] for r in found)
    )
    assert scores["mul"]["qwen2"]["truncated"] > 0
    assert "pass_at" not in scores["short"]["qwen2"]
    assert set(scores["mul"]["qwen2"]["pass_at"]) == {"1", "2", "4", "8", "16"}
    identities = json.loads((out / "evaluate" / "suites.json").read_text())
    assert identities["short"]["decoding"] == {
        "samples_per_problem": 1,
        "temperature": 0.0,
        "top_p": 0.95,
        "max_new_tokens": 96,
    }
    assert len(identities["short"]["sha256"]) == 64


def test_tables_and_pages(continued: tuple[Path, int, str], capsys: pytest.CaptureFixture[str]) -> None:
    out, _, printed = continued
    assert "shuffle" in printed
    assert "accuracy" in printed
    assert (out / "evaluate" / "browse" / "index.html").is_file()
    for suite in ("short", "mul"):
        assert "tiny-" in (out / "evaluate" / "browse" / f"qwen2.{suite}.html").read_text()
    # a finished evaluation starts nothing: it answers without Ray, and refuses other keys
    assert cli.main(command(out)[3:]) == 0
    assert "shuffle" in capsys.readouterr().out
    assert cli.main([*command(out)[3:], "seed=3"]) == 2
    assert "out=DIR" in capsys.readouterr().err


def test_against_another_evaluation(
    continued: tuple[Path, int, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = continued[0]
    found = rows(out / "evaluate" / "qwen2.jsonl")
    worse = [r | {"verdict": "wrong", "reason": "different"} for r in found]
    other = tmp_path / "other" / "evaluate"
    other.mkdir(parents=True)
    write_jsonl(other / "bad.jsonl", worse)
    suites = json.loads((out / "evaluate" / "suites.json").read_text())
    (other / "suites.json").write_text(json.dumps(suites))
    assert cli.main([*command(out)[3:], "--against", str(tmp_path / "other")]) == 0
    assert "qwen2 against bad" in capsys.readouterr().out
    comparison = json.loads((out / "comparison.json").read_text())
    assert comparison["mean"]["bad"]["verdict"] == "better"
    scores = json.loads((out / "evaluate" / "scores.json").read_text())
    assert comparison["mean"]["bad"]["difference"] == pytest.approx(scores["mean"]["qwen2"]["accuracy"])
    suites["mul"]["decoding"]["temperature"] = 0.5
    (other / "suites.json").write_text(json.dumps(suites))
    for wrong in (tmp_path / "absent", out, tmp_path / "other"):
        assert cli.main([*command(out)[3:], "--against", str(wrong)]) == 2
        assert "--against" in capsys.readouterr().err


def test_reused_rows_must_belong(continued: tuple[Path, int, str], tmp_path: Path) -> None:
    path = tmp_path / "m.unfinished.jsonl"
    write_jsonl(path, rows(continued[0] / "evaluate" / "qwen2.jsonl")[:1])
    with pytest.raises(UserError, match="does not ask for"):
        evaluate._read_unfinished(path, {})


def test_problem_records_are_unchanged_by_storage(continued: tuple[Path, int, str]) -> None:
    settings = load(RECIPE, [f"models.backbone={MODEL}", *KEYS], training=False)
    problems = {p.id: replace(p, solution=None) for found in load_suites(settings)[0].values() for p in found}
    for r in rows(continued[0] / "evaluate" / "qwen2.jsonl"):
        assert r["problem"] == to_json(problems[r["problem"]["id"]])
