"""Weights through the object store: every tensor as it was, in few buckets, and without a copy on reading."""

from __future__ import annotations

import pytest
import torch

from workers.weights import StoredWeights, store

TENSORS = {
    "embedding": torch.arange(600, dtype=torch.float32).view(30, 20),  # 2,400 bytes: more than a bucket
    "norm": torch.randn(7).to(torch.bfloat16),  # 14 bytes: the next one cannot begin where this ends
    "up": torch.randn(12, 10),
    "scalar": torch.tensor(3.0),
    "columns": torch.randn(8, 4).T,  # not contiguous
    "down": torch.randn(10, 12),
}


@pytest.fixture(scope="module")
def stored(ray_session: None) -> StoredWeights:
    return store(iter(TENSORS.items()), bucket_bytes=1024)


def test_tensors_come_out_as_they_went_in(stored: StoredWeights) -> None:
    read = stored.tensors()
    assert read.keys() == TENSORS.keys()
    assert all(tensor.dtype == TENSORS[name].dtype for name, tensor in read.items())
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in read.items())
    assert stored.num_bytes == sum(tensor.nbytes for tensor in TENSORS.values())


def test_a_bucket_is_filled_before_the_next_and_a_large_tensor_has_its_own(stored: StoredWeights) -> None:
    assert len(stored.buckets) == 3  # embedding; norm, up, scalar, columns; down


def test_readers_share_the_memory_of_the_store(stored: StoredWeights) -> None:
    first, second = stored.tensors(), stored.tensors()
    assert all(first[name].data_ptr() == second[name].data_ptr() for name in TENSORS)
