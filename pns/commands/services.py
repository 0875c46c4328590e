"""`pns status` and `pns scale`: the services of a run that is at work, on this machine or another one."""

import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pns.errors import UserError, did_you_mean
from pns.run.page import check_page
from pns.run.services import DONE, Board, ask_to_scale, read_board, read_request

_LOOK_SECONDS = 0.5  # between looks at services.json


def show_status(directory: Path, watch: bool) -> None:
    """Print what the services of a run do, or (`watch`) show it until Ctrl-C or the end of the run."""
    from rich.console import Console
    from rich.live import Live

    # What it shows has words of models and machines: a bracket in them is a bracket.
    board, console = known_board(directory), Console(markup=False, highlight=False)
    running = board.is_of_running(directory)
    if watch and running:
        try:
            with Live(status_view(directory, board, running), console=console) as live:
                while running:
                    time.sleep(_LOOK_SECONDS)
                    board = known_board(directory)
                    running = board.is_of_running(directory)
                    live.update(status_view(directory, board, running))
        except KeyboardInterrupt:  # how a watch ends
            return
    else:
        console.print(status_view(directory, board, running))


def scale(directory: Path, words: Sequence[str], timeout_seconds: float) -> None:
    """Give services of a run that is at work as many replicas as `words` (TERM=N) say, and wait for them.
    Raises UserError where that fails or takes longer than `timeout_seconds`."""
    replicas = parse_sizes(words)
    board = known_board(directory)
    if not board.is_of_running(directory):
        raise UserError(f"{directory}: no run with services is at work there; pns run starts one")
    for name in replicas:
        if name not in board.services:
            there = f"there are: {', '.join(board.services) or 'none'}"
            hint = did_you_mean(name, board.services) or f"; {there}"
            raise UserError(f"{name}: this run uses no such service{hint}")
    request = ask_to_scale(directory, board.start, replicas)
    end = time.monotonic() + timeout_seconds
    while not (board.request == request.id and all(board.outcomes.values())):
        if time.monotonic() > end:
            raise UserError(late(directory, board, request.id, replicas, timeout_seconds))
        time.sleep(_LOOK_SECONDS)
        board = known_board(directory)
        if board.start != request.start or not board.is_of_running(directory):
            raise UserError(f"{directory}: the run ended before it was done")
        if board.request != request.id and read_request(directory, board.start) != request:
            raise UserError(f"{directory}: another pns scale took the place of this one")
    faults = [outcome for outcome in board.outcomes.values() if outcome != DONE]
    if faults:
        raise UserError("; ".join(faults))
    for name, number in replicas.items():
        print(f"{name}={number}: done")


def late(directory: Path, board: Board, request: str, replicas: dict[str, int], seconds: float) -> str:
    """What is said when a request has not been done in time."""
    if board.request != request:
        return f"{directory}: the run has not taken the request within {seconds:g} s: is its machine there?"
    waiting = []
    for name, number in replicas.items():
        if not board.outcomes[name]:
            figures = board.services[name] or {"replicas": 0}
            waiting.append(f"{name} has {figures['replicas']} of {number} replicas")
    way_out = f"the run goes on trying, and pns status {directory} shows how it ends"
    return f"{', '.join(waiting)} after {seconds:g} s: {way_out}"


def known_board(directory: Path) -> Board:
    """Raises UserError where no run has written one."""
    check_page(directory)
    board = read_board(directory)
    if board is None:
        raise UserError(f"{directory}: its run has had no services yet; they come up with its first stage")
    return board


def parse_sizes(words: Sequence[str]) -> dict[str, int]:
    """TERM=N words as a dict. Raises UserError for one of another form."""
    sizes: dict[str, int] = {}
    for word in words:
        name, equals, number = word.partition("=")
        if not (name and equals and number.isascii() and number.isdecimal() and 0 < int(number) < 10**4):
            raise UserError(f"{word!r} is not of the form TERM=N with N from 1 to 9999, such as judge=4")
        if name in sizes:
            raise UserError(f"{name} is there twice: {name}={sizes[name]} and {word}")
        sizes[name] = int(number)
    return sizes


def status_view(directory: Path, board: Board, running: bool) -> Any:
    """The services, a row each, and what became of the last `pns scale`."""
    from rich.console import Group
    from rich.table import Table

    when = datetime.fromtimestamp(board.written).strftime("%Y-%m-%d %H:%M:%S")
    state = f"at {when}" if running else f"not at work; the last figures are of {when}"
    heads = "service replicas queued busy scored items/s p50_s p95_s restarts failures".split()
    with_cost = any(figures and figures["cost"] for figures in board.services.values())
    table = Table(box=None, padding=(0, 1, 0, 0))  # fits into 80 columns
    for head in [*heads, "cost"] if with_cost else heads:
        words = head in ("service", "failures")
        title, is_long = head.replace("_", " "), head == "failures"
        table.add_column(title, justify="left" if words else "right", no_wrap=not is_long)
    for name, figures in board.services.items():
        table.add_row(*(service_cells(name, figures, with_cost) if figures else [name, "starting"]))
    asked = [f"pns scale: {name}: {outcome or 'under way'}" for name, outcome in board.outcomes.items()]
    return Group(f"{directory}: {state}", table, *asked)


def service_cells(name: str, figures: dict[str, Any], with_cost: bool) -> list[str]:
    up, wanted = figures["replicas"], figures["wanted"]
    counts = [figures[what] for what in ("queued", "in_flight", "scored")]
    speeds = [figures[what] for what in ("items_per_second", "seconds_p50", "seconds_p95")]
    causes = "\n".join(f"{count} {cause}" for cause, count in figures["failures"].items()) or "none"
    cells = [name, str(up) if up == wanted else f"{up} of {wanted}", *map(str, counts)]
    cells += [*(f"{speed:.3g}" for speed in speeds), str(figures["restarts"]), causes]
    return [*cells, f"{figures['cost']:.4g}"] if with_cost else cells
