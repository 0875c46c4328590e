"""What a checkpoint of the policy costs training: waited for, and written while training goes on.

    python tests/bench/checkpoints.py    # two minutes, 8 GiB; one JSON line

One policy process on one thread trains a Qwen2 of random weights (74 M parameters: 890 MB of state) through
Ray. In turns `--rounds` times: `blocking` is `Policy.save`, `held` is `Policy.begin_save`, after which steps
are taken until the state is on disk (`written`). `step` and `step_while_writing` are the seconds of a step
without a write and beside one. `cost` = held + what the steps beside the write took longer, and `ratio` =
blocking / cost.
"""

import argparse
import json
import shutil
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import ray
from policy_memory import CASES, save_model

from pns import config
from workers.runtime import Runtime
from workers.training.batching import Batch
from workers.training.objectives import SftObjective
from workers.training.policy import Policy

CASE = CASES["74M, checkpointing"]
ROWS, ROW_TOKENS, PROMPT_TOKENS = 4, 128, 16
STEPS = 6  # without a write, after each round


def seconds(call: object) -> float:
    assert callable(call)
    began = time.monotonic()
    call()
    return time.monotonic() - began


def measure(policy: Policy, rounds: int, directory: Path) -> dict[str, float]:
    noise = np.random.default_rng(0)
    rows = [noise.integers(0, CASE.vocabulary, ROW_TOKENS).tolist() for _ in range(ROWS)]
    batch = Batch([row[:PROMPT_TOKENS] for row in rows], [row[PROMPT_TOKENS:] for row in rows])

    def step() -> float:
        return seconds(lambda: policy.train_step(batch, SftObjective()))

    step()  # the optimizer's state comes with the first
    blocking, held, written, quiet, beside, costs = [], [], [], [], [], []
    for number in range(rounds):
        waited_for, in_background = directory / f"blocking-{number}", directory / f"background-{number}"
        blocking.append(seconds(lambda target=waited_for: policy.save(target)))
        num_bytes = sum(file.stat().st_size for file in waited_for.rglob("*"))
        shutil.rmtree(waited_for)
        of_round = [step() for _ in range(STEPS)]
        quiet += of_round
        began = time.monotonic()
        held.append(seconds(lambda target=in_background: policy.begin_save(target)))
        during = []
        while not policy.is_saved():
            during.append(step())
        written.append(time.monotonic() - began)
        beside += during
        costs.append(held[-1] + sum(during) - len(during) * statistics.median(of_round))
        shutil.rmtree(in_background)
    results = {
        "blocking_s": blocking,
        "held_s": held,
        "written_s": written,
        "step_s": quiet,
        "step_while_writing_s": beside,
        "cost_s": costs,
    }
    medians = {name: statistics.median(values) for name, values in results.items()}
    return medians | {"ratio": medians["blocking_s"] / medians["cost_s"], "megabytes": num_bytes / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    with TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        save_model(CASE, model)
        policy = Policy(config.Pool(replicas=1, cpus=1), config.PolicyConfig(), Runtime("cpu"))
        try:
            policy.load(str(model), "language_model", config.Optimizer(), total_steps=1000, seed=0)
            measured = measure(policy, arguments.rounds, Path(directory))
        finally:
            policy.shutdown()
    ray.shutdown()
    rounded = {name: round(value, 3) for name, value in measured.items()}
    print(json.dumps(rounded | {"rounds": arguments.rounds, "torch": version("torch")}))


if __name__ == "__main__":
    main()
