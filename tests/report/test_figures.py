"""Figures, tables and examples from data."""

from __future__ import annotations

import pytest

from pns.report.examples import Example, Side, examples, marked
from pns.report.figures import (
    Line,
    Share,
    _roc_points,
    bars,
    curve,
    differences,
    first_wrong_step,
    histogram,
    roc,
    running_mean,
    separation,
)
from pns.report.tables import results_table

HOSTILE = '<b onload=x>$a$ & "q"</b>'


def test_the_running_mean_is_shorter_at_the_ends() -> None:
    assert running_mean([1.0, 2.0, 6.0, 3.0], 3) == pytest.approx([1.5, 3.0, 11 / 3, 4.5])
    assert running_mean([1.0, 2.0], 1) == [1.0, 2.0]


def test_the_roc_of_four_scores() -> None:
    x, y = _roc_points(right=[3.0, 1.0], others=[2.0, 1.0])
    assert list(zip(x, y, strict=True)) == [(0, 0), (0, 0.5), (0.5, 0.5), (1, 1)]  # a tie is one slant
    assert separation({"right": [3.0, 1.0], "a": [2.0, 1.0], "none": []}, "right").startswith(
        "AUROC of right against a 0.62 "
    )
    assert separation({"a": [1.0]}, "right") == ""


def test_same_data_give_the_same_figure() -> None:
    def drawn() -> str:
        return curve("t", [Line("a", [0, 1, 2], [0.1, None, 0.3], smooth=3)], "step", "share", percent=True)

    assert drawn() == drawn()


@pytest.mark.parametrize(
    "figure",
    [
        curve(
            HOSTILE, [Line(HOSTILE, [0, 1], [1, 2], [0, 1], [2, 3]), Line("b", [0], [1])], HOSTILE, HOSTILE
        ),
        histogram(HOSTILE, {HOSTILE: [1.0, 2.0], "right": [3.0], "none": []}, HOSTILE, "right", HOSTILE),
        roc(HOSTILE, {HOSTILE: [1.0, 2.0], "right": [3.0]}, "right"),
        first_wrong_step(HOSTILE, {HOSTILE: [0, 1, None, 99], "right": []}),
        bars(HOSTILE, {"a": {HOSTILE: Share(0.5, 0.4, 0.6)}, "b": {"x": Share(0.1)}}, "share"),
        differences(HOSTILE, {HOSTILE: {HOSTILE: Share(-0.1, -0.2, 0.1)}, "b": {"x": Share(0.1)}}, "points"),
        curve("nothing", [], "x", "y"),
        histogram("nothing", {"a": []}, "x"),
    ],
    ids="curve histogram roc steps bars differences no-lines no-values".split(),
)
def test_names_stay_text_and_colours_are_the_pages(figure: str) -> None:
    assert "<b " not in figure
    assert "<title" not in figure or HOSTILE not in figure
    assert figure.count("<svg") == 1
    assert "var(--grid)" in figure
    assert "#0000" not in figure  # every stand-in has become a variable
    assert "<metadata" not in figure


def test_first_wrong_steps_are_shares() -> None:
    figure = first_wrong_step("t", {"rs": [0, 0, 1, None]})
    assert ">none</text>" in figure
    assert "50%" in figure  # the axis reaches it


def test_a_results_table_marks_what_is_significant() -> None:
    rows = {
        "start": {"mean": Share(0.5, 0.45, 0.55)},
        "pns": {"mean": Share(0.625, 0.6, 0.65, "better"), HOSTILE: Share(0.1, verdict="worse")},
    }
    table = results_table(rows, {"mean": "n = 40"}, "caption")
    assert table.count("▲") == 1
    assert table.count("▼") == 1
    assert "62.5" in table
    assert "[60.0, 65.0]" in table
    assert "n = 40" in table
    assert "–" in table  # start has no figure of the other suite
    assert "<b " not in table


def test_the_first_wrong_step_is_marked_and_text_stays_text() -> None:
    text = "2+2=4 <i>3*4=13</i> so"
    side = Side("pns", text, False, (6, text.index(" so")), {"reward model": 1.234})
    step = "&lt;i&gt;3*4=13&lt;/i&gt;"
    assert marked(side) == f'2+2=4 <mark title="first wrong step">{step}</mark> so'
    shown = examples([Example(HOSTILE, HOSTILE, [side, Side(HOSTILE, HOSTILE, True)])])
    assert "reward model 1.23" in shown
    assert "<b " not in shown
    assert "<i>" not in shown
