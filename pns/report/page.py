"""Pages: one file each, which work offline from the file system and run no script. What is sampled or named
by others is untrusted text: whatever is not Markup is escaped, and the pages' policy forbids scripts and
loading anything."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import jinja2
from markupsafe import Markup

from pns.report.text import render, render_answer


@dataclass(frozen=True)
class Section:
    """A part of a page, below its title; `lead` says in a line what is to be seen."""

    title: str
    body: Markup
    lead: str = ""


def page(title: str, sentence: str, sections: Sequence[Section], note: str = "") -> str:
    """The whole page: the sentence that says what came out, the sections, and a small note at the end."""
    values = {"title": title, "sentence": sentence, "sections": sections, "note": note}
    return template("report.html.jinja").render(values)


def grid(blocks: Iterable[Markup]) -> Markup:
    """Blocks (figures) side by side, as many as fit."""
    return Markup('<div class="grid">{}</div>').format(Markup("").join(blocks))


def beside(blocks: Iterable[Markup]) -> Markup:
    """Blocks of their own widths (tables) side by side, where there is room."""
    return Markup('<div class="beside">{}</div>').format(Markup("").join(blocks))


def folded(summary: str, body: Markup) -> Markup:
    """What opens on a click."""
    return Markup("<details><summary>{}</summary>{}</details>").format(summary, body)


@cache
def template(name: str) -> jinja2.Template:
    # Only `pns.report.text` makes Markup of sampled text, of elements that it allows.
    loader = jinja2.PackageLoader("pns.report")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"formulas": render, "formula": render_answer}
    return environment.get_template(name)
