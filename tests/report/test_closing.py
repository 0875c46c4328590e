"""The last lines of a run."""

from pathlib import Path

import pytest

from pns.files import write_jsonl
from pns.report.closing import binned, closing, sentence, sparkline


def metrics(directory: Path, stage: str, name: str, values: list[float | None]) -> None:
    directory.mkdir(parents=True)
    rows = [{"stage": stage, "step": step, "values": {name: value}} for step, value in enumerate(values)]
    write_jsonl(directory / "metrics.jsonl", rows)


def test_every_trained_stage_has_a_curve(tmp_path: Path) -> None:
    metrics(tmp_path / "rl", "rl", "accuracy", [0.25, None, 0.5, 0.75])
    metrics(tmp_path / "reverse_rl_target", "reverse_rl", "wrong_rate", [0.4, 0.9])
    metrics(tmp_path / "reverse_rl_backbone", "reverse_rl", "wrong_rate", [0.9])  # a point is no curve
    metrics(tmp_path / "synthesize", "synthesize", "accuracy", [1.0, 1.0])
    assert closing(tmp_path, {}) == [
        "rl                   right answers    ▁▅█  0.25 -> 0.75",
        "reverse_rl_target    wrong answers    ▁█  0.40 -> 0.90",
    ]
    assert closing(tmp_path, {}, unicode=False)[0].endswith(".+@  0.25 -> 0.75")


@pytest.mark.parametrize(
    ("values", "most", "expected"),
    [([1.0, 2.0], 5, [1.0, 2.0]), ([1.0, 2.0, 3.0, 4.0], 2, [1.5, 3.5]), ([3.0, 1.0, 2.0], 1, [2.0])],
)
def test_a_long_curve_is_the_means_of_its_parts(
    values: list[float], most: int, expected: list[float]
) -> None:
    assert binned(values, most) == expected


def test_a_flat_curve_is_flat() -> None:
    assert sparkline([0.5, 0.5], "._#") == ".."
    assert sparkline([0.0, 0.5, 1.0], "._#") == "._#"


def test_the_sentence_says_what_the_intervals_say() -> None:
    better = {"difference": 0.25, "low": 0.2, "high": 0.3, "verdict": "better"}
    unclear = {"difference": -0.01, "low": -0.02, "high": 0.01, "verdict": "not distinguishable"}
    mean = {
        "backbone": {"accuracy": 0.3},
        "target": {"accuracy": 0.55, "against": {"backbone": better}},
        "result": {"accuracy": 0.54, "against": {"backbone": better, "target": unclear}},
    }
    assert sentence({"a": {}, "b": {}, "mean": mean}) == (
        "Mean of 2 suites: backbone 30.0 %, after RL 55.0 % (better: +25.0 points [+20.0, +30.0] from backbone), "
        "after preference optimisation 54.0 % (not distinguishable: -1.0 points [-2.0, +1.0] from target)."
    )
    arm = {"backbone": {"accuracy": 0.3}, "nsa": {"accuracy": 0.55, "against": {"backbone": better}}}
    assert sentence({"a": {}, "mean": arm}).endswith(
        "nsa 55.0 % (better: +25.0 points [+20.0, +30.0] from backbone)."
    )
