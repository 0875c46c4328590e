"""What a step costs the driver itself: seconds and memory, by part, at 512 to 4,096 completions.

    python tests/bench/driver_scale.py

The project's own `pns.stages.grpo.train`, one step of reverse RL with the three default terms, KL and the
layout `shared`, between fakes that take no time: an engine whose samples are there at once, a verifier and
services that answer at once, training processes that give zeros. What is timed is what the driver's process
does: bookkeeping, text, rewards, JSON, layout. Samples come as Ray gives them (unpickled), 32 at a time;
micro-batches leave as Ray takes them (pickled out of band). Every size is a process of its own, once for the
times and once for the memory, whose reading costs time.

`seconds` are of the processor, and each part's own, without the parts inside it; `critical` adds up those after the last sample,
while nothing else of the step can go on; the others run while rollout decodes. `mib` is the most that the
process has grown by while the part ran, since it began. `growth` is the exponent of time and of memory in
the number of completions, from the smallest size to the largest: 1 is linear. Prints one JSON line.
"""

import argparse
import io
import json
import math
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import workers.training.policy as policy_module
from pns import config
from pns.algo.judging import Judgement
from pns.algo.negatives import degeneration
from pns.algo.reward import reward_rules
from pns.data.prompts import Prompts
from pns.records import Problem, Verdict
from pns.run.place import Place
from pns.run.terminal import PlainTerminal
from pns.run.tracking import Tracker
from pns.stages import grpo, scoring, stream
from pns.stages.artefacts import TrainedModel
from pns.stages.context import Context
from workers.rewards.service import Outcome
from workers.rewards.verifier import VerifierResult
from workers.rollout.engine import Request, Sample, Sampling
from workers.training.batching import MicroBatch
from workers.training.policy import Policy

SIZES = (512, 1024, 2048, 4096)
GROUP, CHUNK, VOCABULARY = 8, 32, 151_643
# In the order of a step; "fakes", "other", and "restore" and "skip" of an interruption are no part of it.
WHILE_DECODING = ("receive", "text", "bookkeeping", "write_unfinished")
AFTERWARDS = ("rewards", "write_rollouts", "metrics", "advantages", "batch", "plan", "layout", "send")


class Clock:
    """Seconds of named parts, each without the parts inside it, or (`memory`) the MiB that the process has
    grown by in each."""

    def __init__(self, memory: bool) -> None:
        self.values: dict[str, float] = {}
        self._memory = memory
        self._parts = ["other"]
        self._began: list[float] = [_resident()]  # of each open part
        self._since = time.process_time()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._turn()
        self._parts.append(name)
        self._began.append(_resident() if self._memory else 0.0)
        try:
            yield
        finally:
            self._turn()
            self._parts.pop()
            self._began.pop()

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Every call of this function of a module or class is the part `name` from now on."""
        function: Callable[..., Any] = getattr(owner, attribute)

        @wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            with self.part(name):
                return function(*arguments, **named)

        setattr(owner, attribute, timed)

    def _turn(self) -> None:
        """What has passed goes to the part that is open."""
        if self._memory:
            peak = _resident("VmHWM")
            for name, began in zip(self._parts, self._began, strict=True):
                self.values[name] = max(self.values.get(name, 0.0), peak - began)
            Path("/proc/self/clear_refs").write_text("5")  # the highest resident size is the present one
            return
        now = time.process_time()
        self.values[self._parts[-1]] = self.values.get(self._parts[-1], 0.0) + now - self._since
        self._since = now


def _resident(field: str = "VmRSS") -> float:
    """MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 2**10
    raise RuntimeError(f"/proc/self/status has no {field}")


def make_tokenizer() -> Any:
    """As large as Qwen2.5's, with tokens of 3 to 6 characters; a text is split into its bytes."""
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for number in range(len(vocabulary), VOCABULARY - 3):
        # "Ġ" is a space; the number in letters, as its hexadecimal digits.
        vocabulary["Ġ" + f"{number:04x}".translate(str.maketrans("0123456789", "ghijklmnop"))] = number
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.add_tokens(["<think>", "</think>"])
    return fast


