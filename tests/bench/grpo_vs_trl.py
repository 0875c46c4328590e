"""Steps of GRPO by PNS and by TRL's GRPOTrainer: the update alone, and the whole step with its rollout.

    pip install '.[bench]'
    python tests/bench/grpo_vs_trl.py                              # CPU, one thread a side
    python tests/bench/grpo_vs_trl.py --device cuda --shape 0.5b   # one GPU

Every side is a process of its own, on the CPU with one thread, and has the same random weights, prompts,
completions a prompt, reward, precision (float32 on the CPU; bf16 with float32 master weights on a GPU) and
optimizer (AdamW, clipping at 1). The sides take turns, one step each; `--warm-up` rounds are not timed, and a
figure is the median over rounds, in tokens of the completions a second.

Update: completions of given tokens, of about 110 with a tail. A step is everything from token ids to new
weights: rewards, advantages, layout, forward, backward, clipping, AdamW. What the engine would have given
beside the tokens (our old log-probabilities) is there before the clock starts. `trl` has the same number of
rows in a micro-batch as our `padded`, `trl-small` a quarter.

Whole: every side samples its own completions of at most `--new-tokens`, at temperature 1. Random weights
hardly ever end one, so that all have nearly the same length: what padding costs TRL is not counted here. A
step of ours is rollout, rewards, advantages, layout, update, and the new weights into the engine, which lies
in the trainer's process: no Ray. `transformers` and `vllm` are our engines with the layout `shared`; TRL
generates with transformers, in one batch (`whole-trl`) or with its continuous batching (`whole-trl-paged`, on
a GPU alone). TRL's own vLLM mode needs CUDA and is not among the sides.

How the two are comparable: the loss is the clipped surrogate (0.2 and 0.28) averaged over all tokens of the
step, TRL's `loss_type="dapo"`; advantages are rewards minus their group's mean (`scale_rewards="none"`, our
`dr_grpo`), because TRL divides by another standard deviation; no KL term (TRL's default); one update a batch,
for which TRL takes its own log-probabilities as the old ones, and ours are the engine's. The reward is the
share of even tokens. No gradient checkpointing; sdpa on the CPU.

A speed-up of a wrong computation is no figure: in the update the losses and gradient norms of all sides have
to agree at every step, and in the whole step our policy has to give what our engine gave (mean ratio 1), else
the script fails. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from dpo_vs_trl import CLIP, SHAPES, Shape, Side, save_model

OURS = {"update": ("padded", "packed", "shared", "shared-compiled"), "whole": ("transformers", "vllm")}
TRL = {"update": ("trl", "trl-small", "trl-compiled"), "whole": ("whole-trl", "whole-trl-paged")}
DEFAULT_SIDES = {
    "cpu": ("trl", "trl-small", "padded", "packed", "shared", "whole-trl", "transformers", "vllm"),
    "cuda": ("trl", "shared", "whole-trl", "whole-trl-paged", "transformers", "vllm"),
}
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
END = 1  # the end token of `save_model`


@dataclass(frozen=True)
class Work:
    """What a worker is told. `completion_ids` are those of the update, `group` for each prompt."""

    side: str
    device: str
    model: str
    shape: Shape
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    group: int
    rows_per_micro_batch: int
    new_tokens: int
    steps: int

    @property
    def samples(self) -> bool:
        return part_of(self.side) == "whole"


def part_of(side: str) -> str:
    return next(part for part in OURS if side in OURS[part] + TRL[part])


def draw_rows(
    shape: Shape, num_prompts: int, group: int, seed: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Random prompts of about 90 tokens, and completions of about 110 with a tail."""
    noise = np.random.default_rng(seed)

    def tokens(median: float, sigma: float, high: int) -> list[int]:
        length = int(np.clip(noise.lognormal(math.log(median), sigma), 16, high))
        return noise.integers(2, shape.vocab_size, length).tolist()

    prompts = [tokens(90, 0.45, 256) for _ in range(num_prompts)]
    return prompts, [tokens(110, 0.5, 512) for _ in range(num_prompts * group)]


def reward(token_ids: Any) -> float:
    """The share of even tokens."""
    return float(np.mean(np.asarray(token_ids) % 2 == 0))


