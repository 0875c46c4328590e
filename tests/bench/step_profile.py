"""Where a step of rl on the tiny models spends the processor: its rollout, its update, what is not multiplying.

    python tests/bench/step_profile.py

One replica's share of a step of `recipes/tiny-qwen2.yaml` (20 of its 40 problems x 8 completions), by the
classes that run in the actors, in this process on one thread: `VllmEngine.generate`, then `Rank.train` on
what it gave, after two steps that are not counted. `rollout` and `update` are seconds of the processor
without any profiler, the median of `--steps`; `driver` are those of the driver's own functions for the same
completions. `share` splits them, in [0, 1], by the file that a function belongs to, from one more step under
cProfile: `multiplying` is time inside operations of torch, the rest is Python. cProfile makes calls of Python
dearer, so that their share is an upper bound. `digest` is of what was sampled and of the last
update's loss and gradient norm: the same to the bit before and after a change. Prints one JSON line;
`--functions N` also the dearest functions, on the standard error.
"""

import argparse
import cProfile
import gc
import hashlib
import json
import os
import pstats
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[2]

# Part -> what the path of a function's file, or a built-in's name, holds; the first that fits counts.
PARTS: dict[str, tuple[str, ...]] = {
    "noise": ("workers/rollout/engine.py", "process_dict_updates"),
    "our_engine": ("workers/rollout/", "pns/"),
    "vllm_scheduler": ("vllm/v1/core",),
    "vllm_output": ("vllm/v1/engine", "vllm/outputs", "vllm/logprobs", "vllm/v1/outputs"),
    "vllm_sampler": ("vllm/v1/sample",),
    "vllm_runner": ("vllm/v1/worker", "vllm/v1/attention", "vllm/v1/executor"),
    "vllm_other": ("vllm/",),
    "verl": ("verl/", "tensordict/"),
    "our_training": ("workers/training/",),
    "fsdp": ("torch/distributed",),
    "optimizer": ("torch/optim",),
    "model": ("transformers/", "torch/nn"),
    "torch_python": ("torch/",),
}


def part_of(file: str, name: str) -> str:
    if "torch" in name or "TensorBase" in name or "run_backward" in name or "torch._" in file:
        return "multiplying"  # built-ins: operations of torch
    for part, paths in PARTS.items():
        if any(path in file for path in paths):
            return part
    return "other_python"