class Rollout:
    """Samples of random tokens that are there at once."""

    def __init__(self, clock: Clock, prompts: Prompts) -> None:
        self._clock, self._prompts = clock, prompts
        self._noise = np.random.default_rng(0)

    def load(self, model: str) -> None: ...

    def update_weights(self, source: Any, version: int) -> int:
        return 0

    def stream(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[Sample]]:
        for start in range(0, len(requests), CHUNK):
            with self._clock.part("fakes"):
                samples = [self._sample(request, sampling) for request in requests[start : start + CHUNK]]
                sent = pickle.dumps(samples, protocol=5)
                del samples
            with self._clock.part("receive"):
                samples = pickle.loads(sent)
            yield samples

    def _sample(self, request: Request, sampling: Sampling) -> Sample:
        tokenizer = self._prompts.tokenizer
        opening = tokenizer.encode("<think>", add_special_tokens=False)
        ending = tokenizer.encode(f"</think>\\boxed{{{request.seed % 7}}}", add_special_tokens=False)
        ending.append(tokenizer.eos_token_id)
        num = sampling.max_new_tokens - len(opening) - len(ending)
        ids = (*opening, *self._noise.integers(256, VOCABULARY - 3, num).tolist(), *ending)
        log_probs = -(self._noise.exponential(0.3, len(ids)).astype(np.float32) ** 3)
        return Sample(request.id, ids, tuple(log_probs.tolist()), "stop", 0)


class Verifier:
    """One of four is right."""

    def submit(self, items: Sequence[Any]) -> list[Future[VerifierResult]]:
        right = [hash(text[-40:]) % 4 == 0 for _, text, _ in items]
        return [_done(VerifierResult(Verdict.CORRECT if r else Verdict.WRONG, None, "1")) for r in right]


class Scorer:
    """Scores that differ from one item to the next."""

    def __init__(self, judges: bool) -> None:
        self._judges, self._num = judges, 0

    def submit(self, items: Sequence[Any]) -> list[Future[Any]]:
        self._num += 1
        shares = tuple((0.1, 0.2, 0.3, 0.4) for _ in range(4))
        value = Judgement((3, 2, self._num % 4, 1), shares) if self._judges else math.sin(self._num)
        return [_done(Outcome(value)) for _ in items]


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class Processes:
    """Training processes of which nothing comes but zeros."""

    def __init__(self, clock: Clock, ranks: int) -> None:
        self._clock, self._ranks = clock, ranks

    def train(self, parts: list[list[MicroBatch]], *others: Any) -> list[dict[str, float]]:
        self._send(parts)
        return [{"loss": 0.0, "grad_norm": 1.0, "lr": 0.0}] * self._ranks

    def infer(self, parts: list[list[MicroBatch]], *others: Any) -> list[list[np.ndarray]]:
        self._send(parts)
        with self._clock.part("fakes"):
            return [[np.zeros(len(part.labels), np.float32) for part in of_rank] for of_rank in parts]

    def _send(self, parts: list[list[MicroBatch]]) -> None:
        with self._clock.part("send"):
            for of_rank in parts:
                buffers: list[pickle.PickleBuffer] = []
                sent = pickle.dumps(of_rank, protocol=5, buffer_callback=buffers.append)
                for buffer in buffers:  # into the object store
                    bytes(buffer.raw())
                del sent, buffers


class InstantPolicy(Policy):
    """The driver's side of the policy over `Processes`."""

    def __init__(self, clock: Clock, ranks: int) -> None:
        self.settings = config.PolicyConfig()
        self.turn = _at_once
        self.busy = threading.RLock()
        self.num_updates = 0
        self._ranks = ranks
        self._group = Processes(clock, ranks)
        self._vocab_size = VOCABULARY
        self._version = 0
        optimizer = SimpleNamespace(optimizer=True, head="language_model", lora_rank=0, path="")
        self._model: Any = optimizer
        self._runtime: Any = SimpleNamespace(device="cpu", step_limit=None)

    def load(self, *others: Any) -> None: ...

    def load_reference(self, model_path: str) -> None: ...

    def weights(self) -> tuple[int, Any]:
        return self._version, None

    def export(self, directory: str | Path) -> None: ...

    def _wait(self, references: Sequence[Any], limit: Any, awaited: str) -> list[Any]:
        return list(references)


@contextmanager
def _at_once() -> Iterator[None]:
    yield


WATCHED: tuple[tuple[Any, str, str], ...] = (
    (Prompts, "encode", "text"),
    (Prompts, "decode", "text"),
    (grpo, "roll_out", "bookkeeping"),
    (stream, "append_jsonl", "write_unfinished"),
    (scoring, "rewarded", "rewards"),
    (scoring, "check_failures", "rewards"),
    (grpo, "append_jsonl", "write_rollouts"),
    (grpo, "masked_counts", "metrics"),
    (grpo, "rollout_advantages", "advantages"),
    (grpo, "training_batch", "batch"),
    (policy_module, "check_batch", "batch"),
    (policy_module, "plan", "plan"),
    (policy_module, "micro_batch", "layout"),
)