# The sides. Each calls `turn(metrics, prepare)` before its first step and after every step, which returns
# whether there is to be another one; `prepare` is done before its clock starts.

Turn = Callable[..., bool]


def train_trl(work: Work, turn: Turn) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    num_tokens = 0

    class TokenIdTrainer(GRPOTrainer):
        """Prompts are numbers of rows of token ids; in the update, completions are given, too."""

        def _tokenize_prompts(self, prompts: list[str]) -> Any:
            return [work.prompt_ids[int(prompt)] for prompt in prompts], None, {}

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal num_tokens
            if work.samples:
                completion_ids, log_probs = super()._generate_single_turn(*args, **kwargs)
            else:
                completion_ids, log_probs = work.completion_ids, None
            num_tokens = sum(map(len, completion_ids))
            return completion_ids, log_probs

    class Turns(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            turn(None)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" not in logs:
                return
            metrics = {"loss": logs["loss"], "grad_norm": logs["grad_norm"], "num_tokens": num_tokens}
            if not turn(metrics):
                control.should_training_stop = True

    cuda = work.device == "cuda"
    rows = work.group * len(work.prompt_ids)
    settings = GRPOConfig(
        output_dir=tempfile.mkdtemp(dir=work.model),
        use_cpu=not cuda,
        bf16=cuda,
        torch_compile=work.side.endswith("-compiled"),
        num_train_epochs=work.steps,
        per_device_train_batch_size=work.rows_per_micro_batch,
        gradient_accumulation_steps=rows // work.rows_per_micro_batch,
        num_generations=work.group,
        max_completion_length=work.new_tokens,
        use_transformers_continuous_batching=work.side.endswith("-paged"),
        shuffle_dataset=False,
        temperature=1.0,
        beta=0.0,
        epsilon=CLIP_LOW,
        epsilon_high=CLIP_HIGH,
        loss_type="dapo",
        scale_rewards="none",
        learning_rate=work.shape.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=CLIP,
        gradient_checkpointing=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32, attn_implementation="sdpa")
    TokenIdTrainer(
        model,
        reward_funcs=lambda completion_ids, **_: [reward(ids) for ids in completion_ids],
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": str(row)} for row in range(len(work.prompt_ids))]),
        processing_class=AutoTokenizer.from_pretrained(work.model),
        callbacks=[Turns()],
    ).train()


def train_ours(work: Work, turn: Turn) -> None:
    import torch

    from pns import config
    from pns.algo.advantages import group_advantages
    from workers.rollout.engine import Request, Sample, Sampling
    from workers.runtime import Runtime
    from workers.training.batching import Batch, MicroBatch, micro_batch, plan
    from workers.training.objectives import GrpoObjective
    from workers.training.rank import ModelSpec, Rank
    from workers.weights import rollout_dtype

    runtime = Runtime(device=work.device, step_timeout_seconds=600)
    engine: Any = None
    if work.side == "vllm":
        from workers.rollout.engine_vllm import VllmEngine

        # On a GPU the trainer has the other part of the memory.
        engine = VllmEngine(runtime, max_batch=256, memory_fraction=0.4, kv_cache_gib=1.0)
    elif work.side == "transformers":
        from workers.rollout.engine_transformers import TransformersEngine

        engine = TransformersEngine(runtime, torch.float32 if work.device == "cpu" else torch.bfloat16)
    if engine:
        engine.load(work.model)
    layout = config.Layout.shared if engine else config.Layout[work.side.removesuffix("-compiled")]
    settings = config.PolicyConfig(
        gradient_checkpointing=False, layout=layout, compile=work.side.endswith("-compiled")
    )
    optimizer = config.Optimizer(learning_rate=work.shape.learning_rate, clip_grad=CLIP)
    rank = Rank()
    rank.load(ModelSpec(work.model, "language_model", settings, optimizer, work.steps, 0, runtime))
    objective = GrpoObjective(CLIP_LOW, CLIP_HIGH, kl_coefficient=0.0)
    prompts = [prompt for prompt in work.prompt_ids for _ in range(work.group)]
    longest = max(len(p) + len(c) for p, c in zip(prompts, work.completion_ids, strict=True))
    # The same rows as TRL has where rows are padded, else as many tokens.
    max_tokens = work.rows_per_micro_batch * longest

    def lay_out(batch: Batch) -> list[MicroBatch]:
        [planned] = plan(batch, group_size=1, ranks=1, max_tokens=max_tokens, layout=layout)
        return [micro_batch(batch, families, layout) for families in planned]

    def update(completions: list[Any], old_log_probs: list[Any]) -> dict[str, float]:
        rewards_PG = np.reshape([reward(ids) for ids in completions], (-1, work.group))
        advantages = group_advantages(rewards_PG, config.Advantage.dr_grpo).reshape(-1).tolist()
        completion_ids = [np.asarray(ids) for ids in completions]
        values = {"old_log_probs": old_log_probs, "mask": [np.ones(len(ids)) for ids in completions]}
        batch = Batch(list(map(np.asarray, prompts)), completion_ids, values, {"advantages": advantages})
        parts = lay_out(batch)
        num_tokens = sum(map(len, completions))
        constants = {
            "num_tokens": float(num_tokens),
            "num_groups": len(batch),
            "end_of_step": True,
            "global_token_num": [length for part in parts for length in part.computed_lengths] or [1],
        }
        return rank.train(parts, objective, constants) | {"num_tokens": num_tokens}

    old_log_probs: list[np.ndarray] = []

    def ask_policy() -> None:
        parts = lay_out(Batch(prompts, work.completion_ids))
        by_row = {}
        for part, values in zip(parts, rank.infer(parts), strict=True):
            rows = np.split(values, np.cumsum(part.completion_lengths)[:-1])
            by_row |= dict(zip(part.rows, rows, strict=True))
        old_log_probs[:] = [by_row[row] for row in range(len(prompts))]

    metrics: dict[str, float] | None = None
    if engine is None:
        while turn(metrics, ask_policy):
            metrics = update(work.completion_ids, old_log_probs)
        return
    sampling = Sampling(1.0, 1.0, work.new_tokens)
    step = 0
    while turn(metrics):
        requests = [Request(str(row), tuple(ids), step * 10_000 + row) for row, ids in enumerate(prompts)]
        samples: dict[str, Sample] = {sample.id: sample for sample in engine.generate(requests, sampling)}
        in_order = [samples[request.id] for request in requests]
        given = [np.asarray(sample.log_probs, np.float32) for sample in in_order]
        metrics = update([sample.token_ids for sample in in_order], given)
        step += 1
        engine.update_weights(dict(rank._full_weights(rollout_dtype(runtime))), step)


# A worker: told what to do by its first line of input, then one step for every further line.


def work_off() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print is not a reply
    told = json.loads(sys.stdin.readline())
    work = Work(**{**told, "shape": Shape(**told["shape"])})
    import torch

    torch.set_num_threads(1 if work.device == "cpu" else os.cpu_count() or 1)
    started = 0.0

    def now() -> float:
        if work.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def turn(metrics: dict[str, float] | None, prepare: Callable[[], None] = lambda: None) -> bool:
        nonlocal started
        seconds = now() - started
        print(json.dumps({"seconds": seconds, **(metrics or {})}), file=replies, flush=True)
        more = sys.stdin.readline().strip() == "step"
        if more:
            prepare()
        started = now()
        return more

    ours = work.side in OURS["update"] + OURS["whole"]
    (train_ours if ours else train_trl)(work, turn)
    print(json.dumps({}), file=replies, flush=True)


class GrpoSide(Side):
    """Keeps tokens and ratio of every step, too."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.tokens: list[float] = []
        self.ratios: list[float] = []
        super().__init__(*arguments, **named)

    def step(self) -> None:
        self._tell("step")
        found = self._hear()
        self.seconds.append(found["seconds"])
        self.losses.append(found["loss"])
        self.grad_norms.append(found["grad_norm"])
        self.tokens.append(found["num_tokens"])
        self.ratios.append(found.get("ratio", 1.0))


# The parent.


def disagreement(sides: list[GrpoSide], cuda: bool) -> str | None:
    """What is wrong with losses, gradients and log-probabilities, if anything."""
    loss_tolerance, norm_tolerance, ratio_tolerance = (5e-3, 5e-2, 3e-2) if cuda else (1e-5, 1e-3, 1e-4)
    updates = [side for side in sides if part_of(side.name) == "update"]
    for side in updates:
        pairs = zip(side.losses, updates[0].losses, side.grad_norms, updates[0].grad_norms, strict=True)
        for step, (loss, first_loss, norm, first_norm) in enumerate(pairs, start=1):
            if not abs(loss - first_loss) <= loss_tolerance:
                return (
                    f"{side.name}: the loss of step {step} is {loss}, that of {updates[0].name} {first_loss}"
                )
            if not math.isclose(norm, first_norm, rel_tol=norm_tolerance):
                return f"{side.name}: the gradient norm of step {step} is {norm}, not {first_norm}"
    for side in sides:
        if not all(abs(ratio - 1) <= ratio_tolerance for ratio in side.ratios):
            return f"{side.name}: what the policy gives over what the engine gave is {side.ratios}, not 1"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every_side = [side for part in OURS for side in TRL[part] + OURS[part]]
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--sides", nargs="+", choices=every_side, help="default: by the device")
    parser.add_argument("--prompts", type=int, default=2, help="of a step (default %(default)s)")
    parser.add_argument("--group", type=int, default=8, help="completions a prompt (default %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=128, help="of a completion (default %(default)s)")
    parser.add_argument("--rows", type=int, default=8, help="of a micro-batch (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of every side")
    parser.add_argument("--warm-up", type=int, default=1, help="rounds that are not timed")
    parser.add_argument("--seed", type=int, default=0, help="of the rows")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work_off()
    shape = SHAPES[arguments.shape]
    prompts, completions = draw_rows(shape, arguments.prompts, arguments.group, arguments.seed)
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        save_model(shape, arguments.device, directory)
        sides = []
        for name in arguments.sides or DEFAULT_SIDES[arguments.device]:
            work = Work(
                name,
                arguments.device,
                directory,
                shape,
                prompts,
                completions,
                arguments.group,
                max(1, arguments.rows // 4) if name.endswith("-small") else arguments.rows,
                arguments.new_tokens,
                arguments.warm_up + arguments.rounds,
            )
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            ours = name in OURS["update"] + OURS["whole"]
            sides.append(GrpoSide(work, log, __file__, ours, vllm=name == "vllm"))
            stack.callback(sides[-1].kill)
        for _ in range(arguments.warm_up + arguments.rounds):
            for side in sides:
                side.step()
        for side in sides:
            side.end()
    report(arguments, shape, sides)


def report(arguments: argparse.Namespace, shape: Shape, sides: list[GrpoSide]) -> None:
    wrong = disagreement(sides, arguments.device == "cuda")
    if wrong:
        sys.exit(wrong)
    rates: dict[str, float] = {}
    for side in sides:
        seconds = statistics.median(side.seconds[arguments.warm_up :])
        rates[side.name] = statistics.median(side.tokens[arguments.warm_up :]) / seconds
        print(f"{side.name:16} {rates[side.name]:10,.0f} tokens/s  {seconds:7.3f} s a step")
    result: dict[str, Any] = {}
    for part in OURS:
        ours, trl = ([name for name in names[part] if name in rates] for names in (OURS, TRL))
        if ours and trl:
            fastest, best_trl = (max(names, key=lambda name: rates[name]) for names in (ours, trl))
            result[f"{part}_speedup"] = rates[fastest] / rates[best_trl]
            result |= {f"{part}_ours": fastest, f"{part}_trl": best_trl}
    updates = [side for side in sides if part_of(side.name) == "update"]
    result |= {
        "tokens_per_second": rates,
        "last_losses": {side.name: side.losses[-1] for side in updates},
        "last_grad_norms": {side.name: side.grad_norms[-1] for side in updates},
        "settings": {
            name: value for name, value in vars(arguments).items() if name not in ("worker", "sides")
        },
        "model": asdict(shape),
        "versions": {name: version(name) for name in ("trl", "transformers", "torch", "verl")},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
