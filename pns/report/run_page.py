"""A run's page, report.html: the sentence, the results, how each stage went, what its negatives are like, and
solutions side by side; and browse/, pages of all of these.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.table import Table

from pns.files import read_json, replacing
from pns.report.browse import write_solution_pages
from pns.report.closing import base_of, sentence
from pns.report.examples import examples
from pns.report.figures import bars, differences, first_wrong_step, histogram, roc
from pns.report.page import Section, beside, folded, grid, page
from pns.report.solutions import (
    CORRECT,
    as_examples,
    checker_of,
    read_solutions,
    side_by_side,
    steps_by_source,
)
from pns.report.tables import Share, results_table, table
from pns.report.training import training_sections

PAGE = "report.html"
_EXAMPLES = 4
_MOST_MODELS = 4  # whose accuracies on every suite are drawn
_MARKED = (
    "Accuracy in % with its 95 % interval. ▲ ▼: better or worse than the model that its training began with "
    "(paired bootstrap over problems, p < 0.05; over suites corrected by Holm)."
)


def write_run_page(run_path: Path, report: Mapping[str, Any], tables: Mapping[str, Table]) -> Path:
    """Write report.html and browse/ of a run from its report and the tables of it. Returns the page."""
    sections = [
        *results(report, tables),
        *training_sections(run_path, list(report["stages"])),
        *negatives(run_path, report, tables),
        *rest(run_path, tables),
    ]
    finished = ", ".join(report["stages"]) or "nothing"
    suites = report.get("suites")
    said = sentence(suites) if suites else f"Not evaluated yet. Finished: {finished}."
    versions = [f"{name} {version}" for name, version in report.get("versions", {}).items() if version]
    text = page(run_path.name, said, sections, ", ".join(versions))
    with replacing(run_path / PAGE) as file:
        file.write(text.encode())
    return run_path / PAGE


def results(report: Mapping[str, Any], tables: Mapping[str, Table]) -> Iterator[Section]:
    """Accuracies of the models on the suites, their mean first."""
    if not (suites := report.get("suites")):
        return
    by_model: dict[str, dict[str, Share]] = {}
    gains: dict[str, dict[str, Share]] = {}
    for suite in ["mean", *(suite for suite in suites if suite != "mean")]:
        for model, own in suites[suite].items():
            verdict = ""
            if base := base_of(model, suites["mean"]):
                against = own["against"][base]
                verdict = against["verdict"]
                gain = Share(against["difference"], against["low"], against["high"])
                gains.setdefault(f"{model} against {base}", {})[suite] = gain
            share = Share(own["accuracy"], own["low"], own["high"], verdict)
            by_model.setdefault(model, {})[suite] = share
    notes = {suite: f"n = {next(iter(scores.values()))['n']}" for suite, scores in suites.items()}
    drawn, title = by_model, "Accuracy"
    if len(by_model) > _MOST_MODELS:  # of many models the mean over suites alone
        drawn, gains = (
            {"mean": {name: own["mean"] for name, own in rows.items()}} for rows in (by_model, gains)
        )
        title = "Accuracy, mean of the suites"
    figures = [bars(title, drawn, "right answers")]
    if gains:
        figures.append(differences("What training was worth", gains, "points of accuracy, paired, 95 %"))
    body = results_table(by_model, notes, _MARKED) + grid(figures)
    for name in ("differences", "bcpg", "step_labels"):
        if name in tables:
            body += folded(str(tables[name].title), as_html(tables[name]))
    yield Section("Results", body)


def negatives(run_path: Path, report: Mapping[str, Any], tables: Mapping[str, Table]) -> Iterator[Section]:
    """What the reward models, the generator and the negatives are like, and some of them."""
    models = [titled(tables[name]) for name in ("reward_model", "generator") if name in tables]
    if models:
        yield Section("Reward models and generator", beside(models))
    if "pairs" not in tables:
        return
    checker = checker_of(run_path)
    solutions = read_solutions(run_path, checker)
    scores = read_json(run_path / "pair" / "scores.json")
    figures = [histogram("Scores of the reward model", scores, "raw score", CORRECT)]
    if scores.get(CORRECT):
        figures.append(roc("ROC of the reward model", scores, CORRECT))
    if checker is not None:
        # Colours go by place: that of the correct ones stays free.
        steps: dict[str, list[int | None]] = {CORRECT: [], **steps_by_source(solutions)}
        figures.append(first_wrong_step("First wrong step, by the checker", steps))
    lead = (
        "correct and rs: the target's own right and wrong solutions; others: what a generator wrote. "
        "Negatives are plausible where the scores do not tell them from correct ones."
    )
    yield Section("Negatives", grid(figures) + as_html(tables["pairs"]), lead)
    shown = side_by_side(solutions, _EXAMPLES)
    marked = "The first wrong step is marked. " if checker is not None else ""
    lead = f"The first problems that have a solution of every kind. {marked}Scores are the reward model's."
    every = as_examples(solutions)
    write_solution_pages(run_path / "browse", every, what_became(report), f"../{PAGE}")
    link = Markup('<p><a href="browse/index.html">Pairs and negatives of {} problems</a></p>')
    yield Section("Side by side", examples(shown) + link.format(len(every)), lead)


def what_became(report: Mapping[str, Any]) -> dict[str, int]:
    """How many of the samples that negatives were chosen from were kept, or dropped for which reason."""
    counts: dict[str, int] = report["stages"].get("synthesize", {}).get("counts", {})
    others = {"samples", "prompts_too_long"}
    if any(name.startswith("kept_") for name in counts):  # of a mixture by source
        others.add("kept")
    return {name: num for name, num in counts.items() if num and name not in others}


def rest(run_path: Path, tables: Mapping[str, Table]) -> Iterator[Section]:
    """Where completions can be read, times and memory."""
    body = Markup("")
    if (run_path / "evaluate/browse/index.html").is_file():
        said = "The completions of the evaluation, by verdict"
        body += Markup('<p><a href="evaluate/browse/index.html">{}</a></p>').format(said)
    for name in ("time", "nodes"):
        if name in tables:
            body += folded(str(tables[name].title), as_html(tables[name]))
    if body:
        yield Section("More", body)


def titled(own: Table) -> Markup:
    return Markup("<div><h3>{}</h3>{}</div>").format(own.title, as_html(own))


def as_html(own: Table) -> Markup:
    """A table of the terminal."""
    heads = [str(column.header) for column in own.columns]
    rows = zip(*(map(str, column.cells) for column in own.columns), strict=True)
    return table(heads, [list(row) for row in rows], str(own.caption or ""))
