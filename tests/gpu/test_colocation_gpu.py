"""Rollout and policy in turns on one GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pns.config import Config, EngineKind, Optimizer, Placement, PolicyConfig, Pool, RolloutEngine
from pns.tiny.tokenizer import build_tokenizer
from workers.fleet import Fleet
from workers.rollout.engine import Request, Sampling
from workers.runtime import Runtime
from workers.training.batching import Batch
from workers.training.objectives import SftObjective

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def ray_with_gpu() -> Iterator[None]:
    """A Ray of its own, which sees the real devices."""
    import ray

    os.environ.pop("VERL_PLATFORM", None)
    os.environ.pop("VERL_USE_EXTERNAL_MODULES", None)
    if ray.is_initialized():
        pytest.skip("run tests/gpu by itself: this Ray was started with logical GPUs")
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of 0.2 B random weights: 0.8 GB in float32 and as much again twice for Adam."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    directory, tokenizer = tmp_path_factory.mktemp("model"), build_tokenizer()
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=8,
        intermediate_size=3072,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(shape).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def used_gib() -> float:
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


@pytest.mark.parametrize("engine", EngineKind)
def test_one_gpu_is_for_one_role_at_a_time(ray_with_gpu: None, checkpoint: str, engine: EngineKind) -> None:
    if engine is EngineKind.vllm:
        pytest.importorskip("vllm")
    config = Config(
        placement=Placement(rollout=Pool(1), policy=Pool(1), colocate=["rollout", "policy"]),
        rollout=RolloutEngine(engine, max_batch=32, memory_fraction=0.5),
        policy=PolicyConfig(max_tokens_per_micro_batch=4096),
    )
    fleet = Fleet(config, Runtime("cuda", start_timeout_seconds=500))
    try:
        fleet.start(["rollout", "policy"])
        fleet.rollout.load(checkpoint)
        in_rollout = used_gib()
        policy, rollout = fleet.policy, fleet.rollout
        policy.load(checkpoint, "language_model", Optimizer(learning_rate=1e-4), 6, seed=0)
        batch = Batch([[5, 6, 7]] * 16, [list(range(8, 40))] * 16)
        losses = []
        for step in range(3):
            losses.append(policy.train_step(batch, SftObjective())["loss"])
            in_policy = used_gib()
            rollout.update_weights(policy, step + 1)  # the policy is away
            in_rollout = max(in_rollout, used_gib())
            requests = [Request(f"{step}/{i}", (5, 6, 7), i) for i in range(8)]
            samples = [s for part in rollout.stream(requests, Sampling(1.0, 1.0, 16)) for s in part]
            assert {sample.weights_version for sample in samples} == {step + 1}
        theirs = np.concatenate(rollout.log_probs(batch.prompt_ids, batch.completion_ids))
        ours = np.concatenate(policy.log_probs(batch))
        at_rest = np.concatenate(rollout.log_probs(batch.prompt_ids, batch.completion_ids))
    finally:
        fleet.shutdown()
    assert losses[2] < losses[1] < losses[0]  # what Adam held came back with the weights
    assert np.abs(theirs - ours).mean() < 0.05  # the engine's weights are bfloat16
    np.testing.assert_array_equal(at_rest, theirs)  # given back after a sleep that no update followed
    total_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    if engine is EngineKind.vllm:
        assert in_rollout > 0.4 * total_gib
        assert in_policy < 0.2 * total_gib
