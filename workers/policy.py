"""Policy training: a group of FSDP2 processes (verl's `TrainingWorker` in a `RayWorkerGroup`) behind one object, `Policy`.

The processes are started once and take one model after another, a language model or a reward model. Stages hand over rows of token ids
and a loss; `plan` spreads the rows over ranks and micro-batches, and the mean over the whole batch does not depend on how it did.
Nothing of verl is imported before a `Policy` is made.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pns import config
from pns.errors import UserError

if TYPE_CHECKING:
    import torch

Head = Literal["language_model", "score"]

# One allocator arena that keeps its pages: a micro-batch's buffers are of the same size every time, and giving them back costs page faults.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_TOP_PAD_": "67108864"}

# What verl and transformers print about every model they build.
_QUIET = {"VERL_LOGGING_LEVEL": "ERROR", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore::UserWarning:verl.workers.engine"}


@dataclass(frozen=True)
class Batch:
    """Rows to train on or to score; every list has one entry per row.

    `token_values` hold one number per completion token, `row_values` one per row. The losses read: `old_log_probs`, `ref_log_probs` and
    `advantages` (a row value) for `Grpo`; `ref_log_probs` and, if given, `margin_mask` (1 for tokens that take part in the margin) for
    `Dpo`; and for `Grpo` and `Sft`, if given, `mask` (0 for tokens without loss). For `Dpo` and `BradleyTerry` rows come in pairs: chosen,
    rejected, chosen, rejected, ...
    """

    prompt_ids: Sequence[Sequence[int]]
    completion_ids: Sequence[Sequence[int]]
    token_values: dict[str, Sequence[Sequence[float] | np.ndarray]] = field(default_factory=dict)
    row_values: dict[str, Sequence[float]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompt_ids)


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
class Dpo:
    """`pns.algo.losses.dpo_loss` plus `nll_weight` times the length-normalised NLL of the chosen side; the mean is over pairs."""

    beta: float
    nll_weight: float = 0.0
    label_smoothing: float = 0.0
    group_size = 2
    head = "language_model"
    needs = ("ref_log_probs",)


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


Loss = Grpo | Dpo | BradleyTerry | Sft


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together. `token_ids` (N,) int64: all rows end to end, each `lengths[b]` long, of which the first
    `prompt_lengths[b]` are the prompt; `token_values` (C,) float32 over the completion tokens, `row_values` (B,) float32; `rows` (B,) are
    the rows' places in the batch, -1 for padding."""

    rows: np.ndarray
    token_ids: np.ndarray
    lengths: np.ndarray
    prompt_lengths: np.ndarray
    token_values: dict[str, np.ndarray]
    row_values: dict[str, np.ndarray]


def plan(lengths: Sequence[int], group_size: int, ranks: int, max_tokens: int, padded: bool) -> list[list[list[int]]]:
    """Spread rows over ranks and micro-batches: rank -> micro-batch -> rows (-1: a row of padding).

    `group_size` consecutive rows stay together; ranks get about the same work and the same number of micro-batches; rows of similar length
    share a micro-batch. A micro-batch holds at most `max_tokens` tokens, counted with padding where rows are `padded`.
    Raises UserError when a group is larger than `max_tokens`.
    """
    from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions

    groups = [range(start, start + group_size) for start in range(0, len(lengths), group_size)]

    def size(members: Iterable[int]) -> int:
        of_groups = [[lengths[row] for row in groups[group]] for group in members]
        return group_size * len(of_groups) * max(map(max, of_groups)) if padded else sum(map(sum, of_groups))

    for group in range(len(groups)):
        if size([group]) > max_tokens:
            rows = "a row" if group_size == 1 else f"{group_size} rows that belong together"
            raise UserError(f"{rows} of {size([group])} tokens exceed policy.max_tokens_per_micro_batch = {max_tokens}: raise it")
    tokens = [sum(lengths[row] for row in group) for group in groups]
    if ranks == 1:
        shares = [list(range(len(groups)))]
    elif len(groups) >= ranks:
        shares = get_seqlen_balanced_partitions(tokens, ranks, equal_size=False)
    else:
        shares = [[group] for group in range(len(groups))] + [[] for _ in range(ranks - len(groups))]
    planned: list[list[list[int]]] = []
    for share in shares:
        batches: list[list[int]] = []
        for group in sorted(share, key=lambda g: max(lengths[row] for row in groups[g]), reverse=True):
            if batches and size([*batches[-1], group]) <= max_tokens:
                batches[-1].append(group)
            else:
                batches.append([group])
        planned.append(batches)
    most = max(map(len, planned))
    for batches in planned:
        while len(batches) < most:
            largest = max(batches, key=len, default=[])
            if len(largest) < 2:
                batches.append([])
            else:
                half = len(largest) // 2
                batches[batches.index(largest)] = largest[:half]
                batches.append(largest[half:])
    padding = [-1] * group_size
    return [[[row for group in batch for row in groups[group]] or padding for batch in batches] for batches in planned]


