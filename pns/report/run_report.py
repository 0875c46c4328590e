"""The report of a run from what its finished stages wrote: report.json, report.html, and tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from pns.files import read_json, write_json
from pns.report.closing import closing
from pns.run.page import NODES
from pns.run.terminal import PlainTerminal, Terminal

BASES = ("backbone", "target")  # models that others are compared with
_WRITTEN = {  # key of the report: what a stage wrote
    "suites": "evaluate/scores.json",
    "generator": "reverse_rl/generator.json",
    "reward_model": "reward_model/quality.json",
    "pairs": "pair/quality.json",
    "nodes": NODES,
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
# Key of the report -> step of each arm and round of method bcpg, and what it wrote.
_WRITTEN_IN_ROUNDS = {"step_labels": ("label_steps", "quality.json"), "bcpg": ("bcpg", "data.json")}
_MEANINGS = {  # figure -> what it is; others are called by their names
    "accuracy": "right answers",
    "wrong_rate": "wrong answers",
    "correct_rate": "right answers",
    "format_rate": "well-formed",
    "truncated_rate": "cut off",
    "masked_rate": "masked",
    "length_mean": "mean length, tokens",
    "length_max": "longest, tokens",
    "completion_tokens": "mean length, tokens",
    "single_error_share": "single error (checker)",
    "checker_rubric_mean": "rubric (checker)",
    "plausibility_mean": "plausibility",
    "coherence_mean": "coherence",
    "top_offset_share": "same error of the answer",
    "distinct_4": "distinct 4-grams",
    "box_only_flip_rate": "only the box is wrong",
    "num_completions": "completions",
    "training_pairs": "pairs trained on",
    "held_out_pairs": "pairs held out",
    "pairwise_accuracy": "held-out pairs told apart",
    "calibration_error": "calibration error",
    "chosen_mean": "mean score, right",
    "rejected_mean": "mean score, wrong",
}
_MODELS_AS_COLUMNS = 4  # with more of them each is a row


def write_report(run_path: Path, terminal: Terminal | None = None) -> dict[str, Any]:
    """Write report.json and report.html, show the tables and what the run came to, and return the report.

    Keys: `suites.<suite>.<model>.{accuracy,low,high,n}` (with "mean"; models: backbone, target, result or
    arms), `generator.{before,after}.<figure>` (of a mixture `generator.<part> {before,after}`),
    `reward_model.{main,held_out}.<figure>`, `pairs` (quality of the negatives: a figure by source),
    `step_labels.<arm>_<round>.<figure>`, `bcpg.<arm>_<round>.<figure>` (what it was trained on),
    `stages.<stage>.seconds`, `wall_seconds`, `peak_memory_gib`, `nodes` (peak memory of each node of a
    cluster), `versions`. What no finished stage has written is left out.
    """
    report = build_report(run_path)
    write_json(run_path / "report.json", report)
    terminal = terminal or PlainTerminal()
    tables = report_tables(report)
    from pns.report.run_page import write_run_page  # it draws: whoever only reads a report loads less

    page = write_run_page(run_path, report, tables)
    ending = closing(run_path, report, unicode=terminal.console.encoding.startswith("utf"))
    terminal.tables(list(tables.values()))
    terminal.summary([*ending, f"Report: {page}"], report)
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
    in_order = sorted(manifests.items(), key=lambda named: (named[1]["ended"], named[0]))
    shown = ("seconds", "counts")
    report["stages"] = {
        name: {key: manifest[key] for key in shown} | {"place": (run_path / name).resolve().name}
        for name, manifest in in_order
    }
    for key, (step, file) in _WRITTEN_IN_ROUNDS.items():
        rounds = [name.removeprefix(f"{step}_") for name in manifests if name.startswith(f"{step}_")]
        if rounds:
            in_turn = sorted(rounds, key=_arm_and_round)
            report[key] = {name: read_json(run_path / f"{step}_{name}" / file) for name in in_turn}
    if in_order:
        report["versions"] = in_order[-1][1]["versions"]  # the newest stage's: others may be of earlier ones
    if (run_path / "run.json").is_file():
        figures = read_json(run_path / "run.json")
        kept = {key: figures.get(key) for key in ("wall_seconds", "peak_memory_gib")}
        report |= {key: value for key, value in kept.items() if value is not None}
    return report


def _arm_and_round(name: str) -> tuple[str, int]:
    arm, _, number = name.rpartition("_")
    return arm, int(number)


def report_tables(report: Mapping[str, Any]) -> dict[str, Table]:
    """Tables for the terminal, by what they are of: accuracies, and for method bcpg their differences, the
    labels of steps and what each arm was trained on; the reward models, the generator, the negatives, the
    nodes' memory and the stages' times."""
    made = {}
    stages = report.get("stages", {})
    if suites := report.get("suites"):
        made["suites"] = suites_table(suites)
        if report.get("bcpg"):
            made["differences"] = differences_table(suites)
    if labels := report.get("step_labels"):
        made["step_labels"] = step_labels_table(labels, stages)
    if trained_on := report.get("bcpg"):
        made["bcpg"] = trained_on_table(trained_on)
    if reward_models := report.get("reward_model"):
        made["reward_model"] = figures_table("reward model", reward_models, "Reward models")
    if generator := report.get("generator"):
        made["generator"] = figures_table("generator", generator, "Generator of negatives")
    if quality := report.get("pairs"):
        made["pairs"] = quality_table(quality)
    if nodes := report.get("nodes"):
        made["nodes"] = nodes_table(nodes)
    if stages:
        made["time"] = time_table(stages)
    for table in made.values():
        table.columns[0].no_wrap = True
        for column in table.columns:
            column.overflow = "fold"  # on a narrow terminal nothing is cut off
    return made


def figures_table(what: str, figures: Mapping[str, Mapping[str, float | None]], title: str) -> Table:
    """A column for each of them, a row a figure."""
    table = Table(what, *figures, title=title)
    for name in dict.fromkeys(key for values in figures.values() for key in values):
        table.add_row(_MEANINGS.get(name, name), *(_figure(values.get(name)) for values in figures.values()))
    return table


def nodes_table(nodes: Mapping[str, Any]) -> Table:
    table = Table("node", "host GiB", "of", "GPUs, GiB", title="Peak memory")
    for address, peak in nodes.items():
        gpus = " ".join(f"{gib:.1f}" for gib in peak["gpu_gib"])
        table.add_row(address, f"{peak['host_gib']:.1f}", f"{peak['host_total_gib']:.0f}", gpus or "-")
    return table


def time_table(stages: Mapping[str, Any]) -> Table:
    table = Table("stage", "seconds", title="Time")
    made_as: dict[str, str] = {}  # place -> the first step that leads to it: it was made once
    for stage, values in stages.items():
        first = made_as.setdefault(values["place"], stage)
        table.add_row(stage, f"{values['seconds']:.0f}" if first == stage else f"as {first}")
    return table


def suites_table(suites: Mapping[str, Any]) -> Table:
    """Accuracies, a row a suite; with more than four models a row a model."""
    models = list(dict.fromkeys(model for scores in suites.values() for model in scores))
    sizes = {suite: next(iter(scores.values()))["n"] for suite, scores in suites.items()}
    title = "Accuracy in % [95 % Wilson interval]"
    if len(models) > _MODELS_AS_COLUMNS:
        table = Table("model", *(f"{suite}\nn = {n}" for suite, n in sizes.items()), title=title)
        for model in models:
            table.add_row(model, *(interval(scores.get(model)) for scores in suites.values()))
        return table
    table = Table("suite", *models, "n", title=title)
    for suite, scores in suites.items():
        shares = [interval(scores.get(model)) for model in models]
        table.add_row(suite, *shares, str(sizes[suite]), end_section=suite == list(suites)[-2:][0])
    return table


def differences_table(suites: Mapping[str, Any]) -> Table:
    """Of each arm on each suite from the backbone, and from the target where that was evaluated too."""
    models = list(suites["mean"])
    bases = [model for model in models if model in BASES]
    heads = [head for base in bases for head in (f"from {base}", "p")]
    table = Table("arm", "suite", *heads, title="Difference in % [95 %: paired bootstrap over problems]")
    table.caption = "p: permutation test, corrected for the number of suites (Holm), not for that of arms"
    for arm in [model for model in models if model not in BASES]:
        for suite, scores in suites.items():
            row = [arm if suite == next(iter(suites)) else "", suite]
            for base in bases:
                difference = scores[arm]["against"][base]
                row += [
                    difference_interval(difference),
                    f"{difference.get('p_corrected', difference['p_value']):.4f}",
                ]
            table.add_row(*row, end_section=suite == "mean")
    return table


def step_labels_table(labels: Mapping[str, Any], stages: Mapping[str, Any]) -> Table:
    """The steps that each arm and round labelled, Cohen's kappa of the annotators, and how good they are
    where a checker knows."""
    annotators = list(dict.fromkeys(name for own in labels.values() for name in own.get("exact", {})))
    heads = [annotator.replace("_", " ") for annotator in annotators]
    table = Table("labels", "steps", "correct", "kappa", *heads, "unlabelled")
    table.title = "Labels of steps"
    table.caption = "correct: share of steps by consensus; kappa: of judge and process reward model"
    if annotators:
        precision = f"{', '.join(heads)}: precision / recall of correct steps against a checker's"
        table.caption += f"; in brackets the checker's share; {precision}"
    made_as: dict[str, str] = {}
    for name, own in labels.items():
        first = made_as.setdefault(stages[f"label_steps_{name}"]["place"], name)
        if first != name:
            table.add_row(f"{name} as {first}")
            continue
        correct = _figure(own["correct_share"])
        if "exact_share" in own:
            correct += f" ({_figure(own['exact_share'])})"
        kappa = _figure(own.get("agreement", {}).get("kappa"))
        exact = own.get("exact", {})
        qualities = [_label_quality(exact.get(annotator, {})) for annotator in annotators]
        missing = {service: sum(causes.values()) for service, causes in own["missing"].items()}
        unlabelled = ", ".join(f"{service} {num}" for service, num in missing.items()) or "-"
        table.add_row(name, str(own["steps"]), correct, kappa, *qualities, unlabelled)
    return table


def _label_quality(figures: Mapping[str, float | None]) -> str:
    return " / ".join(_figure(figures.get(name)) for name in ("precision", "recall"))


def trained_on_table(trained_on: Mapping[str, Any]) -> Table:
    """The completions of each arm and round, and their tokens by the sign of the advantage."""
    heads = ("problems", "right", "wrong", "unlabelled", "tokens +", "0", "-", "gap")
    table = Table("trained", *heads, title="What each arm was trained on")
    table.caption = (
        "completions right, wrong, left out for want of labels; tokens by the sign of their advantage; "
        "gap: mean over tokens of |log-probability when trained - when sampled|"
    )
    for name, own in trained_on.items():
        counts = [str(own[what]) for what in ("problems", "right", "wrong")]
        unlabelled = str(sum(own["unlabelled"].values()))
        signs = own["tokens"] or {}  # of pairs none
        tokens = [str(signs.get(sign, "-")) for sign in ("positive", "zero", "negative")]
        table.add_row(name, *counts, unlabelled, *tokens, _figure(own["behaviour_gap"]))
    return table


def quality_table(quality: Mapping[str, Any]) -> Table:
    """Figures of the negatives, a column a source; below them the one-sidedness of the pairs."""
    named = [source for figure in _QUALITY for source in quality.get(figure, {})]
    sources = [source for source in dict.fromkeys(named) if source != "pairs"]
    table = Table("negatives", *sources, title="Quality of negatives (AUROC 0.5: like right ones)")
    for figure, label in _QUALITY.items():
        if quality.get(figure):
            table.add_row(label, *(_quality_cell(quality, figure, source) for source in sources))
    of_pairs = f"one-sidedness of the pairs: {_quality_cell(quality, 'one_sidedness', 'pairs')}"
    brackets = "the detector's 95 % interval, one-sidedness by chance, share of the text up to the wrong step"
    table.caption = f"{of_pairs}; in brackets: {brackets}"
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


def interval(score: Mapping[str, float] | None) -> str:
    """Accuracy in % with its interval."""
    if score is None:
        return "-"
    accuracy, low, high = (100 * score[figure] for figure in ("accuracy", "low", "high"))
    return f"{accuracy:.1f} [{low:.1f}, {high:.1f}]"


def difference_interval(difference: Mapping[str, float]) -> str:
    """Difference of accuracies in % with its interval."""
    value, low, high = (100 * difference[figure] for figure in ("difference", "low", "high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