def shares(profile: cProfile.Profile) -> dict[str, float]:
    """Part -> its share of the time."""
    seconds: Counter[str] = Counter()
    statistics_of: dict[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    for (file, _, name), (_, _, own, _, _) in statistics_of.items():
        seconds[part_of(file, name)] += own
    return {part: round(own / seconds.total(), 3) for part, own in seconds.most_common()}


def measured(
    function: Callable[[], Any], steps: int, functions: int, label: str
) -> tuple[Any, float, dict[str, float]]:
    """What `function` gives, its seconds of the processor, and their shares."""
    times = []
    collecting = [0.0, 0.0]  # when the garbage collector began, and its seconds so far

    def collector(phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            collecting[0] = time.process_time()
        else:
            collecting[1] += time.process_time() - collecting[0]

    function()  # the first is not counted
    gc.callbacks.append(collector)
    for _ in range(steps):
        began = time.process_time()
        function()
        times.append(time.process_time() - began)
    gc.callbacks.remove(collector)
    print(f"{label}: {collecting[1] / steps:.3f} s of a step collecting garbage", file=sys.stderr)
    profile = cProfile.Profile(time.process_time)
    result = profile.runcall(function)
    if functions:
        print(label, file=sys.stderr)
        pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(functions)
    return result, statistics.median(times), shares(profile)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3, help="timed (default %(default)s)")
    parser.add_argument("--problems", type=int, default=20, help="of the replica (default %(default)s)")
    parser.add_argument("--functions", type=int, default=0, help="show so many functions (default: none)")
    arguments = parser.parse_args()
    from workers.runtime import VERL_CPU, Runtime, process_environment

    single = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512", "RANK": "0", "WORLD_SIZE": "1"}
    environment = process_environment("rollout", "cpu", 1, vllm=True)
    os.environ |= environment | VERL_CPU | single | {"LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    import numpy as np
    import torch

    from pns.algo.advantages import group_advantages
    from pns.data.problems import load_problem_sets
    from pns.driver import load_prompts
    from pns.files import append_jsonl
    from pns.recipe import load
    from pns.records import Completion, Reward, Rollout, Verdict
    from workers.rollout.engine import Request, Sample, Sampling
    from workers.rollout.engine_vllm import VllmEngine
    from workers.training.batching import Batch, micro_batch, plan
    from workers.training.objectives import GrpoObjective
    from workers.training.rank import ModelSpec, Rank

    torch.set_num_threads(1)
    config = load(ROOT / "recipes" / "tiny-qwen2.yaml", [])
    prompts = load_prompts(config)
    group = config.rl.completions_per_problem
    problems = [p for p in list(load_problem_sets(config).train)[: arguments.problems] for _ in range(group)]
    prompt_ids = [prompts.encode(problem) for problem in problems]
    runtime = Runtime("cpu")
    engine = VllmEngine(runtime, config.rollout.max_batch, kv_cache_gib=config.rollout.kv_cache_gib)
    engine.load(config.models.backbone)
    sampling = Sampling(1.0, 1.0, config.rollout.max_new_tokens)
    requests = [Request(str(row), tuple(ids), row) for row, ids in enumerate(prompt_ids)]
    samples: list[Sample]
    samples, rollout, of_rollout = measured(
        lambda: list(engine.generate(requests, sampling)), arguments.steps, arguments.functions, "rollout"
    )
    samples = sorted(samples, key=lambda sample: int(sample.id))
    rank = Rank()
    spec = ModelSpec(
        config.models.backbone, "language_model", config.policy, config.rl.optimizer, 100, 0, runtime
    )
    rank.load(spec)
    settings = config.rl
    objective = GrpoObjective(settings.clip_low, settings.clip_high, settings.kl_coefficient)
    rewards_PG = np.random.default_rng(0).integers(0, 2, (arguments.problems, group)).astype(float)

    def lay_out() -> tuple[list[Any], dict[str, Any]]:
        advantages = group_advantages(rewards_PG).reshape(-1).tolist()
        completion_ids = [np.asarray(sample.token_ids) for sample in samples]
        old_log_probs = [np.asarray(sample.log_probs, np.float32) for sample in samples]
        values = {"old_log_probs": old_log_probs, "mask": [np.ones(len(ids)) for ids in completion_ids]}
        batch = Batch(
            [np.asarray(ids) for ids in prompt_ids], completion_ids, values, {"advantages": advantages}
        )
        [planned] = plan(batch, 1, 1, config.policy.max_tokens_per_micro_batch, config.policy.layout)
        parts = [micro_batch(batch, families, config.policy.layout) for families in planned]
        num_tokens = float(sum(map(len, completion_ids)))
        lengths = [length for part in parts for length in part.computed_lengths]
        counts = {"num_tokens": num_tokens, "num_groups": len(batch), "end_of_step": True}
        return parts, {**counts, "global_token_num": lengths}

    parts, constants = lay_out()
    metrics, update, of_update = measured(
        lambda: rank.train(parts, objective, constants), arguments.steps, arguments.functions, "update"
    )
    weights, handing_out, _ = measured(
        lambda: dict(rank._full_weights(torch.float32)), arguments.steps, 0, "weights"
    )
    _, taking, _ = measured(lambda: engine.update_weights(weights, 1), arguments.steps, 0, "new weights")

    def write() -> None:
        rows = []
        for problem, sample in zip(problems, samples, strict=True):
            text = prompts.decode(sample.token_ids)
            completion = Completion(
                sample.id, problem.id, text, sample.token_ids, sample.log_probs, sample.finish_reason
            )
            rows.append(Rollout(0, problem, completion, Reward(0.0, True, Verdict.WRONG)))
        with TemporaryDirectory() as directory:
            append_jsonl(Path(directory) / "rows.jsonl", rows)

    _, laying_out, _ = measured(lay_out, arguments.steps, 0, "layout")
    _, writing, _ = measured(write, arguments.steps, 0, "text and JSON")
    seconds = {"rollout": rollout, "update": update, "weights_out": handing_out, "weights_in": taking}
    driver = {"layout": laying_out, "text_and_json": writing}
    num_tokens = sum(len(sample.token_ids) for sample in samples)
    figures = {
        "completions": len(samples),
        "tokens": num_tokens,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "digest": hashlib.sha256(repr((samples, metrics["loss"], metrics["grad_norm"])).encode()).hexdigest(),
        "driver": {name: round(value, 3) for name, value in driver.items()},
        "share": {"rollout": of_rollout, "update": of_update},
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
