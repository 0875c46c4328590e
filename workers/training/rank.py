"""What runs in a training process: a verl `TrainingWorker` and the model it holds.

The driver imports this for the class of its actors, so verl is imported where it is used.
"""

import gc
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from pns import config
from workers.actor_logs import actor_log, print_to
from workers.broadcast import Seat, member
from workers.runtime import Runtime
from workers.training.batching import MicroBatch
from workers.training.objectives import Head, Objective
from workers.weights import StoredWeights, rollout_dtype, store

_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True)
class ModelSpec:
    """What `Rank.load` builds; `path` is a directory."""

    path: str
    head: Head
    settings: config.PolicyConfig
    optimizer: config.Optimizer | None
    total_steps: int
    seed: int
    runtime: Runtime

    @property
    def lora_rank(self) -> int:
        """0: every weight is trained. Reward models are always trained in full, their head is new."""
        return self.settings.lora.rank if self.optimizer and self.head == "language_model" else 0

    @property
    def offloads(self) -> bool:
        """Whether the training state is in host memory, where it is without a GPU anyhow."""
        return self.settings.offload and self.runtime.device == "cuda"

    @property
    def compute_dtype(self) -> str:
        """ "bfloat16" or "float32": what `policy.dtype` means on the device."""
        if self.settings.dtype != "auto":
            return self.settings.dtype
        return "bfloat16" if self.runtime.device == "cuda" else "float32"


