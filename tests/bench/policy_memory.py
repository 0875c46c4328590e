"""The peak memory of policy training on a CPU, measured, beside what `pns plan` says it is.

    python tests/bench/policy_memory.py

For each case fresh processes, one a rank, of the class and with the settings of our policy processes, train a
Qwen2 of random weights in float32 for two steps of two micro-batches (SFT on rows of random tokens, packed). A
small model is loaded and trained first, so that libraries and thread pools are there before memory is first
read; then the kernel's high-water mark is set back. What is measured is the high-water mark of the resident
size after the second step minus the resident size before the model was loaded, on rank 0.

Each case runs twice. `held`: with an allocator that gives every large block back at once, so that the process
is as large as what it holds; beside `pns.planning.memory.training_memory`. `process`: with the settings of our
policy processes, which keep what is freed; beside that and `assumptions.cpu_heap`.

The last line printed is one JSON object; the script fails where a prediction of what is held misses by more than
`--tolerance`.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from workers.training.rank import Rank

ROOT = Path(__file__).parents[2]
ROW_TOKENS, PROMPT_TOKENS = 256, 16
# Left alone, glibc raises the first of them to 32 MiB by itself.
GIVES_BACK = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(2**17))


@dataclass(frozen=True)
class Case:
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    tied: bool
    tokens: int  # of a micro-batch
    checkpointing: bool
    ranks: int = 1


SMALL = Case(1000, 64, 2, 2, 1, 128, True, 512, False)
CASES = {
    "47M, tied": Case(32000, 512, 8, 8, 2, 2048, True, 1024, False),
    "47M, tied, 2048 tokens": Case(32000, 512, 8, 8, 2, 2048, True, 2048, False),
    "74M, checkpointing": Case(16000, 768, 8, 12, 3, 2048, False, 1024, True),
    "74M, 2 ranks": Case(16000, 768, 8, 12, 3, 2048, False, 512, False, ranks=2),
}


def save_model(case: Case, directory: Path) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        intermediate_size=case.intermediate,
        tie_word_embeddings=case.tied,
        max_position_embeddings=4096,
    )
    Qwen2ForCausalLM(config).save_pretrained(directory)


def measure(case: Case, directory: Path) -> dict[str, float]:
    """In a rank's process: bytes at most until the second step had ended, without those before the model."""
    import torch

    from workers.training.rank import Rank

    torch.set_num_threads(1)
    rank = Rank()
    train(rank, SMALL, directory / "small")
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
    before = status_bytes("VmRSS")
    train(rank, case, directory / "measured")
    return {"peak": status_bytes("VmHWM") - before}


def status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def train(rank: Rank, case: Case, model: Path) -> None:
    from pns import config
    from workers.runtime import Runtime
    from workers.training.batching import Batch, micro_batch, plan
    from workers.training.objectives import SftObjective
    from workers.training.rank import ModelSpec

    layout = config.Layout.packed
    settings = config.PolicyConfig(
        gradient_checkpointing=case.checkpointing, layout=layout, max_tokens_per_micro_batch=case.tokens
    )
    runtime = Runtime(device="cpu", step_timeout_seconds=600)
    spec = ModelSpec(str(model), "language_model", settings, config.Optimizer(), 2, 0, runtime)
    rank.load(spec)
    noise = np.random.default_rng(0)
    ranks = int(os.environ["WORLD_SIZE"])  # of the small model, too
    num_rows = 2 * ranks * case.tokens // ROW_TOKENS  # two micro-batches a rank
    rows = [noise.integers(0, case.vocabulary, ROW_TOKENS).tolist() for _ in range(num_rows)]
    completions = [row[PROMPT_TOKENS:] for row in rows]
    ones = [np.ones(len(completion), np.float32) for completion in completions]
    batch = Batch([row[:PROMPT_TOKENS] for row in rows], completions, {"mask": ones})
    planned = plan(batch, 1, ranks, case.tokens, layout)[int(os.environ["RANK"])]
    assert len(planned) == 2
    parts = [micro_batch(batch, families, layout) for families in planned]
    constants = {
        "num_tokens": float(sum(map(len, completions))),
        "num_groups": num_rows,
        "end_of_step": True,
        "global_token_num": [ROW_TOKENS] * num_rows,
    }
    for _ in range(2):
        rank.train(parts, SftObjective(), constants)


def predicted(case: Case) -> tuple[dict[str, float], dict[str, float]]:
    """GB of both runs, and by part of what is held."""
    from pns.config import PolicyConfig
    from pns.planning.assumptions import Assumptions
    from pns.planning.memory import total, training_memory, training_of
    from pns.planning.shapes import Shape

    shape = Shape(
        case.vocabulary,
        case.hidden,
        case.layers,
        case.heads,
        case.kv_heads,
        case.hidden // case.heads,
        case.intermediate,
        case.tied,
        qkv_bias=True,
    )
    settings = PolicyConfig(gradient_checkpointing=case.checkpointing)
    parts = training_memory(training_of(shape, case.ranks, "cpu", settings, case.tokens))
    held = total(parts)
    return {"held": held, "process": held * (1 + Assumptions().cpu_heap)}, parts


def run_case(case: Case, keeps_freed: bool) -> float:
    """What rank 0 measured, GB."""
    from workers.runtime import VERL_CPU, process_environment

    with tempfile.TemporaryDirectory() as directory, socket.socket() as free:
        save_model(SMALL, Path(directory) / "small")
        save_model(case, Path(directory) / "measured")
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        environment = {
            **os.environ,
            **(process_environment("reward", "cpu", cpus=1) if keeps_freed else GIVES_BACK),
            **VERL_CPU,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(case.ranks),
            "LOCAL_RANK": "0",
        }
        command = [sys.executable, __file__, "--worker", json.dumps(asdict(case)), directory]
        processes = [
            subprocess.Popen(
                command,
                env=environment | {"RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(case.ranks)
        ]
        outputs = [process.communicate(timeout=600) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            sys.exit(f"a rank failed:\n{errors[-4000:]}")
    return json.loads(outputs[0][0].splitlines()[-1])["peak"] / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--tolerance", type=float, default=0.15)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        told, directory = arguments.worker
        measured = measure(Case(**json.loads(told)), Path(directory))
        print(json.dumps(measured), flush=True)
        return
    results: dict[str, dict[str, object]] = {}
    misses: dict[str, list[float]] = {"held": [], "process": []}
    for name in arguments.cases:
        case = CASES[name]
        of_runs, parts = predicted(case)
        results[name] = {"case": asdict(case), "parts_gb": {part: round(gb, 4) for part, gb in parts.items()}}
        for run, gb in of_runs.items():
            measured = run_case(case, keeps_freed=run == "process")
            ratio = gb / measured
            print(
                f"{name:24} {run:8} measured {measured:.3f} GB, predicted {gb:.3f}: {ratio:.2f}", flush=True
            )
            results[name][run] = {"measured_gb": round(measured, 4), "predicted_gb": round(gb, 4)}
            misses[run].append(abs(ratio - 1))
    versions = {name: version(name) for name in ("torch", "transformers", "verl")}
    worst = {run: round(max(of_run), 3) for run, of_run in misses.items()}
    print(json.dumps({"worst_miss": worst, "cases": results, "versions": versions}))
    if worst["held"] > arguments.tolerance:
        sys.exit(f"a prediction misses by {worst['held']:.0%}, more than {arguments.tolerance:.0%}")


if __name__ == "__main__":
    main()
