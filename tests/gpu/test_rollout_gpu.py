"""The engines on a GPU against a plain transformers forward: the transformers engine in float32, vLLM (if it
is installed) in bfloat16."""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from workers.rollout.engine import Engine, Request, Sample, Sampling, perturb
from workers.runtime import Runtime

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
VOCAB, END = 50, 1
GPU = Runtime("cuda")


def build_model(tied: bool, seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    settings = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.08,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=0,
        dtype="float32",
    )
    return Qwen2ForCausalLM(settings).eval()


def transformers_engine() -> Engine:
    from workers.rollout.engine_transformers import TransformersEngine

    return TransformersEngine(GPU, max_batch=32)


def vllm_engine() -> Engine:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    from workers.rollout.engine_vllm import VllmEngine

    return VllmEngine(GPU, max_batch=32, memory_fraction=0.2)


NO_VLLM = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(
    scope="module",
    params=[(transformers_engine, 1e-4), pytest.param((vllm_engine, 0.1), marks=NO_VLLM)],
    ids=["transformers", "vllm"],
)
def engine(request: pytest.FixtureRequest) -> tuple[Engine, float]:
    """An engine, and how far its log-probabilities may lie from a float32 forward."""
    build: Callable[[], Engine]
    build, tolerance = request.param
    return build(), tolerance


def make_requests(count: int) -> list[Request]:
    draw = random.Random(0)
    return [
        Request(f"r{i}", tuple(draw.randrange(2, VOCAB) for _ in range(draw.randrange(5, 30))), i)
        for i in range(count)
    ]


def forward_log_probs(model: Qwen2ForCausalLM, request: Request, sample: Sample) -> np.ndarray:
    ids = torch.tensor([[*request.prompt_ids, *sample.token_ids]])
    with torch.no_grad():
        log_probs = model(input_ids=ids).logits[0].log_softmax(dim=-1)
    first = len(request.prompt_ids) - 1
    return np.array([log_probs[first + i, token].item() for i, token in enumerate(sample.token_ids)])


def worst_error(engine: Engine, model: Qwen2ForCausalLM) -> float:
    requests = make_requests(16)
    samples = {sample.id: sample for sample in engine.generate(requests, Sampling(1.0, max_new_tokens=32))}
    assert len(samples) == 16
    scored = engine.log_probs(
        [request.prompt_ids for request in requests], [samples[request.id].token_ids for request in requests]
    )
    errors = []
    for request, log_probs in zip(requests, scored, strict=True):
        expected = forward_log_probs(model, request, samples[request.id])
        errors += [
            np.abs(log_probs - expected).max(),
            np.abs(np.array(samples[request.id].log_probs) - expected).max(),
        ]
    return float(max(errors))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_log_probs_are_those_of_the_present_weights(
    engine: tuple[Engine, float], tied: bool, tmp_path: Path
) -> None:
    runner, tolerance = engine
    first, second = build_model(tied, 0), build_model(tied, 1)
    first.save_pretrained(tmp_path)
    runner.load(str(tmp_path))
    assert worst_error(runner, first) < tolerance
    runner.update_weights(dict(second.state_dict()), 1)
    assert worst_error(runner, second) < tolerance
    assert worst_error(runner, first) > 1  # stale weights would show


def test_a_seed_gives_its_sample_whatever_the_batch(engine: tuple[Engine, float], tmp_path: Path) -> None:
    runner, _ = engine
    build_model(True, 0).save_pretrained(tmp_path)
    runner.load(str(tmp_path))
    requests = make_requests(32)
    together = {sample.id: sample for sample in runner.generate(requests, Sampling(1.0, max_new_tokens=8))}
    alone = [next(iter(runner.generate([request], Sampling(1.0, max_new_tokens=8)))) for request in requests]
    same = sum(sample.token_ids == together[sample.id].token_ids for sample in alone)
    assert same >= 28  # another batch rounds otherwise, which may decide a near-tie
    assert len({sample.token_ids for sample in alone}) > 28


def test_the_noise_is_that_of_the_cpu() -> None:
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    on_cpu = perturb(logits, range(64), range(64), 0.8, 0.9)
    on_gpu = perturb(logits.cuda(), range(64), range(64), 0.8, 0.9).cpu()
    assert (on_cpu.argmax(dim=-1) == on_gpu.argmax(dim=-1)).float().mean() > 0.98
