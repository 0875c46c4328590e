"""`pns study`: the runs of a study, one for each backbone and seed, and what they come to together."""

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from pns.algo.scores import MEAN
from pns.commands.compare import check_same, comparison, comparison_tables, finished_evaluation, suite_runs
from pns.config import Config, Method, stages
from pns.errors import UserError
from pns.files import write_json
from pns.preflight import check_inputs
from pns.recipe import load
from pns.run.stopping import current_request

REFERENCES = ("target", "rft", "rs")  # arms of these names are what the others are compared with
_POLL_SECONDS = 0.5
_LEAVE_SECONDS = 60.0  # that a run has after an interruption for its checkpoint


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a study."""

    backbone: str  # its name in the study
    seed: int
    words: list[str]  # over the recipe's
    page: Path
    log: Path

    @property
    def name(self) -> str:
        return f"{self.backbone}, seed {self.seed}"


def run_study(recipe: Path, overrides: Sequence[str], over: Sequence[Path] = ()) -> None:
    """Make what is missing of every run, `study.at_once` side by side, then the study's page. A run that
    fails stops none of the others; the same command goes on with what is missing."""
    config = load(recipe, list(overrides), over=over)
    if config.method is not Method.study:
        raise UserError(f"{recipe}: method is {config.method}: a study has method=study, and study.arms")
    cells = study_cells(config)
    for cell in cells:
        check_inputs(load(recipe, [*overrides, *cell.words], over=over), stages(config))
    place = Path(config.runs) / config.name
    print(
        f"{config.name}: {len(cells)} runs of {len(config.study.arms)} arms; their page is in {place}",
        flush=True,
    )
    from pns import driver  # takes seconds: what is wrong with the words has been said by now

    driver.check_source(config)
    options = [word for file in over for word in ("--with", str(file))]
    command = [sys.executable, "-m", "pns.cli", "run", str(recipe), *options, *overrides]
    failed = make_cells(cells, command, config.study.at_once)
    if failed:
        shown = "; ".join(f"{cell.name}: {last_line(cell.log)} ({cell.log})" for cell in failed)
        raise UserError(f"{len(failed)} of {len(cells)} runs failed, the same command makes them: {shown}")
    pages: dict[str, list[Path]] = {}
    for cell in cells:
        pages.setdefault(cell.backbone, []).append(cell.page)
    report_study(Path(config.runs) / config.name, pages)


def report_study(
    directory: Path, pages: Mapping[str, Sequence[Path]], console: Console | None = None
) -> None:
    """Write study.json, tables.md and report.html of a study's finished runs (backbone -> pages, a seed
    each), and print what it came to."""
    from pns.report import study_page  # draws: nothing of it is needed before

    console = console or Console()
    found: dict[str, study_page.Backbone] = {}
    references: list[str] = []
    for name, of_backbone in pages.items():
        evaluations = [finished_evaluation(own) for own in of_backbone]
        check_same(of_backbone, evaluations)
        models = list(evaluations[0].scores()[MEAN])
        references = [own for own in REFERENCES if own in models]
        compared = comparison(suite_runs(evaluations, models), models, references)
        found[name] = study_page.Backbone(of_backbone, compared)
        console.print(*comparison_tables(compared, models, references, len(of_backbone)), sep="\n")
    console.print("reading the negatives of all runs, for the page ...")
    directory.mkdir(parents=True, exist_ok=True)
    figures = {
        name: {
            "suites": own.compared,
            "negatives": own.figures,
            "coverage": own.coverage,
            "first_errors": own.first_errors,
        }
        for name, own in found.items()
    }
    write_json(directory / "study.json", figures)
    tables = [study_page.study_markdown(name, own, references) for name, own in found.items()]
    (directory / "tables.md").write_text("\n".join(tables), encoding="utf-8")
    page = directory / "report.html"
    page.write_text(study_page.study_page(directory.name, found, references), encoding="utf-8")
    said = [study_page.study_sentence(name, own, references) for name, own in found.items()]
    console.print(*said, f"{page}, tables.md, study.json", sep="\n", soft_wrap=True, highlight=False)


def study_cells(config: Config) -> list[Cell]:
    """All seeds of the first backbone, then of the next. Raises UserError for a seed that is named twice."""
    own, runs = config.study, Path(config.runs)
    if not own.seeds or len(set(own.seeds)) < len(own.seeds):
        raise UserError(f"study.seeds: {own.seeds} must be numbers, at least one, each once")
    backbones = own.backbones or {"backbone": config.models.backbone}
    cells = []
    for name, model in backbones.items():
        for seed in own.seeds:
            run = f"{config.name}-{name}-{seed}"
            words = [f"models.backbone={model}", f"seed={seed}", f"name={run}"]
            cells.append(Cell(name, seed, words, runs / run, runs / config.name / f"{name}-{seed}.log"))
    return cells


def make_cells(cells: Sequence[Cell], command: Sequence[str], at_once: int) -> list[Cell]:
    """Run `command` with the words of each cell. Returns those that failed."""
    waiting, failed = list(cells), []
    stop = current_request()
    stop.end_seconds, stop.way_out = _LEAVE_SECONDS + 5, lambda: "the same command goes on with each run"
    running: dict[Cell, tuple[subprocess.Popen[bytes], float]] = {}
    num_done = 0
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                cell = waiting.pop(0)
                cell.log.parent.mkdir(parents=True, exist_ok=True)
                with cell.log.open("ab") as log:
                    made = subprocess.Popen([*command, *cell.words], stdout=log, stderr=subprocess.STDOUT)
                running[cell] = made, time.monotonic()
                print(f"{cell.name}: {cell.page} (what it prints: {cell.log})", flush=True)
            for cell, (process, began) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[cell]
                num_done += 1
                said = "done" if process.returncode == 0 else f"failed: {last_line(cell.log)}"
                took = f"{(time.monotonic() - began) / 60:.1f} min"
                print(f"{cell.name}: {said} ({took}; {num_done} of {len(cells)})", flush=True)
                if process.returncode != 0:
                    failed.append(cell)
            time.sleep(_POLL_SECONDS)
    finally:
        leave([process for process, _ in running.values()])
    return failed


def leave(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask runs that are still at work to stop, which keeps a checkpoint, and wait for it."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + _LEAVE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
