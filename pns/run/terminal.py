"""What a run shows while it is at work: one live line on a terminal, plain lines elsewhere, JSON lines for
programs, or its end alone."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TextIO

from rich import progress
from rich.console import Console
from rich.table import Column, Table

STEP_SECONDS = 5.0  # between plain lines of a stage's steps
PART_SECONDS = 15.0  # and of what is counted within a step
_BAR_WIDTH = 20
_MOST_FIGURES = 3
# Of a stage's metrics those that tell whether it does what it is for; of other stages the first ones.
_FIGURES = {
    "rl": ("reward", "accuracy", "format_rate"),
    "reverse_rl": ("wrong_rate", "plausibility_mean", "coherence_mean"),
    "reward_model": ("loss", "accuracy"),
    "preference": ("loss", "accuracy", "tokens_per_second"),
    "bcpg": ("loss", "kl", "tokens_per_second"),
}


class Show(StrEnum):
    """What a command shows."""

    auto = "auto"
    quiet = "quiet"
    json = "json"


@dataclass(frozen=True)
class Progress:
    """How far a stage is, or a part of one of its steps."""

    label: str
    done: int
    total: int
    seconds_left: float | None  # None: not known
    values: Mapping[str, float | None]  # metrics of the last step; of a part none

    @property
    def figures(self) -> str:
        """The metrics to look at, `reward 0.5  accuracy 0.61`."""
        stage = next((name for name in _FIGURES if is_series_of(self.label, name)), "")
        known = [name for name in _FIGURES.get(stage, ()) if name in self.values]
        chosen = known or list(self.values)[:_MOST_FIGURES]
        spelt = {name: self.values[name] for name in chosen}
        return "  ".join(
            f"{name} {'-' if value is None else f'{value:.3g}'}" for name, value in spelt.items()
        )

    @property
    def eta(self) -> str:
        return "" if self.seconds_left is None else f"ETA {minutes(self.seconds_left)}"


class Terminal:
    """Shows what a run came to and nothing before it; the others show more."""

    def __init__(self, out: TextIO | None = None, width: int | None = None) -> None:
        """`out`: standard output; `width`: the one of the terminal."""
        self.console = Console(file=out, width=width)

    def note(self, text: str) -> None:
        """A line of its own, for what the user should know at once."""

    def stage(self, name: str, number: int, total: int, resumed: str) -> None:
        """Stage `name`, the `number`-th of the run's `total`, begins; `resumed`: from where."""

    def wait(self, what: str) -> None:
        """From now on something without steps is waited for."""

    def progress(self, now: Progress) -> None:
        """A step has ended, or a part of it."""

    def end_stage(self) -> None:
        """The stage has ended: its last progress stays to be read."""

    def tables(self, tables: Sequence[Table]) -> None:
        """The report's."""

    def summary(self, lines: Sequence[str], report: Mapping[str, Any]) -> None:
        """The run's end: what it came to, and where the report is."""
        self.close()
        self.console.print(*lines, sep="\n", soft_wrap=True, highlight=False, markup=False)

    def close(self) -> None:
        """Give the terminal back, also after an interruption."""


class PlainTerminal(Terminal):
    """A line for each thing, at most one every few seconds of a stage's steps: for pipes and files."""

    def __init__(self, out: TextIO | None = None, width: int | None = None) -> None:
        super().__init__(out, width)
        self._label, self._shown = "", 0.0

    def note(self, text: str) -> None:
        self._line(text)

    def stage(self, name: str, number: int, total: int, resumed: str) -> None:
        self._line(stage_line(name, number, total, resumed))

    def wait(self, what: str) -> None:
        self._line(what)

    def progress(self, now: Progress) -> None:
        ends_stage = bool(now.values) and now.done == now.total
        interval = STEP_SECONDS if now.values else PART_SECONDS
        is_first = now.label != self._label
        moment = time.monotonic()
        if is_first and not now.values:  # a part has done nothing yet that is worth a line
            self._label, self._shown = now.label, moment
        elif is_first or ends_stage or moment - self._shown >= interval:
            self._label, self._shown = now.label, moment
            parts = (now.label, f"{now.done}/{now.total}", now.eta, now.figures)
            self._line("  ".join(part for part in parts if part))

    def end_stage(self) -> None:
        self._label = ""

    def tables(self, tables: Sequence[Table]) -> None:
        self.console.print(*tables, sep="\n")

    def _line(self, text: str) -> None:
        # Not by rich, which would wrap at a width that a pipe does not have.
        self.console.file.write(f"{text}\n")
        self.console.file.flush()


