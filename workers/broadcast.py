"""Weights from the policy to all rollout processes at once, by a process group of torch: NCCL between GPUs,
gloo between CPUs.

The driver keeps a small store where the processes find each other and read what the next bucket holds; the
bytes go from process to process. Where one is lost the others would wait for it for ever: the driver gives
the group up, which ends their waits, and the next transfer makes a new one.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch
from torch import distributed

from workers.runtime import Runtime
from workers.sizes import WEIGHTS_BUCKET_BYTES
from workers.weights import Slice, packed

_GIVEN_UP = "given up"  # key of the store
_GLANCE_SECONDS = 0.1  # between two looks at it
_POLL_SECONDS = 0.001


@dataclass(frozen=True)
class Seat:
    """The place of a process in a group of `size`; rank 0 sends. `host` and `port` are those of the driver's
    store."""

    host: str
    port: int
    group: str
    rank: int
    size: int
    device: str
    timeout_seconds: float  # of one transfer


class Meeting:
    """The driver's side: one group at a time, of a sender and `num_receivers` other processes."""

    def __init__(self, num_receivers: int, runtime: Runtime) -> None:
        self._size = 1 + num_receivers
        self._runtime = runtime
        self._host = ray.util.get_node_ip_address()
        self._store = distributed.TCPStore(self._host, 0, is_master=True, wait_for_workers=False)
        self._number = 0  # of the present group

    def seat(self, rank: int) -> Seat:
        """In the present group; 0 is the sender's."""
        device, limit = self._runtime.device, self._runtime.sync_timeout_seconds
        return Seat(self._host, self._store.port, self._group, rank, self._size, device, limit)

    def give_up(self) -> None:
        """Whoever waits in the present group stops; seats are in another one from now on."""
        distributed.PrefixStore(self._group, self._store).set(_GIVEN_UP, "")
        self._number += 1

    @property
    def _group(self) -> str:
        return f"weights {self._number}"


class Member:
    """A process in a group. Its methods raise RuntimeError where the group is given up or a transfer takes
    longer than the seat says; it is of no use any more then."""

    def __init__(self, seat: Seat) -> None:
        """Returns when all are there."""
        self.seat = seat
        self._device = torch.device(seat.device)
        if seat.device == "cuda":  # by number: a thread of its own does not know which one is the process's
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._store = _store_of(seat)
        self._begin()
        self._store.set(f"here {seat.rank}", "")
        everybody = [f"here {rank}" for rank in range(seat.size)]
        self._wait(lambda: self._store.check(everybody))
        # Nothing can interrupt it: where a process is lost meanwhile, a thread is left behind.
        making = Future[Any]()
        threading.Thread(target=self._make_group, args=(making,), name="weights", daemon=True).start()
        self._wait(making.done)
        self._process_group = making.result()
        self._num_buckets = 0  # of all transfers, with the empty one at the end of each
        self._num_deleted = 0

    def send(
        self, tensors: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int = WEIGHTS_BUCKET_BYTES
    ) -> int:
        """Rank 0: the tensors, of any device, to all others; returns their bytes. Each is asked for when its
        turn comes, and one bucket is held beside them."""
        self._begin()
        for number in range(self._num_deleted, self._num_buckets):  # everybody has read them
            self._store.delete_key(_bucket(number))
        self._num_deleted = self._num_buckets
        room = torch.empty(bucket_bytes, dtype=torch.uint8, device=self._device)
        num_bytes = 0
        for slices, data in packed(tensors, room):
            self._announce(slices, len(data))
            self._broadcast(data)
            num_bytes += sum(own.num_bytes for own in slices)
        self._announce((), 0)
        return num_bytes

    def receive(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The others: what rank 0 sends, name and tensor, on the seat's device."""
        self._begin()
        while True:
            slices, num_bytes = self._announced()
            if not slices:
                return
            # Anew for each bucket: who loads the tensors may hold some until a layer is complete.
            data = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
            self._broadcast(data)
            for own in slices:
                yield own.name, own.of(data)

    def leave(self) -> None:
        """End what this process still sends or receives."""
        self._process_group.abort()

    def _make_group(self, making: "Future[Any]") -> None:
        try:
            process_group = _process_group(self.seat)
            # NCCL connects the processes with the first bytes.
            _begin_broadcast(process_group, torch.zeros(1, dtype=torch.uint8, device=self._device)).wait()
            making.set_result(process_group)
        except Exception as error:
            making.set_exception(error)

    def _announce(self, slices: tuple[Slice, ...], num_bytes: int) -> None:
        # No pickles: anyone who reaches the port can write there.
        parts = [(own.name, str(own.dtype), own.shape, own.start) for own in slices]
        self._store.set(_bucket(self._num_buckets), json.dumps((parts, num_bytes)))
        self._num_buckets += 1

    def _announced(self) -> tuple[tuple[Slice, ...], int]:
        key = _bucket(self._num_buckets)
        self._wait(lambda: self._store.check([key]))
        self._num_buckets += 1
        parts, num_bytes = json.loads(self._store.get(key))
        slices = [
            Slice(name, getattr(torch, dtype.removeprefix("torch.")), tuple(shape), start)
            for name, dtype, shape, start in parts
        ]
        return tuple(slices), num_bytes

    def _broadcast(self, data: torch.Tensor) -> None:
        work = _begin_broadcast(self._process_group, data)
        self._wait(work.is_completed)
        work.wait()  # what comes after in the device's stream finds the bytes; raises what went wrong

    def _begin(self) -> None:
        self._ends = time.monotonic() + self.seat.timeout_seconds
        self._looks = time.monotonic() + _GLANCE_SECONDS

    def _wait(self, done: Callable[[], bool]) -> None:
        while not done():
            time.sleep(_POLL_SECONDS)
            now = time.monotonic()
            if now < self._looks:
                continue
            self._looks = now + _GLANCE_SECONDS
            if self._store.check([_GIVEN_UP]):
                raise RuntimeError(f"{self.seat.group}: another process of the transfer was lost")
            if now > self._ends:
                raise RuntimeError(f"{self.seat.group}: longer than {self.seat.timeout_seconds:g} s")


_member: Member | None = None  # of this process


def member(seat: Seat) -> Member:
    """This process in the seat's group, joined with the first call."""
    global _member
    if _member is None or _member.seat != seat:
        if _member is not None:
            _member.leave()
            _member = None
        _member = Member(seat)
    return _member


def _begin_broadcast(process_group: Any, data: torch.Tensor) -> distributed.Work:
    options = distributed.BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    return process_group.broadcast([data], options)


def _bucket(number: int) -> str:
    return f"bucket {number}"


def _store_of(seat: Seat) -> distributed.Store:
    """A connection of its own to the driver's: one that waits lets no other thread ask."""
    limit = timedelta(seconds=seat.timeout_seconds)
    store = distributed.TCPStore(seat.host, seat.port, is_master=False, timeout=limit)
    return distributed.PrefixStore(seat.group, store)


def _process_group(seat: Seat) -> Any:
    """Not `init_process_group`'s: policy and vLLM have that one for themselves."""
    # The group's own limit ends the process, so it comes after ours.
    limit = timedelta(seconds=2 * seat.timeout_seconds)
    if seat.device == "cpu":
        return distributed.ProcessGroupGloo(_store_of(seat), seat.rank, seat.size, limit)
    options = distributed.ProcessGroupNCCL.Options()
    options._timeout = limit
    return distributed.ProcessGroupNCCL(_store_of(seat), seat.rank, seat.size, options)
