"""Policy training: a group of FSDP2 processes (verl's `TrainingWorker` in a `RayWorkerGroup`) behind one
object, `Policy`.

The processes are started once and take one model after another, a language model or a reward model. Stages
hand over rows of token ids and a loss; `plan` spreads the rows over ranks and micro-batches, and the mean
over the whole batch does not depend on how it did. Nothing of verl is imported before a `Policy` is made.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pns import config
from pns.errors import UserError
from workers.training.batching import Batch, MicroBatch, check, micro_batch, plan

if TYPE_CHECKING:
    import torch

Head = Literal["language_model", "score"]

# One allocator arena that keeps its pages: a micro-batch's buffers are of the same size every time, and
# giving them back costs page faults.
_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "67108864",
}

# What verl and transformers print about every model they build.
_QUIET = {
    "VERL_LOGGING_LEVEL": "ERROR",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore::UserWarning:verl.workers.engine",
}


@dataclass(frozen=True)
class Grpo:
    """`pns.algo.losses.grpo_loss`; the mean is over the tokens in `mask`."""

    clip_low: float
    clip_high: float
    kl_coefficient: float
    group_size = 1
    head = "language_model"
    needs = ("old_log_probs", "advantages")


@dataclass(frozen=True)
class Preference:
    """`pns.algo.losses.preference_loss`; the mean is over pairs. `kl` is KTO's estimate for the whole batch,
    unused by other losses."""

    settings: config.PreferenceConfig
    kl: float = 0.0
    group_size = 2
    head = "language_model"

    @property
    def needs(self) -> tuple[str, ...]:
        reference = () if config.reference_free(self.settings.loss) else ("ref_log_probs",)
        return (*reference, "score_gap") if self.settings.loss is config.PreferenceLoss.offset else reference


@dataclass(frozen=True)
class BradleyTerry:
    """`pns.algo.losses.bradley_terry_loss`; the mean is over pairs."""

    centre: float
    group_size = 2
    head = "score"
    needs = ()


@dataclass(frozen=True)
class Sft:
    """`pns.algo.losses.sft_loss`; the mean is over the tokens in `mask`."""

    group_size = 1
    head = "language_model"
    needs = ()


Loss = Grpo | Preference | BradleyTerry | Sft


@dataclass(frozen=True)
class Model:
    """What `Rank.load` builds."""

    path: str
    head: Head
    device: str
    settings: config.PolicyConfig
    optimizer: config.Optimizer | None
    total_steps: int
    seed: int
    trust_remote_code: bool

    @property
    def lora_rank(self) -> int:
        """0: every weight is trained. Reward models are always trained in full, their head is new."""
        return self.settings.lora.rank if self.optimizer and self.head == "language_model" else 0


class Rank:
    """One training process: a verl `TrainingWorker` and the model it holds. A plain class; `Policy` makes it
    an actor."""

    training: Any = None
    reference: Any = None
    model: Model

    def load(self, model: Model, timeout_seconds: float) -> int:
        """Build `model`, dropping the one before and its reference; returns its vocabulary's size. All ranks
        call it together."""
        import torch
        from verl.utils.distributed import initialize_global_process_group_ray

        cuda = model.device == "cuda"
        # verl would ask for gloo twice on a CPU, which torch refuses.
        initialize_global_process_group_ray(timeout_seconds, backend=None if cuda else "gloo")
        self.training = self.reference = None
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
        self.training = self._build(model)
        self.model = model
        return self.training.model_config.hf_config.get_text_config().vocab_size

    def load_reference(self, model: Model) -> None:
        """Build a second model beside the first, which is never trained: it holds no gradients and no
        optimizer state."""
        self.reference = self._build(model)

    def _build(self, model: Model) -> Any:
        import torch
        from verl.trainer.config import CheckpointConfig
        from verl.workers.config import (
            FSDPEngineConfig,
            FSDPOptimizerConfig,
            HFModelConfig,
            TrainingWorkerConfig,
        )
        from verl.workers.engine_workers import TrainingWorker

        from workers.training import attention, verl_engine  # noqa: F401  the second registers the engines

        cuda = model.device == "cuda"
        torch.manual_seed(model.seed)
        implementation = "sdpa" if model.settings.layout is config.Layout.padded else attention.NAME
        compute = {"bfloat16": "bf16", "float32": "fp32"}[compute_dtype(model.settings.dtype, model.device)]
        optimizer = model.optimizer or config.Optimizer()
        worker = TrainingWorker(
            TrainingWorkerConfig(
                model_type="language_model" if model.head == "language_model" else "value_model",
                model_config=HFModelConfig(
                    path=model.path,
                    load_tokenizer=False,
                    trust_remote_code=model.trust_remote_code,
                    override_config={"attn_implementation": implementation},
                    enable_gradient_checkpointing=model.settings.gradient_checkpointing,
                    use_remove_padding=False,
                    lora_rank=model.lora_rank,
                    lora_alpha=model.settings.lora.alpha,
                    target_modules=model.settings.lora.targets
                    if len(model.settings.lora.targets) > 1
                    else model.settings.lora.targets[0],
                ),
                engine_config=FSDPEngineConfig(
                    strategy="fsdp2",
                    model_dtype="fp32",
                    mixed_precision={"param_dtype": compute, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
                    reshard_after_forward=cuda,
                    use_torch_compile=model.settings.compile,
                    seed=model.seed,
                ),
                # verl's schedule counts steps from 1 here, so that the first step is not lost to a rate of 0;
                # one step more keeps the last one from it. A cosine that stays at 1 is the constant schedule.
                optimizer_config=FSDPOptimizerConfig(
                    lr=optimizer.learning_rate,
                    betas=(optimizer.beta1, optimizer.beta2),
                    weight_decay=optimizer.weight_decay,
                    clip_grad=optimizer.clip_grad,
                    lr_warmup_steps=optimizer.warmup_steps,
                    lr_scheduler_type="cosine",
                    min_lr_ratio=1.0 if optimizer.schedule == "constant" else 0.0,
                    zero_indexed_step=False,
                    total_training_steps=model.total_steps + 1,
                    override_optimizer_config={"fused": True},
                ),
                checkpoint_config=CheckpointConfig(),
            )
        )
        worker.reset()
        return worker

    def infer(self, micro_batches: Sequence[MicroBatch], by_reference: bool = False) -> list[np.ndarray]:
        """Per micro-batch: log-probabilities (C,) of its completion tokens, or scores (B,) of its rows."""
        engine = (self.reference if by_reference and self.reference else self.training).engine
        adapter_off = by_reference and not self.reference
        with engine.eval_mode(), engine.disable_adapter() if adapter_off else nullcontext():
            outputs = engine.infer_batch(self._data(micro_batches, {}))["model_output"]
        name = "scores" if self.model.head == "score" else "log_probs"
        return [output[name].float().cpu().numpy() for output in outputs]

    def train(
        self, micro_batches: Sequence[MicroBatch], loss: Loss, constants: dict[str, Any]
    ) -> dict[str, float]:
        """One optimizer step. The metrics are those of the whole batch, the same on every rank."""
        from verl.utils import tensordict_utils as tu
        from verl.utils.metric import Metric

        from workers.training.verl_engine import verl_loss

        self.training.set_loss_fn(verl_loss(loss))
        metrics = tu.get(self.training.train_batch(self._data(micro_batches, constants)), "metrics")
        return {
            name: float(Metric.aggregate_dp(value) if isinstance(value, list) else value)
            for name, value in metrics.items()
        }

    def _data(self, micro_batches: Sequence[MicroBatch], constants: dict[str, Any]) -> Any:
        from tensordict import NonTensorData
        from verl.utils import tensordict_utils as tu

        from workers.training.verl_engine import tensors

        constants = {**constants, "dp_size": self.training.engine.get_data_parallel_size()}
        parts = [tensors(part, constants) for part in micro_batches]
        data = {
            "micro_batches": NonTensorData(parts),
            "update_lr_scheduler": True,
            "global_token_num": constants.get("global_token_num"),
        }
        return tu.assign_non_tensor(tu.get_tensordict({}), **data)

    def weights(self) -> list[ray.ObjectRef]:
        """The full weights as a dict of float32 CPU tensors under their checkpoint names, in the object
        store; from rank 0 only."""
        tensors = self._full_tensors()
        return [ray.put(tensors)] if self.training.rank == 0 else []

    def _full_tensors(self) -> dict[str, torch.Tensor]:
        """Gathered on every rank, kept on rank 0; a LoRA adapter is added to the weights it adapts. A tied
        tensor is left out."""
        module = self.training.engine.module
        tied = set(module._tied_weights_keys or ()) if module.config.tie_word_embeddings else set()
        kept = {}
        for name, tensor in module.state_dict().items():
            full = (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()
            name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            if self.training.rank == 0 and name not in tied:
                kept[name] = full.to("cpu", copy=True)
        lora = self.model.settings.lora
        for down in [name for name in kept if name.endswith(".lora_A.default.weight")]:
            adapted = down.removesuffix(".lora_A.default.weight")
            update = kept.pop(f"{adapted}.lora_B.default.weight") @ kept.pop(down)
            kept[f"{adapted}.weight"] += lora.alpha / lora.rank * update
        return kept

    def save(self, directory: str) -> None:
        self.training.save_checkpoint(directory)

    def restore(self, directory: str) -> None:
        self.training.load_checkpoint(directory)

    def export(self, directory: str) -> None:
        """Write config, weights and tokenizer as transformers reads them; weights in the dtype the model
        computes in."""
        import torch
        from huggingface_hub import save_torch_state_dict
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        tensors = self._full_tensors()
        if self.training.rank != 0:
            return
        engine = self.training.engine
        dtype = torch.bfloat16 if engine._autocast_dtype == torch.bfloat16 else torch.float32
        hf_config = type(engine.module.config).from_dict(engine.module.config.to_dict())
        hf_config.dtype = dtype
        if self.model.head == "score":
            hf_config.architectures = [
                AutoModelForSequenceClassification._model_mapping[type(hf_config)].__name__
            ]
        Path(directory).mkdir(parents=True, exist_ok=True)
        save_torch_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, directory)
        tokenizer = AutoTokenizer.from_pretrained(
            self.model.path, trust_remote_code=self.model.trust_remote_code
        )
        tokenizer.save_pretrained(directory)
        if hf_config.pad_token_id is None:
            hf_config.pad_token_id = tokenizer.pad_token_id
        hf_config.save_pretrained(directory)
        generation_config = self.training.model_config.generation_config
        if self.model.head == "language_model" and generation_config is not None:
            generation_config.save_pretrained(directory)


def compute_dtype(setting: str, device: str) -> str:
    """ "bfloat16" or "float32": what `policy.dtype` means on a device."""
    return setting if setting != "auto" else "bfloat16" if device == "cuda" else "float32"


def _actor_class() -> Any:
    """`Rank` as the class of a verl worker group: each call starts on all ranks at once and returns their
    references."""
    from verl.single_controller.base import Worker
    from verl.single_controller.base.decorator import Dispatch, register

    same = register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    own = register(dispatch_mode=Dispatch.ALL_TO_ALL, blocking=False)  # lists with one entry per rank

    class PolicyRank(Rank, Worker):
        load = same(Rank.load)
        load_reference = same(Rank.load_reference)
        infer = own(Rank.infer)
        train = own(Rank.train)
        weights = same(Rank.weights)
        save = same(Rank.save)
        restore = same(Rank.restore)
        export = same(Rank.export)

    return PolicyRank


class Policy:
    """The training processes, seen from the driver. Calls block until all ranks are done, and are not to be
    made concurrently.

    A wait longer than `start_timeout_seconds` (processes, model) or `step_timeout_seconds` (everything else)
    raises TimeoutError with what was waited for; the exception of a rank is raised as it is.
    """

    def __init__(
        self,
        pool: config.Pool,
        device: Literal["cpu", "cuda"],
        settings: config.PolicyConfig,
        start_timeout_seconds: float,
        step_timeout_seconds: float = 3600.0,
        trust_remote_code: bool = False,
    ) -> None:
        """Start one process per rank; no model yet. `pool.gpus` of a rank on cuda is in (0, 1].

        Raises UserError when the processes cannot be placed within `start_timeout_seconds`.
        """
        cuda = device == "cuda"
        if cuda and not 0 < pool.gpus <= 1:
            raise UserError(
                f"placement.policy.gpus: {pool.gpus}; a rank uses one GPU or a share of it: set it in (0, 1] and add replicas"
            )
        self._device = device
        self.settings = settings  # may be exchanged before a `load`
        self._start_timeout, self._step_timeout = start_timeout_seconds, step_timeout_seconds
        self._trust_remote_code = trust_remote_code
        self._ranks = pool.replicas
        self._model: Model | None = None
        self._vocab_size = 0
        self._version = 0
        # A CPU bundle has at least one CPU, as verl's helper task asks for one.
        bundle = {"CPU": max(1.0, pool.cpus), **({"GPU": pool.gpus} if cuda else {})}
        self._bundles = placement_group([bundle] * pool.replicas, strategy="PACK")
        if not self._bundles.wait(start_timeout_seconds):
            remove_placement_group(self._bundles)
            raise UserError(
                f"placement.policy needs {pool.replicas} x {bundle}, and {start_timeout_seconds:g} s were not enough to get them; "
                f"free now: {_free()}: lower placement.policy or add a node"
            )
        environment = {
            "OMP_NUM_THREADS": str(max(1, int(pool.cpus))),
            "TOKENIZERS_PARALLELISM": "false",
            **_QUIET,
        }
        if not cuda:
            environment |= {
                "VERL_PLATFORM": "cpu",
                "VERL_USE_EXTERNAL_MODULES": "workers.training.verl_cpu",
                **_MALLOC,
            }
        self._group = self._spawn(pool, environment, cuda)

    def _spawn(self, pool: config.Pool, environment: dict[str, str], cuda: bool) -> Any:
        if not cuda:
            # The driver's part of verl asks for a platform, too; it has to be named before the first import.
            os.environ.setdefault("VERL_PLATFORM", "cpu")
            os.environ.setdefault("VERL_USE_EXTERNAL_MODULES", "workers.training.verl_cpu")
        from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
        from verl.single_controller.ray.base import get_master_addr_port

        share = pool.gpus if cuda else 1.0
        resources = RayResourcePool([pool.replicas], use_gpu=cuda, max_colocate_count=1 / share)
        resources.pgs = [self._bundles]
        first = PlacementGroupSchedulingStrategy(self._bundles, placement_group_bundle_index=0)
        address = get_master_addr_port.options(scheduling_strategy=first, num_cpus=0).remote()
        host, port = self._wait([address], self._start_timeout, "the address of the first policy process")[0]
        rank_class = RayClassWithInitArgs(ray.remote(_actor_class()))
        rank_class.update_options({"num_cpus": max(1.0, pool.cpus)})
        return RayWorkerGroup(
            resources,
            rank_class,
            device_name="cuda" if cuda else "cpu",
            worker_env=environment,
            master_addr=host,
            master_port=port,
        )

    def load(
        self, model_path: str, head: Head, optimizer: config.Optimizer | None, total_steps: int, seed: int
    ) -> None:
        """Build the model of a Hugging Face checkpoint (directory or Hub id) in the running processes; the
        one before is dropped.

        `head` "score" replaces the language-model head by one bias-free linear output, taken from the
        checkpoint where it has one, else drawn from `seed`. Without `optimizer` the model can score, not
        train. `total_steps` is the length of the learning-rate schedule.
        """
        from workers.rollout.engine import local_directory

        path = str(local_directory(model_path))
        model = Model(
            path, head, self._device, self.settings, optimizer, total_steps, seed, self._trust_remote_code
        )
        self._model = None
        self._vocab_size = self._wait(
            self._group.load(model, self._step_timeout),
            self._start_timeout,
            f"the policy processes to load {path}",
        )[0]
        self._model = model
        self._version += 1

    def log_probs(self, batch: Batch) -> list[np.ndarray]:
        """Natural-log probabilities (T,) float32 of each row's completion tokens at temperature 1."""
        return self._log_probs(batch, by_reference=False)

    def load_reference(self, model_path: str) -> None:
        """Build a frozen language model beside the loaded one, for `reference_log_probs`; the next `load`
        drops it. No model is built where the loaded one is the same under a LoRA adapter: switched off, it is
        the reference."""
        from workers.rollout.engine import local_directory

        path = str(local_directory(model_path))
        loaded = self._loaded("language_model")
        if loaded.lora_rank and loaded.path == path:
            return
        model = replace(loaded, path=path, optimizer=None)
        self._wait(
            self._group.load_reference(model),
            self._start_timeout,
            f"the policy processes to load the reference {path}",
        )

    def reference_log_probs(self, batch: Batch) -> list[np.ndarray]:
        """`log_probs` under the model of `load_reference`."""
        return self._log_probs(batch, by_reference=True)

    def _log_probs(self, batch: Batch, by_reference: bool) -> list[np.ndarray]:
        self._loaded("language_model")
        results: list[np.ndarray] = [np.empty(0, np.float32)] * len(batch)
        for part, values in self._infer(batch, by_reference):
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

    def train_step(self, batch: Batch, loss: Loss) -> dict[str, float]:
        """One optimizer step on the whole batch.

        Returns `loss`, `grad_norm` (before clipping), `lr` (of the next step) and the loss's metrics, means
        over the batch; `update_skipped`, 1 when the gradient was not finite and the weights were left as they
        are; `tokens_per_second` of the rows; `padding_saved`, the share of a padded batch that would be
        padding, and `prefix_saved`, the share of the rows' tokens that is computed with another row (both 0
        where the layout saves none); on a GPU `mfu`, of the tokens computed; and of a preference loss
        `length_bias`, the correlation in [-1, 1] of the margin with how much longer the chosen side is.
        """
        model = self._loaded(loss.head)
        if model.optimizer is None:
            raise ValueError("the model was loaded without an optimizer")
        missing = [
            name for name in loss.needs if name not in batch.token_values and name not in batch.row_values
        ]
        if missing:
            raise ValueError(f"{type(loss).__name__} needs {', '.join(missing)} in the batch")
        if len(batch) % loss.group_size:
            raise ValueError(f"{type(loss).__name__} takes pairs of rows, the batch has {len(batch)} rows")
        if loss.group_size == 1 and "mask" not in batch.token_values:
            ones = [np.ones(len(completion), np.float32) for completion in batch.completion_ids]
            batch = Batch(
                batch.prompt_ids, batch.completion_ids, {**batch.token_values, "mask": ones}, batch.row_values
            )
        parts = self._parts(batch, loss.group_size)
        all_parts = [part for of_rank in parts for part in of_rank]
        constants = {
            "num_tokens": float(sum(np.sum(mask) for mask in batch.token_values.get("mask", ()))),
            "num_groups": len(batch) // loss.group_size,
            "global_token_num": [
                trunk * (i == 0) + branch
                for p in all_parts
                for trunk, rows in p.families
                for i, branch in enumerate(rows)
            ],
        }
        if loss.group_size == 1 and constants["num_tokens"] == 0:
            raise ValueError("no token of the batch is in the mask: there is nothing to train on")
        began = time.monotonic()
        references = self._group.train(parts, [loss] * self._ranks, [constants] * self._ranks)
        metrics = self._wait(references, self._step_timeout, "a training step")[0]
        tokens, padded = (
            sum(part.num_tokens for part in all_parts),
            sum(part.num_padded for part in all_parts),
        )
        metrics["tokens_per_second"] = tokens / (time.monotonic() - began)
        metrics["padding_saved"] = (
            0.0 if self.settings.layout is config.Layout.padded else 1 - tokens / padded
        )
        metrics["prefix_saved"] = max(0.0, 1 - sum(len(part.token_ids) for part in all_parts) / tokens)
        if "_longer" in metrics:
            metrics["length_bias"] = _correlation(metrics)
        metrics = {name: value for name, value in metrics.items() if not name.startswith(("_", "perf/"))}
        if self._device == "cpu":
            metrics.pop("mfu", None)  # the peak of a CPU is not known
        metrics["update_skipped"] = float(not np.isfinite(metrics["grad_norm"]))
        self._version += 1
        return metrics

    def weights(self) -> tuple[int, ray.ObjectRef]:
        """`(version, reference)`: the current weights as a dict of float32 CPU tensors under their checkpoint
        names (a tied head left out), in rank 0's object store. The version rises with every change of the
        weights."""
        self._loaded(None)
        return self._version, self._wait(
            self._group.weights(), self._step_timeout, "the weights of the policy"
        )[0][0]

    def save(self, directory: str | Path) -> None:
        """Write model, optimizer, schedule and random state, one file of each per rank. The checkpoint is
        complete when this returns."""
        self._loaded(None)
        self._wait(
            self._group.save(str(Path(directory).absolute())),
            self._step_timeout,
            f"the policy's checkpoint in {directory}",
        )

    def restore(self, directory: str | Path) -> None:
        """Go back to a checkpoint of `save`, after `load` of the same model: the next step is the same to the
        bit.

        Raises UserError when it was written with another number of ranks.
        """
        self._loaded(None)
        directory = Path(directory).absolute()
        if not (directory / f"model_world_size_{self._ranks}_rank_0.pt").is_file():
            found = sorted(path.name for path in directory.glob("model_world_size_*_rank_0.pt"))
            raise UserError(
                f"checkpoint {directory} does not fit placement.policy.replicas = {self._ranks}"
                + (
                    f": it holds {found[0]}; use as many replicas as it was written with"
                    if found
                    else ": it holds no policy checkpoint"
                )
            )
        self._wait(
            self._group.restore(str(directory)), self._step_timeout, f"the policy to restore {directory}"
        )
        self._version += 1

    def export(self, directory: str | Path) -> None:
        """Write a checkpoint that `AutoModelForCausalLM`, or for a score head
        `AutoModelForSequenceClassification`, loads as it is: safetensors (bfloat16 where the model computes
        in it, else float32), config and tokenizer."""
        self._loaded(None)
        self._wait(
            self._group.export(str(Path(directory).absolute())),
            self._step_timeout,
            f"the export to {directory}",
        )

    def shutdown(self) -> None:
        """End the processes and give their resources back."""
        for worker in self._group.workers:
            ray.kill(worker)
        remove_placement_group(self._bundles)

    def _loaded(self, head: str | None) -> Model:
        if self._model is None:
            raise RuntimeError("no model is loaded")
        if head is not None and self._model.head != head:
            raise ValueError(
                f"this needs a {head} head, and {self._model.path} was loaded with a {self._model.head} head"
            )
        return self._model

    def _infer(self, batch: Batch, by_reference: bool = False) -> list[tuple[MicroBatch, np.ndarray]]:
        if not len(batch):
            return []
        parts = self._parts(Batch(batch.prompt_ids, batch.completion_ids), group_size=1)
        values = self._wait(
            self._group.infer(parts, [by_reference] * self._ranks), self._step_timeout, "a forward pass"
        )
        return [pair for of_rank in zip(parts, values, strict=True) for pair in zip(*of_rank, strict=True)]

    def _parts(self, batch: Batch, group_size: int) -> list[list[MicroBatch]]:
        check(batch, self._vocab_size)
        layout = self.settings.layout
        planned = plan(batch, group_size, self._ranks, self.settings.max_tokens_per_micro_batch, layout)
        return [[micro_batch(batch, families, layout) for families in of_rank] for of_rank in planned]

    @staticmethod
    def _wait(references: Sequence[Any], timeout_seconds: float, what: str) -> list[Any]:
        """The results of all ranks; the first failure is raised at once, as the other ranks may wait for the
        failed one."""
        deadline = time.monotonic() + timeout_seconds
        pending = list(references)
        while pending:
            done, pending = ray.wait(pending, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                raise TimeoutError(
                    f"waited {timeout_seconds:g} s for {what}; {len(pending)} of {len(references)} processes have not answered"
                )
            ray.get(done)
        return ray.get(list(references))


def _correlation(moments: dict[str, float]) -> float:
    """Of the margin and of how many tokens longer the chosen side is; 0 where either does not vary."""
    margin, longer = moments["margin"], moments["_longer"]
    spread = (moments["_margin_2"] - margin**2) * (moments["_longer_2"] - longer**2)
    return (moments["_margin_longer"] - margin * longer) / spread**0.5 if spread > 1e-12 else 0.0


def _free() -> dict[str, float]:
    return {name: amount for name, amount in ray.available_resources().items() if name in ("CPU", "GPU")}