def micro_batch(batch: Batch, rows: Sequence[int]) -> MicroBatch:
    """The given rows of `batch`, with `weight` 1 beside them; a row of padding is two tokens with every value and its weight 0."""
    prompts = [batch.prompt_ids[row] if row >= 0 else (0,) for row in rows]
    completions = [batch.completion_ids[row] if row >= 0 else (0,) for row in rows]
    row_values = {"weight": [1.0] * len(batch), **batch.row_values}
    return MicroBatch(
        rows=np.array(rows),
        token_ids=np.concatenate([part for pair in zip(prompts, completions, strict=True) for part in pair]).astype(np.int64),
        lengths=np.array([len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]),
        prompt_lengths=np.array([len(prompt) for prompt in prompts]),
        token_values={
            name: np.concatenate([values[row] if row >= 0 else (0.0,) for row in rows]).astype(np.float32)
            for name, values in batch.token_values.items()
        },
        row_values={
            name: np.array([values[row] if row >= 0 else 0.0 for row in rows], dtype=np.float32) for name, values in row_values.items()
        },
    )


@dataclass(frozen=True)
class Model:
    """What `Rank.load` builds."""

    path: str
    head: Head
    device: str
    settings: config.Policy
    optimizer: config.Optimizer | None
    total_steps: int
    seed: int
    trust_remote_code: bool


@dataclass(frozen=True)
class ModelInfo:
    vocab_size: int
    padded: bool  # whether rows are padded to the longest of their micro-batch (else packed end to end)


