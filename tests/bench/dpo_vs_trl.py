"""Optimizer steps of DPO by PNS and by TRL's DPOTrainer: tokens a second, peak memory, and what packing and
prefix sharing give.

    pip install '.[bench]'
    python tests/bench/dpo_vs_trl.py
    python tests/bench/dpo_vs_trl.py --device cuda --shape 0.5b
    python tests/bench/dpo_vs_trl.py --device cuda --shape 1.5b --sides trl-by-length-compiled shared

Every side is a process of its own, on the CPU with one thread, and has the same random weights, pairs,
precision (float32 on the CPU; bf16 with float32 master weights on a GPU) and optimizer (AdamW, clipping at
1). A step is everything from rows of token ids to new weights: laying out, forward, backward, clipping, AdamW
and the loss on the Python side. Reference log-probabilities are computed before the first step. The sides
take turns, one step each, in the same order every round; `--warm-up` rounds are not timed. A side's figure is
the median over rounds; tokens are 2P + C + R of every pair (prompt, chosen, rejected), whatever a side
computes.

Sides: `padded`, `packed` and `shared` are our layouts, all with the rows of TRL's micro-batches (consecutive
pairs in the order of the data); `trl` is TRL on the same micro-batches, `trl-by-length` has the pairs of the
step sorted by length, as TRL's `group_by_length` does, and `trl-single` one pair per micro-batch; `-compiled`
adds TRL's `torch_compile`, or our `policy.compile`. All make the same optimizer step. The speed-up is that of
our fastest side over the fastest TRL side: on the CPU both are compiled, which needs a C++ compiler, and
TRL's has one pair per micro-batch, which pads least.

TRL's other settings: no gradient checkpointing (its default recomputes every layer), precomputed reference
log-probabilities, fused AdamW, its chunked language-model head (always on), flash-attention 2 where it is
installed and the device is cuda, else sdpa. `padding_free` is ignored by this version, which warns and pads,
and the Liger kernels are left out as deprecated. Its preprocessing is skipped: it gets our token ids. Both
sides have the memory-allocator settings of our policy processes.

A speed-up of a wrong computation is no figure: the losses of all sides have to agree at every step, the first
has to be ln 2, and the first gradient norms have to agree, else the script fails. The last line printed is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np

ROOT = Path(__file__).parents[2]
OURS = ("padded", "packed", "shared", "shared-compiled")
TRL = tuple(
    name + compiled for compiled in ("", "-compiled") for name in ("trl", "trl-by-length", "trl-single")
)
DEFAULT_SIDES = {
    "cpu": ("trl", "trl-single", "trl-single-compiled", *OURS),
    "cuda": ("trl-by-length", "trl-by-length-compiled", *OURS),
}
BETA, CLIP = 0.1, 1.0


@dataclass(frozen=True)
class Shape:
    """A Qwen2 model and the work of a step."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    tie_word_embeddings: bool
    learning_rate: float
    pairs: int  # of a step
    pairs_per_micro_batch: int


SHAPES = {
    "small": Shape(11008, 256, 6, 4, 1, 1392, True, 3e-6, 8, 4),  # in the proportions of Qwen2.5-0.5B
    "narrow": Shape(
        4096, 256, 6, 4, 2, 768, True, 3e-6, 16, 4
    ),  # more of the time elementwise and in attention, less in the head
    "0.5b": Shape(151936, 896, 24, 14, 2, 4864, True, 1e-6, 64, 16),  # Qwen2.5-0.5B
    "1.5b": Shape(151936, 1536, 28, 12, 2, 8960, True, 1e-6, 64, 8),  # Qwen2.5-1.5B
}

Pair = dict[str, list[int]]


@dataclass(frozen=True)
class Work:
    """What a worker is told."""

    side: str
    device: str
    model: str
    shape: Shape
    pairs: list[Pair]
    pairs_per_micro_batch: int
    steps: int


def draw_pairs(shape: Shape, seed: int) -> list[Pair]:
    """Random tokens with the lengths of mathematical reasoning: prompts of about 100 tokens, completions of
    about 260 with a long tail, the longer at most twice the shorter (PNS drops other pairs)."""
    noise = np.random.default_rng(seed)

    def length(median: float, sigma: float, high: int) -> int:
        return int(np.clip(noise.lognormal(math.log(median), sigma), 16, high))

    def tokens(count: int) -> list[int]:
        return noise.integers(2, shape.vocab_size, count).tolist()

    pairs = []
    for _ in range(shape.pairs):
        chosen = rejected = 0
        while not 0 < chosen <= 2 * rejected <= 4 * chosen:
            chosen, rejected = (length(220, 0.6, 1536) for _ in range(2))
        pairs.append(
            {
                "prompt_ids": tokens(length(90, 0.45, 512)),
                "chosen_ids": tokens(chosen),
                "rejected_ids": tokens(rejected),
            }
        )
        pairs[-1]["rejected_ids"][0] = (
            pairs[-1]["chosen_ids"][0] + 1
        ) % shape.vocab_size  # what is shared is the prompt
    return pairs


