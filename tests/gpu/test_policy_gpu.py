"""Policy training on a GPU: bfloat16 compute over float32 master weights, against transformers in float32."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pns import config
from workers.rollout.pool import RolloutPool
from workers.runtime import Runtime
from workers.training.batching import Batch
from workers.training.objectives import (
    BradleyTerryObjective,
    GrpoObjective,
    PreferenceObjective,
    SftObjective,
)
from workers.training.policy import Policy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
VOCABULARY = 64
OPTIMIZER = config.Optimizer(learning_rate=1e-3)
DPO = PreferenceObjective("sigmoid", {"beta": 0.1})
RUNTIME = Runtime(device="cuda", start_timeout_seconds=300)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Random models of three architectures, with a tokenizer each."""
    import transformers
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w2"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", eos_token="w1", unk_token="w2"
    )
    root = tmp_path_factory.mktemp("models")
    for name, tied in (("Qwen2", True), ("Qwen3", True), ("Llama", False)):
        torch.manual_seed(3)
        shape = getattr(transformers, f"{name}Config")(
            vocab_size=VOCABULARY,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=256,
            max_position_embeddings=256,
            tie_word_embeddings=tied,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
        getattr(transformers, f"{name}ForCausalLM")(shape).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {path.name: str(path) for path in root.iterdir()}


@pytest.fixture(scope="module")
def checkpoint(checkpoints: dict[str, str]) -> str:
    return checkpoints["Qwen2"]


@pytest.fixture(
    scope="module", params=["bfloat16-shared", "bfloat16-packed", "bfloat16-padded", "float32-shared"]
)
def policy(request: pytest.FixtureRequest) -> Iterator[Policy]:
    """One rank on half a GPU, in a Ray of its own that sees the real devices."""
    import ray

    os.environ.pop("VERL_PLATFORM", None)
    os.environ.pop("VERL_USE_EXTERNAL_MODULES", None)
    if ray.is_initialized():
        pytest.skip("run tests/gpu by itself: this Ray was started with logical GPUs")
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    dtype, layout = request.param.split("-")
    settings = config.PolicyConfig(max_tokens_per_micro_batch=512, dtype=dtype, layout=config.Layout(layout))
    made = Policy(config.Pool(replicas=1, gpus=0.5), settings, RUNTIME)
    yield made
    made.shutdown()
    ray.shutdown()


def rows(count: int, seed: int = 0) -> Batch:
    """Pairs of rows with one prompt."""
    noise = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> list[int]:
        return noise.integers(2, VOCABULARY, noise.integers(low, high)).tolist()

    prompts = [tokens(2, 20) for _ in range(count // 2)]
    return Batch([prompt for prompt in prompts for _ in range(2)], [tokens(5, 60) for _ in range(count)])


def reference_log_probs(path: str, batch: Batch) -> list[np.ndarray]:
    from transformers import AutoModelForCausalLM

    model, results = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), []
    with torch.no_grad():
        for prompt, completion in zip(batch.prompt_ids, batch.completion_ids, strict=True):
            ids = torch.tensor([[*prompt, *completion]])
            log_probs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            results.append(log_probs[len(prompt) - 1 :].numpy())
    return results


@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3", "Llama"])
def test_log_probs_are_those_of_transformers(
    policy: Policy, checkpoints: dict[str, str], architecture: str
) -> None:
    checkpoint = checkpoints[architecture]
    policy.load(checkpoint, "language_model", None, total_steps=1, seed=0)
    batch = rows(24)
    difference = np.abs(
        np.concatenate(policy.log_probs(batch)) - np.concatenate(reference_log_probs(checkpoint, batch))
    )
    assert difference.mean() < 0.01  # bfloat16 keeps about three digits
    assert difference.max() < 0.1


def test_dpo_and_grpo_steps(policy: Policy, checkpoint: str) -> None:
    policy.load(checkpoint, "language_model", OPTIMIZER, total_steps=10, seed=0)
    batch = rows(16)
    before = policy.log_probs(batch)
    values = {"ref_log_probs": before, "old_log_probs": before}
    given = Batch(batch.prompt_ids, batch.completion_ids, values, {"advantages": [1.0, -1.0] * 8})
    first, *_, last = [policy.train_step(given, DPO) for _ in range(5)]
    assert first["loss"] == pytest.approx(math.log(2), abs=0.02)
    assert last["loss"] < first["loss"]
    found = policy.train_step(given, GrpoObjective(clip_low=0.2, clip_high=0.28, kl_coefficient=1e-3))
    assert found["update_skipped"] == 0
    assert found["kl"] > 0


def test_lora_reference_is_the_adapter_switched_off(policy: Policy, checkpoint: str) -> None:
    whole = policy.settings
    try:
        policy.settings = replace(whole, lora=config.Lora(rank=8, alpha=16))
        policy.load(
            checkpoint, "language_model", config.Optimizer(learning_rate=1e-2), total_steps=10, seed=0
        )
        policy.load_reference(checkpoint)
        batch = rows(16)
        before = policy.reference_log_probs(batch)
        given = Batch(batch.prompt_ids, batch.completion_ids, {"ref_log_probs": before})
        first, *_, last = [policy.train_step(given, DPO) for _ in range(5)]
        assert first["loss"] == pytest.approx(math.log(2), abs=0.02)
        assert last["loss"] < first["loss"]
        np.testing.assert_array_equal(
            np.concatenate(policy.reference_log_probs(batch)), np.concatenate(before)
        )
    finally:
        policy.settings = whole


@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3", "Llama"])
def test_a_reference_gives_what_its_float32_weights_give(
    policy: Policy, checkpoints: dict[str, str], architecture: str
) -> None:
    checkpoint, batch = checkpoints[architecture], rows(16)
    policy.load(checkpoint, "language_model", OPTIMIZER, total_steps=10, seed=0)
    policy.load_reference(checkpoint)
    np.testing.assert_array_equal(
        np.concatenate(policy.reference_log_probs(batch)), np.concatenate(policy.log_probs(batch))
    )


def test_an_offloaded_model_trains_alike(policy: Policy, checkpoint: str, tmp_path: Path) -> None:
    batch, whole = rows(16), policy.settings

    def train() -> list[float]:
        policy.load(checkpoint, "language_model", OPTIMIZER, total_steps=10, seed=0)
        policy.load_reference(checkpoint)
        given = Batch(
            batch.prompt_ids, batch.completion_ids, {"ref_log_probs": policy.reference_log_probs(batch)}
        )
        losses = [policy.train_step(given, DPO)["loss"] for _ in range(3)]
        policy.save(tmp_path / f"after-{policy.settings.offload}")
        after = policy.train_step(given, DPO)["loss"]
        policy.restore(tmp_path / f"after-{policy.settings.offload}")
        assert policy.train_step(given, DPO)["loss"] == after
        return [*losses, after]

    on_gpu, weights = train(), policy.weights().tensors()
    try:
        policy.settings = replace(whole, offload=True)
        assert train() == pytest.approx(on_gpu, rel=1e-2)
        policy.leave()
        policy.come()
        assert policy.log_probs(batch)
        for name, weight in policy.weights().tensors().items():
            torch.testing.assert_close(weight, weights[name], atol=1e-2, rtol=1e-2)
    finally:
        policy.settings = whole


@pytest.mark.parametrize("gpus", [0.5, 1.0], ids=["store", "broadcast"])
def test_the_engine_takes_the_weights_of_the_policy(policy: Policy, checkpoint: str, gpus: float) -> None:
    """From the policy through the object store into an engine on the same device, or by NCCL to one on another;
    stale weights would show."""
    if gpus == 1 and torch.cuda.device_count() < 2:
        pytest.skip("NCCL takes no two processes on one GPU")
    engine = config.RolloutEngine(engine=config.EngineKind.transformers, max_batch=32)
    pool = RolloutPool(config.Pool(replicas=1, gpus=gpus), engine, RUNTIME)
    try:
        pool.load(checkpoint)
        policy.load(checkpoint, "language_model", config.Optimizer(learning_rate=1e-2), 5, seed=0)
        batch = rows(16)
        before = np.concatenate(pool.log_probs(batch.prompt_ids, batch.completion_ids))
        for _ in range(5):
            policy.train_step(batch, SftObjective())
        pool.update_weights(policy, version=5)
        after = np.concatenate(pool.log_probs(batch.prompt_ids, batch.completion_ids))
        own = np.concatenate(policy.log_probs(batch))
    finally:
        pool.shutdown()
    assert (pool._meeting is not None) == (gpus == 1)
    assert np.abs(after - own).mean() < 0.05  # the engine's weights are bfloat16
    assert np.abs(before - own).mean() > 0.2


def test_restore_and_export(policy: Policy, checkpoint: str, tmp_path: Path) -> None:
    policy.load(checkpoint, "language_model", OPTIMIZER, total_steps=10, seed=0)
    batch = rows(16)
    policy.train_step(batch, SftObjective())
    policy.save(tmp_path / "checkpoint")
    first = policy.train_step(batch, SftObjective())
    policy.restore(tmp_path / "checkpoint")
    assert policy.train_step(batch, SftObjective())["loss"] == first["loss"]
    assert {tensor.dtype for tensor in policy.weights().tensors().values()} == {torch.bfloat16}
    policy.export(tmp_path / "model")
    difference = np.concatenate(policy.log_probs(batch)) - np.concatenate(
        reference_log_probs(str(tmp_path / "model"), batch)
    )
    assert np.abs(difference).mean() < 0.01


def test_bradley_terry_learns(policy: Policy, checkpoint: str) -> None:
    policy.load(checkpoint, "score", OPTIMIZER, total_steps=20, seed=0)
    batch = rows(16)
    first, *_, last = [policy.train_step(batch, BradleyTerryObjective(centre=0.01)) for _ in range(15)]
    assert first["loss"] == pytest.approx(math.log(2), abs=0.1)
    assert last["loss"] < 0.5 * first["loss"]
    assert last["accuracy"] > first["accuracy"]
