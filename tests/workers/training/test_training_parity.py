"""Ten optimizer steps of the policy against those that TRL's DPOTrainer made
(`tests/parity/record_trl_training.py`): same model, pairs, order and optimizer, float32 on the CPU."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pns import config
from workers.runtime import Runtime
from workers.training.batching import Batch
from workers.training.objectives import PreferenceObjective
from workers.training.policy import Policy

RECORDED: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "parity" / "trl_training.json").read_text()
)
MODEL = Path(__file__).parents[3] / RECORDED["model"]
STEPS, PAIRS = RECORDED["steps"], RECORDED["pairs_per_step"]


CASES = [("shared", name) for name in RECORDED["losses"]] + [("packed", "sigmoid"), ("padded", "sigmoid")]


@pytest.fixture(scope="module")
def policy(ray_session: None, request: pytest.FixtureRequest) -> Iterator[Policy]:
    settings = config.PolicyConfig(
        max_tokens_per_micro_batch=512, gradient_checkpointing=False, layout=config.Layout(request.param)
    )
    started = Policy(config.Pool(), settings, Runtime(start_timeout_seconds=1800))
    yield started
    started.shutdown()


def ten_steps(policy: Policy, objective: PreferenceObjective) -> list[dict[str, float]]:
    optimizer = config.Optimizer(learning_rate=RECORDED["learning_rate"], clip_grad=RECORDED["clip_grad"])
    policy.load(str(MODEL), "language_model", optimizer, total_steps=STEPS, seed=0)
    prompts = [pair["prompt_ids"] for pair in RECORDED["pairs"] for _ in range(2)]
    completions = [pair[side] for pair in RECORDED["pairs"] for side in ("chosen_ids", "rejected_ids")]
    reference = policy.log_probs(Batch(prompts, completions))
    found = []
    for start in range(0, len(prompts), 2 * PAIRS):
        rows = slice(start, start + 2 * PAIRS)
        batch = Batch(prompts[rows], completions[rows], {"ref_log_probs": reference[rows]})
        found.append(policy.train_step(batch, objective))
    return found


@pytest.mark.parametrize(("policy", "name"), CASES, indirect=["policy"])
def test_ten_steps_are_those_of_trl(policy: Policy, name: str) -> None:
    recorded = RECORDED["losses"][name]
    found = ten_steps(policy, PreferenceObjective(name, recorded["hyper_parameters"]))
    for step, expected in zip(found, recorded["steps"], strict=True):
        assert step["loss"] == pytest.approx(expected["loss"], abs=1e-4)
        assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    if name == "sigmoid":
        assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
