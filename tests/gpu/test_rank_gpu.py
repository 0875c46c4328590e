"""A training process by itself on a GPU: the variable-length kernel in the shapes of real models, and the
memory of a step."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pns import config
from workers.runtime import Runtime
from workers.training import attention
from workers.training.batching import Batch, micro_batch, plan
from workers.training.objectives import SftObjective
from workers.training.rank import ModelSpec, Rank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"


# Query heads, key heads and head dimension of Qwen2.5-0.5B, 1.5B and 7B, of Qwen3-8B and Llama-3.1-8B, and of
# a model whose heads are not grouped.
@pytest.mark.parametrize(
    "heads", [(14, 2, 64), (12, 2, 128), (28, 4, 128), (32, 8, 128), (8, 8, 64)], ids=str
)
@pytest.mark.parametrize("trunk", [5, 200])
def test_variable_length_kernel_is_torch_attention_row_by_row(
    trunk: int, heads: tuple[int, int, int]
) -> None:
    """Outputs and gradients of the two kernel calls, against a call of torch's attention a row in float32."""
    torch.manual_seed(0)
    segments = attention.segments_of([(trunk, [70, 33, 1]), (0, [130]), (17, [64, 64])])
    count = sum(segments.leading) + sum(segments.branches)
    query_heads, key_heads, width = heads
    shapes = [(1, number, count, width) for number in (query_heads, key_heads, key_heads)]
    exact = [torch.randn(shape, device=DEVICE).bfloat16().float().requires_grad_() for shape in shapes]
    fast = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    expected, found = (
        attention.packed_attention(torch.nn.Module(), *tensors, None, segments)[0]
        for tensors in (exact, fast)
    )
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found.float() * weights).sum().backward()
    for own, other in zip(fast, exact, strict=True):
        assert (own.grad.float() - other.grad).norm() < 0.02 * other.grad.norm()


@pytest.fixture(scope="module")
def rank() -> Iterator[Rank]:
    """One rank in this process."""
    with socket.socket() as free, pytest.MonkeyPatch.context() as environment:
        free.bind(("127.0.0.1", 0))
        for name, value in {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
        }.items():
            environment.setenv(name, value)
        free.close()
        yield Rank()
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of 68 million numbers, a third of them in the embedding."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    path = tmp_path_factory.mktemp("model")
    shape = Qwen2Config(
        vocab_size=32000,
        hidden_size=768,
        num_hidden_layers=6,
        num_attention_heads=12,
        num_key_value_heads=2,
        intermediate_size=2048,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(shape).save_pretrained(path)
    return path


def test_micro_batches_are_not_held_together(
    rank: Rank, model: Path, record_property: Callable[[str, object], None]
) -> None:
    """A step of six micro-batches needs no more memory than one of two, and its gradient is the mean: the losses
    of equal rows are equal."""
    settings = config.PolicyConfig(gradient_checkpointing=False, dtype="bfloat16")
    spec = ModelSpec(
        str(model), "language_model", settings, config.Optimizer(learning_rate=1e-6), 9, 0, Runtime(DEVICE)
    )
    vocabulary = rank.load(spec)
    noise = np.random.default_rng(0)
    prompt, completion = (
        noise.integers(2, vocabulary, 200).tolist(),
        noise.integers(2, vocabulary, 1800).tolist(),
    )
    peaks, found = [], []
    for count in (2, 2, 6):  # the first makes the optimizer's state
        batch = Batch([prompt] * count, [completion] * count, {"mask": [np.ones(len(completion))] * count})
        [planned] = plan(batch, group_size=1, ranks=1, max_tokens=2000, layout=config.Layout.packed)
        parts = [micro_batch(batch, families, config.Layout.packed) for families in planned]
        assert len(parts) == count
        torch.cuda.reset_peak_memory_stats()
        constants = {
            "num_tokens": float(count * len(completion)),
            "num_groups": count,
            "global_token_num": [2000] * count,
        }
        found.append(rank.train(parts, SftObjective(), constants))
        peaks.append(torch.cuda.max_memory_allocated())
    record_property("peak_mib_of_2_micro_batches", round(peaks[1] / 2**20))
    record_property("peak_mib_of_6_micro_batches", round(peaks[2] / 2**20))
    assert peaks[2] < 1.01 * peaks[1]
    assert found[2]["loss"] == pytest.approx(found[1]["loss"], abs=1e-2)
    assert found[2]["grad_norm"] == pytest.approx(found[1]["grad_norm"], rel=5e-2)
