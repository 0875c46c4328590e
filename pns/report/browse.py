"""Pages to read an evaluation's completions, by verdict, with rendered formulas: `index.html` and one page
per model and suite.

They work offline from the file system and run no script: see `pns.report.page`.
"""

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pns.report.page import template

CAUSES = ("truncated", "no_answer", "prompt_too_long")  # of a wrong one, that say nothing of an answer
KINDS = ("correct", "wrong", *CAUSES, "unverified")
RENDERED_SAMPLES = 4  # of a problem; formulas of further samples stay LaTeX, which keeps pages small
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
    index = template("index.html.jinja")
    text = index.render(title="Completions by verdict", kinds=KINDS, pages=pages)
    (directory / "index.html").write_text(text, encoding="utf-8")


def page(title: str, rows: Sequence[Row]) -> Iterator[str]:
    """The HTML of one model on one suite, in pieces."""
    problems = []
    for samples in _grouped(rows, "id").values():
        counts = Counter(map(kind, samples))
        ordered = {name: counts[name] for name in KINDS if name in counts}
        problems.append((samples[0]["problem"], samples, ordered))
    values = {"title": title, "kinds": KINDS, "counts": Counter(map(kind, rows)), "problems": problems}
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
