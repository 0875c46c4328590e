"""Pages to read an evaluation's completions, by verdict, with rendered formulas: `index.html` and one page
per model and suite.

They work offline from the file system and run no script: completions are untrusted text, so all of it is
escaped, formulas become MathML of a few allowed elements, and the pages' policy forbids scripts and loading
anything.
"""

from __future__ import annotations

import html
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

CAUSES = ("truncated", "no_answer", "prompt_too_long")  # of a wrong one, that say nothing of an answer
KINDS = ("correct", "wrong", *CAUSES, "unverified")
RENDERED_SAMPLES = 4  # of a problem; formulas of further samples stay LaTeX, which keeps pages small
_MAX_FORMULA = 2000  # characters; longer ones stay LaTeX
_ELEMENTS = frozenset(
    "math mrow mi mn mo mtext mspace mfrac msqrt mroot msub msup msubsup munder mover munderover mtable mtr mtd mstyle mpadded mphantom "  # noqa: SIM905
    "menclose merror".split()
)
_ATTRIBUTES = frozenset(
    "display mathvariant stretchy fence separator lspace rspace width height depth linethickness columnalign rowspacing columnspacing "  # noqa: SIM905
    "columnlines rowlines displaystyle scriptlevel accent accentunder movablelimits largeop form minsize maxsize notation symmetric".split()
)
# A formula between single dollars begins and ends with no space and has no digit after it: amounts of money
# stay text.
_FORMULA = re.compile(
    r"\$\$(?P<a>.+?)\$\$|\\\[(?P<b>.+?)\\\]|\\\((?P<c>.+?)\\\)|(?<!\\)\$(?P<d>(?!\s)(?:[^$\\\n]|\\.|\n(?!\n))+?)(?<!\s)\$(?!\d)",
    re.DOTALL,
)
_STYLE = """
:root{color-scheme:light dark;font:16px/1.5 system-ui,sans-serif}body{max-width:60rem;margin:1rem auto;padding:0 1rem}
details{border:1px solid #8884;border-radius:6px;margin:.4rem 0;padding:.3rem .7rem}summary{cursor:pointer}
.text{white-space:pre-wrap;overflow-wrap:anywhere;background:#8881;border-radius:6px;padding:.5rem .7rem;margin:.4rem 0}
.tag{display:inline-block;min-width:6.5rem;font-weight:600}.correct{color:#1a7f37}.wrong{color:#cf222e}.truncated{color:#9a6700}
.no_answer,.prompt_too_long{color:#8250df}.unverified{color:#0969da}
label{margin-right:1rem;white-space:nowrap}math[display=block]{margin:.3rem 0}
table{border-collapse:collapse}td,th{padding:.2rem .8rem;text-align:right}td:first-child,th:first-child{text-align:left}
"""
_HIDE = "".join(
    f"body:has(#show-{kind}:checked) .sample:not(.is-{kind}),body:has(#show-{kind}:checked) .problem:not(.has-{kind}){{display:none}}"
    for kind in KINDS
)
_HEAD = (
    '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    '<meta name="viewport" content="width=device-width"><title>{title}</title><style>{style}</style></head><body>'
)

Row = Mapping[str, Any]


