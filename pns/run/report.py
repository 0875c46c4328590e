"""The report of a run: report.json, tables on the terminal and plots, from what finished stages wrote."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from pns.files import read_json, read_jsonl, write_json

MODELS = ("backbone", "target", "result")
SOURCES = {"correct": "correct (target)", "rs": "wrong, rejection-sampled", "pns": "PNS negatives"}
_WRITTEN = {  # key of the report: what a stage wrote
    "suites": "evaluate/scores.json",
    "generator": "reverse_rl/generator.json",
    "reward_model": "reward_model/quality.json",
    "pairs": "pair/quality.json",
}
# Rows of the table of negatives: a figure of quality.json by source, and what it is called.
_QUALITY = {
    "tokens_mean": "tokens",
    "perplexity": "perplexity",
    "reward_model_mean": "reward model",
    "auroc_held_out": "AUROC, held-out",
    "detector": "AUROC, detector",
    "one_sidedness": "one-sidedness",
    "first_wrong_step": "first wrong step",
}
_COLUMNS = 3  # of plots side by side


def write_report(run_path: Path, console: Console | None = None) -> dict[str, Any]:
    """Write report.json and plots/*.png, print the tables, and return the report.

    Keys: `suites.<suite>.{backbone,target,result}.{accuracy,low,high,n}` (with "mean"),
    `generator.{before,after}.<figure>` (of a mixture `generator.<part> {before,after}`),
    `reward_model.{main,held_out}.<figure>`, `pairs` (quality of the negatives: a figure by source),
    `stages.<stage>.seconds`, `wall_seconds`, `peak_memory_gib`, `versions`. What no finished stage has
    written is left out.
    """
    report = build_report(run_path)
    write_json(run_path / "report.json", report)
    plots = plot_metrics(run_path)
    where = f"{run_path / 'report.json'}, {len(plots)} plots in {run_path / 'plots'}"
    (console or Console()).print(*report_tables(report), where, sep="\n")
    return report


def build_report(run_path: Path) -> dict[str, Any]:
    """The report's values."""
    report: dict[str, Any] = {}
    for key, name in _WRITTEN.items():
        if (run_path / name).is_file():
            report[key] = read_json(run_path / name)
    for path in sorted(run_path.glob("reverse_rl_*/generator.json")):  # one of each generator of a mixture
        part = path.parent.name.removeprefix("reverse_rl_")
        figures = {f"{part} {when}": values for when, values in read_json(path).items()}
        report["generator"] = report.get("generator", {}) | figures
    manifests = {path.parent.name: read_json(path) for path in run_path.glob("*/manifest.json")}
    in_order = sorted(manifests.items(), key=lambda named: named[1]["ended"])
    shown = ("seconds", "counts")
    report["stages"] = {name: {key: manifest[key] for key in shown} for name, manifest in in_order}
    if in_order:
        report["versions"] = in_order[-1][1]["versions"]  # the newest stage's: others may be of earlier ones
    if (run_path / "run.json").is_file():
        figures = read_json(run_path / "run.json")
        kept = {key: figures.get(key) for key in ("wall_seconds", "peak_memory_gib")}
        report |= {key: value for key, value in kept.items() if value is not None}
    return report


def report_tables(report: Mapping[str, Any]) -> list[Table]:
    """Terminal tables: accuracies, the generator, the negatives, the stages' times."""
    made = []
    if suites := report.get("suites"):
        table = Table("suite", *MODELS, "n", title="Accuracy in % [95 % Wilson interval]")
        for suite, scores in suites.items():
            n = next(iter(scores.values()))["n"] if scores else ""
            shares = [interval(scores.get(model)) for model in MODELS]
            table.add_row(suite, *shares, str(n), end_section=suite == list(suites)[-2:][0])
        made.append(table)
    if generator := report.get("generator"):
        table = Table("generator", *generator, title="Generator of negatives")
        for figure in dict.fromkeys(key for values in generator.values() for key in values):
            table.add_row(figure, *(_figure(values.get(figure)) for values in generator.values()))
        made.append(table)
    if quality := report.get("pairs"):
        made.append(quality_table(quality))
    if stages := report.get("stages"):
        table = Table("stage", "seconds", title="Time")
        for stage, values in stages.items():
            table.add_row(stage, f"{values['seconds']:.0f}")
        made.append(table)
    return made