def one_step(tokenizer: Any, clock: Clock, num_completions: int, num_tokens: int, ranks: int = 1) -> None:
    """A step, and what an interruption after it would cost; its parts are in the clock."""
    prompts = Prompts(tokenizer, config.Data(chat_template=False))
    rules = reward_rules(config.Config())
    settings = config.ReverseRl(
        steps=1,
        problems_per_step=num_completions // GROUP,
        completions_per_problem=GROUP,
        max_skipped_updates=1,
    )
    problems = [
        Problem(
            f"train/{i}", f"Ann has {i} apples and eats some of them. How many are left? " * 2, "3", "made"
        )
        for i in range(num_completions // GROUP)
    ]
    scorers = {"plausibility": Scorer(judges=False), "coherence": Scorer(judges=True)}
    fleet: Any = SimpleNamespace(
        rollout=Rollout(clock, prompts),
        policy=InstantPolicy(clock, ranks),
        verifier=Verifier(),
        scorer=lambda name: scorers[name],
    )
    terms = [name for name in rules.terms if name != "wrong"]

    def describe(rollouts: Sequence[Any]) -> dict[str, float]:
        with clock.part("metrics"):
            return degeneration(rollouts, terms)

    with TemporaryDirectory() as directory:
        place = Place(Path(directory) / "step")
        tracker = Tracker(
            Path(directory), config.Tracking(), lambda *_: None, terminal=PlainTerminal(io.StringIO())
        )
        with place.making({"inputs": []}):
            tracker.enter(place.directory)
            ctx = Context(0, place, fleet, prompts, tracker, Path(directory))
            run = grpo.GrpoRun("bench", settings, num_tokens, 0.2, rules)
            trained = TrainedModel(place.directory)
            grpo.train(ctx, run, trained, "none", problems, describe)
            clock.values["file_mib"] = trained.rollouts_file.stat().st_size / 2**20
            with clock.part("skip"):  # rows of steps before the checkpoint
                grpo.take_back(trained, scoring.unfinished_rollouts(ctx), 1)
            with clock.part("restore"):
                grpo.take_back(trained, scoring.unfinished_rollouts(ctx), 0)
                restored = scoring.unfinished_rollouts(ctx)
        assert len(restored.rows) == num_completions


def measure(num_completions: int, arguments: argparse.Namespace, memory: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", str(num_completions), "--ranks", str(arguments.ranks)]
    command += ["--tokens", str(arguments.tokens), *(["--memory"] if memory else [])]
    root = str(Path(__file__).parents[2])
    environment = dict(os.environ, PYTHONHASHSEED="0", PYTHONPATH=root)
    answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(answer.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="completions")
    parser.add_argument("--tokens", type=int, default=2048, help="of a completion (default %(default)s)")
    parser.add_argument("--ranks", type=int, default=1, help="of the policy (default %(default)s)")
    parser.add_argument("--without-memory", action="store_true")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        tokenizer, clock = make_tokenizer(), Clock(arguments.memory)
        for watched in WATCHED:
            clock.wrap(*watched)
        one_step(tokenizer, clock, arguments.one, arguments.tokens, arguments.ranks)
        return print(json.dumps(clock.values))
    seconds: dict[str, dict[str, float]] = {}
    mib: dict[str, dict[str, float]] = {}
    for size in arguments.sizes:
        parts = measure(size, arguments, memory=False)
        parts["while_decoding"] = sum(parts[name] for name in WHILE_DECODING)
        parts["critical"] = sum(parts[name] for name in AFTERWARDS)
        seconds[str(size)] = {name: round(value, 3) for name, value in parts.items()}
        if not arguments.without_memory:
            parts = measure(size, arguments, memory=True)
            parts["whole"] = max(parts[name] for name in ("other", "bookkeeping"))
            mib[str(size)] = {name: round(value, 1) for name, value in parts.items()}
        print(f"{size} completions: {seconds[str(size)]}", file=sys.stderr, flush=True)
    least, most = (str(size) for size in (min(arguments.sizes), max(arguments.sizes)))
    result: dict[str, Any] = {"tokens": arguments.tokens, "seconds": seconds, "mib": mib}
    if least != most:
        ratio = math.log(int(most) / int(least))
        growth = {
            f"{n}_seconds": math.log(seconds[most][n] / seconds[least][n]) / ratio
            for n in ("while_decoding", "critical")
        }
        if mib:
            growth["memory"] = math.log(mib[most]["whole"] / mib[least]["whole"]) / ratio
        result["growth"] = {name: round(value, 2) for name, value in growth.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
