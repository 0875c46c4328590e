"""A session: cluster, actors and tracker for as long as steps of a plan are made."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pns.config import Config
from pns.data.prompts import Messages
from pns.files import read_jsonl, write_json
from pns.records import leaves
from pns.run.leftovers import marked_processes
from pns.run.memory import PeakMemory
from pns.run.page import NODES, RunPage, linked_places
from pns.run.stage import Step
from pns.run.stopping import current_request
from pns.run.terminal import PlainTerminal, Terminal
from pns.run.tracking import METRICS, Tracker
from pns.stages.context import Context
from pns.stages.monitor import ServiceMonitor
from workers.cluster import Cluster
from workers.fleet import Fleet
from workers.metric_backends import open_backends
from workers.node_memory import NodeMemory
from workers.runtime import runtime_of


@dataclass(frozen=True)
class Session:
    """Makes steps, one after the other, with actors that stay up between them."""

    config: Config
    page: RunPage
    fleet: Fleet
    messages: Messages
    tracker: Tracker
    scores: dict[str, list[float]] = field(default_factory=dict)  # see `Context`

    def make(self, step: Step, number: int = 1, total: int = 1) -> None:
        """Make a step that is not done, or go on where an interruption left it; it is the `number`-th of the
        run's `total`."""
        if changes := changed_keys(self.page.previous(step.name), step.made_from):
            self.tracker.note(f"{step.name}: made anew, as {changes} (the output before is kept)")
        self.tracker.terminal.stage(step.name, number, total, resumed(step))
        own = self.config.seed, step.place, self.fleet, self.messages, self.tracker
        ctx = Context(*own, Path(self.config.runs), self.scores)
        with ctx.making(step.made_from):
            self.page.link(step)
            self.tracker.enter(step.place.directory)
            step.stage.make(ctx, step.settings, *step.inputs)
            self.page.save()
        if current_request().came:
            current_request().obey()


@contextmanager
def session(
    config: Config,
    page: RunPage,
    pending: Sequence[Step],
    messages: Messages,
    attempts: dict[str, int],
    terminal: Terminal | None = None,
) -> Iterator[Session]:
    """Everything that `pending` needs, up. Raises UserError, with nothing written, where it cannot be."""
    terminal = terminal or PlainTerminal()
    roles = list(dict.fromkeys(role for step in pending for role in step.roles))
    place = "joining the Ray cluster" if os.environ.get("RAY_ADDRESS") else "starting Ray"
    terminal.wait(f"{place} for {', '.join(roles)}")
    with ExitStack() as stack:
        if not os.environ.get("RAY_ADDRESS"):  # there the processes are Ray's to end
            stack.enter_context(marked_processes(page.path))
        device = stack.enter_context(Cluster(config, roles))
        memory = stack.enter_context(PeakMemory())
        page.begin(config, attempts)  # only now: a start that fails changes nothing
        stack.callback(lambda: page.save(memory.gib))
        if os.environ.get("RAY_ADDRESS"):  # this process sees its own node alone
            nodes = stack.enter_context(NodeMemory())
            stack.callback(lambda: write_json(page.path / NODES, nodes.peaks()))
        fleet = Fleet(config, runtime_of(config, device, page.path))
        stack.callback(fleet.shutdown)  # before `start`, which may fail half-way
        files = [directory / METRICS for directory in linked_places(page.path).values()]
        # Backends want one count of rows that never falls, over all stages and starts.
        num_rows = sum(len(read_jsonl(file)) for file in files if file.is_file())
        tracker = Tracker(page.path, config.tracking, open_backends, num_rows, terminal)
        stack.callback(tracker.close)
        fleet.start(roles)
        stack.enter_context(ServiceMonitor(page.path, fleet.services))
        yield Session(config, page, fleet, messages, tracker)


def resumed(step: Step) -> str:
    """Where an interruption left the step; "" where it begins."""
    if not step.place.has_begun():
        return ""
    checkpoint = step.place.latest_checkpoint()
    return f"from step {checkpoint.step}" if checkpoint else "with what is kept of its beginning"


def changed_keys(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    """What the configuration says otherwise in two records of what a step was made from; empty: nothing."""
    if before is None:
        return ""
    said = ("settings", "roles", "seed")  # by the configuration; inputs and prompts follow from other keys
    was, is_now = (leaves({key: record[key] for key in said}) for record in (before, now))
    keys = [key for key in {**was, **is_now} if was.get(key) != is_now.get(key)]
    return ", ".join(f"{key} was {was.get(key)} and is {is_now.get(key)}" for key in keys)
