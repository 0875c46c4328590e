"""Policy training: FSDP2 processes (verl's `TrainingWorker` in a `RayWorkerGroup`) behind `Policy`.

The processes are started once and take one model after another, a language model or a reward model. Stages
hand over rows of token ids and an objective; `plan` spreads the rows over ranks and micro-batches, and the
mean over the whole batch does not depend on how. Nothing of verl is imported before a `Policy` is made.
"""

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import wraps
from itertools import chain
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pns import config
from pns.errors import UserError
from workers.broadcast import Seat
from workers.checkpoints import local_directory
from workers.reservation import release, reserve
from workers.runtime import VERL_CPU, Limit, Runtime, process_environment
from workers.training.batching import Batch, MicroBatch, check_batch, micro_batch, plan
from workers.training.objectives import Head, Objective, with_length_bias, with_means_by_sign
from workers.training.rank import ModelSpec, actor_class
from workers.weights import StoredWeights

_Result = TypeVar("_Result")
_Arguments = ParamSpec("_Arguments")


def _in_turn(
    method: Callable[Concatenate["Policy", _Arguments], _Result],
) -> Callable[Concatenate["Policy", _Arguments], _Result]:
    """The call of a `Policy` that uses its GPUs."""

    @wraps(method)
    def call(policy: "Policy", *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with policy.busy, policy.turn():
            return method(policy, *args, **kwargs)

    return call


class Policy:
    """The training processes, seen from the driver. Calls block until all ranks are done; one at a time, the
    others wait.

    A wait longer than the runtime's limit for it (of starting, loading, handing out weights, or a step)
    raises TimeoutError with what was waited for and the limit's key; the exception of a rank is raised as it
    is.
    """

    def __init__(
        self,
        pool: config.Pool,
        settings: config.PolicyConfig,
        runtime: Runtime,
        groups: Sequence[Any] = (),
        turn: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Start one process per rank, in the placement `groups` that `reserve` gave, else in those that it
        gives now; no model yet. Every call that uses the GPUs begins with `turn`, and between turns the
        models are elsewhere (`leave`, `come`). UserError when there is no place for them in time."""
        cuda = runtime.device == "cuda"
        if cuda and not 0 < pool.gpus <= 1:
            raise UserError(
                f"placement.policy.gpus: {pool.gpus}; a rank uses one GPU or a share of it: "
                "set it in (0, 1] and add replicas"
            )
        self.settings = settings  # may be exchanged before a `load`
        self._runtime = runtime
        self._ranks = pool.replicas
        self.turn = turn
        # Ranks that got the calls of two threads in different orders would wait for each other.
        self.busy = threading.RLock()
        self.num_updates = 0  # `load`, `train_step`, `restore`: tells whether the weights are still the same
        self._model: ModelSpec | None = None
        self._vocab_size = 0
        self._groups = groups or reserve(pool, runtime, settings.fsdp_size)
        self._group = self._spawn(pool, process_environment("policy", runtime.device, pool.cpus), cuda)
        up = [worker.__ray_ready__.remote() for worker in self._group.workers]
        self._wait(up, runtime.start_limit, "the policy's processes to start")

    def _spawn(self, pool: config.Pool, environment: dict[str, str], cuda: bool) -> Any:
        if not cuda:
            # The driver's part of verl asks for a platform, too; it has to be named before the first import.
            for name, value in VERL_CPU.items():
                os.environ.setdefault(name, value)
        from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
        from verl.single_controller.ray.base import get_master_addr_port

        share = pool.gpus if cuda else 1.0
        sizes = [group.bundle_count for group in self._groups]
        resources = RayResourcePool(sizes, use_gpu=cuda, max_colocate_count=1 / share)
        resources.pgs = list(self._groups)
        first = PlacementGroupSchedulingStrategy(self._groups[0], placement_group_bundle_index=0)
        address = get_master_addr_port.options(scheduling_strategy=first, num_cpus=0).remote()
        awaited = "the address of the first policy process"
        [(host, port)] = self._wait([address], self._runtime.start_limit, awaited)
        rank_class = RayClassWithInitArgs(ray.remote(actor_class()), self._runtime.logs)
        rank_class.update_options({"num_cpus": max(1.0, pool.cpus)})
        return RayWorkerGroup(
            resources,
            rank_class,
            device_name=self._runtime.device,
            worker_env=environment,
            master_addr=host,
            master_port=port,
        )

    @_in_turn
    def load(
        self, model_path: str, head: Head, optimizer: config.Optimizer | None, total_steps: int, seed: int
    ) -> None:
        """Build the model of a checkpoint (directory or Hub id) in the processes; drop the one before.

        `head` "score" replaces the language-model head by one bias-free linear output, taken from the
        checkpoint where it has one, else drawn from `seed`. Without `optimizer` the model can score, not
        train. `total_steps` is the length of the learning-rate schedule.
        """
        path = str(local_directory(model_path))
        spec = ModelSpec(path, head, self.settings, optimizer, total_steps, seed, self._runtime)
        self._model = None  # where loading fails, neither model is there
        self.num_updates += 1
        loading = self._group.load(spec)
        awaited = f"the policy's processes to load {path}"
        self._vocab_size = self._wait(loading, self._runtime.load_limit, awaited)[0]
        self._model = spec

    @property
    def compute_dtype(self) -> str:
        """Of the loaded model's forward passes: "bfloat16" or "float32"."""
        return self._loaded().compute_dtype

    def log_probs(self, batch: Batch, temperature: float = 1.0) -> list[np.ndarray]:
        """Natural-log probabilities (T,) float32 of each row's completion tokens."""
        return self._log_probs(batch, False, temperature)

    @_in_turn
    def load_reference(self, model_path: str) -> None:
        """Build a frozen language model beside the loaded one, for `reference_log_probs`; the next `load`
        drops it. None is built where the loaded one is the same under a LoRA adapter, which can be off."""
        path = str(local_directory(model_path))
        loaded = self._loaded("language_model")
        if loaded.lora_rank and loaded.path == path:
            return
        loading = self._group.load_reference(replace(loaded, path=path, optimizer=None))
        awaited = f"the policy's processes to load the reference {path}"
        self._wait(loading, self._runtime.load_limit, awaited)

    def reference_log_probs(self, batch: Batch, temperature: float = 1.0) -> list[np.ndarray]:
        """`log_probs` under the model of `load_reference`."""
        return self._log_probs(batch, True, temperature)

    def _log_probs(self, batch: Batch, by_reference: bool, temperature: float) -> list[np.ndarray]:
        self._loaded("language_model")
        results: list[np.ndarray] = [np.empty(0, np.float32)] * len(batch)
        for part, values in self._infer(batch, by_reference, temperature):
            ends = np.cumsum(part.completion_lengths)[:-1]
            for row, row_values in zip(part.rows, np.split(values, ends), strict=True):
                if row >= 0:
                    results[row] = row_values
        return results

    def scores(self, batch: Batch) -> list[float]:
        """The score head's output at each row's last token."""
        self._loaded("score")
        results = [0.0] * len(batch)
        for part, values in self._infer(batch):
            for row, score in zip(part.rows, values, strict=True):
                if row >= 0:
                    results[row] = float(score)
        return results

    def pass_step(self) -> None:
        """Let a step go by without an update: the schedule of the learning rate counts steps."""
        self._wait_for_step(self._group.pass_step(), "a step without an update")

    @_in_turn
    def train_step(self, batch: Batch, objective: Objective, end_of_step: bool = True) -> dict[str, float]:
        """One optimizer step on the whole batch. The learning rate moves on with the last one of a training
        step (`end_of_step`).

        Returns `loss`, `grad_norm` (before clipping), `lr` (of the next step) and the objective's metrics,
        means over the batch; `update_skipped`, 1 when the gradient was not finite and the weights were left
        as they are; `tokens_per_second` of the rows; `padding_saved`, the share of a padded batch that would
        be padding, and `prefix_saved`, the share of the rows' tokens that is computed with another row (both
        0 where the layout saves none); on a GPU `mfu`, of the tokens computed; and of a preference loss
        `length_bias`, the correlation in [-1, 1] of the margin with how much longer the chosen side is.
        """
        if self._loaded(objective.head).optimizer is None:
            raise ValueError("the model was loaded without an optimizer")
        batch = _fitting(batch, objective)
        parts = self._parts(batch, objective.group_size)
        all_parts = list(chain.from_iterable(parts))
        constants = {
            "num_tokens": float(sum(np.sum(mask) for mask in batch.token_values.get("mask", ()))),
            "num_groups": len(batch) // objective.group_size,
            "end_of_step": end_of_step,
            "global_token_num": [length for part in all_parts for length in part.computed_lengths],
        }
        if objective.group_size == 1 and constants["num_tokens"] == 0:
            raise ValueError("no token of the batch is in the mask: there is nothing to train on")
        self.num_updates += 1
        began = time.monotonic()
        references = self._group.train(parts, [objective] * self._ranks, [constants] * self._ranks)
        of_batch = self._wait_for_step(references, "a training step")[0]
        metrics = with_length_bias(with_means_by_sign(of_batch))
        num_tokens = sum(part.num_tokens for part in all_parts)
        metrics["tokens_per_second"] = num_tokens / (time.monotonic() - began)
        padded = any(part.width for part in all_parts)
        num_padded = num_tokens if padded else sum(part.num_padded for part in all_parts)
        metrics["padding_saved"] = 1 - num_tokens / num_padded
        num_held = sum(len(part.token_ids) for part in all_parts)
        metrics["prefix_saved"] = max(0.0, 1 - num_held / num_tokens)  # padded ones hold more
        metrics["update_skipped"] = float(not np.isfinite(metrics["grad_norm"]))  # verl only prints it
        # The peak of a CPU is not known, so neither is how much of it was used.
        dropped = ("perf/", "mfu") if self._runtime.device == "cpu" else ("perf/",)
        return {name: value for name, value in metrics.items() if not name.startswith(dropped)}

    @_in_turn
    def weights(self) -> StoredWeights:
        """By their checkpoint names (a tied head left out), in the dtype of rollout, in the object store of
        rank 0's node."""
        self._loaded()
        gathering = self._group.weights()
        of_rank_0, *_ = self._wait(gathering, self._runtime.sync_limit, "the weights of the policy")
        return of_rank_0

    @_in_turn
    def send_weights(self, seat: Seat) -> list[Any]:
        """Begin to send the same to the group in which `seat` is rank 0's. Returns at once, with what to wait
        for; the first is their bytes."""
        self._loaded()
        return self._group.send_weights(seat)

    def save(self, directory: str | Path) -> None:
        """Write weights, optimizer, schedule and random state; whole on return."""
        self.begin_save(directory)
        self.is_saved(waits=True)

    @_in_turn
    def begin_save(self, directory: str | Path) -> None:
        """`save` into an empty directory that returns when the state is copied to the host: training goes on
        while it is written. Until `is_saved` says so the directory is worth nothing. One at a time: the save
        before is waited for."""
        self._loaded()
        saving = self._group.begin_save(str(Path(directory).absolute()))
        self._wait_for_step(saving, f"the policy's checkpoint in {directory}")

    def is_saved(self, waits: bool = False) -> bool:
        """Whether the last save is on disk, all of it; `waits`: once it is. Raises what writing failed with.
        Asks no GPU for its turn."""
        return all(self._wait_for_step(self._group.is_saved(waits), "the policy's checkpoint to be written"))

    @_in_turn
    def restore(self, directory: str | Path) -> None:
        """Go back to a checkpoint of `save`, after `load` of the same model, by any number of ranks, with any
        `fsdp_size`. With as many ranks, sharded alike, the next step is the same to the bit. Raises UserError
        where there is none."""
        self._loaded()
        directory = Path(directory).absolute()
        if not (directory / ".metadata").is_file():  # written last
            raise UserError(
                f"{directory} holds no whole checkpoint of the policy (no .metadata): remove it, and the "
                "stage goes on from the one before, or begins anew"
            )
        self.num_updates += 1
        restoring = self._group.restore(str(directory))
        self._wait_for_step(restoring, f"the policy to restore {directory}")

    @_in_turn
    def export(self, directory: str | Path) -> None:
        """Write a checkpoint that `AutoModelForCausalLM`, or for a score head
        `AutoModelForSequenceClassification`, loads as it is: safetensors (bfloat16 where the model computes
        in it, else float32), config and tokenizer."""
        self._loaded()
        exporting = self._group.export(str(Path(directory).absolute()))
        self._wait_for_step(exporting, f"the export to {directory}")

    def leave(self) -> None:
        """Move weights and optimizer to the host, that others may have the GPUs; drop the last gradients."""
        self._wait_for_step(self._group.leave(), "the policy to leave its GPUs")

    def come(self) -> None:
        """Move them back."""
        self._wait_for_step(self._group.come(), "the policy to come back to its GPUs")

    def shutdown(self) -> None:
        """End the processes and give their resources back."""
        for worker in self._group.workers:
            ray.kill(worker)
        release(self._groups)

    def _loaded(self, head: Head | None = None) -> ModelSpec:
        """The loaded model. Raises ValueError where it has another head."""
        if self._model is None:
            raise RuntimeError("no model is loaded")
        if head is not None and self._model.head != head:
            raise ValueError(
                f"this needs a {head} head, and {self._model.path} was loaded with a {self._model.head} head"
            )
        return self._model

    @_in_turn
    def _infer(
        self, batch: Batch, by_reference: bool = False, temperature: float = 1.0
    ) -> list[tuple[MicroBatch, np.ndarray]]:
        if not len(batch):
            return []
        parts = self._parts(Batch(batch.prompt_ids, batch.completion_ids), group_size=1)
        ranks = self._ranks
        references = self._group.infer(parts, [by_reference] * ranks, [temperature] * ranks)
        outputs = self._wait_for_step(references, "a forward pass")
        return list(zip(chain.from_iterable(parts), chain.from_iterable(outputs), strict=True))

    def _parts(self, batch: Batch, group_size: int) -> list[list[MicroBatch]]:
        """The micro-batches of every rank."""
        # Once: each of the steps below reads every token.
        prompts, completions = (
            list(map(np.asarray, ids)) for ids in (batch.prompt_ids, batch.completion_ids)
        )
        batch = replace(batch, prompt_ids=prompts, completion_ids=completions)
        check_batch(batch, self._vocab_size)
        layout = self.settings.layout
        planned = plan(batch, group_size, self._ranks, self.settings.max_tokens_per_micro_batch, layout)
        return [[micro_batch(batch, families, layout) for families in of_rank] for of_rank in planned]

    def _wait_for_step(self, references: Sequence[Any], awaited: str) -> list[Any]:
        return self._wait(references, self._runtime.step_limit, awaited)

    def _wait(self, references: Sequence[Any], limit: Limit, awaited: str) -> list[Any]:
        try:
            return wait_for_all(references, limit, awaited)
        except RayError as error:  # of a process that died, or of one that lost another
            if self._runtime.logs:
                error.add_note(f"what the policy's processes printed: {self._runtime.logs}/policy-*.log")
            raise


def wait_for_all(references: Sequence[Any], limit: Limit, awaited: str) -> list[Any]:
    """The results of all ranks; a failure is raised at once, as the other ranks may wait for the failed."""
    deadline = time.monotonic() + limit.seconds
    pending = list(references)
    while pending:
        done, pending = ray.wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            raise TimeoutError(
                f"waited {limit.seconds:g} s for {awaited}; {len(pending)} of {len(references)} processes "
                f"have not answered: if they only need longer, raise {limit.key}"
            )
        ray.get(done)
    return ray.get(list(references))


def _fitting(batch: Batch, objective: Objective) -> Batch:
    """`batch` with a `mask` where the objective reads one. ValueError where something it needs is missing."""
    name, values = type(objective).__name__, batch.token_values
    missing = [value for value in objective.needs if value not in values and value not in batch.row_values]
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)} in the batch")
    if len(batch) % objective.group_size:
        raise ValueError(f"{name} takes pairs of rows, the batch has {len(batch)} rows")
    if objective.group_size > 1 or "mask" in values:
        return batch
    ones = [np.ones(len(completion), np.float32) for completion in batch.completion_ids]
    return replace(batch, token_values={**values, "mask": ones})
