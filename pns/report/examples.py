"""Solutions of one problem side by side, with the first wrong step marked and what the reward model gives."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from pns.report.page import template
from pns.report.text import render


@dataclass(frozen=True)
class Side:
    """One solution. `wrong`: text[start:end] is its first wrong step, None where it has none or nobody knows;
    `scores`: what is said of it by name, such as the reward model's score."""

    name: str
    text: str
    correct: bool
    wrong: tuple[int, int] | None = None
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    """A problem with its gold answer and several solutions, the correct ones first."""

    problem: str
    answer: str
    sides: Sequence[Side]


def examples(shown: Sequence[Example]) -> Markup:
    """The problems one below the other, the solutions of each side by side where there is room."""
    return Markup(template("examples.html.jinja").render(examples=shown, marked=marked))


def marked(side: Side) -> Markup:
    """The text of a solution with its first wrong step marked."""
    if side.wrong is None:
        return render(side.text)
    start, end = side.wrong
    parts = (side.text[:start], side.text[start:end], side.text[end:])
    return Markup('{}<mark title="first wrong step">{}</mark>{}').format(*map(render, parts))
