"""A model's weights on their way from the policy to rollout: packed, and stored in Ray's object store.

The tensors lie end to end in flat buckets of bytes. Ray writes such an array into the store once and reads it
where it lies; a tensor it would pickle, and every reader would have a copy of its own. `workers.broadcast`
sends the same buckets from process to process.
"""

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import ray
import torch

from workers.runtime import Runtime
from workers.sizes import WEIGHTS_BUCKET_BYTES

_ALIGNMENT = 64  # of tensors in a bucket


def rollout_dtype(runtime: Runtime) -> torch.dtype:
    """What rollout computes in, and so what weights are sent in."""
    return torch.float32 if runtime.device == "cpu" else torch.bfloat16


@dataclass(frozen=True)
class Slice:
    """A tensor in a bucket, from the byte `start` on."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    def of(self, data: torch.Tensor) -> torch.Tensor:
        """The tensor, in the memory of the bucket's bytes `data`."""
        return data[self.start : self.start + self.num_bytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Bucket:
    """`data`: uint8, read-only where it comes out of the store."""

    slices: tuple[Slice, ...]
    data: np.ndarray

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            data = torch.from_numpy(self.data)
        for own in self.slices:
            yield own.name, own.of(data)


@dataclass(frozen=True)
class StoredWeights:
    """The weights of a model in Ray's object store, for as long as this is held; `num_bytes` of tensors."""

    buckets: tuple[ray.ObjectRef, ...]
    num_bytes: int

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name, in the memory of the store's node-local copy: to be read, never to be written."""
        return {name: tensor for bucket in ray.get(list(self.buckets)) for name, tensor in bucket.tensors()}


def store(
    tensors: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int = WEIGHTS_BUCKET_BYTES
) -> StoredWeights:
    """Put the tensors, of any device, into the object store. Each is asked for when its turn comes, and only
    one bucket is held beside the store."""
    # Without a GPU pinned memory is not to be had.
    room = torch.empty(bucket_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    references: list[ray.ObjectRef] = []
    num_bytes = 0
    for slices, data in packed(tensors, room):
        references.append(ray.put(Bucket(slices, data.numpy())))
        num_bytes += sum(own.num_bytes for own in slices)
    return StoredWeights(tuple(references), num_bytes)


def packed(
    tensors: Iterable[tuple[str, torch.Tensor]], room: torch.Tensor
) -> Iterator[tuple[tuple[Slice, ...], torch.Tensor]]:
    """The tensors end to end in the bytes of `room`, as many at a time as it holds; one that is larger comes
    alone, in memory of its own. Both are on the device of `room`. What is yielded is overwritten when the
    next is asked for."""
    slices: list[Slice] = []
    end = 0  # of what is in `room`
    for name, tensor in tensors:
        tensor = tensor.detach()
        if tensor.nbytes > len(room):
            alone = tensor.to(room.device).contiguous().view(torch.uint8).flatten()
            yield (Slice(name, tensor.dtype, tuple(tensor.shape), 0),), alone
            continue
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        if start + tensor.nbytes > len(room):
            yield tuple(slices), room[:end]
            slices.clear()
            start = 0
        own = Slice(name, tensor.dtype, tuple(tensor.shape), start)
        own.of(room).copy_(tensor)
        slices.append(own)
        end = start + tensor.nbytes
    if slices:
        yield tuple(slices), room[:end]
