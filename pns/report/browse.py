"""Pages to read an evaluation's completions, by verdict, with rendered formulas: `index.html` and one page
per model and suite; and pages of solutions side by side.

They work offline from the file system and run no script: see `pns.report.page`.
"""

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pns.report.examples import Example, marked
from pns.report.page import template

CAUSES = ("truncated", "no_answer", "prompt_too_long")  # of a wrong one, that say nothing of an answer
KINDS = ("correct", "wrong", *CAUSES, "unverified")
RENDERED_SAMPLES = 4  # of a problem; formulas of further samples stay LaTeX, which keeps pages small
PROBLEMS_A_PAGE = 100
ORDERS = {  # of the two sides of a pair
    "right_first": "the right one scores higher",
    "wrong_first": "the wrong one scores higher",
    "not_scored": "not scored",
}
Row = Mapping[str, Any]


def write_pages(directory: Path, answered: Mapping[str, Sequence[Row]]) -> None:
    """Write the pages of every model's rows (`Answered` as JSON), in place of those that are there."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    pages = []
    for model, rows in answered.items():
        for suite, rows_of_suite in _grouped(rows, "suite").items():
            title, file = f"{model}: {suite}", f"{model}.{suite}.html"
            with open(directory / file, "w", encoding="utf-8") as out:
                out.writelines(page(title, rows_of_suite))
            pages.append((title, file, Counter(map(kind, rows_of_suite))))
    found = [name for name in KINDS if any(counts[name] for _, _, counts in pages)]
    text = template("index.html.jinja").render(title="Completions by verdict", kinds=found, pages=pages)
    (directory / "index.html").write_text(text, encoding="utf-8")


def page(title: str, rows: Sequence[Row]) -> Iterator[str]:
    """The HTML of one model on one suite, in pieces."""
    problems = []
    for samples in _grouped(rows, "id").values():
        counts = Counter(map(kind, samples))
        ordered = {name: counts[name] for name in KINDS if name in counts}
        problems.append((samples[0]["problem"], samples, ordered))
    values: dict[str, Any] = {
        "title": title,
        "kinds": KINDS,
        "counts": Counter(map(kind, rows)),
        "problems": problems,
    }
    values |= {"kind_of": kind, "rendered_samples": RENDERED_SAMPLES}
    values |= {"back": "index.html", "back_to": "all models and suites"}
    return template("page.html.jinja").generate(values)  # in pieces: pages have megabytes


def _grouped(rows: Sequence[Row], key: str) -> dict[str, list[Row]]:
    """The rows by a field of their problem."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["problem"][key], []).append(row)
    return groups


def kind(row: Row) -> str:
    """The verdict; the causes of a wrong one that say nothing of an answer go apart."""
    return str(row["reason"] if row["reason"] in CAUSES else row["verdict"])


def write_solution_pages(
    directory: Path, problems: Sequence[Example], became: Mapping[str, int], back: str
) -> None:
    """Write `index.html` and pages of problems with their solutions side by side, in place of those that are
    there; the first two of a problem are its pair, the right one first. `became`: what became of the samples,
    a count by name; `back`: the page that leads here."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    pages = []
    for number, start in enumerate(range(0, len(problems), PROBLEMS_A_PAGE), start=1):
        shown = problems[start : start + PROBLEMS_A_PAGE]
        title, file = f"Problems {start + 1} to {start + len(shown)}", f"solutions-{number}.html"
        counts = Counter(map(order, shown))
        values: dict[str, Any] = {"title": title, "counts": counts, "problems": shown}
        values |= {"kinds": list(ORDERS), "names": ORDERS}
        values |= {"order": order, "marked": marked, "back": "index.html", "back_to": "all problems"}
        with open(directory / file, "w", encoding="utf-8") as out:
            out.writelines(template("solutions.html.jinja").generate(values))
        pages.append((title, file, counts))
    values = {"title": "Solutions side by side", "kinds": list(ORDERS), "names": ORDERS, "pages": pages}
    values |= {"became": became, "total": sum(became.values()), "back": back, "back_to": "report"}
    text = template("solutions-index.html.jinja").render(values)
    (directory / "index.html").write_text(text, encoding="utf-8")


def order(example: Example) -> str:
    """Which of the first two solutions scores higher, by the first of their scores; a name of ORDERS."""
    scores = [next(iter(side.scores.values()), None) for side in example.sides[:2]]
    if len(scores) < 2 or scores[0] is None or scores[1] is None:
        return "not_scored"
    return "right_first" if scores[0] > scores[1] else "wrong_first"
