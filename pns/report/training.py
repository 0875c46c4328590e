"""The metrics of a run's stages on a page: the few that tell how a stage went as figures, all of them as a
table."""

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from pns.files import json_lines
from pns.report.closing import binned, sparkline
from pns.report.figures import Line, curve
from pns.report.page import Section, folded, grid
from pns.report.tables import table

Series = dict[str, list[tuple[int, float]]]  # metric -> (step, value) where there is a value


@dataclass(frozen=True)
class Panel:
    """One figure over the steps: metrics (patterns) with the names of their lines ("*": the metric's own)."""

    title: str
    metrics: Mapping[str, str]
    unit: str
    percent: bool = False


_LENGTH = Panel("Length of completions", {"completion_tokens": ""}, "tokens")
_DISTANCE = Panel("Distance from the start (KL)", {"kl": ""}, "nats a token")
_GRADIENT = Panel("Norm of the gradient", {"grad_norm": ""}, "norm, before clipping")
_LOSS = Panel("Loss", {"loss": ""}, "loss")
_PAIRS = Panel("Pairs told apart", {"accuracy": ""}, "share of pairs", True)
_MARGIN = Panel("Margin between the sides", {"margin": ""}, "chosen - rejected")
# Stage -> its figures, the most important first.
_PANELS = {
    "rl": (
        Panel("Right answers", {"accuracy": ""}, "share of completions", True),
        Panel(
            "Form", {"format_rate": "well-formed", "truncated_rate": "cut off"}, "share of completions", True
        ),
        _LENGTH,
        Panel("Uncertainty (negative log-likelihood)", {"nll": ""}, "nats a token"),
        _DISTANCE,
        _GRADIENT,
    ),
    "reverse_rl": (
        Panel(
            "Wrong answers and form",
            {"wrong_rate": "wrong", "format_rate": "well-formed"},
            "share of completions",
            True,
        ),
        Panel(
            "What the reward says of wrong ones",
            {"plausibility_mean": "plausibility", "coherence_mean": "coherence"},
            "mean score, 0 to 1",
        ),
        Panel(
            "What the checker says of wrong ones",
            {"checker_rubric_mean": "rubric", "single_error_share": "with a single error"},
            "mean, 0 to 1",
        ),
        Panel(
            "Habits",
            {"top_offset_share": "same error of the answer", "distinct_4": "distinct 4-grams"},
            "share",
            True,
        ),
        _LENGTH,
        _DISTANCE,
    ),
    "reward_model": (
        _PAIRS,
        _MARGIN,
        Panel("Scores", {"chosen_score": "right", "rejected_score": "wrong"}, "raw score"),
        _LOSS,
        _GRADIENT,
    ),
    "preference": (
        _PAIRS,
        _MARGIN,
        Panel(
            "Change of log-likelihood",
            {"chosen_reward": "chosen", "rejected_reward": "rejected"},
            "β · nats a completion",
        ),
        Panel("Negative log-likelihood", {"*_nll": "*"}, "nats a token"),
        _LOSS,
        Panel("Longer sides preferred", {"length_bias": ""}, "correlation of margin and length"),
    ),
    "bcpg": (
        _LOSS,
        Panel(
            "Change of log-likelihood by the sign of the advantage",
            {"positive_log_ratio": "positive", "negative_log_ratio": "negative"},
            "nats a token",
        ),
        Panel("Negative log-likelihood", {"*nll": "*"}, "nats a token"),
        _DISTANCE,
        _GRADIENT,
    ),
}
_MOST_PANELS = 6
_LEAST_SHARE = 0.5  # of the steps that a metric among the figures has to have a value for
_WIDTH = 16  # bars of a course
_BARS = "▁▂▃▄▅▆▇█"


def training_sections(run_path: Path, steps: Sequence[str]) -> Iterator[Section]:
    """A section for each of the run's `steps` that has metrics of several steps, in this order."""
    for step in steps:
        file = run_path / step / "metrics.jsonl"
        by_series = read_series(file) if file.is_file() else {}
        if any(len(points) > 1 for series in by_series.values() for points in series.values()):
            yield Section(f"Training: {step.replace('_', ' ')}", stage_body(step, by_series))


def read_series(file: Path) -> dict[str, Series]:
    """The metrics of a stage, by what its rows call the stage: a reward model's has two trainings. A torn
    last line is left out."""
    found: dict[str, Series] = {}
    for _, row in json_lines(file, growing=True):
        series = found.setdefault(row["stage"], {})
        for metric, value in row["values"].items():
            points = series.setdefault(metric, [])
            if value is not None:
                points.append((row["step"], value))
    return found


def stage_body(step: str, by_series: Mapping[str, Series]) -> Markup:
    """The figures of one stage, and its table folded."""
    stage = next((name for name in _PANELS if step == name or step.startswith(f"{name}_")), "")
    drawn = [figure for panel in _PANELS.get(stage, ()) if (figure := draw(panel, step, by_series))]
    tables = [course_table(name, series) for name, series in by_series.items()]
    count = sum(len(series) for series in by_series.values())
    every = folded(f"All metrics of every step ({count})", Markup("").join(tables))
    return grid(drawn[:_MOST_PANELS]) + every


def draw(panel: Panel, step: str, by_series: Mapping[str, Series]) -> Markup | None:
    """None where none of the panel's metrics was measured often and varies."""
    lines = []
    for name, series in by_series.items():
        own = name.removeprefix(step).strip("_").replace("_", " ") or "main"
        num_steps = max(len(points) for points in series.values())
        for pattern, said in panel.metrics.items():
            for metric in fnmatch.filter(series, pattern):
                values = [value for _, value in series[metric]]
                if len(values) < max(2, _LEAST_SHARE * num_steps) or min(values) == max(values):
                    continue
                what = metric.replace("_", " ") if said == "*" else said
                named = [own, what] if len(by_series) > 1 else [what]
                steps = [at for at, _ in series[metric]]
                smooth = 2 * (num_steps // 20) + 1
                lines.append(Line(", ".join(filter(None, named)), steps, values, smooth=smooth))
    if not lines:
        return None
    widths = {line.smooth for line in lines}
    caption = f"Thick: running mean over {max(widths)} steps." if max(widths) > 1 else ""
    return curve(panel.title, lines, "step", panel.unit, caption, panel.percent)


def course_table(name: str, series: Series) -> Markup:
    """Every metric with its course over the steps."""
    heads = ["metric", "course", "first part", "last part", "lowest", "highest", "steps"]
    rows = []
    for metric in sorted(series):
        values = [value for _, value in series[metric]]
        if values:
            points = binned(values, _WIDTH)
            course = sparkline(points, _BARS) if min(values) < max(values) else "constant"
            figures = (f"{value:.4g}" for value in (points[0], points[-1], min(values), max(values)))
            rows.append([metric, course, *figures, str(len(values))])
    return table(heads, rows, f"{name}. First and last part: means of the first and last of {_WIDTH}.")