def quality_table(quality: Mapping[str, Any]) -> Table:
    """Figures of the negatives, a column a source; below them the one-sidedness of the pairs. In brackets
    stand the detector's 95 % interval, the one-sidedness by chance, and the share of the text up to the first
    wrong step."""
    named = [source for figure in _QUALITY for source in quality.get(figure, {})]
    sources = [source for source in dict.fromkeys(named) if source != "pairs"]
    table = Table("negatives", *sources, title="Quality of negatives (AUROC 0.5: like right ones)")
    for figure, label in _QUALITY.items():
        if quality.get(figure):
            table.add_row(label, *(_quality_cell(quality, figure, source) for source in sources))
    table.caption = f"one-sidedness of the pairs: {_quality_cell(quality, 'one_sidedness', 'pairs')}"
    return table


def _quality_cell(quality: Mapping[str, Any], figure: str, source: str) -> str:
    value = quality.get(figure, {}).get(source)
    if value is None:
        return "-"
    if figure == "detector":
        return f"{value['auroc']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"
    if figure == "first_wrong_step":
        return f"{_figure(value['index'])} ({_figure(value['share'])})"
    if figure == "one_sidedness":
        return f"{_figure(value)} ({_figure(quality['one_sidedness_by_chance'][source])})"
    return _figure(value)


def plot_metrics(run_path: Path) -> list[Path]:
    """plots/<stage>.png with every metric over the steps, and plots/reward_model_scores.png."""
    directory = run_path / "plots"
    directory.mkdir(exist_ok=True)
    for old in directory.glob("*.png"):
        old.unlink()  # of a stage that the page no longer leads to
    written: list[Path] = []
    rows_by_stage: dict[str, list[dict[str, Any]]] = {}
    for metrics in sorted(run_path.glob("*/metrics.jsonl")):
        for row in read_jsonl(metrics):
            rows_by_stage.setdefault(row["stage"], []).append(row)
    for stage, rows in rows_by_stage.items():
        if len(rows) > 1:
            written.append(directory / f"{stage}.png")
            _curves(stage, rows).savefig(written[-1])
    scores = run_path / "pair" / "scores.json"
    if scores.is_file():
        written.append(directory / "reward_model_scores.png")
        _distributions(read_json(scores)).savefig(written[-1])
    return written


def _curves(stage: str, rows: Sequence[Mapping[str, Any]]) -> Figure:
    names = sorted({name for row in rows for name in row["values"]})
    num_rows = math.ceil(len(names) / _COLUMNS)
    # Not pyplot: it looks for a display, and keeps every figure alive.
    figure = Figure(figsize=(4 * _COLUMNS, 2.2 * num_rows), dpi=80, layout="constrained")
    figure.suptitle(stage)
    for place, name in enumerate(names, start=1):
        axes = figure.add_subplot(num_rows, _COLUMNS, place)
        points = [(row["step"], row["values"][name]) for row in rows if row["values"].get(name) is not None]
        axes.plot([step for step, _ in points], [value for _, value in points], linewidth=1)
        axes.set_title(name, fontsize=8)
        axes.tick_params(labelsize=7)
    return figure


def _distributions(scores: Mapping[str, Sequence[float]]) -> Figure:
    figure = Figure(figsize=(6, 3.5), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    pooled = [score for values in scores.values() for score in values]
    span = (min(pooled, default=0.0), max(pooled, default=0.0))  # the same bins for all
    for source, values in scores.items():
        if values:
            mean = sum(values) / len(values)
            label = f"{SOURCES.get(source, source)} (n = {len(values)}, mean {mean:.2f})"
            axes.hist(values, bins=30, range=span, density=True, histtype="step", label=label)
    axes.set_xlabel("reward-model score")
    axes.set_ylabel("density")
    axes.legend(fontsize=7)
    return figure


def interval(score: Mapping[str, float] | None) -> str:
    """Accuracy in % with its interval."""
    if score is None:
        return "-"
    accuracy, low, high = (100 * score[figure] for figure in ("accuracy", "low", "high"))
    return f"{accuracy:.1f} [{low:.1f}, {high:.1f}]"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
