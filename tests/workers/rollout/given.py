"""Weights that a test gives to rollout, in the place of the policy's."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray import cloudpickle

from workers.broadcast import Seat, member
from workers.weights import StoredWeights, store

# Ray's processes do not find the tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

Waits = tuple[Path, Path]  # a file that is made before the last tensor, and one that is waited for then


class Sender:
    """An actor with the seat of the policy's rank 0."""

    def send(self, tensors: dict[str, torch.Tensor], waits: Waits | None, seat: Seat) -> int:
        return member(seat).send(self._one_by_one(tensors, waits))

    def _one_by_one(
        self, tensors: dict[str, torch.Tensor], waits: Waits | None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        *first, last = tensors.items()
        yield from first
        if waits is not None:
            begun, go_on = waits
            begun.touch()
            while not go_on.exists():
                time.sleep(0.01)
        yield last


@dataclass
class Given:
    """A `workers.rollout.pool.WeightsSource` with these tensors; `sender` is an actor, for a pool that
    broadcasts."""

    tensors: dict[str, torch.Tensor]
    sender: Any = None
    waits: Waits | None = None
    num_updates: int = 0

    def weights(self) -> StoredWeights:
        return store(self.tensors.items())

    def send_weights(self, seat: Seat) -> list[Any]:
        return [self.sender.send.remote(self.tensors, self.waits, seat)]
