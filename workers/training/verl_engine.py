"""verl's FSDP engines with our micro-batches, and our objectives in verl's form.

The engines keep verl's model building, sharding, optimizer, scheduler, mixed precision, LoRA and checkpoints.
They differ in five things: micro-batches come ready-made (see `workers.training.batching`) and hold no
padding; log-probabilities are computed in float32, for completion tokens only, and never from the logits of a
whole batch; padded rows (the layout for comparison) carry no attention mask, because with causal attention
and padding on the right no real token sees the padding; the value model is a reward model: one bias-free
linear head, read at a row's last token; and a reference is held in the dtype that is computed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from tensordict import NonTensorData, TensorDict
from torch import Tensor
from verl.models.transformers import monkey_patch
from verl.utils import tensordict_utils as tu
from verl.utils.fsdp_utils import get_init_weight_context_manager
from verl.utils.metric import Metric
from verl.utils.py_functional import append_to_dict
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from pns.errors import UserError
from workers.training.attention import segments_of
from workers.training.log_probs import LogProbHead

if TYPE_CHECKING:
    from workers.training.batching import MicroBatch
    from workers.training.objectives import Objective


# Where TRL is installed, verl 0.9.1 patches a class of it that TRL 1.x no longer has, and cannot build a
# model.
monkey_patch.is_trl_available = lambda: False


class PolicyEngine(FSDPEngineWithLMHead):
    """A causal language model; `log_probs` of a micro-batch is (C,), one entry per completion token, rows end
    to end."""

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Callable | None, forward_only: bool = False
    ) -> dict[str, Any]:
        micro_batches = tu.get(data, "micro_batches")
        outputs: list[Any] = []
        batch_losses: list[float] = []
        metrics: dict[str, Any] = {}
        for index, micro_batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1  # the ranks' gradients are added up once a step
            if not forward_only:
                self.module.set_requires_all_reduce(
                    last
                )  # and those of copies of the model, over the network
            with nullcontext() if forward_only else self._gradient_sync_context(is_last_micro_batch=last):
                loss, output = self.forward_step(
                    micro_batch, loss_function=loss_function, forward_only=forward_only
                )
                if not forward_only:
                    loss.backward()
            batch_losses.append(output["loss"])
            append_to_dict(metrics, output["metrics"])
            if forward_only:  # in training an output would keep its graph
                outputs.append(output["model_output"])
        return {"model_output": outputs, "loss": batch_losses, "metrics": metrics}

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        # FSDP reads in its first forward pass which weights are trained, to reduce their gradients in the
        # right dtype; PEFT marks an adapter that is switched off as not trained.
        trained = [weight for weight in self.module.parameters() if weight.requires_grad]
        with super().disable_adapter():
            for weight in trained:
                weight.requires_grad_(True)
            yield

    def _build_module(self) -> torch.nn.Module:
        module = super()._build_module()
        scales = ("final_logit_softcapping", "logit_scale", "logits_scaling")
        scaled = [key for key in scales if getattr(module.config, key, None)]
        if scaled:
            raise UserError(
                f"{self.model_config.local_path}: models that change their logits "
                f"({scaled[0]} in config.json) are not supported"
            )
        module.set_output_embeddings(LogProbHead(module.get_output_embeddings()))
        if self.engine_config.use_torch_compile:
            self._compile_elementwise(module)
        return module

    @staticmethod
    def _compile_elementwise(module: torch.nn.Module) -> None:
        """Norms and feed-forward parts; attention over packed rows has as many calls as there are rows."""
        layers = [part for part in module.modules() if type(part).__name__ in module._no_split_modules]
        for layer in layers:
            for name, part in layer.named_children():
                if "attn" not in name:
                    part.compile(dynamic=True)

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        # PEFT's wrapper passes the call on to the model that holds the head.
        head = self.module.get_output_embeddings()
        head.ask(micro_batch["predictors"], micro_batch["labels"], micro_batch["temperature"])
        return _model_inputs(micro_batch), {}

    def prepare_model_outputs(
        self,
        output: Any,
        output_args: dict[str, Any],
        micro_batch: TensorDict,
        logits_processor_func: Callable | None,
    ) -> dict[str, Tensor]:
        return {"log_probs": output.logits}


class ReferenceEngine(PolicyEngine):
    """A frozen language model. Its weights are held in the dtype that is computed in, to which those of a
    trained model are rounded whenever they are gathered: half the memory in bfloat16, the same results."""

    def _build_module(self) -> torch.nn.Module:
        self.model_config.model_type = "language_model"  # of the kinds that verl builds
        module = super()._build_module()
        precision = self.engine_config.mixed_precision["param_dtype"]  # in verl's words
        compute_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        for weight in module.parameters():  # not the buffers: positions are rotated by float32 angles
            weight.data = weight.data.to(compute_dtype)
        return module


class ScoreEngine(PolicyEngine):
    """A reward model; `scores` of a micro-batch is (B,)."""

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        return _model_inputs(micro_batch), {}

    def _build_module(self) -> torch.nn.Module:
        from transformers import AutoModelForTokenClassification

        config = self.model_config.hf_config
        config.num_labels = 1
        config.classifier_dropout = 0.0  # the token classifiers of some architectures have one by default
        with get_init_weight_context_manager(
            use_meta_tensor=not config.tie_word_embeddings, mesh=self.device_mesh
        )():
            module, loading = AutoModelForTokenClassification.from_pretrained(
                self.model_config.local_path,
                config=config,
                dtype=torch.float32,
                trust_remote_code=self.model_config.trust_remote_code,
                output_loading_info=True,
            )
            head = torch.nn.Linear(module.score.in_features, 1, bias=False)
            if "score.weight" in loading["missing_keys"]:
                # Scores start near 0, whatever the width: the head is drawn from the seed that `load` set.
                torch.nn.init.normal_(head.weight, std=1 / (head.in_features + 1))
            else:
                head.weight = module.score.weight
            module.score = head
            module.to(torch.float32)
            if self.model_config.enable_gradient_checkpointing:
                module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return module

    def prepare_model_outputs(
        self,
        output: Any,
        output_args: dict[str, Any],
        micro_batch: TensorDict,
        logits_processor_func: Callable | None,
    ) -> dict[str, Tensor]:
        return {"scores": output.logits.flatten()[micro_batch["last"]].float()}


REFERENCE_MODEL = "reference_model"  # beside the kinds that verl knows
_ENGINES = (
    ("language_model", PolicyEngine),
    ("value_model", ScoreEngine),
    (REFERENCE_MODEL, ReferenceEngine),
)
# In the place of verl's own engines; the reward model in that of its value model.
for _device, _vendor in (("cpu", None), ("cuda", "nvidia"), ("cuda", "amd")):
    for _model_type, _engine in _ENGINES:
        EngineRegistry.register(_model_type, "fsdp2", _device, _vendor)(_engine)


def tensors(micro_batch: MicroBatch, constants: dict[str, Any]) -> TensorDict:
    """One micro-batch in the form verl's engine takes, with `constants` beside it."""
    names = ("token_ids", "position_ids", "predictors", "labels", "completion_lengths", "last")
    arrays = {name: getattr(micro_batch, name) for name in names}
    arrays |= micro_batch.token_values | micro_batch.row_values
    segments = None if micro_batch.width else segments_of(micro_batch.families)
    others = {**constants, "width": micro_batch.width, "segments": segments}
    fields = {name: torch.from_numpy(array) for name, array in arrays.items()}
    fields |= {name: NonTensorData(value) for name, value in others.items()}
    return TensorDict(fields, batch_size=[])


def _model_inputs(micro_batch: TensorDict) -> dict[str, Any]:
    token_ids, width = micro_batch["token_ids"], micro_batch["width"]
    if width:
        return {"input_ids": token_ids.view(-1, width), "attention_mask": None, "position_ids": None}
    return {
        "input_ids": token_ids.unsqueeze(0),
        "position_ids": micro_batch["position_ids"].unsqueeze(0),
        "attention_mask": None,
        "segments": micro_batch["segments"],
    }


def verl_loss(objective: Objective) -> Callable[..., tuple[Tensor, dict[str, Metric]]]:
    """`objective` in verl's form: `(model_output, data, dp_group) -> (loss, metrics)` of one micro-batch.

    FSDP averages gradients over ranks, so the local part of a sum over the whole batch is multiplied by the
    number of ranks; verl averages metrics over ranks and adds them over micro-batches, so they are, too.
    """

    def verl_form(
        model_output: dict[str, Tensor], data: TensorDict, dp_group: Any = None
    ) -> tuple[Tensor, dict[str, Metric]]:
        value, metrics = objective.compute(model_output, data)
        ranks = data["dp_size"]
        return value * ranks, {name: Metric("sum", metric * ranks) for name, metric in metrics.items()}

    return verl_form
