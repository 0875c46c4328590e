"""What a run's services do, and what is asked of them: two files of its page, for other machines, too.

services.json   written by the run every two seconds, for `pns status`
scale.json      written by `pns scale`, read by the run
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pns.files import read_json, write_json
from pns.records import from_json, to_json
from pns.run.place import lock_holder

WRITE_SECONDS = 2.0  # between two states of services.json
DONE = "done"


@dataclass
class Board:
    """The state of one start of a run.

    `start` names the start, `holder` its process as the lock of the page does. `services`: reward term -> the
    figures of its service (`workers.rewards.service.ServiceStats`), None while it is not up. `request`: the
    last one that was read, `outcomes` what became of it, a term: "" while it is under way, DONE, or why not.
    """

    start: str
    holder: str
    written: float = 0.0  # seconds since 1970
    services: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    request: str = ""
    outcomes: dict[str, str] = field(default_factory=dict)

    def write(self, page: Path) -> None:
        write_json(page / "services.json", to_json(self))

    def is_of_running(self, page: Path) -> bool:
        """Whether the start that wrote it still holds the page."""
        return bool(self.holder) and lock_holder(page / "lock") == self.holder


def read_board(page: Path) -> Board | None:
    """The last state; None where no run has written one. Raises UserError for a damaged file."""
    path = page / "services.json"
    return from_json(Board, read_json(path)) if path.is_file() else None


@dataclass(frozen=True)
class ScaleRequest:
    """Replicas that terms shall have, of the start `start` alone: another one knows nothing of it."""

    start: str
    id: str
    replicas: dict[str, int]


def ask_to_scale(page: Path, start: str, replicas: Mapping[str, int]) -> ScaleRequest:
    """Leave a request for the run; it takes the place of one that has not been read."""
    request = ScaleRequest(start, uuid.uuid4().hex, dict(replicas))
    write_json(page / "scale.json", request)
    return request


def read_request(page: Path, start: str) -> ScaleRequest | None:
    """The request that was left for this start, if any. Raises UserError for a damaged file."""
    path = page / "scale.json"
    values = read_json(path) if path.is_file() else None
    if not isinstance(values, dict) or values.get("start") != start:
        return None
    return from_json(ScaleRequest, values)
