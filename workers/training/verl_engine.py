"""What runs inside the training processes: verl's FSDP engines with our micro-batches, and our losses in
verl's form.

The engines keep verl's model building, sharding, optimizer, scheduler, mixed precision, LoRA and checkpoints.
They differ in four things: micro-batches come ready-made (see `workers.training.batching`) and hold no
padding; log-probabilities are computed in float32, for completion tokens only, and never from the logits of a
whole batch; padded rows (the layout for comparison) carry no attention mask, because with causal attention
and padding on the right no real token sees the padding; and the value model is a reward model: one bias-free
linear head, read at a row's last token.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
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

from pns.algo import losses
from pns.errors import UserError
from workers.training.attention import segments_of
from workers.training.log_probs import LogProbHead

if TYPE_CHECKING:
    from workers.training.batching import MicroBatch
    from workers.training.policy import BradleyTerry, Grpo, Loss, Preference


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
            last = index == len(micro_batches) - 1
            with nullcontext() if forward_only else self._gradient_sync_context(is_last_micro_batch=last):
                loss, output = self.forward_step(
                    micro_batch, loss_function=loss_function, forward_only=forward_only
                )
                if not forward_only:
                    loss.backward()
            batch_losses.append(output["loss"])
            append_to_dict(metrics, output["metrics"])
            if forward_only:
                outputs.append(output["model_output"])
        return {"model_output": outputs, "loss": batch_losses, "metrics": metrics}

    def _build_module(self) -> torch.nn.Module:
        module = super()._build_module()
        scaled = [
            key
            for key in ("final_logit_softcapping", "logit_scale", "logits_scaling")
            if getattr(module.config, key, None)
        ]
        if scaled:
            raise UserError(
                f"{self.model_config.local_path}: models that change their logits ({scaled[0]} in config.json) are not supported"
            )
        module.set_output_embeddings(LogProbHead(module.get_output_embeddings()))
        if self.engine_config.use_torch_compile:
            # What is elementwise; attention over packed rows has as many calls as there are rows.
            for layer in (
                part for part in module.modules() if type(part).__name__ in module._no_split_modules
            ):
                for name, part in layer.named_children():
                    if "attn" not in name:
                        part.compile(dynamic=True)
        return module

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        # PEFT's wrapper passes the call on to the model that holds the head.
        self.module.get_output_embeddings().ask(micro_batch["predictors"], micro_batch["labels"])
        return _model_inputs(micro_batch), {}

    def prepare_model_outputs(
        self,
        output: Any,
        output_args: dict[str, Any],
        micro_batch: TensorDict,
        logits_processor_func: Callable | None,
    ) -> dict[str, Tensor]:
        return {"log_probs": output.logits}


class ScoreEngine(PolicyEngine):
    """A reward model; `scores` of a micro-batch is (B,)."""

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        return _model_inputs(micro_batch), {}

    def _build_module(self) -> torch.nn.Module:
        from transformers import AutoModelForTokenClassification

        config = self.model_config.hf_config
        config.num_labels = 1
        config.classifier_dropout = 0.0
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


for _device, _vendor in (("cpu", None), ("cuda", "nvidia"), ("cuda", "amd")):
    EngineRegistry.register(model_type="language_model", backend="fsdp2", device=_device, vendor=_vendor)(
        PolicyEngine
    )
    EngineRegistry.register(model_type="value_model", backend="fsdp2", device=_device, vendor=_vendor)(
        ScoreEngine
    )


def tensors(micro_batch: MicroBatch, constants: dict[str, Any]) -> TensorDict:
    """One micro-batch in the form verl's engine takes, with `constants` beside it."""
    arrays = {
        name: getattr(micro_batch, name)
        for name in ("token_ids", "position_ids", "predictors", "labels", "completion_lengths", "last")
    }
    arrays |= micro_batch.token_values | micro_batch.row_values
    others = {
        **constants,
        "width": micro_batch.width,
        "segments": None if micro_batch.width else segments_of(micro_batch.families),
    }
    fields = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return TensorDict(
        {**fields, **{name: NonTensorData(value) for name, value in others.items()}}, batch_size=[]
    )


def _model_inputs(micro_batch: TensorDict) -> dict[str, Any]:
    if width := micro_batch["width"]:
        return {
            "input_ids": micro_batch["token_ids"].view(-1, width),
            "attention_mask": None,
            "position_ids": None,
        }
    return {
        "input_ids": micro_batch["token_ids"].unsqueeze(0),
        "position_ids": micro_batch["position_ids"].unsqueeze(0),
        "attention_mask": None,
        "segments": micro_batch["segments"],
    }