def _build(spec: ModelSpec, is_reference: bool = False) -> Any:
    """The model in a verl `TrainingWorker`, sharded over the ranks, which call this together."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import TrainingWorkerConfig
    from verl.workers.engine_workers import TrainingWorker

    from workers.training.verl_engine import REFERENCE_MODEL  # importing it registers the engines

    torch.manual_seed(spec.seed)
    trained = "language_model" if spec.head == "language_model" else "value_model"
    training_worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type=REFERENCE_MODEL if is_reference else trained,
            model_config=_model_config(spec),
            engine_config=_engine_config(spec),
            optimizer_config=_optimizer_config(spec.optimizer or config.Optimizer(), spec.total_steps),
            checkpoint_config=CheckpointConfig(),
        )
    )
    training_worker.reset()
    return training_worker


def _model_config(spec: ModelSpec) -> Any:
    from verl.workers.config import HFModelConfig

    from workers.training import attention

    lora, padded = spec.settings.lora, spec.settings.layout is config.Layout.padded
    return HFModelConfig(
        path=spec.path,
        load_tokenizer=False,  # rows are token ids
        trust_remote_code=spec.runtime.trust_remote_code,
        override_config={"attn_implementation": "sdpa" if padded else attention.NAME},
        enable_gradient_checkpointing=spec.settings.gradient_checkpointing,
        use_remove_padding=False,  # micro-batches hold none
        lora_rank=spec.lora_rank,
        lora_alpha=lora.alpha,
        # PEFT knows "all-linear" as a string only.
        target_modules=lora.targets if len(lora.targets) > 1 else lora.targets[0],
    )


def _engine_config(spec: ModelSpec) -> Any:
    from verl.workers.config import FSDPEngineConfig

    compute = {"bfloat16": "bf16", "float32": "fp32"}[spec.compute_dtype]
    return FSDPEngineConfig(
        strategy="fsdp2",
        fsdp_size=spec.settings.fsdp_size or -1,
        model_dtype="fp32",  # the master weights
        mixed_precision={"param_dtype": compute, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        reshard_after_forward=spec.runtime.device == "cuda",  # to save memory; on a CPU it only costs
        # Else every rank holds the whole model's gradient in float32 from its first micro-batch to its last.
        use_no_sync_for_gradient_accumulation=False,
        forward_prefetch=True,  # a layer's weights are gathered while the one before it computes
        use_torch_compile=spec.settings.compile,
        offload_policy=spec.offloads,
        seed=spec.seed,
    )


def _optimizer_config(optimizer: config.Optimizer, total_steps: int) -> Any:
    from verl.workers.config import FSDPOptimizerConfig

    # verl's schedule counts steps from 1 here, so that the first step is not lost to a rate of 0; one step
    # more keeps the last one from it. A cosine that stays at 1 is the constant schedule.
    return FSDPOptimizerConfig(
        lr=optimizer.learning_rate,
        betas=(optimizer.beta1, optimizer.beta2),
        weight_decay=optimizer.weight_decay,
        clip_grad=optimizer.clip_grad,
        lr_warmup_steps=optimizer.warmup_steps,
        lr_scheduler_type="cosine",
        min_lr_ratio=1.0 if optimizer.schedule == "constant" else 0.0,
        zero_indexed_step=False,
        total_training_steps=total_steps + 1,
        override_optimizer_config={"fused": True},  # one pass over the weights instead of one an operation
    )


class Rank:
    """One training process. A plain class; `actor_class` makes it an actor."""

    training: Any = None
    reference: Any = None
    spec: ModelSpec
    _files: Any = None  # a `StateFiles`

    def load(self, spec: ModelSpec) -> int:
        """Build a model and drop the one before with its reference, on all ranks; its vocabulary's size."""
        from verl.utils.distributed import initialize_global_process_group_ray

        from workers.training.state_files import StateFiles

        cuda = spec.runtime.device == "cuda"
        # verl would ask for gloo twice on a CPU, which torch refuses.
        backend = None if cuda else "gloo"
        initialize_global_process_group_ray(spec.runtime.step_timeout_seconds, backend=backend)
        self._files = self._files or StateFiles(spec.runtime.step_timeout_seconds)
        self.training = self.reference = None
        gc.collect()  # modules and optimizer refer to each other: else two models are held at once
        if cuda:
            torch.cuda.empty_cache()
        self.training = _build(spec)
        self.spec = spec
        return self.training.model_config.hf_config.get_text_config().vocab_size

    def load_reference(self, spec: ModelSpec) -> None:
        """Build a second model beside the first. Never trained, it holds no gradients or optimizer state."""
        self.reference = _build(spec, is_reference=True)

    def leave(self) -> None:
        """Free the GPU: weights and optimizer to the host. Gradients are of a step that is over. On a CPU
        everything stays where it is."""
        for model in self._models():
            model.engine.optimizer_zero_grad()
            if not self.spec.offloads:
                model.to("cpu")
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.synchronize()  # verl copies without waiting
            torch.cuda.empty_cache()

    def come(self) -> None:
        for model in self._models():
            if not self.spec.offloads:  # then each layer comes when it is computed
                model.to("device")

    def _models(self) -> list[Any]:
        return [model for model in (self.training, self.reference) if model is not None]

    def infer(
        self, micro_batches: Sequence[MicroBatch], by_reference: bool = False, temperature: float = 1.0
    ) -> list[np.ndarray]:
        """Per micro-batch: log-probabilities (C,) of its completion tokens, or scores (B,) of its rows."""
        engine = (self.reference if by_reference and self.reference else self.training).engine
        adapter_off = by_reference and not self.reference
        with engine.eval_mode(), engine.disable_adapter() if adapter_off else nullcontext():
            outputs = engine.infer_batch(self._data(micro_batches, {"temperature": temperature}))[
                "model_output"
            ]
        name = "scores" if self.spec.head == "score" else "log_probs"
        return [output[name].float().cpu().numpy() for output in outputs]

    def train(
        self, micro_batches: Sequence[MicroBatch], objective: Objective, constants: dict[str, Any]
    ) -> dict[str, float]:
        """One optimizer step. The metrics are those of the whole batch, the same on every rank."""
        from verl.utils import tensordict_utils as tu
        from verl.utils.metric import Metric

        from workers.training.verl_engine import verl_loss

        self.training.set_loss_fn(verl_loss(objective))
        constants = {**constants, "temperature": objective.temperature}
        metrics = tu.get(self.training.train_batch(self._data(micro_batches, constants)), "metrics")
        return {
            name: float(Metric.aggregate_dp(value) if isinstance(value, list) else value)
            for name, value in metrics.items()
        }

    def pass_step(self) -> None:
        """Move the learning rate on by a step that has no update."""
        self.training.engine.lr_scheduler_step()

    def _data(self, micro_batches: Sequence[MicroBatch], constants: dict[str, Any]) -> Any:
        from tensordict import NonTensorData
        from verl.utils import tensordict_utils as tu

        from workers.training.verl_engine import tensors

        constants = {**constants, "dp_size": self.training.engine.get_data_parallel_size()}
        return tu.assign_non_tensor(
            tu.get_tensordict({}),
            micro_batches=NonTensorData([tensors(part, constants) for part in micro_batches]),
            update_lr_scheduler=constants.get("end_of_step"),
            global_token_num=constants.get("global_token_num"),
        )

    def weights(self) -> StoredWeights | None:
        """The full weights, in the dtype of rollout, in the object store; from rank 0 only."""
        return self._on_rank_0(self._full_weights(rollout_dtype(self.spec.runtime)), store)

    def send_weights(self, seat: Seat) -> int | None:
        """The same from rank 0, which has the seat, to the others of its group; their bytes."""
        weights = self._full_weights(rollout_dtype(self.spec.runtime))
        return self._on_rank_0(weights, lambda tensors: member(seat).send(tensors))

    def _on_rank_0(self, tensors: Iterator[_T], use: Callable[[Iterator[_T]], _R]) -> _R | None:
        """Rank 0 uses them; the others gather with it what it asks for."""
        try:
            return use(tensors) if self.training.rank == 0 else None
        finally:
            deque(
                tensors, maxlen=0
            )  # all ranks to the end, also where rank 0 fails: they wait for each other

    def _full_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Checkpoint names with whole tensors of `dtype`, one at a time, on the device; all ranks go through
        them together. A LoRA adapter is added in, a tied tensor left out."""
        module, lora, device = self.training.engine.module, self.spec.settings.lora, self.spec.runtime.device
        tied = set(module._tied_weights_keys or ()) if module.config.tie_word_embeddings else set()
        weights = module.state_dict()
        for name, weight in weights.items():
            checkpoint_name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")  # PEFT's
            if checkpoint_name in tied or ".lora_A." in name or ".lora_B." in name:
                continue
            adapted = name.removesuffix(".base_layer.weight")
            down = f"{adapted}.lora_A.default.weight"
            if down not in weights:
                # Half as much to gather in bfloat16; on the device, also what is offloaded: by its network.
                yield checkpoint_name, _whole(weight.detach().to(device, dtype))
                continue
            up = _whole(weights[f"{adapted}.lora_B.default.weight"].to(device))
            update = up @ _whole(weights[down].to(device))
            merged = _whole(weight.to(device)) + lora.alpha / lora.rank * update
            yield checkpoint_name, merged.detach().to(dtype)

    def begin_save(self, directory: str) -> None:
        """Copy the training state to the host; it is written while training goes on."""
        self._files.begin(self.training.engine, directory)

    def is_saved(self, waits: bool) -> bool:
        """Whether what `begin_save` began is on disk; raises what writing failed with."""
        return self._files.is_whole(waits)

    def restore(self, directory: str) -> None:
        self._files.read(self.training.engine, directory)

    def export(self, directory: str) -> None:
        """Write config, weights (in the dtype that is computed in) and tokenizer for transformers."""
        from huggingface_hub import save_torch_state_dict
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        dtype = torch.bfloat16 if self.spec.compute_dtype == "bfloat16" else torch.float32
        weights = self._on_rank_0(self._full_weights(dtype), _on_host)
        if weights is None:
            return
        own_config = self.training.engine.module.config
        hf_config = type(own_config).from_dict(own_config.to_dict())
        hf_config.dtype = dtype
        if self.spec.head == "score":  # it was built as a token classifier
            architecture = AutoModelForSequenceClassification._model_mapping[type(hf_config)]
            hf_config.architectures = [architecture.__name__]
        Path(directory).mkdir(parents=True, exist_ok=True)
        save_torch_state_dict(weights, directory)
        trust_remote_code = self.spec.runtime.trust_remote_code
        tokenizer = AutoTokenizer.from_pretrained(self.spec.path, trust_remote_code=trust_remote_code)
        tokenizer.save_pretrained(directory)
        if hf_config.pad_token_id is None:  # without one transformers scores one row at a time only
            hf_config.pad_token_id = tokenizer.pad_token_id
        hf_config.save_pretrained(directory)
        generation_config = self.training.model_config.generation_config
        if self.spec.head == "language_model" and generation_config is not None:
            generation_config.save_pretrained(directory)


def _whole(weight: torch.Tensor) -> torch.Tensor:
    """Of all ranks' shards; all of them call this together."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _on_host(tensors: Iterator[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    # Copies: a tensor may be a part of a larger one, which safetensors refuses.
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors}


def actor_class() -> Any:
    """`Rank` as a class for verl's worker group: a call starts on all ranks and returns their references."""
    from verl.single_controller.base import Worker
    from verl.single_controller.base.decorator import Dispatch, register

    on_all = register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    on_each = register(dispatch_mode=Dispatch.ALL_TO_ALL, blocking=False)  # lists with one entry per rank

    class PolicyRank(Rank, Worker):
        def __init__(self, logs: str) -> None:
            print_to(actor_log(logs, "policy", int(os.environ["RANK"])))  # verl gives each its number so
            super().__init__()

        load = on_all(Rank.load)
        load_reference = on_all(Rank.load_reference)
        infer = on_each(Rank.infer)
        train = on_each(Rank.train)
        leave = on_all(Rank.leave)
        come = on_all(Rank.come)
        pass_step = on_all(Rank.pass_step)
        weights = on_all(Rank.weights)
        send_weights = on_all(Rank.send_weights)
        begin_save = on_all(Rank.begin_save)
        is_saved = on_all(Rank.is_saved)
        restore = on_all(Rank.restore)
        export = on_all(Rank.export)

    return PolicyRank
