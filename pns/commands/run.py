"""`pns run`, `report`, `runs` and `gc`: a recipe's run, and what runs keep."""

import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from pns.config import ALL_STAGES, Config, stages
from pns.errors import UserError
from pns.files import files_below, remove
from pns.preflight import check_inputs, check_start
from pns.recipe import load
from pns.run.page import RunPage, check_page, linked_places, pages, way_on
from pns.run.place import STORE, Place, locked
from pns.run.stopping import current_request
from pns.run.terminal import Show, open_terminal


def run_recipe(
    recipe: Path,
    overrides: Sequence[str],
    first: str | None,
    last: str | None,
    over: Sequence[Path] = (),
    show: Show = Show.auto,
) -> None:
    """Make what is missing of the recipe's run, with the files `over` it."""
    config = load(recipe, list(overrides), over=over)
    check_stages(config, first, last)
    check_inputs(config, stages(config, last))
    check_start(config, stages(config, last), first)
    page = Path(config.runs) / config.name
    before = RunPage(page).attempts
    current_request().way_out = lambda: way_on(page, first if RunPage(page).attempts != before else None)
    with closing(open_terminal(show)) as terminal:
        terminal.note(f"{config.name}: {', '.join(stages(config, last))}; all of it is in {page}")
        terminal.wait("loading libraries")
        from pns import driver  # takes seconds: what is wrong has been said by now

        driver.run(config, first, last, terminal)


def check_stages(config: Config, first: str | None, last: str | None) -> None:
    """Raises UserError for --from and --until that do not fit the run."""
    if first and last and ALL_STAGES.index(first) > ALL_STAGES.index(last):
        raise UserError(f"--from {first} comes after --until {last}: exchange them")
    for option, stage in (("--from", first), ("--until", last)):
        if stage and stage not in stages(config):
            raise UserError(f"{option} {stage}: the stages of this run are {', '.join(stages(config))}")


def report_runs(directories: Sequence[Path], against: Sequence[str] = (), file: Path | None = None) -> None:
    """Of one run print the tables again, and rebuild its report; of several, or with `against` or
    `file`, print accuracies and differences over all of them."""
    for directory in directories:
        check_page(directory)
    if len(directories) > 1 or against or file is not None:
        from pns.commands.compare import compare_runs

        compare_runs(directories, against, file)
        return
    from pns.report.run_report import write_report

    write_report(directories[0])


def list_runs(runs: Path) -> None:
    """Print the runs below `runs` with their stages, and the outputs that no run leads to."""
    own = check_runs(runs)
    for page in pages(runs):
        print(page.name)
        places = linked_places(page)
        width = max([14, *(len(name) + 2 for name in places)])
        for name, place in places.items():
            print(f"  {name:<{width}}{described_place(place)}")
    unlinked = sorted(own - used_places(runs))
    if unlinked:
        print("led to by no run (pns gc removes them):")
        for place in unlinked:
            print(f"  {described_place(place)}")


def collect_garbage(runs: Path, yes: bool) -> None:
    """Remove the outputs that no run leads to, after asking; one that is being made stays."""
    unlinked = sorted(check_runs(runs) - used_places(runs))
    if not unlinked:
        print(f"{runs}: every output is led to by a run")
        return
    for place in unlinked:
        print(described_place(place))
    total = sum(num_bytes(place) for place in unlinked)
    question = f"remove these {len(unlinked)} outputs ({readable_size(total)})? [y/N] "
    if not yes and input(question).strip().lower() not in ("y", "yes"):
        print("nothing was removed")
        return
    for place in unlinked:
        try:
            # Whoever makes it holds the lock; after a crash nobody does.
            with locked(place / "lock", "it stays"):
                remove(place)
        except UserError as error:
            print(error)


def check_runs(runs: Path) -> set[Path]:
    """The places of all outputs below `runs`. Raises UserError where nothing has run."""
    if not (runs / STORE).is_dir():
        raise UserError(f"{runs} has no {STORE}/: name the directory of runs with --runs DIR")
    return {path.resolve() for path in (runs / STORE).iterdir() if path.is_dir()}


def used_places(runs: Path) -> set[Path]:
    """The places that pages lead to, and those that what they lead to was made from."""
    used = {place for page in pages(runs) for place in linked_places(page).values()}
    for place in list(used):
        manifest = Place(place).manifest() or {}
        used |= {(runs / STORE / stage).resolve() for stage in manifest.get("contents", {})}
    return used


def described_place(place: Path) -> str:
    """Name, state, size and age of a stage's output."""
    state = "done" if Place(place).manifest() else "unfinished"
    age = readable_age(time.time() - place.stat().st_mtime)
    return f"{place.name:<36}{state:<12}{readable_size(num_bytes(place)):>10}{age:>10}"


def num_bytes(place: Path) -> int:
    return sum(path.stat().st_size for _, path in files_below(place))


def readable_size(num: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num < 1024:
            return f"{num:.0f} {unit}"
        num /= 1024
    return f"{num:.1f} GiB"


def readable_age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
