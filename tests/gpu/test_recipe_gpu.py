"""A cut-down tiny recipe through every stage on CUDA: NCCL, bf16, flash-attention where it is installed, all
roles on one device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_every_stage(tmp_path: Path, engine: str) -> None:
    if engine == "vllm":
        pytest.importorskip("vllm")
    settings = [
        f"runs={tmp_path}",
        "name=small",
        f"rollout.engine={engine}",
        "rollout.memory_fraction=0.2",
        "placement.device=cuda",
        *(f"placement.{role}.replicas=1" for role in ("rollout", "policy")),
        *(f"placement.{role}.gpus=0.25" for role in ("rollout", "policy")),
        *(f"reward.terms.{term}.pool.gpus=0.25" for term in ("plausibility", "coherence")),
        *(
            "data.tiny.num_train=40",
            "data.tiny.num_reward=60",
            "data.tiny.num_preference=40",
            "data.tiny.num_test_per_suite=4",
        ),
        *(
            "rl.steps=2",
            "reward_model.steps=3",
            "reverse_rl.steps=2",
            "preference.steps=2",
            "evaluate.generator_samples=40",
        ),
    ]
    command = [sys.executable, "-m", "pns.cli", "run", "recipes/tiny-qwen2.yaml", *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    report = json.loads((tmp_path / "small" / "report.json").read_text())
    assert set(report["suites"]["base"]) == {"backbone", "target", "result"}
