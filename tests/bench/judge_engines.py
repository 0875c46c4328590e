"""A judge on vLLM (`pool.engine=vllm`) beside the same judge on transformers: candidates a second.

    PYTHONPATH=. python tests/bench/judge_engines.py [--device cuda]

A Qwen2 with random weights (30 million parameters; `--device cuda`: of the shapes of 1.5 billion) and a chat
template grades groups of eight candidates of one problem through `JudgePool`, one replica a side. The sides
take turns, and a figure is the median over `--rounds`; `same` is the share of candidates with the same four
grades. On a CPU transformers reads one candidate at a time, so that grades are the same to the bit, and vLLM
keeps no prompts; on a GPU transformers reads batches, and vLLM keeps what candidates have in common. Prints
one JSON line.
"""

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from importlib.metadata import version

import ray
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from pns.config import EngineKind, ServicePool
from tests.small_models import QWEN, chat_tokenizer
from workers.rewards.judge import Candidate, JudgePool
from workers.runtime import Runtime

GROUP_SIZE = 8
SHAPES = {
    "cpu": {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1536, "num_attention_heads": 8},
    "cuda": {"hidden_size": 1536, "num_hidden_layers": 28, "intermediate_size": 8960, "num_attention_heads": 12},
}


def save_judge(directory: str, device: str) -> int:
    """Its parameters."""
    tokenizer = chat_tokenizer(QWEN)
    shape = Qwen2Config(
        vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=8192, **SHAPES[device]
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(shape)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return sum(weight.numel() for weight in model.parameters())


def candidates(num: int) -> list[Candidate]:
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(draw.choice(("Ann", "has", "12", "more", "than", "Bob", "so", "7")) for _ in range(count))

    problems = [words(40) for _ in range(-(-num // GROUP_SIZE))]
    return [(problems[i // GROUP_SIZE], words(draw.randrange(40, 120))) for i in range(num)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--items", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="after one that is not counted")
    own = parser.parse_args()
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    runtime = Runtime(device=own.device, start_timeout_seconds=1800)
    share = 0.45 if own.device == "cuda" else 0.0  # both have the same GPU
    items = candidates(own.items)
    with tempfile.TemporaryDirectory() as directory:
        num_parameters = save_judge(directory, own.device)
        pools: dict[str, JudgePool] = {}
        for engine in (EngineKind.transformers, EngineKind.vllm):
            placed = ServicePool(replicas=1, gpus=share, engine=engine)
            pools[engine] = JudgePool("coherence", placed, runtime, 0, 3600)
            pools[engine].load(directory)
        seconds: dict[str, list[float]] = {name: [] for name in pools}
        grades: dict[str, list[tuple[int, ...]]] = {}
        for _ in range(1 + own.rounds):
            for name, pool in pools.items():
                began = time.monotonic()
                outcomes = pool.score(items)
                seconds[name].append(time.monotonic() - began)
                grades[name] = [outcome.value.scores for outcome in outcomes if outcome.value is not None]
        for pool in pools.values():
            pool.shutdown()
    ray.shutdown()
    assert all(len(of_side) == len(items) for of_side in grades.values())
    a_second = {name: len(items) / statistics.median(of_side[1:]) for name, of_side in seconds.items()}
    same = [a == b for a, b in zip(grades["transformers"], grades["vllm"], strict=True)]
    result = {
        "device": torch.cuda.get_device_name() if own.device == "cuda" else platform.machine(),
        "parameters": num_parameters,
        "items": len(items),
        "candidates_per_second": {name: round(value, 2) for name, value in a_second.items()},
        "speedup": round(a_second["vllm"] / a_second["transformers"], 2),
        "same": sum(same) / len(same),
        "versions": {name: version(name) for name in ("torch", "transformers", "vllm")},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
