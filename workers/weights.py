"""A model's weights on their way from the policy to rollout, through Ray's object store.

The tensors lie end to end in flat buckets of bytes. Ray writes such an array into the store once and reads it
where it lies; a tensor it would pickle, and every reader would have a copy of its own.
"""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import ray
import torch

from workers.runtime import Runtime

BUCKET_BYTES = 256 * 2**20  # of the sender's memory, beside the store's; a larger tensor travels alone
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

    def of(self, data: torch.Tensor) -> torch.Tensor:
        """The tensor, in the memory of the bucket's bytes `data`."""
        num_bytes = self.dtype.itemsize * int(np.prod(self.shape))
        return data[self.start : self.start + num_bytes].view(self.dtype).view(self.shape)


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


def store(tensors: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int = BUCKET_BYTES) -> StoredWeights:
    """Put the tensors, of any device, into the object store. Each is asked for when its turn comes, and only
    one bucket is held beside the store."""
    # Without a GPU pinned memory is not to be had.
    room = torch.empty(bucket_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    references: list[ray.ObjectRef] = []
    slices: list[Slice] = []
    end = num_bytes = 0  # of the bucket's bytes; of all tensors

    def close() -> None:
        nonlocal end
        if slices:
            references.append(ray.put(Bucket(tuple(slices), room[:end].numpy())))
            slices.clear()
            end = 0

    for name, tensor in tensors:
        num_bytes += tensor.nbytes
        if tensor.nbytes > bucket_bytes:
            alone = tensor.detach().cpu().contiguous().view(torch.uint8).flatten().numpy()
            references.append(ray.put(Bucket((Slice(name, tensor.dtype, tuple(tensor.shape), 0),), alone)))
            continue
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        if start + tensor.nbytes > bucket_bytes:
            close()
            start = 0
        own = Slice(name, tensor.dtype, tuple(tensor.shape), start)
        own.of(room).copy_(tensor.detach())
        slices.append(own)
        end = start + tensor.nbytes
    close()
    return StoredWeights(tuple(references), num_bytes)
