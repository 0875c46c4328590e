"""Policy, vLLM engine and transformers engine are one model: their log-probabilities agree, also after
training and a weight update."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from pns import config
from pns.tiny.tokenizer import build_tokenizer
from workers.rollout.pool import Request, RolloutPool, Sampling
from workers.runtime import Runtime
from workers.training.batching import Batch
from workers.training.objectives import SftObjective
from workers.training.policy import Policy

TOLERANCE = 1e-4
RUNTIME = Runtime(start_timeout_seconds=1800)


@pytest.fixture(scope="module")
def policy(ray_session: None) -> Iterator[Policy]:
    policy = Policy(config.Pool(replicas=1), config.PolicyConfig(gradient_checkpointing=False), RUNTIME)
    yield policy
    policy.shutdown()


@pytest.fixture(scope="module")
def pools(ray_session: None) -> Iterator[list[RolloutPool]]:
    vllm, transformers = config.EngineKind.vllm, config.EngineKind.transformers
    store, broadcast = config.WeightTransport.store, config.WeightTransport.broadcast
    engines = [
        config.RolloutEngine(engine=engine, max_batch=32, weight_transport=transport)
        for engine, transport in ((vllm, broadcast), (transformers, store))
    ]
    pools = [RolloutPool(config.Pool(replicas=1, gpus=0), engine, RUNTIME) for engine in engines]
    yield pools
    for pool in pools:
        pool.shutdown()


@pytest.mark.parametrize("tied", [True, False])
def test_log_probs_agree_before_and_after_an_update(
    policy: Policy, pools: list[RolloutPool], tied: bool, tmp_path: Path
) -> None:
    tokenizer = build_tokenizer()
    torch.manual_seed(tied)
    shape = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=96,
        max_position_embeddings=128,
        initializer_range=0.1,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy.load(str(tmp_path), "language_model", config.Optimizer(learning_rate=1e-2), 3, seed=0)
    for pool in pools:
        pool.load(str(tmp_path))
    prompts = [
        (1, *tokenizer.encode(text))
        for text in ("Bob has 12. ", "How many has Eve? ", "Cal has 3 times Bob. Gus has 7. ")
    ]
    before = sampled_and_scored(policy, pools, prompts)
    batch = Batch(prompts, [tokenizer.encode("12+7=19")] * len(prompts))
    for _ in range(3):
        policy.train_step(batch, SftObjective())
    stale = policy.log_probs(before)
    assert (
        max(np.abs(a - np.array(b)).max() for a, b in zip(stale, before.token_values["old"], strict=True))
        > 0.1
    )
    for pool in pools:
        pool.update_weights(policy, version=3)
    sampled_and_scored(policy, pools, prompts)


def sampled_and_scored(policy: Policy, pools: list[RolloutPool], prompts: list[tuple[int, ...]]) -> Batch:
    """Sample from the first pool; the sampler's own log-probs, both engines' scores and the policy's must be
    the same."""
    requests = [Request(str(i), prompt, seed=i) for i, prompt in enumerate(prompts)]
    samples = {
        sample.id: sample for chunk in pools[0].stream(requests, Sampling(1.0, 1.0, 20)) for sample in chunk
    }
    completions = [samples[str(i)].token_ids for i in range(len(prompts))]
    batch = Batch(prompts, completions, {"old": [samples[str(i)].log_probs for i in range(len(prompts))]})
    own = policy.log_probs(batch)
    for scored in (batch.token_values["old"], *(pool.log_probs(prompts, completions) for pool in pools)):
        for row, expected in zip(scored, own, strict=True):
            assert np.abs(np.asarray(row) - expected).max() <= TOLERANCE
    return batch
