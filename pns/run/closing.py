"""What a run came to, in a few lines: a curve of each trained stage, and one sentence from the intervals."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from pns.files import read_jsonl

# Stage -> the metric that tells whether it does what it is for, and what that is called.
_CURVES = {
    "rl": ("accuracy", "right answers"),
    "reward_model": ("accuracy", "pairs told apart"),
    "reverse_rl": ("wrong_rate", "wrong answers"),
    "preference": ("accuracy", "pairs told apart"),
}
_BARS = {True: "▁▂▃▄▅▆▇█", False: ".:-=+*#@"}  # for terminals with Unicode, and without
_WIDTH = 24  # bars of a curve, at most
_MODELS = {"target": "after RL", "result": "after preference optimisation"}


def closing(run_path: Path, report: Mapping[str, Any], unicode: bool = True) -> list[str]:
    """Lines for the end of a run, of the stages that have finished."""
    lines = [curve_line(stage, path, unicode) for stage, path in _metric_files(run_path)]
    if suites := report.get("suites"):
        lines.append(sentence(suites))
    return [line for line in lines if line]


def _metric_files(run_path: Path) -> Iterator[tuple[str, Path]]:
    for stage in _CURVES:
        for directory in sorted(run_path.glob(f"{stage}*")):
            name = directory.name
            is_part = name == stage or (stage == "reverse_rl" and name.startswith("reverse_rl_"))
            if is_part and (directory / "metrics.jsonl").is_file():
                yield stage, directory / "metrics.jsonl"


def curve_line(stage: str, metrics: Path, unicode: bool) -> str:
    """`rl  right answers  ▁▂▄▆█  0.29 -> 0.58`: the mean of each part of the stage's steps, the first and the
    last of them as numbers; "" where it has too few steps for a curve."""
    metric, meaning = _CURVES[stage]
    rows = [row for row in read_jsonl(metrics, growing=True) if row["stage"] == stage]
    values = [row["values"][metric] for row in rows if row["values"].get(metric) is not None]
    if len(values) < 2:
        return ""
    points = binned(values, _WIDTH)
    name = metrics.parent.name
    return f"{name:<20} {meaning:<17}{sparkline(points, _BARS[unicode])}  {points[0]:.2f} -> {points[-1]:.2f}"


def binned(values: Sequence[float], most: int) -> list[float]:
    """The means of `most` equal parts of the values, or the values themselves where there are fewer."""
    num = min(most, len(values))
    ends = [len(values) * part // num for part in range(num + 1)]
    return [fmean(values[start:end]) for start, end in pairwise(ends)]


def sparkline(values: Sequence[float], bars: str) -> str:
    """A bar for each value, the lowest and the highest of them the first and the last of `bars`."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(bars[round((value - low) / span * (len(bars) - 1))] for value in values)


def sentence(suites: Mapping[str, Any]) -> str:
    """What training was worth on the mean of the suites: each model against the one that its training began
    with, as far as their paired interval tells them apart."""
    mean = suites["mean"]
    first, *others = mean
    parts = [f"{first} {100 * mean[first]['accuracy']:.1f} %"]
    for model in others:
        # A result and the arms of method bcpg begin with the target, where there is one.
        base = "target" if model != "target" and "target" in mean else first
        difference = mean[model]["against"][base]
        points, low, high = (f"{100 * difference[figure]:+.1f}" for figure in ("difference", "low", "high"))
        verdict, accuracy = difference["verdict"], 100 * mean[model]["accuracy"]
        found = f"{verdict}: {points} points [{low}, {high}] from {base}"
        parts.append(f"{_MODELS.get(model, model)} {accuracy:.1f} % ({found})")
    return f"Mean of {len(suites) - 1} suites: {', '.join(parts)}."
