"""The metrics of a run's stages on a page: the few that tell how a stage went as figures, all of them as a
table."""

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
_MOST_PARTS = 4  # lines of one figure beside their points
_LEAST_SHARE = 0.5  # of the steps that a metric among the figures has to have a value for
_WIDTH = 16  # bars of a course
_BARS = "▁▂▃▄▅▆▇█"


def training_sections(run_path: Path, steps: Sequence[str]) -> Iterator[Section]:
    """A section for each stage among the run's `steps` that trained for several steps, in this order. The
    parts that a run has of one stage (the arms of method bcpg, two reward models) are lines of one figure."""
    parts_of: dict[str, dict[str, Series]] = {}
    files: dict[Path, str] = {}  # those of two arms may be one
    for step in steps:
        file = (run_path / step / "metrics.jsonl").resolve()
        if file.is_file():
            files.setdefault(file, step)
    for file, step in files.items():
        stage = next((stage for stage in _PANELS if step == stage or step.startswith(f"{stage}_")), None)
        if stage is None:
            continue
        for name, series in read_series(file).items():
            own = f"{step.removeprefix(stage)} {name.removeprefix(stage)}".replace("_", " ").strip()
            parts_of.setdefault(stage, {})[own or "main"] = series
    for stage, parts in parts_of.items():
        if any(len(points) > 1 for series in parts.values() for points in series.values()):
            yield Section(f"Training: {stage.replace('_', ' ')}", stage_body(stage, parts))


def read_series(file: Path) -> dict[str, Series]:
    """The metrics in a stage's file, by what its rows call the stage: a reward model's has two trainings. A
    torn last line is left out."""
    found: dict[str, Series] = {}
    for _, row in json_lines(file, growing=True):
        series = found.setdefault(row["stage"], {})
        for metric, value in row["values"].items():
            points = series.setdefault(metric, [])
            if value is not None:
                points.append((row["step"], value))
    return found


def stage_body(stage: str, parts: Mapping[str, Series]) -> Markup:
    """The figures of one stage, and its table folded."""
    drawn = [figure for panel in _PANELS[stage] for figure in draw(panel, parts)]
    tables = [course_table(name, series) for name, series in parts.items()]
    count = sum(len(series) for series in parts.values())
    every = folded(f"All metrics of every step ({count})", Markup("").join(tables))
    return grid(drawn[:_MOST_PANELS]) + every


def draw(panel: Panel, parts: Mapping[str, Series]) -> list[Markup]:
    """The panel's figure; of many parts one for each of its metrics. None of what was seldom measured or does
    not vary."""
    lines: dict[str, list[Line]] = {}  # by what the metric is
    for part, series in parts.items():
        num_steps = max(len(points) for points in series.values())
        smooth = 2 * (num_steps // 20) + 1
        for pattern, said in panel.metrics.items():
            for metric in fnmatch.filter(series, pattern):
                values = [value for _, value in series[metric]]
                if len(values) < max(2, _LEAST_SHARE * num_steps) or min(values) == max(values):
                    continue
                what = metric.replace("_", " ") if said == "*" else said
                name = part if len(parts) > 1 else ""
                steps = [at for at, _ in series[metric]]
                lines.setdefault(what, []).append(Line(name, steps, values, smooth=smooth))
    if len(parts) > _MOST_PARTS:
        # An empty line keeps the place of a part that lacks the metric: a part has one colour in all figures.
        every = {
            what: [next((line for line in own if line.name == part), Line(part, [], [])) for part in parts]
            for what, own in lines.items()
        }
        titles = {what: f"{panel.title}: {what}" if what else panel.title for what in every}
        return [_curve(panel, titles[what], own) for what, own in every.items()]
    named = [
        replace(line, name=", ".join(filter(None, [line.name, what])))
        for what, own in lines.items()
        for line in own
    ]
    return [_curve(panel, panel.title, named)] if named else []


def _curve(panel: Panel, title: str, lines: Sequence[Line]) -> Markup:
    widest = max(line.smooth for line in lines)
    said = "Thick: running mean" if len(lines) <= _MOST_PARTS else "Running mean"
    caption = f"{said} over {widest} steps." if widest > 1 else ""
    return curve(title, lines, "step", panel.unit, caption, panel.percent, points=len(lines) <= _MOST_PARTS)


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
