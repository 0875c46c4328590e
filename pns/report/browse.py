"""Pages to read an evaluation's completions, by verdict, with rendered formulas: `index.html` and one page
per model and suite.

They work offline from the file system and run no script: completions are untrusted text, so all of it is
escaped, formulas become MathML of a few allowed elements, and the pages' policy forbids scripts and loading
anything.
"""

import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jinja2
from markupsafe import Markup, escape

CAUSES = ("truncated", "no_answer", "prompt_too_long")  # of a wrong one, that say nothing of an answer
KINDS = ("correct", "wrong", *CAUSES, "unverified")
RENDERED_SAMPLES = 4  # of a problem; formulas of further samples stay LaTeX, which keeps pages small
_MAX_FORMULA = 2000  # characters; longer ones stay LaTeX
_ELEMENTS = frozenset(
    "math mrow mi mn mo mtext mspace mfrac msqrt mroot msub msup msubsup munder mover munderover mtable mtr "
    "mtd mstyle mpadded mphantom menclose merror".split()
)
_ATTRIBUTES = frozenset(
    "display mathvariant stretchy fence separator lspace rspace width height depth linethickness columnalign "
    "rowspacing columnspacing columnlines rowlines displaystyle scriptlevel accent accentunder movablelimits "
    "largeop form minsize maxsize notation symmetric".split()
)
# A formula between single dollars begins and ends with no space and has no digit after it: amounts of money
# stay text.
_FORMULA = re.compile(
    r"\$\$(?P<a>.+?)\$\$|\\\[(?P<b>.+?)\\\]|\\\((?P<c>.+?)\\\)"
    r"|(?<!\\)\$(?P<d>(?!\s)(?:[^$\\\n]|\\.|\n(?!\n))+?)(?<!\s)\$(?!\d)",
    re.DOTALL,
)
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
    index = _environment().get_template("index.html.jinja")
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
    template = _environment().get_template("page.html.jinja")
    return template.generate(values, rendered_samples=RENDERED_SAMPLES)  # in pieces: pages have megabytes


def _grouped(rows: Sequence[Row], key: str) -> dict[str, list[Row]]:
    """The rows by a field of their problem."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["problem"][key], []).append(row)
    return groups


@cache
def _environment() -> jinja2.Environment:
    # Whatever is not Markup is escaped; only `formula` makes Markup, of elements it allows.
    loader = jinja2.PackageLoader("pns.report")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"kind": kind, "formulas": render, "formula": render_answer}
    return environment


def kind(row: Row) -> str:
    """The verdict; the causes of a wrong one that say nothing of an answer go apart."""
    return str(row["reason"] if row["reason"] in CAUSES else row["verdict"])


def render(text: str) -> Markup:
    """Text with formulas between dollars, `\\\\(`, `\\\\[` as safe HTML."""
    pieces, end = [], 0  # escaped text and safe formulas in turn
    for match in _FORMULA.finditer(text):
        block = match["a"] or match["b"]
        latex = block or match["c"] or match["d"]
        pieces += [escape(text[end : match.start()]), formula(latex, block is not None) or escape(match[0])]
        end = match.end()
    return Markup("").join([*pieces, escape(text[end:])])


def render_answer(answer: str) -> Markup:
    """A final answer: a formula as a whole, or its text."""
    return formula(answer.strip().strip("$"), False) or escape(answer)


# Samples of one problem have most formulas in common.
@lru_cache(maxsize=20_000)
def formula(latex: str, block: bool) -> Markup | None:
    """Presentation MathML of a formula, None where it cannot be read (it is shown as it is then)."""
    from latex2mathml.converter import convert

    if len(latex) > _MAX_FORMULA:
        return None
    try:
        root = ElementTree.fromstring(convert(latex, display="block" if block else "inline"))
    except Exception:  # sampled text need not be LaTeX: the converter raises whatever its parser runs into
        return None
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]  # without the namespace, which ElementTree puts first
        if element.tag not in _ELEMENTS:
            return None
        element.attrib = {key: value for key, value in element.attrib.items() if key in _ATTRIBUTES}
    return Markup(ElementTree.tostring(root, encoding="unicode", method="html"))
