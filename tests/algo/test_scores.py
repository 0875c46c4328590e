"""Statistics of evaluations: figures by hand on made-up rows."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pns.algo.metrics import Difference
from pns.algo.scores import answer_classes, described, suite_figures, summarise
from pns.config import Decoding
from pns.records import Answered, Problem, Verdict

GREEDY = Decoding(1, 0.0, 1.0, 9)


def row(
    problem: str,
    sample: int,
    verdict: str,
    extracted: str | None = "1",
    reason: str = "equal",
    suite: str = "s",
    level: str = "",
) -> Answered:
    asked = Problem(problem, "?", "1", suite, level=level)
    return Answered(
        asked, sample, 0, f"\\boxed{{{extracted}}}", 7, "stop", extracted, Verdict(verdict), reason
    )


def greedy(verdicts: Sequence[str], suite: str = "s", problem: str = "p") -> list[Answered]:
    """One sample of each of the problems p0, p1, ..."""
    return [row(f"{problem}{i}", 0, verdict, suite=suite) for i, verdict in enumerate(verdicts)]


def test_figures_by_hand() -> None:
    """Three problems, four samples each: 4, 2 and 0 right."""
    figures = suite_figures(
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
    assert (figures["accuracy"], figures["n"], figures["completions"]) == (0.5, 3, 12)
    counted = [figures[what] for what in ("truncated", "no_answer", "unverified", "prompt_too_long")]
    assert counted == [1, 1, 1, 0]
    assert figures["unverified_problems"] == ["c"]
    # pass@2 of b: 1 - C(2,2) / C(4,2) = 5/6
    assert figures["pass_at"] == {"1": 0.5, "2": pytest.approx((1 + 5 / 6) / 3), "4": pytest.approx(2 / 3)}
    assert figures["majority_at"] == {"4": pytest.approx((1 + 0.5 + 0) / 3)}
    assert figures["by_level"]["1"]["accuracy"] == 1.0
    assert (figures["by_level"]["2"]["accuracy"], figures["by_level"]["2"]["n"]) == (0.25, 2)
    assert "by_subject" not in figures


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
    unverified = row("b", 0, "unverified", "x", "timeout")
    too_long = row("c", 0, "wrong", None, "prompt_too_long")
    figures = suite_figures([row("a", 0, "correct"), unverified, too_long])
    assert (figures["accuracy"], figures["n"]) == (pytest.approx(1 / 3), 3)
    assert (figures["unverified"], figures["prompt_too_long"]) == (1, 1)


def test_models_are_compared_problem_by_problem() -> None:
    good, bad = greedy(["correct"] * 30), greedy(["wrong", "correct"] * 15)
    scores = summarise({"backbone": bad, "result": good}, {"s": GREEDY}, seed=4)
    difference = scores["s"]["result"]["against"]["backbone"]
    assert (difference["verdict"], difference["difference"]) == ("better", 0.5)
    assert scores["mean"]["result"]["against"]["backbone"] == difference
    assert scores["s"]["result"]["seed"] == 4
    assert "against" not in scores["s"]["backbone"]
    same = summarise({"backbone": bad, "result": bad}, {"s": GREEDY}, seed=4)
    assert same["mean"]["result"]["against"]["backbone"]["verdict"] == "not distinguishable"


def test_the_mean_is_over_suites() -> None:
    rows = [*greedy(["correct"] * 2), *greedy(["wrong"] * 10, suite="t", problem="q")]
    scores = summarise({"m": rows}, {"s": GREEDY, "t": GREEDY}, seed=0)
    assert (scores["mean"]["m"]["accuracy"], scores["mean"]["m"]["n"]) == (0.5, 12)


def test_suites_are_so_many_tests() -> None:
    """One of ten suites differs by chance: corrected, it tells nothing; the mean is a test of its own."""
    weak, none = Difference(0.1, 0.01, 0.19, 0.03), Difference(0.0, -0.1, 0.1, 0.9)
    found = described({**{f"s{i}": none for i in range(9)}, "t": weak, "mean": weak})
    assert (found["t"]["p_value"], found["t"]["p_corrected"]) == (0.03, pytest.approx(0.3))
    assert (found["t"]["verdict"], found["mean"]["verdict"]) == ("not distinguishable", "better")