def save_model(shape: Shape, device: str, directory: str) -> int:
    """Write random weights and a tokenizer that TRL can find a padding token in. Returns the number of
    parameters without embeddings."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    keys = ("pairs", "pairs_per_micro_batch", "learning_rate")
    sizes = {name: value for name, value in asdict(shape).items() if name not in keys}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(**sizes, max_position_embeddings=4096, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    )
    model.to(torch.bfloat16 if device == "cuda" else torch.float32).save_pretrained(directory)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>").save_pretrained(
        directory
    )
    return sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if "embed_tokens" not in name and "lm_head" not in name
    )


# The sides. Each calls `turn` before its first step and after every step, with the step's loss and gradient
# norm; False ends it.

Turn = Callable[[dict[str, float] | None], bool]


def train_trl(work: Work, turn: Turn, ready: Callable[[], None]) -> None:
    import importlib.util

    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class TokenIdTrainer(DPOTrainer):
        """Takes rows of token ids as they are."""

        def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
            return dataset

    class Turns(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            turn(None)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs and not turn({"loss": logs["loss"], "grad_norm": logs["grad_norm"]}):
                control.should_training_stop = True

    ready()
    cuda = work.device == "cuda"
    pairs = work.pairs
    if work.side.startswith("trl-by-length"):
        pairs = sorted(
            pairs,
            key=lambda pair: (
                max(len(pair["chosen_ids"]), len(pair["rejected_ids"])) + len(pair["prompt_ids"])
            ),
        )
    settings = DPOConfig(
        output_dir=tempfile.mkdtemp(dir=work.model),
        use_cpu=not cuda,
        bf16=cuda,
        torch_compile=work.side.endswith("-compiled"),
        num_train_epochs=work.steps,
        per_device_train_batch_size=work.pairs_per_micro_batch,
        gradient_accumulation_steps=len(pairs) // work.pairs_per_micro_batch,
        train_sampling_strategy="sequential",
        beta=BETA,
        learning_rate=work.shape.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=CLIP,
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        max_length=None,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    attention = "flash_attention_2" if cuda and importlib.util.find_spec("flash_attn") else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(
        work.model, dtype=torch.float32, attn_implementation=attention
    )
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    TokenIdTrainer(
        model,
        args=settings,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        callbacks=[Turns()],
    ).train()


def train_ours(work: Work, turn: Turn, ready: Callable[[], None]) -> None:
    import verl.workers.engine_workers  # noqa: F401  its import belongs to the memory before the model

    from pns import config
    from workers.runtime import Runtime
    from workers.training.batching import Batch, MicroBatch, micro_batch, plan
    from workers.training.objectives import PreferenceObjective
    from workers.training.rank import ModelSpec, Rank

    layout = config.Layout[work.side.removesuffix("-compiled")]
    objective = PreferenceObjective("sigmoid", {"beta": BETA})
    sides = ("chosen_ids", "rejected_ids")
    prompts = [pair["prompt_ids"] for pair in work.pairs for _ in sides]
    completions = [pair[side] for pair in work.pairs for side in sides]
    size = 2 * work.pairs_per_micro_batch

    def lay_out(reference: list[np.ndarray] | None = None) -> list[MicroBatch]:
        parts = []
        for start in range(0, len(prompts), size):
            rows = slice(start, start + size)
            batch = Batch(
                prompts[rows], completions[rows], {"ref_log_probs": reference[rows]} if reference else {}
            )
            [[families]] = plan(batch, group_size=2, ranks=1, max_tokens=sys.maxsize, layout=layout)
            parts.append(micro_batch(batch, families, layout))
        return parts

    ready()
    rank = Rank()
    settings = config.PolicyConfig(
        gradient_checkpointing=False, layout=layout, compile=work.side.endswith("-compiled")
    )
    optimizer = config.Optimizer(learning_rate=work.shape.learning_rate, clip_grad=CLIP)
    runtime = Runtime(device=work.device, step_timeout_seconds=600)
    rank.load(ModelSpec(work.model, "language_model", settings, optimizer, work.steps, 0, runtime))
    parts = lay_out()
    reference: list[np.ndarray] = [np.empty(0)] * len(prompts)
    for index, (part, values) in enumerate(zip(parts, rank.infer(parts), strict=True)):
        rows = np.split(values, np.cumsum(part.completion_lengths)[:-1])
        for row, row_values in zip(part.rows, rows, strict=True):
            reference[index * size + row] = row_values
    constants = {
        "num_tokens": 0.0,
        "num_groups": len(work.pairs),
        "global_token_num": [
            len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)
        ],
    }
    metrics: dict[str, float] | None = None
    while turn(metrics):
        metrics = rank.train(lay_out(reference), objective, constants)


# A worker: told what to do by its first line of input, then one step for every further line.


def work_off() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print is not a reply
    told = json.loads(sys.stdin.readline())
    work = Work(**{**told, "shape": Shape(**told["shape"])})
    import torch

    torch.set_num_threads(1 if work.device == "cpu" else os.cpu_count() or 1)
    before = 0.0
    started = 0.0

    def ready() -> None:
        nonlocal before
        before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def now() -> float:
        if work.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def reply(values: dict[str, Any]) -> None:
        print(json.dumps(values), file=replies, flush=True)

    def turn(metrics: dict[str, float] | None) -> bool:
        nonlocal started
        ended = now()
        if metrics is not None:
            reply({"seconds": ended - started, "loss": metrics["loss"], "grad_norm": metrics["grad_norm"]})
        else:
            reply({})
        more = sys.stdin.readline().strip() == "step"
        started = now()
        return more

    (train_ours if work.side in OURS else train_trl)(work, turn, ready)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    if work.device == "cuda":
        reply({"peak": torch.cuda.max_memory_allocated() / 2**20, "before": 0.0})
    else:
        reply({"peak": peak, "before": before})


class Side:
    """A worker of `script`, on our `side` of the comparison or TRL's, seen from the parent."""

    def __init__(self, work: Any, log: IO[str], script: str, ours: bool, vllm: bool = False) -> None:
        environment = dict(
            os.environ,
            PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        )
        environment |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        if work.device == "cpu":
            from workers.runtime import VERL_CPU, process_environment

            environment |= {"CUDA_VISIBLE_DEVICES": "", **process_environment("reward", "cpu", 1, vllm)}
        if ours:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            environment |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "RANK": "0",
                "WORLD_SIZE": "1",
                "LOCAL_RANK": "0",
            }
            if work.device == "cpu":
                environment |= VERL_CPU
        self.name = work.side
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self._log = log
        self._process = subprocess.Popen(
            [sys.executable, script, "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
        self._tell(json.dumps(asdict(work)))
        self._hear()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            print(line, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            self._fail()

    def _hear(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else self._fail()

    def _fail(self) -> Any:
        self._log.seek(0)
        sys.exit(f"{self.name} ended before it was told to:\n{self._log.read()[-4000:]}")

    def step(self) -> None:
        self._tell("step")
        found = self._hear()
        self.seconds.append(found["seconds"])
        self.losses.append(found["loss"])
        self.grad_norms.append(found["grad_norm"])

    def end(self) -> dict[str, float]:
        """Peak memory and the memory before the model was built, in MiB."""
        self._tell("end")
        found = self._hear()
        self._process.wait(60)
        return found

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


# The parent.


def model_flops(shape: Shape, pairs: Sequence[Pair], num_parameters: int) -> float:
    """Floating-point operations that a step needs, forward and backward, with a shared prompt computed once.

    6 (non-embedding parameters) (P + C + R), 6 (vocabulary) (hidden) (C + R) for the head, and 12 (heads)
    (head dimension) (layers) for every pair of a query and a key at or before it. Nothing for recomputation,
    padding or the optimizer.
    """
    width = shape.num_hidden_layers * shape.hidden_size
    total = 0.0
    for pair in pairs:
        prompt, *completions = (
            len(ids) for ids in (pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"])
        )
        attended = prompt * (prompt + 1) / 2 + sum(
            length * prompt + length * (length + 1) / 2 for length in completions
        )
        total += 6 * num_parameters * (
            prompt + sum(completions)
        ) + 6 * shape.vocab_size * shape.hidden_size * sum(completions)
        total += 12 * width * attended
    return total


def ceilings(pairs: Sequence[Pair], per_micro_batch: int) -> tuple[float, float]:
    """What packing and sharing would give if time were proportional to tokens: B max / sum of lengths, and
    (2P+C+R) / (P+C+R)."""
    rows = [
        [len(pair["prompt_ids"]) + len(pair[side]) for side in ("chosen_ids", "rejected_ids")]
        for pair in pairs
    ]
    packed = sum(map(sum, rows))
    padded = 0
    for start in range(0, len(rows), per_micro_batch):
        part = rows[start : start + per_micro_batch]
        padded += 2 * len(part) * max(map(max, part))
    return padded / packed, packed / (packed - sum(len(pair["prompt_ids"]) for pair in pairs))


def disagreement(sides: Sequence[Side], tolerance: float) -> str | None:
    """What is wrong with the losses, if anything."""
    first = sides[0]
    for side in sides:
        if abs(side.losses[0] - math.log(2)) > tolerance:
            return f"{side.name}: the first loss is {side.losses[0]}, not ln 2"
        if not math.isclose(side.grad_norms[0], first.grad_norms[0], rel_tol=10 * tolerance):
            return (
                f"{side.name}: the first gradient norm is {side.grad_norms[0]}, "
                f"that of {first.name} {first.grad_norms[0]}"
            )
        for step, (one, other) in enumerate(zip(side.losses, first.losses, strict=True)):
            if not abs(one - other) <= tolerance:
                return f"{side.name}: the loss of step {step + 1} is {one}, that of {first.name} {other}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument(
        "--sides", nargs="+", choices=TRL + OURS, help="default: those that matter on the device"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of every side")
    parser.add_argument("--warm-up", type=int, default=2, help="rounds that are not timed")
    parser.add_argument("--seed", type=int, default=0, help="of the pairs")
    parser.add_argument(
        "--peak-tflops",
        type=float,
        default=989.5,
        help="of the GPU, for MFU; an H200's dense bf16 by default",
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work_off()
    shape = SHAPES[arguments.shape]
    pairs = draw_pairs(shape, arguments.seed)
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        num_parameters = save_model(shape, arguments.device, directory)
        sides = []
        for name in arguments.sides or DEFAULT_SIDES[arguments.device]:
            per_micro_batch = 1 if name.startswith("trl-single") else shape.pairs_per_micro_batch
            steps = arguments.warm_up + arguments.rounds
            work = Work(name, arguments.device, directory, shape, pairs, per_micro_batch, steps)
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            sides.append(Side(work, log, __file__, name in OURS))
            stack.callback(sides[-1].kill)
        for _ in range(arguments.warm_up + arguments.rounds):
            for side in sides:
                side.step()
        memory = {side.name: side.end() for side in sides}
    report(arguments, shape, pairs, num_parameters, sides, memory)


def report(
    arguments: argparse.Namespace,
    shape: Shape,
    pairs: Sequence[Pair],
    num_parameters: int,
    sides: Sequence[Side],
    memory: dict[str, dict[str, float]],
) -> None:
    wrong = disagreement(sides, 1e-3 if arguments.device == "cpu" else 5e-2)
    if wrong:
        sys.exit(wrong)
    tokens = sum(
        2 * len(pair["prompt_ids"]) + len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs
    )
    seconds = {side.name: statistics.median(side.seconds[arguments.warm_up :]) for side in sides}
    flops = model_flops(shape, pairs, num_parameters)
    for side in sides:
        timed, median = side.seconds[arguments.warm_up :], seconds[side.name]
        peak, before = memory[side.name]["peak"], memory[side.name]["before"]
        mfu = f"  MFU {flops / median / arguments.peak_tflops / 1e12:6.1%}"
        print(
            f"{side.name:22} {tokens / median:10,.0f} tokens/s  {median:7.3f} s a step "
            f"({min(timed):.3f} to {max(timed):.3f})  peak {peak:7,.0f} MiB, "
            f"{peak - before:7,.0f} without libraries{mfu if arguments.device == 'cuda' else ''}"
        )
    packing, sharing = ceilings(pairs, shape.pairs_per_micro_batch)
    losses = ", ".join(f"{side.losses[-1]:.6f}" for side in sides)
    print(f"ceilings: packing {packing:.3f}, prefix sharing {sharing:.3f}; last losses: {losses}")

    def ratio(slower: str | None, faster: str | None) -> float | None:
        return seconds[slower] / seconds[faster] if slower in seconds and faster in seconds else None

    best_trl = min((name for name in TRL if name in seconds), key=lambda name: seconds[name], default=None)
    best_ours = min((name for name in OURS if name in seconds), key=lambda name: seconds[name], default=None)
    packed, shared = ratio("padded", "packed"), ratio("packed", "shared")
    libraries = (["trl"] if best_trl else []) + ["transformers", "torch", "verl"]
    result = {
        "speedup": ratio(best_trl, best_ours),
        "packing_fraction_of_ceiling": packed and packed / packing,
        "prefix_fraction_of_ceiling": shared and shared / sharing,
        "peak_memory_ours_mib": best_ours and memory[best_ours]["peak"] - memory[best_ours]["before"],
        "peak_memory_trl_mib": best_trl and memory[best_trl]["peak"] - memory[best_trl]["before"],
        "ours": best_ours,
        "trl": best_trl,
        "tokens_per_second": {name: tokens / of_side for name, of_side in seconds.items()},
        "mfu": {name: flops / of_side / arguments.peak_tflops / 1e12 for name, of_side in seconds.items()}
        if arguments.device == "cuda"
        else None,
        "model": {
            "shape": arguments.shape,
            "device": arguments.device,
            **asdict(shape),
            "non_embedding_parameters": num_parameters,
        },
        "tokens": tokens,
        "versions": {name: version(name) for name in libraries},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