def write_pages(directory: Path, answered: Mapping[str, Sequence[Row]]) -> None:
    """Write the pages of every model's rows (`pns.stages.evaluate.Answered` as JSON), in place of those that
    are there."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    lines = []
    for name, rows in answered.items():
        by_suite: dict[str, list[Row]] = {}
        for row in rows:
            by_suite.setdefault(row["problem"]["suite"], []).append(row)
        for suite, own in by_suite.items():
            file = f"{name}.{suite}.html"
            with open(directory / file, "w", encoding="utf-8") as out:
                out.writelines(page(f"{name}: {suite}", own))
            counts = Counter(kind(row) for row in own)
            cells = "".join(f"<td>{counts[k]}</td>" for k in KINDS)
            lines.append(
                f'<tr><td><a href="{html.escape(quote(file))}">{html.escape(name)}: {html.escape(suite)}</a></td>{cells}</tr>'
            )
    header = "".join(f"<th>{k}</th>" for k in KINDS)
    table = f"<h1>Completions by verdict</h1><table><tr><th></th>{header}</tr>{''.join(lines)}</table></body></html>"
    (directory / "index.html").write_text(
        _HEAD.format(title="Evaluation", style=_STYLE) + table, encoding="utf-8"
    )


def page(title: str, rows: Sequence[Row]) -> Iterator[str]:
    """The HTML of one model on one suite, in parts."""
    by_problem: dict[str, list[Row]] = {}
    for row in rows:
        by_problem.setdefault(row["problem"]["id"], []).append(row)
    counts = Counter(kind(row) for row in rows)
    yield _HEAD.format(title=html.escape(title), style=_STYLE + _HIDE) + f"<h1>{html.escape(title)}</h1><p>"
    yield f'<label><input type="radio" name="show" checked> all ({len(rows)})</label>'
    for name in KINDS:
        yield f'<label><input type="radio" name="show" id="show-{name}"> <span class="{name}">{name}</span> ({counts[name]})</label>'
    yield "</p>"
    for problem_id, own in by_problem.items():
        problem, kinds = own[0]["problem"], [kind(row) for row in own]
        head = " ".join(
            text for text in (problem["subject"], problem["level"] and f"level {problem['level']}") if text
        )
        marks = "".join(
            f' <span class="{name}">{kinds.count(name)} {name}</span>' for name in KINDS if name in kinds
        )
        yield (
            f'<details class="problem {" ".join(f"has-{name}" for name in dict.fromkeys(kinds))}"><summary>{html.escape(problem_id)} '
            f'{html.escape(head)}{marks}</summary><div class="text">{render(problem["prompt"])}</div>'
            f"<p>Gold answer: {render_answer(problem['answer'])}</p>"
        )
        for row, name in zip(own, kinds, strict=True):
            extracted = render_answer(row["extracted"]) if row["extracted"] is not None else "none"
            shown = (
                render(row["completion"])
                if row["sample"] < RENDERED_SAMPLES
                else html.escape(row["completion"])
            )
            yield (
                f'<details class="sample is-{name}"{" open" if len(own) == 1 else ""}><summary><span class="tag {name}">{name}</span> '
                f"sample {row['sample']}, {row['num_tokens']} tokens, {html.escape(row['reason'])}; answer: {extracted} "
                f"{html.escape(row.get('detail', ''))}</summary>"
                f'<div class="text">{shown}</div></details>'
            )
        yield "</details>\n"
    yield "</body></html>"


def kind(row: Row) -> str:
    """The verdict; the causes of a wrong one that say nothing of an answer go apart."""
    return str(row["reason"] if row["reason"] in CAUSES else row["verdict"])


def render(text: str) -> str:
    """Text with formulas between dollars, `\\\\(`, `\\\\[` as safe HTML."""
    parts, end = [], 0
    for found in _FORMULA.finditer(text):
        block = found["a"] or found["b"]
        latex = block or found["c"] or found["d"]
        parts += [
            html.escape(text[end : found.start()]),
            formula(latex, block is not None) or html.escape(found[0]),
        ]
        end = found.end()
    return "".join([*parts, html.escape(text[end:])])


def render_answer(answer: str) -> str:
    """A final answer: a formula as a whole, or its text."""
    return formula(answer.strip().strip("$"), False) or html.escape(answer)


@lru_cache(maxsize=20_000)
def formula(latex: str, block: bool) -> str | None:
    """Presentation MathML of a formula, None where it cannot be read (it is shown as it is then)."""
    from latex2mathml.converter import convert

    if len(latex) > _MAX_FORMULA:
        return None
    try:
        root = ElementTree.fromstring(convert(latex, display="block" if block else "inline"))
    except (
        Exception
    ):  # the converter raises whatever its parser runs into; sampled text is not LaTeX at all times
        return None
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        if element.tag not in _ELEMENTS:
            return None
        element.attrib = {key: value for key, value in element.attrib.items() if key in _ATTRIBUTES}
    return ElementTree.tostring(root, encoding="unicode", method="html")
