"""Several runs of one recipe with other seeds, as one table: `pns report RUN RUN ...`."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pns.algo.across import SuiteRuns, resample
from pns.algo.scores import MEAN, described, right_shares
from pns.errors import UserError, did_you_mean
from pns.files import read_json, write_json
from pns.records import to_json
from pns.report.run_report import interval
from pns.stages.artefacts import Evaluation

Figures = dict[str, Any]
Comparison = dict[str, dict[str, Figures]]  # suite (and "mean") -> model -> figures


def compare_runs(
    runs: Sequence[Path], against: Sequence[str], file: Path | None, console: Console | None = None
) -> Comparison:
    """Print accuracies of each model over `runs` (pages) and its paired differences from the first model and
    from those named in `against`; write them to `file`, if any.

    Keys: `<suite>.<model>.{accuracy,low,high,n}` (with "mean", the unweighted mean over suites), `runs` (the
    accuracy in each), and `against.<model>.{difference,low,high,p_value,p_corrected,verdict}`. Raises
    UserError unless all runs have the same models, and suites that compare.
    """
    evaluations = [finished_evaluation(run) for run in runs]
    models = list(evaluations[0].scores()[MEAN])
    check_same(runs, evaluations)
    for name in against:
        if name not in models:
            hint = did_you_mean(name, models) or f"; there are {', '.join(models)}"
            raise UserError(f"--against {name}: the runs have no such model{hint}")
    references = list(dict.fromkeys([models[0], *against]))
    compared = comparison(suite_runs(evaluations, models), models, references)
    if file is not None:
        write_json(file, compared)
    (console or Console()).print(*comparison_tables(compared, models, references, len(runs)), sep="\n")
    return compared


def finished_evaluation(run: Path) -> Evaluation:
    """Raises UserError where the run has not come to its end."""
    evaluation = Evaluation(run / "evaluate")
    if not (run / "evaluate" / "manifest.json").is_file():
        raise UserError(f"{run} has no finished evaluation: pns run its recipe to the end")
    return evaluation


def check_same(runs: Sequence[Path], evaluations: Sequence[Evaluation]) -> None:
    """Raises UserError unless the evaluations are different ones of the same models, suites and decoding."""
    places: dict[Path, Path] = {}
    for run, evaluation in zip(runs, evaluations, strict=True):
        place = evaluation.directory.resolve()
        if place in places:
            way_out = "name runs of different seeds, each once"
            raise UserError(f"{run} has the evaluation of {places[place]}, {place.name}: {way_out}")
        places[place] = run
        for what, mine, theirs in differences(evaluations[0], evaluation):
            raise UserError(f"{run} has {what} {theirs}, and {runs[0]} {mine}: compare runs of one recipe")


def differences(first: Evaluation, other: Evaluation) -> Iterator[tuple[str, Any, Any]]:
    """(what, of the first, of the other) of all that has to be the same."""
    models, other_models = (sorted(own.scores()[MEAN]) for own in (first, other))
    if models != other_models:
        yield "the models", ", ".join(models), ", ".join(other_models)
    mine, theirs = (read_json(own.suites_file) for own in (first, other))
    if mine.keys() != theirs.keys():
        yield "the suites", ", ".join(mine), ", ".join(theirs)
    for suite in mine:
        for what in ("count", "decoding"):
            if mine[suite][what] != theirs[suite][what]:
                yield f"{what} of {suite}", mine[suite][what], theirs[suite][what]


def suite_runs(evaluations: Sequence[Evaluation], models: Sequence[str]) -> dict[str, SuiteRuns]:
    """Suite -> its shares of right samples in all runs, problems in the order of their texts."""
    shares: dict[str, list[list[list[float]]]] = {}
    asked: dict[str, list[list[str]]] = {}
    num_samples: dict[str, int] = {}
    for evaluation in evaluations:
        rows = {model: evaluation.completions(model) for model in models}
        for suite in read_json(evaluation.suites_file):
            of_suite = [[row for row in rows[model] if row.problem.suite == suite] for model in models]
            texts = {row.problem.id: row.problem.prompt for row in of_suite[0]}
            in_order = sorted(texts, key=lambda identity: (texts[identity], identity))
            num_samples[suite] = len(of_suite[0]) // len(texts)  # the same in all runs
            by_id = [right_shares(of_model) for of_model in of_suite]
            shares.setdefault(suite, []).append([[own[identity] for identity in in_order] for own in by_id])
            asked.setdefault(suite, []).append([texts[identity] for identity in in_order])
    return {
        suite: SuiteRuns(
            np.array(of_runs), all(texts == asked[suite][0] for texts in asked[suite]), num_samples[suite]
        )
        for suite, of_runs in shares.items()
    }


def comparison(
    suites: Mapping[str, SuiteRuns], models: Sequence[str], references: Sequence[str]
) -> Comparison:
    found, mean = resample(suites)
    every = found | {MEAN: mean}
    compared: Comparison = {suite: {} for suite in every}
    for index, model in enumerate(models):
        for suite, own in every.items():
            accuracy = to_json(own.accuracy(index)) | {"runs": own.observed_RM[:, index].tolist()}
            compared[suite][model] = accuracy
        for other in references:
            if other != model:
                before = models.index(other)
                differences = {suite: own.difference(before, index) for suite, own in every.items()}
                for suite, figures in described(differences).items():
                    compared[suite][model].setdefault("against", {})[other] = figures
    return compared


def comparison_tables(
    compared: Comparison, models: Sequence[str], references: Sequence[str], num_runs: int
) -> list[Table]:
    """A row a model and a column a suite; then the differences from each reference, on the mean of the suites
    and on every suite."""
    said = "1 run" if num_runs == 1 else f"{num_runs} runs"
    table = Table("model", *compared, title=f"Accuracy in % over {said} [95 % interval]")
    for model in models:
        table.add_row(model, *(interval(of_suite[model]) for of_suite in compared.values()))
    made = [table]
    in_order = [MEAN, *(suite for suite in compared if suite != MEAN)]
    for reference in references:
        heads = ("model", "suite", "difference % [95 %]", "p", "p corrected", "")
        table = Table(*heads, title=f"Against {reference}, paired")
        for model in (other for other in models if other != reference):
            for suite in in_order:
                own = compared[suite][model]["against"][reference]
                difference, low, high = (f"{100 * own[what]:+.1f}" for what in ("difference", "low", "high"))
                p_values = (f"{own[key]:.3f}" for key in ("p_value", "p_corrected"))
                row = (suite, f"{difference} [{low}, {high}]", *p_values, own["verdict"])
                table.add_row(model if suite == MEAN else "", *row, end_section=suite == in_order[-1])
        made += [table] if table.row_count else []
    return made
