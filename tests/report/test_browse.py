"""Pages of completions: all of it is untrusted text, and formulas are MathML or stay as they are."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pns.report.browse import KINDS, kind, page, write_pages
from pns.report.text import formula, render, render_answer

ATTACK = (
    '<script>alert(1)</script><img src=x onerror="alert(2)">"><svg/onload=alert(3)></div></details> $\\text{<script>alert(4)</script>}$ '
    '$\\href{javascript:alert(5)}{x}$ $\\style{background:url(http://a)}{y}$ $$<b onclick="alert(6)">$$ '
    "\\(\\unicode{60}script\\unicode{62}\\) $\\class{\" onmouseover=\"alert(7)}{z}$ <a href='javascript:alert(8)'>\x00\u2028&lt;script&gt;"
)
ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "h1", "p", "label", "input", "span", "details"),
    *("summary", "div", "math", "table", "tr", "td", "th", "a"),
}


class Page(HTMLParser):
    """What a browser sees: elements, their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.shows: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.shows += [value or "" for name, value in attrs if name == "class"]

    def handle_data(self, data: str) -> None:
        self.text += data


def row(
    problem: str = "p1", verdict: str = "correct", reason: str = "equal", **changes: Any
) -> dict[str, Any]:
    stated = {
        "id": problem,
        "prompt": "What is $\\frac{1}{2}$ of $x^2$?",
        "answer": "$\\frac{x^2}{2}$",
        "suite": "s",
    }
    base = {
        "problem": stated | {"subject": "Algebra", "level": "3"},
        "sample": 0,
        "seed": 1,
        "completion": "So \\boxed{2}.",
        "num_tokens": 5,
    }
    return base | {"finish_reason": "stop", "extracted": "2", "verdict": verdict, "reason": reason} | changes


def test_untrusted_text_stays_text() -> None:
    hostile = row(completion=ATTACK, extracted=ATTACK, reason=ATTACK)
    hostile["problem"] |= {
        "prompt": ATTACK,
        "answer": ATTACK,
        "id": ATTACK,
        "subject": ATTACK,
        "level": ATTACK,
    }
    text = "".join(page(ATTACK, [hostile]))
    found = Page(text)
    mathml = {tag for tag in found.tags if tag.startswith("m") and tag != "meta"}
    assert found.tags - mathml <= ALLOWED
    assert not {name for name in found.attributes if name.startswith("on")}
    assert not found.attributes & {"src", "style"}
    assert re.findall(r'<a href="([^"]*)"', text) == ["index.html"]
    assert "<script" not in text
    assert found.text.count("<script>alert(1)</script>") >= 6  # shown, as text
    assert "default-src 'none'" in text


def test_pages_need_no_network(tmp_path: Path) -> None:
    write_pages(tmp_path / "b", {"m": [row(), row("p2", "wrong", "different")], "a b": [row()]})
    pages = sorted(path.name for path in (tmp_path / "b").iterdir())
    assert pages == ["a b.s.html", "index.html", "m.s.html"]
    for path in (tmp_path / "b").iterdir():
        text = path.read_text()
        assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//|<link|<script|@import|url\(", text)
        for target in re.findall(r'href="([^"]+)"', text):
            assert (tmp_path / "b" / target.replace("%20", " ")).is_file()
    write_pages(tmp_path / "b", {"m": [row()]})
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["index.html", "m.s.html"]


def test_problems_are_found_by_verdict() -> None:
    rows = [
        row("p1"),
        row("p2", "wrong", "different"),
        row("p3", "wrong", "truncated"),
        row("p4", "wrong", "no_answer", extracted=None),
        row("p5", "wrong", "prompt_too_long", extracted=None),
        row("p6", "unverified", "timeout"),
    ]
    assert [kind(r) for r in rows] == list(KINDS)
    text = "".join(page("t", rows))
    shows = Page(text).shows
    for r, name in zip(rows, KINDS, strict=True):
        assert f"problem has-{name}" in shows
        assert f"sample is-{name}" in shows
        assert f'id="show-{name}"' in text
        assert f"#show-{name}:checked) .sample:not(.is-{name})" in text
        assert r["problem"]["id"] in text
    assert "timeout" in text


def test_formulas() -> None:
    found = render("Half of $x^2$ is $$\\frac{x^2}{2}$$ or \\(y\\), \\[z < 1\\].")
    assert found.count("<math") == 4
    assert "<mfrac><mrow>" in found or "<mfrac>" in found
    assert found.count('display="block"') == 2
    assert "<mo>&lt;</mo>" in found
    assert render("It costs $2 and $3, so $5.") == "It costs $2 and $3, so $5."
    assert render("costs \\$2 and \\$3") == "costs \\$2 and \\$3"
    assert "<math" in render_answer("\\frac{1}{2}")
    assert "<math" in render_answer("$69$")


@pytest.mark.parametrize(
    "latex",
    ["\\frac{1}{", "{" * 3000, "\\sqrt{" * 300, "^" * 400, "\\begin{array}{c", "\x00", "", "x" * 5000],
)
def test_unreadable_formulas_stay_latex(latex: str) -> None:
    assert formula(latex, False) is None
    text = f"a ${latex}$ <b>"
    assert "<math" not in render(text)
    assert Page(render(text)).text.replace("\x00", "").replace("\ufffd", "") == text.replace("\x00", "")
    assert "&lt;b&gt;" in render(text)