class Rank:
    """One training process: a verl `TrainingWorker` and the model it holds. A plain class; `Policy` makes it an actor."""

    training: Any = None
    reference: Any = None
    model: Model

    def load(self, model: Model, timeout_seconds: float) -> ModelInfo:
        """Build `model`, dropping the one before and its reference. All ranks call it together."""
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
        padded = not self.training.engine.use_remove_padding
        return ModelInfo(vocab_size=self.training.model_config.hf_config.get_text_config().vocab_size, padded=padded)

    def load_reference(self, model: Model) -> None:
        """Build a second model beside the first, which is never trained: it holds no gradients and no optimizer state."""
        self.reference = self._build(model)

    def _build(self, model: Model) -> Any:
        import torch
        from verl.trainer.config import CheckpointConfig
        from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig
        from verl.workers.engine_workers import TrainingWorker

        from workers import verl_engine  # noqa: F401  registers the engines

        cuda = model.device == "cuda"
        torch.manual_seed(model.seed)
        attention = model.settings.attention
        if attention == "auto":
            attention = "flash_attention_2" if cuda and importlib.util.find_spec("flash_attn") else "sdpa"
        compute = "bf16" if cuda and model.settings.dtype == "bfloat16" else "fp32"
        optimizer = model.optimizer or config.Optimizer()
        worker = TrainingWorker(
            TrainingWorkerConfig(
                model_type="language_model" if model.head == "language_model" else "value_model",
                model_config=HFModelConfig(
                    path=model.path,
                    load_tokenizer=False,
                    trust_remote_code=model.trust_remote_code,
                    override_config={"attn_implementation": attention},
                    enable_gradient_checkpointing=model.settings.gradient_checkpointing,
                    use_remove_padding=attention == "flash_attention_2",
                ),
                engine_config=FSDPEngineConfig(
                    strategy="fsdp2",
                    model_dtype="fp32",
                    mixed_precision={"param_dtype": compute, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
                    reshard_after_forward=cuda,
                    use_torch_compile=False,
                    seed=model.seed,
                ),
                # verl's schedule counts steps from 1 here, so that the first step is not lost to a rate of 0; one step more keeps the
                # last one from it. A cosine that stays at 1 is the constant schedule.
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
        engine = (self.reference if by_reference else self.training).engine
        with engine.eval_mode():
            outputs = engine.infer_batch(self._data(micro_batches, {}))["model_output"]
        name = "scores" if self.model.head == "score" else "log_probs"
        return [output[name].float().cpu().numpy() for output in outputs]

    def train(self, micro_batches: Sequence[MicroBatch], loss: Loss, constants: dict[str, Any]) -> dict[str, float]:
        """One optimizer step. The metrics are those of the whole batch, the same on every rank."""
        from verl.utils import tensordict_utils as tu
        from verl.utils.metric import Metric

        from workers.verl_engine import verl_loss

        self.training.set_loss_fn(verl_loss(loss))
        metrics = tu.get(self.training.train_batch(self._data(micro_batches, constants)), "metrics")
        return {name: float(Metric.aggregate_dp(value) if isinstance(value, list) else value) for name, value in metrics.items()}

    def _data(self, micro_batches: Sequence[MicroBatch], constants: dict[str, Any]) -> Any:
        from tensordict import NonTensorData
        from verl.utils import tensordict_utils as tu

        from workers.verl_engine import tensors

        engine = self.training.engine
        constants = {
            **constants,
            "temperature": 1.0,
            "use_remove_padding": engine.use_remove_padding,
            "dp_size": engine.get_data_parallel_size(),
        }
        parts = [tensors(part, constants) for part in micro_batches]
        data = {"micro_batches": NonTensorData(parts), "update_lr_scheduler": True, "global_token_num": constants.get("global_token_num")}
        return tu.assign_non_tensor(tu.get_tensordict({}), **data)

    def weights(self) -> list[ray.ObjectRef]:
        """The full weights as a dict of float32 CPU tensors under their checkpoint names, in the object store; from rank 0 only."""
        tensors = self._full_tensors()
        return [ray.put(tensors)] if self.training.rank == 0 else []

    def _full_tensors(self) -> dict[str, torch.Tensor]:
        """Gathered on every rank, kept on rank 0. A tensor that is tied to another is left out."""
        engine = self.training.engine
        tied = set(engine.module._tied_weights_keys or ()) if engine.module.config.tie_word_embeddings else set()
        kept = {}
        for name, tensor in engine.get_per_tensor_param()[0]:
            if self.training.rank == 0 and name not in tied:
                kept[name] = tensor.detach().to("cpu", copy=True)
        return kept

    def save(self, directory: str) -> None:
        self.training.save_checkpoint(directory)

    def restore(self, directory: str) -> None:
        self.training.load_checkpoint(directory)

    def export(self, directory: str) -> None:
        """Write config, weights and tokenizer as transformers reads them; weights in the dtype the model computes in."""
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
            hf_config.architectures = [AutoModelForSequenceClassification._model_mapping[type(hf_config)].__name__]
        Path(directory).mkdir(parents=True, exist_ok=True)
        save_torch_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, directory)
        tokenizer = AutoTokenizer.from_pretrained(self.model.path, trust_remote_code=self.model.trust_remote_code)
        tokenizer.save_pretrained(directory)
        if hf_config.pad_token_id is None:
            hf_config.pad_token_id = tokenizer.pad_token_id
        hf_config.save_pretrained(directory)
        generation_config = self.training.model_config.generation_config
        if self.model.head == "language_model" and generation_config is not None:
            generation_config.save_pretrained(directory)


def _actor_class() -> Any:
    """`Rank` as the class of a verl worker group: each call starts on all ranks at once and returns their references."""
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
    """The training processes, seen from the driver. Calls block until all ranks are done, and are not to be made concurrently.

    A wait longer than `start_timeout_seconds` (processes, model) or `step_timeout_seconds` (everything else) raises TimeoutError with what
    was waited for; the exception of a rank is raised as it is.
    """

    def __init__(
        self,
        pool: config.Pool,
        device: Literal["cpu", "cuda"],
        settings: config.Policy,
        start_timeout_seconds: float,
        step_timeout_seconds: float = 3600.0,
        trust_remote_code: bool = False,
    ) -> None:
        """Start one process per rank; no model yet. `pool.gpus` of a rank on cuda is in (0, 1].

        Raises UserError when the processes cannot be placed within `start_timeout_seconds`.
        """
        cuda = device == "cuda"
        if cuda and not 0 < pool.gpus <= 1:
            raise UserError(f"placement.policy.gpus: {pool.gpus}; a rank uses one GPU or a share of it: set it in (0, 1] and add replicas")
        self._device, self._settings = device, settings
        self._start_timeout, self._step_timeout = start_timeout_seconds, step_timeout_seconds
        self._trust_remote_code = trust_remote_code
        self._ranks = pool.replicas
        self._model: Model | None = None
        self._info: ModelInfo | None = None
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
        environment = {"OMP_NUM_THREADS": str(max(1, int(pool.cpus))), "TOKENIZERS_PARALLELISM": "false", **_QUIET}
        if not cuda:
            environment |= {"VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": "workers.verl_cpu", **_MALLOC}
        self._group = self._spawn(pool, environment, cuda)

    def _spawn(self, pool: config.Pool, environment: dict[str, str], cuda: bool) -> Any:
        if not cuda:
            # The driver's part of verl asks for a platform, too; it has to be named before the first import.
            os.environ.setdefault("VERL_PLATFORM", "cpu")
            os.environ.setdefault("VERL_USE_EXTERNAL_MODULES", "workers.verl_cpu")
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
            resources, rank_class, device_name="cuda" if cuda else "cpu", worker_env=environment, master_addr=host, master_port=port
        )

    def load(self, model_path: str, head: Head, optimizer: config.Optimizer | None, total_steps: int, seed: int) -> None:
        """Build the model of a Hugging Face checkpoint (directory or Hub id) in the running processes; the one before is dropped.

        `head` "score" replaces the language-model head by one bias-free linear output, taken from the checkpoint where it has one, else
        drawn from `seed`. Without `optimizer` the model can score, not train. `total_steps` is the length of the learning-rate schedule.
        """
        from workers.engine import local_directory

        path = str(local_directory(model_path))
        model = Model(path, head, self._device, self._settings, optimizer, total_steps, seed, self._trust_remote_code)
        self._model = None
        self._info = self._wait(self._group.load(model, self._step_timeout), self._start_timeout, f"the policy processes to load {path}")[0]
        self._model = model
        self._version += 1

    def log_probs(self, batch: Batch) -> list[np.ndarray]:
        """Natural-log probabilities (T,) float32 of each row's completion tokens at temperature 1."""
        return self._log_probs(batch, by_reference=False)

    def load_reference(self, model_path: str) -> None:
        """Build a frozen language model beside the loaded one, for `reference_log_probs`; the next `load` drops it."""
        from workers.engine import local_directory

        path = str(local_directory(model_path))
        model = replace(self._loaded("language_model"), path=path, optimizer=None)
        self._wait(self._group.load_reference(model), self._start_timeout, f"the policy processes to load the reference {path}")

    def reference_log_probs(self, batch: Batch) -> list[np.ndarray]:
        """`log_probs` under the model of `load_reference`."""
        return self._log_probs(batch, by_reference=True)

    def _log_probs(self, batch: Batch, by_reference: bool) -> list[np.ndarray]:
        self._loaded("language_model")
        results: list[np.ndarray] = [np.empty(0, np.float32)] * len(batch)
        for part, values in self._infer(batch, by_reference):
            ends = np.cumsum(part.lengths - part.prompt_lengths)[:-1]
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
        """One optimizer step on the whole batch. Returns `loss`, `grad_norm` (before clipping), `lr` (of the next step) and the loss's
        metrics, means over the batch. `update_skipped` is 1 when the gradient was not finite and the weights were left as they are."""
        model = self._loaded(loss.head)
        if model.optimizer is None:
            raise ValueError("the model was loaded without an optimizer")
        missing = [name for name in loss.needs if name not in batch.token_values and name not in batch.row_values]
        if missing:
            raise ValueError(f"{type(loss).__name__} needs {', '.join(missing)} in the batch")
        if len(batch) % loss.group_size:
            raise ValueError(f"{type(loss).__name__} takes pairs of rows, the batch has {len(batch)} rows")
        if loss.group_size == 1 and "mask" not in batch.token_values:
            ones = [np.ones(len(completion), np.float32) for completion in batch.completion_ids]
            batch = Batch(batch.prompt_ids, batch.completion_ids, {**batch.token_values, "mask": ones}, batch.row_values)
        constants = {
            "num_tokens": float(sum(np.sum(mask) for mask in batch.token_values.get("mask", ()))),
            "num_groups": len(batch) // loss.group_size,
            "global_token_num": [len(p) + len(c) for p, c in zip(batch.prompt_ids, batch.completion_ids, strict=True)],
        }
        if loss.group_size == 1 and constants["num_tokens"] == 0:
            raise ValueError("no token of the batch is in the mask: there is nothing to train on")
        parts = self._parts(batch, loss.group_size)
        references = self._group.train(parts, [loss] * self._ranks, [constants] * self._ranks)
        metrics = self._wait(references, self._step_timeout, "a training step")[0]
        metrics["update_skipped"] = float(not np.isfinite(metrics["grad_norm"]))
        self._version += 1
        return metrics

    def weights(self) -> tuple[int, ray.ObjectRef]:
        """`(version, reference)`: the current weights as a dict of float32 CPU tensors under their checkpoint names (a tied head left out),
        in rank 0's object store. The version rises with every change of the weights."""
        self._loaded(None)
        return self._version, self._wait(self._group.weights(), self._step_timeout, "the weights of the policy")[0][0]

    def save(self, directory: str | Path) -> None:
        """Write model, optimizer, schedule and random state, one file of each per rank. The checkpoint is complete when this returns."""
        self._loaded(None)
        self._wait(self._group.save(str(Path(directory).absolute())), self._step_timeout, f"the policy's checkpoint in {directory}")

    def restore(self, directory: str | Path) -> None:
        """Go back to a checkpoint of `save`, after `load` of the same model: the next step is the same to the bit.

        Raises UserError when it was written with another number of ranks.
        """
        self._loaded(None)
        directory = Path(directory).absolute()
        if not (directory / f"model_world_size_{self._ranks}_rank_0.pt").is_file():
            found = sorted(path.name for path in directory.glob("model_world_size_*_rank_0.pt"))
            raise UserError(
                f"checkpoint {directory} does not fit placement.policy.replicas = {self._ranks}"
                + (f": it holds {found[0]}; use as many replicas as it was written with" if found else ": it holds no policy checkpoint")
            )
        self._wait(self._group.restore(str(directory)), self._step_timeout, f"the policy to restore {directory}")
        self._version += 1

    def export(self, directory: str | Path) -> None:
        """Write a checkpoint that `AutoModelForCausalLM`, or for a score head `AutoModelForSequenceClassification`, loads as it is:
        safetensors (bfloat16 where the model computes in it, else float32), config and tokenizer."""
        self._loaded(None)
        self._wait(self._group.export(str(Path(directory).absolute())), self._step_timeout, f"the export to {directory}")

    def shutdown(self) -> None:
        """End the processes and give their resources back."""
        for worker in self._group.workers:
            ray.kill(worker)
        remove_placement_group(self._bundles)

    def _loaded(self, head: str | None) -> Model:
        if self._model is None:
            raise RuntimeError("no model is loaded")
        if head is not None and self._model.head != head:
            raise ValueError(f"this needs a {head} head, and {self._model.path} was loaded with a {self._model.head} head")
        return self._model

    def _infer(self, batch: Batch, by_reference: bool = False) -> list[tuple[MicroBatch, np.ndarray]]:
        if not len(batch):
            return []
        parts = self._parts(Batch(batch.prompt_ids, batch.completion_ids), group_size=1)
        values = self._wait(self._group.infer(parts, [by_reference] * self._ranks), self._step_timeout, "a forward pass")
        return [pair for of_rank in zip(parts, values, strict=True) for pair in zip(*of_rank, strict=True)]

    def _parts(self, batch: Batch, group_size: int) -> list[list[MicroBatch]]:
        assert self._info is not None
        _check(batch, self._info.vocab_size)
        lengths = [len(prompt) + len(completion) for prompt, completion in zip(batch.prompt_ids, batch.completion_ids, strict=True)]
        planned = plan(lengths, group_size, self._ranks, self._settings.max_tokens_per_micro_batch, self._info.padded)
        return [[micro_batch(batch, rows) for rows in of_rank] for of_rank in planned]

    @staticmethod
    def _wait(references: Sequence[Any], timeout_seconds: float, what: str) -> list[Any]:
        """The results of all ranks; the first failure is raised at once, as the other ranks may wait for the failed one."""
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


def _check(batch: Batch, vocab_size: int) -> None:
    if not len(batch):
        raise ValueError("the batch has no rows")
    if any(not len(ids) for ids in batch.prompt_ids) or any(not len(ids) for ids in batch.completion_ids):
        raise ValueError("a row has an empty prompt or completion")
    for ids in (*batch.prompt_ids, *batch.completion_ids):
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise ValueError(f"token id {max(ids)} is outside the model's vocabulary of {vocab_size}: use the tokenizer of the model")
    columns: dict[str, Sequence[Any]] = {"completion_ids": batch.completion_ids, **batch.token_values, **batch.row_values}
    for name, values in columns.items():
        if len(values) != len(batch):
            raise ValueError(f"the batch has {len(batch)} prompts and {len(values)} {name}")
    for name, rows in batch.token_values.items():
        for ids, row in zip(batch.completion_ids, rows, strict=True):
            if len(ids) != len(row):
                raise ValueError(f"a completion has {len(ids)} tokens and {len(row)} {name}")


def _free() -> dict[str, float]:
    return {name: amount for name, amount in ray.available_resources().items() if name in ("CPU", "GPU")}
