"""The training state on disk, in PyTorch's distributed checkpoints: every rank writes its shards, any number
of ranks reads them, and training goes on while they are written.

Beside what `torch.distributed.checkpoint` writes of weights and optimizer (`.metadata` last) lies `rank-N.pt`
of each rank: the schedule of the learning rate and the random state.
"""

from __future__ import annotations

from concurrent.futures import Future, wait
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict


class StateFiles:
    """Writes and reads the state of verl engines, one at a time; all ranks make and use theirs together."""

    def __init__(self, timeout_seconds: float) -> None:
        # Writers agree on who writes what while the training's own groups are in use, and from the host.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        self._writing: Future[Any] | None = None

    def begin(self, engine: Any, directory: str) -> None:
        """Copy the state to the host, and write it into `directory`, new or empty, in the background."""
        if self._writing is not None:
            wait([self._writing])  # one copy of the state at a time
            self._writing = None
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # verl moves models to the host without waiting
        own = {
            "schedule": engine.lr_scheduler.state_dict(),
            "random": engine.checkpoint_manager.get_rng_state(),
            "has_moments": bool(engine.optimizer.state),
        }
        Path(directory).mkdir(parents=True, exist_ok=True)
        torch.save(own, _own_file(directory, engine.rank))
        # The writer is given, as it is also what makes the copy, before the call returns.
        writer = dcp.FileSystemWriter(directory)
        state = _state(engine, own["has_moments"])
        self._writing = dcp.async_save(state, storage_writer=writer, process_group=self._group)

    def is_whole(self, waits: bool) -> bool:
        """Whether all that was begun is on disk; `waits`: once it is. Raises what writing failed with."""
        if self._writing is None or not (waits or self._writing.done()):
            return self._writing is None
        self._writing.result()
        return True

    def read(self, engine: Any, directory: str) -> None:
        """Take the state in `directory` into the tensors that are there, whatever shards they are."""
        as_many = len(list(Path(directory).glob("rank-*.pt"))) == dist.get_world_size()
        file = _own_file(directory, engine.rank if as_many else 0)  # the schedule is everyone's
        own = torch.load(file, map_location="cpu", weights_only=False)
        if not own["has_moments"]:
            engine.optimizer.state.clear()
        state = _state(engine, own["has_moments"])
        dcp.load(state, checkpoint_id=directory, process_group=self._group)
        if own["has_moments"]:
            set_optimizer_state_dict(engine.module, engine.optimizer, state["optimizer"])
        engine.lr_scheduler.load_state_dict(own["schedule"])
        for group, rate in zip(engine.optimizer.param_groups, engine.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        if as_many:
            engine.checkpoint_manager.load_rng_state(own["random"])


def _own_file(directory: str | Path, rank: int) -> Path:
    return Path(directory) / f"rank-{rank}.pt"


def _state(engine: Any, has_moments: bool) -> dict[str, Any]:
    """The engine's own tensors: trained weights, each once (a tied head has the name of the embedding), and
    what the optimizer keeps of them. Before its first step that is nothing: asked for it, torch takes one."""
    parameters = engine.module.named_parameters()
    weights = {name: parameter.detach() for name, parameter in parameters if parameter.requires_grad}
    optimizer = get_optimizer_state_dict(engine.module, engine.optimizer) if has_moments else {}
    return {"weights": weights, "optimizer": optimizer}
