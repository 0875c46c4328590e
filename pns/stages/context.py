"""What a stage is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from pns.config import Config
from pns.data.problems import ProblemSets
from pns.data.prompts import Prompts
from pns.run.directory import RunDirectory
from pns.run.tracking import Tracker
from workers.fleet import Fleet


@dataclass
class Context:
    """The run: its configuration, directory, actors, problems and prompts, and where metrics go."""

    config: Config
    run: RunDirectory
    fleet: Fleet
    problems: ProblemSets
    prompts: Prompts
    track: Tracker


Item = TypeVar("Item")


def draw(items: Sequence[Item], num: int, step: int, seed: int) -> list[Item]:
    """The items (problems, pairs) of one training step: consecutive slices of a fresh shuffle per epoch, a
    function of (seed, step) alone, so that a resumed stage neither skips nor repeats one."""
    picked: list[Item] = []
    orders: dict[int, np.ndarray] = {}
    for index in range(step * num, (step + 1) * num):
        epoch, place = divmod(index, len(items))
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, epoch]).permutation(len(items))
        picked.append(items[orders[epoch][place]])
    return picked
