"""What a run shows: on a terminal, in a pipe, as JSON lines, and where little is wanted."""

from __future__ import annotations

import io
import json
import os
import re

import pytest

from pns.run import terminal as terminals
from pns.run.terminal import JsonTerminal, LiveTerminal, PlainTerminal, Progress, Terminal, minutes

VALUES = {"entropy": 1.25, "reward": 0.5, "accuracy": 0.25, "format_rate": None, "lr": 1e-6}


def step(done: int, seconds_left: float = 65.0) -> Progress:
    return Progress("rl", done, 3, seconds_left, VALUES)


def part(done: int) -> Progress:
    return Progress("evaluate  target", done, 700, None, {})


def show(terminal: Terminal) -> None:
    """A stage of three steps, and one that counts completions, as a run shows them."""
    terminal.note("own: rl, evaluate; all of it is in runs/own")
    terminal.wait("starting Ray for rollout, policy")
    terminal.stage("rl", 1, 2, "from step 20")
    for done in (1, 2, 3):
        terminal.progress(step(done, 65.0 * (3 - done)))
    terminal.end_stage()
    terminal.stage("evaluate", 2, 2, "")
    for done in (1, 350, 700):
        terminal.progress(part(done))
    terminal.end_stage()
    terminal.summary(["Mean of 7 suites: better", "Report: runs/own/report.html"], {"wall_seconds": 3.0})


def test_a_pipe_gets_plain_lines_and_few_of_them() -> None:
    out = io.StringIO()
    show(PlainTerminal(out))
    assert out.getvalue().splitlines() == [
        "own: rl, evaluate; all of it is in runs/own",
        "starting Ray for rollout, policy",
        "rl (1 of 2), from step 20",
        "rl  1/3  ETA 2:10  reward 0.5  accuracy 0.25  format_rate -",
        "rl  3/3  ETA 0:00  reward 0.5  accuracy 0.25  format_rate -",
        "evaluate (2 of 2)",
        "Mean of 7 suites: better",
        "Report: runs/own/report.html",
    ]


def test_a_pipe_hears_of_long_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    terminal = PlainTerminal(out)
    terminal.progress(part(1))
    monkeypatch.setattr(terminals, "PART_SECONDS", 0.0)
    terminal.progress(part(350))
    assert out.getvalue() == "evaluate  target  350/700\n"


def test_a_terminal_gets_a_line_that_follows_and_what_stays_above_it() -> None:
    """A real terminal of 100 columns, which is read as the user sees it."""
    out = io.StringIO()
    out.isatty = lambda: True  # type: ignore[method-assign]
    terminal = LiveTerminal(out, 100)
    show(terminal)
    text = out.getvalue()
    assert "\x1b[?25h" in text.split("Mean of 7 suites")[0]  # the cursor is back
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    lines = [line.strip() for line in drawn.replace("\r", "\n").splitlines()]
    assert "rl (1 of 2), from step 20" in lines
    assert "rl  3/3  reward 0.5  accuracy 0.25  format_rate -" in lines  # stays
    assert all(len(line) <= 100 for line in lines)


def test_programs_get_json_lines() -> None:
    out = io.StringIO()
    show(JsonTerminal(out))
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds == ["note", "wait", "stage", *["progress"] * 3, "stage", *["progress"] * 3, "end"]
    assert events[2]["stage"] == "rl"
    assert events[3]["values"] == VALUES
    assert events[-1]["report"] == {"wall_seconds": 3.0}
    assert all(event["time"] > 0 for event in events)


def test_quiet_is_the_end_alone() -> None:
    out = io.StringIO()
    show(Terminal(out))
    assert out.getvalue() == "Mean of 7 suites: better\nReport: runs/own/report.html\n"


@pytest.mark.parametrize("stage", ["reward_model", "reward_model_held_out", "unknown"])
def test_figures_are_those_of_the_stage(stage: str) -> None:
    values = {"grad_norm": 1.0, "lr": 0.5, "margin": 2.0, "loss": 0.75, "accuracy": 0.5}
    known = stage != "unknown"
    expected = "loss 0.75  accuracy 0.5" if known else "grad_norm 1  lr 0.5  margin 2"
    assert Progress(stage, 1, 2, None, values).figures == expected


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (65, "1:05"), (754.6, "12:35"), (7384, "2:03:04")]
)
def test_minutes(seconds: float, text: str) -> None:
    assert minutes(seconds) == text


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setitem(os.environ, "TERM", "dumb")
    assert type(terminals.open_terminal()) is PlainTerminal