def verl_loss(loss: Loss) -> Callable[..., tuple[Tensor, dict[str, Metric]]]:
    """`loss` in verl's form: `(model_output, data, dp_group) -> (loss, metrics)` of one micro-batch.

    FSDP averages gradients over ranks, so the local part of a sum over the whole batch is multiplied by the
    number of ranks; verl averages metrics over ranks and adds them over micro-batches, so they are, too.
    """
    from workers.training import policy

    adapters: dict[type, Callable[[Any, dict[str, Tensor], TensorDict], tuple[Tensor, dict[str, Tensor]]]] = {
        policy.Grpo: _grpo,
        policy.Preference: _preference,
        policy.BradleyTerry: _bradley_terry,
        policy.Sft: _sft,
    }
    adapter = adapters[type(loss)]

    def verl_form(
        model_output: dict[str, Tensor], data: TensorDict, dp_group: Any = None
    ) -> tuple[Tensor, dict[str, Metric]]:
        value, metrics = adapter(loss, model_output, data)
        ranks = data["dp_size"]
        return value * ranks, {name: Metric("sum", metric * ranks) for name, metric in metrics.items()}

    return verl_form


def _grpo(loss: Grpo, model_output: dict[str, Tensor], data: TensorDict) -> tuple[Tensor, dict[str, Tensor]]:
    return losses.grpo_loss(
        log_probs_T=model_output["log_probs"],
        old_log_probs_T=data["old_log_probs"],
        ref_log_probs_T=data.get("ref_log_probs", None),
        advantages_T=torch.repeat_interleave(data["advantages"], data["completion_lengths"]),
        mask_T=data["mask"],
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
        kl_coefficient=loss.kl_coefficient,
        num_tokens=data["num_tokens"],
    )


def _sft(loss: Any, model_output: dict[str, Tensor], data: TensorDict) -> tuple[Tensor, dict[str, Tensor]]:
    return losses.sft_loss(model_output["log_probs"], data["mask"], data["num_tokens"]), {}


def _preference(
    loss: Preference, model_output: dict[str, Tensor], data: TensorDict
) -> tuple[Tensor, dict[str, Tensor]]:
    log_probs_T, lengths_B = model_output["log_probs"], data["completion_lengths"]
    margin_T = data["margin_mask"] if "margin_mask" in data else torch.ones_like(log_probs_T)

    def sums(values_T: Tensor) -> tuple[Tensor, Tensor]:
        """Of the chosen and of the rejected rows."""
        of_rows = losses.row_sums(values_T, lengths_B)
        return of_rows[::2], of_rows[1::2]

    ref_T = data.get("ref_log_probs", None)
    nll_B = losses.length_normalised_nll(log_probs_T, lengths_B)
    chosen_B, rejected_B = sums(log_probs_T * margin_T)
    ref_chosen_B, ref_rejected_B = (None, None) if ref_T is None else sums(ref_T * margin_T)
    chosen_tokens_B, rejected_tokens_B = sums(margin_T)
    loss_B, metrics_B = losses.preference_loss(
        loss.settings,
        chosen_B,
        rejected_B,
        ref_chosen_B,
        ref_rejected_B,
        chosen_tokens_B,
        rejected_tokens_B,
        chosen_nll_B=nll_B[::2],
        score_gap_B=data["score_gap"][::2] if "score_gap" in data else None,
        kl=loss.kl,
    )
    chosen_B, rejected_B = sums(log_probs_T.detach())
    metrics_B |= {"chosen_nll": nll_B[::2].detach(), "rejected_nll": nll_B[1::2].detach()}
    metrics_B |= {"chosen_log_prob": chosen_B, "rejected_log_prob": rejected_B}
    if ref_T is not None:
        kl_T = torch.exp(ref_T - log_probs_T.detach()) - (ref_T - log_probs_T.detach()) - 1
        metrics_B["chosen_log_ratio"] = chosen_B - sums(ref_T)[0]
        metrics_B["kl"] = (losses.row_sums(kl_T, lengths_B) / lengths_B).view(-1, 2).mean(-1)
    # Moments for the correlation that `train_step` makes of them.
    margin_B, longer_B = metrics_B["margin"], (lengths_B[::2] - lengths_B[1::2]).to(loss_B.dtype)
    metrics_B |= {
        "_longer": longer_B,
        "_longer_2": longer_B**2,
        "_margin_2": margin_B**2,
        "_margin_longer": margin_B * longer_B,
    }
    return _mean_over_pairs(loss_B, metrics_B, data)


def _bradley_terry(
    loss: BradleyTerry, model_output: dict[str, Tensor], data: TensorDict
) -> tuple[Tensor, dict[str, Tensor]]:
    scores = model_output["scores"]
    loss_B, metrics_B = losses.bradley_terry_loss(scores[::2], scores[1::2], loss.centre)
    return _mean_over_pairs(loss_B, metrics_B, data)


def _mean_over_pairs(
    loss_B: Tensor, metrics_B: dict[str, Tensor], data: TensorDict
) -> tuple[Tensor, dict[str, Tensor]]:
    weight_B = data["weight"][::2] / data["num_groups"]
    return (loss_B * weight_B).sum(), {name: (values * weight_B).sum() for name, values in metrics_B.items()}