class LiveTerminal(Terminal):
    """One line that follows the stage, with a bar; all else is printed above it."""

    def __init__(self, out: TextIO | None = None, width: int | None = None) -> None:
        super().__init__(out, width)
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(_BAR_WIDTH),
            progress.TimeElapsedColumn(),
            progress.TextColumn("{task.fields[state]}", style="none"),
            progress.TextColumn(
                "{task.fields[figures]}",
                style="none",
                markup=False,
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
            ),
            console=self.console,
            expand=True,
            transient=True,  # what stays is printed
            refresh_per_second=4,
        )
        self._task = self._bar.add_task("", total=None, state="", figures="")
        self._last = ""  # the stage's last state, as a line
        self._bar.start()

    def note(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def stage(self, name: str, number: int, total: int, resumed: str) -> None:
        self.note(stage_line(name, number, total, resumed))
        self._last = ""
        self.wait(f"{name}: loading models")

    def wait(self, what: str) -> None:
        self._bar.reset(self._task, total=None, description=what, state="", figures="")

    def progress(self, now: Progress) -> None:
        state = f"{now.done}/{now.total}  {now.eta}".rstrip()
        self._bar.update(
            self._task,
            total=now.total,
            completed=now.done,
            description=now.label,
            state=state,
            figures=now.figures,
        )
        if now.values:
            self._last = f"  {now.label}  {now.done}/{now.total}  {now.figures}"

    def end_stage(self) -> None:
        if self._last:
            self.note(self._last)
        self._last = ""
        self.wait("")

    def tables(self, tables: Sequence[Table]) -> None:
        self.close()
        self.console.print(*tables, sep="\n")

    def close(self) -> None:
        self._bar.stop()


class JsonTerminal(Terminal):
    """Every event as a JSON object on a line of its own; `event` says which."""

    def note(self, text: str) -> None:
        self._event("note", text=text)

    def stage(self, name: str, number: int, total: int, resumed: str) -> None:
        self._event("stage", stage=name, number=number, total=total, resumed=resumed)

    def wait(self, what: str) -> None:
        self._event("wait", what=what)

    def progress(self, now: Progress) -> None:
        of_part = {} if now.values else {"part": True}
        self._event(
            "progress",
            label=now.label,
            done=now.done,
            total=now.total,
            seconds_left=now.seconds_left,
            values=dict(now.values),
            **of_part,
        )

    def summary(self, lines: Sequence[str], report: Mapping[str, Any]) -> None:
        self._event("end", lines=list(lines), report=dict(report))

    def _event(self, event: str, **values: Any) -> None:
        self.console.file.write(json.dumps({"event": event, "time": time.time(), **values}) + "\n")
        self.console.file.flush()


def open_terminal(show: Show = Show.auto) -> Terminal:
    """By what is asked for, and what standard output is."""
    if show is Show.quiet:
        return Terminal()
    if show is Show.json:
        return JsonTerminal()
    console = Console()
    return LiveTerminal() if console.is_terminal and not console.is_dumb_terminal else PlainTerminal()


def stage_line(name: str, number: int, total: int, resumed: str) -> str:
    """`rl (1 of 7), from step 20`"""
    return f"{name} ({number} of {total})" + (f", {resumed}" if resumed else "")


def is_series_of(label: str, stage: str) -> bool:
    """Whether a series of steps is one of `stage`: `reward_model_held_out` is of `reward_model`."""
    return label == stage or label.startswith(f"{stage}_")


def minutes(seconds: float) -> str:
    """`1:05`, and `2:03:04` from an hour on."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    text = f"{rest // 60:02d}:{rest % 60:02d}"
    return f"{hours}:{text}" if hours else text.removeprefix("0")
