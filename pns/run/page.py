"""A run's page: a directory with the names people know, which are links to where its stages' outputs lie.

<runs>/<name>/
  config.yaml  run.json  report.html  report.json  browse/  decontamination.json  lock
  services.json  scale.json          see pns.run.services
  logs/ROLE-INDEX.log                what actors print, see workers.actor_logs
  <stage> -> ../stages/<stage>-<digest>
  <stage>_<part> -> ../stages/<stage>-<digest>   of a stage that the method has several times: one for each
                                     part of a mixture (reverse_rl_pns_target), arm and round (bcpg_nsa_1)
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from omegaconf import OmegaConf

from pns.config import Config, to_dict
from pns.errors import UserError
from pns.files import read_json, remove, replacing, write_json
from pns.run.place import Place, locked
from pns.run.stage import Step

NODES = "nodes.json"  # peak memory of a cluster's nodes, of the last start


class RunPage:
    """Reading needs no more than `RunPage(path)`; a driver works in `RunPage.open(path)`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened = time.monotonic()
        kept = read_json(path / "run.json") if (path / "run.json").is_file() else {}
        self._seconds_before: float = kept.get("wall_seconds", 0.0)
        self._peak_memory_gib: float | None = kept.get("peak_memory_gib")
        self.attempts: dict[str, int] = kept.get("attempts", {})

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[Self]:
        """Create the directory if need be and hold its lock. Raises UserError while another process holds it.
        Writes nothing but the lock."""
        path.mkdir(parents=True, exist_ok=True)
        with locked(path / "lock", "wait for it to end, or choose another run with name=NAME"):
            yield cls(path)

    def begin(self, config: Config, attempts: dict[str, int]) -> None:
        """Write what the run is made with; from here on the page speaks of this configuration."""
        text = OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))
        with replacing(self.path / "config.yaml") as file:
            file.write(text.encode())
        self.attempts = attempts
        self.save()

    def leads_to(self, step: Step) -> bool:
        """Whether the step's name leads to its place."""
        link = self.path / step.name
        return link.is_symlink() and link.resolve() == step.place.directory.resolve()

    def link(self, step: Step) -> None:
        """Make the step's name lead to its place. The link is relative: `runs` can be moved as a whole."""
        if not self.leads_to(step):
            link = self.path / step.name
            if link.exists() and not link.is_symlink():  # nothing that we did not put there is removed
                raise UserError(f"{link} is no link: move it away, or choose another run with name=NAME")
            remove(link)
            link.symlink_to(os.path.relpath(step.place.directory, self.path))

    def previous(self, name: str) -> dict[str, Any] | None:
        """What the finished stage that the name leads to now was made from."""
        return Place(self.path / name).manifest()

    def save(self, peak_memory_gib: float = 0.0) -> None:
        """Keep the time spent and the highest memory of this and earlier processes of the run."""
        peak = max(peak_memory_gib, self._peak_memory_gib or 0.0)
        self._peak_memory_gib = peak or None  # 0: not measured yet
        wall_seconds = self._seconds_before + time.monotonic() - self._opened
        figures = {"wall_seconds": wall_seconds, "peak_memory_gib": self._peak_memory_gib}
        write_json(self.path / "run.json", figures | {"attempts": self.attempts})


def way_on(page: Path, first: str | None = None) -> str:
    """What the same command does after an interruption. `first`: the stage of its --from."""
    if not (page / "config.yaml").is_file():
        return "nothing is made yet: the same command begins again"
    unfinished = [name for name, place in linked_places(page).items() if Place(place).manifest() is None]
    # It goes on with one; others are of earlier starts, with other keys.
    latest = max(unfinished, key=lambda name: (page / name / "progress.json").stat().st_mtime, default="")
    command = f"the same command without --from {first}" if first else "the same command"
    if not latest:
        return f"{command} goes on after the stages that are done"
    checkpoint = Place(page / latest).latest_checkpoint()
    if checkpoint is None:
        trains = (page / latest / "metrics.jsonl").is_file()
        return f"{command} goes on with {latest}" + (", which has no checkpoint yet" if trains else "")
    return f"{command} goes on with {latest} after its step {checkpoint.step}"


def check_page(directory: Path) -> None:
    """Raises UserError for what is not a run's page."""
    if not (directory / "config.yaml").is_file():
        raise UserError(f"{directory} is not a run directory (no config.yaml); name one like runs/tiny-qwen2")


def pages(runs: Path) -> list[Path]:
    """The run pages below `runs`, by name."""
    return sorted(path.parent for path in runs.glob("*/config.yaml"))


def linked_places(page: Path) -> dict[str, Path]:
    """Name -> directory of every stage that a page leads to and that is still there."""
    links = [path for path in page.iterdir() if path.is_symlink() and path.is_dir()]
    return {link.name: link.resolve() for link in sorted(links)}
