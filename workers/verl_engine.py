"""What runs inside the training processes: verl's FSDP engines with our micro-batches, and our losses in verl's form.

The engines keep verl's model building, sharding, optimizer, scheduler, mixed precision and checkpoints. They differ in four things:
micro-batches come ready-made (see `workers.policy.plan`); padded rows carry no attention mask, because with causal attention and padding
on the right no real token sees the padding; log-probabilities are computed in float32 and for completion tokens only; and the value
model is a reward model: one bias-free linear head, read at a row's last token.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from tensordict import NonTensorData, TensorDict
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from verl.utils import tensordict_utils as tu
from verl.utils.fsdp_utils import get_init_weight_context_manager
from verl.utils.metric import Metric
from verl.utils.py_functional import append_to_dict
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from pns.algo import losses

if TYPE_CHECKING:
    from workers.policy import BradleyTerry, Dpo, Grpo, Loss, MicroBatch

_MAX_LOGITS = 2**27  # float32 logits held at once for one micro-batch; above it they are recomputed in the backward pass, chunk by chunk


class PolicyEngine(FSDPEngineWithLMHead):
    """A causal language model; `log_probs` of a micro-batch is (C,), one entry per completion token, rows end to end."""

    def forward_backward_batch(self, data: TensorDict, loss_function: Callable | None, forward_only: bool = False) -> dict[str, Any]:
        micro_batches = tu.get(data, "micro_batches")
        outputs: list[Any] = []
        batch_losses: list[float] = []
        metrics: dict[str, Any] = {}
        for index, micro_batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            with nullcontext() if forward_only else self._gradient_sync_context(is_last_micro_batch=last):
                loss, output = self.forward_step(micro_batch, loss_function=loss_function, forward_only=forward_only)
                if not forward_only:
                    loss.backward()
            batch_losses.append(output["loss"])
            append_to_dict(metrics, output["metrics"])
            if forward_only:
                outputs.append(output["model_output"])
        return {"model_output": outputs, "loss": batch_losses, "metrics": metrics}

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        inputs, output_args = super().prepare_model_inputs(micro_batch)
        if not self.use_remove_padding:
            inputs["attention_mask"] = None
            inputs["position_ids"] = None
        return inputs, output_args

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: TensorDict, logits_processor_func: Callable | None
    ) -> dict[str, Tensor]:
        token_ids = micro_batch["input_ids"].values()
        # A logit predicts the next token, so the ones that count are those just before a completion token.
        index_C = torch.nonzero(torch.roll(micro_batch["loss_mask"].values(), -1)).squeeze(-1)
        logits_CV = self._pick(output.logits, micro_batch, index_C)
        return {"log_probs": -_negative_log_likelihood(logits_CV, token_ids[index_C + 1])}

    def _pick(self, values: Tensor, micro_batch: TensorDict, index: Tensor) -> Tensor:
        """Entries `index` of the model's output (1, N, ...) or (B, S, ...), counted over the real tokens of all rows end to end."""
        if not self.use_remove_padding:
            lengths_B = micro_batch["input_ids"].offsets().diff()
            real_BS = torch.arange(values.shape[1], device=values.device) < lengths_B.unsqueeze(1)
            index = real_BS.flatten().nonzero().squeeze(-1)[index]
        return values.flatten(0, 1)[index]


class ScoreEngine(PolicyEngine):
    """A reward model; `scores` of a micro-batch is (B,)."""

    def _build_module(self) -> torch.nn.Module:
        from transformers import AutoModelForTokenClassification

        config = self.model_config.hf_config
        config.num_labels = 1
        config.classifier_dropout = 0.0
        with get_init_weight_context_manager(use_meta_tensor=not config.tie_word_embeddings, mesh=self.device_mesh)():
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
        self, output: Any, output_args: dict[str, Any], micro_batch: TensorDict, logits_processor_func: Callable | None
    ) -> dict[str, Tensor]:
        last_B = micro_batch["input_ids"].offsets()[1:] - 1
        return {"scores": self._pick(output.logits.squeeze(-1), micro_batch, last_B).float()}


for _device, _vendor in (("cpu", None), ("cuda", "nvidia"), ("cuda", "amd")):
    EngineRegistry.register(model_type="language_model", backend="fsdp2", device=_device, vendor=_vendor)(PolicyEngine)
    EngineRegistry.register(model_type="value_model", backend="fsdp2", device=_device, vendor=_vendor)(ScoreEngine)


def _negative_log_likelihood(logits_CV: Tensor, labels_C: Tensor) -> Tensor:
    def dense(logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits.float(), labels, reduction="none")

    if logits_CV.numel() <= _MAX_LOGITS:
        return dense(logits_CV, labels_C)
    size = max(1, _MAX_LOGITS // logits_CV.shape[-1])
    parts = zip(logits_CV.split(size), labels_C.split(size), strict=True)
    return torch.cat([checkpoint(dense, logits, labels, use_reentrant=False) for logits, labels in parts])


def tensors(micro_batch: MicroBatch, constants: dict[str, Any]) -> TensorDict:
    """One micro-batch in the form verl's engine takes: jagged tensors of its rows, and `constants` beside them."""
    lengths = torch.tensor(micro_batch.lengths)
    completion_lengths = lengths - torch.tensor(micro_batch.prompt_lengths)
    offsets = functional.pad(lengths.cumsum(0), (1, 0))
    completion_offsets = functional.pad(completion_lengths.cumsum(0), (1, 0))
    position_ids = torch.arange(int(offsets[-1])) - torch.repeat_interleave(offsets[:-1], lengths)
    loss_mask = position_ids >= torch.repeat_interleave(torch.tensor(micro_batch.prompt_lengths), lengths)

    def jagged(values: Tensor, at: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(values, at)

    fields: dict[str, Any] = {
        "input_ids": jagged(torch.tensor(micro_batch.token_ids), offsets),
        "position_ids": jagged(position_ids, offsets),
        "loss_mask": jagged(loss_mask, offsets),
        "completion_lengths": completion_lengths,
        **{name: jagged(torch.tensor(values), completion_offsets) for name, values in micro_batch.token_values.items()},
        **{name: torch.tensor(values) for name, values in micro_batch.row_values.items()},
        **{name: NonTensorData(value) for name, value in constants.items()},
    }
    return TensorDict(fields, batch_size=[len(lengths)])


def verl_loss(loss: Loss) -> Callable[..., tuple[Tensor, dict[str, Metric]]]:
    """`loss` in verl's form: `(model_output, data, dp_group) -> (loss, metrics)` of one micro-batch.

    FSDP averages gradients over ranks, so the local part of a sum over the whole batch is multiplied by the number of ranks; verl averages
    metrics over ranks and adds them over micro-batches, so they are, too.
    """
    from workers import policy

    adapters: dict[type, Callable[[Any, dict[str, Tensor], TensorDict], tuple[Tensor, dict[str, Tensor]]]] = {
        policy.Grpo: _grpo,
        policy.Dpo: _dpo,
        policy.BradleyTerry: _bradley_terry,
        policy.Sft: _sft,
    }
    adapter = adapters[type(loss)]

    def verl_form(model_output: dict[str, Tensor], data: TensorDict, dp_group: Any = None) -> tuple[Tensor, dict[str, Metric]]:
        value, metrics = adapter(loss, model_output, data)
        ranks = data["dp_size"]
        return value * ranks, {name: Metric("sum", metric * ranks) for name, metric in metrics.items()}

    return verl_form


def _grpo(loss: Grpo, model_output: dict[str, Tensor], data: TensorDict) -> tuple[Tensor, dict[str, Tensor]]:
    return losses.grpo_loss(
        log_probs_T=model_output["log_probs"],
        old_log_probs_T=data["old_log_probs"].values(),
        ref_log_probs_T=data["ref_log_probs"].values() if "ref_log_probs" in data else None,
        advantages_T=torch.repeat_interleave(data["advantages"], data["completion_lengths"]),
        mask_T=data["mask"].values(),
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
        kl_coefficient=loss.kl_coefficient,
        num_tokens=data["num_tokens"],
    )


def _sft(loss: Any, model_output: dict[str, Tensor], data: TensorDict) -> tuple[Tensor, dict[str, Tensor]]:
    return losses.sft_loss(model_output["log_probs"], data["mask"].values(), data["num_tokens"]), {}


def _dpo(loss: Dpo, model_output: dict[str, Tensor], data: TensorDict) -> tuple[Tensor, dict[str, Tensor]]:
    log_probs_T, lengths = model_output["log_probs"], data["completion_lengths"]
    margin_T = data["margin_mask"].values() if "margin_mask" in data else torch.ones_like(log_probs_T)
    sums = losses.row_sums(log_probs_T * margin_T, lengths)
    ref_sums = losses.row_sums(data["ref_log_probs"].values() * margin_T, lengths)
    loss_B, metrics_B = losses.dpo_loss(sums[::2], sums[1::2], ref_sums[::2], ref_sums[1::2], loss.beta, loss.label_smoothing)
    nll = losses.length_normalised_nll(log_probs_T, lengths)
    metrics_B |= {
        "preference_loss": loss_B.detach(),
        "chosen_nll": nll[::2].detach(),
        "rejected_nll": nll[1::2].detach(),
        "chosen_log_prob": sums[::2].detach(),
        "rejected_log_prob": sums[1::2].detach(),
    }
    return _mean_over_pairs(loss_B + loss.nll_weight * nll[::2], metrics_B, data)


def _bradley_terry(loss: BradleyTerry, model_output: dict[str, Tensor], data: TensorDict) -> tuple[Tensor, dict[str, Tensor]]:
    scores = model_output["scores"]
    loss_B, metrics_B = losses.bradley_terry_loss(scores[::2], scores[1::2], loss.centre)
    return _mean_over_pairs(loss_B, metrics_B, data)


def _mean_over_pairs(loss_B: Tensor, metrics_B: dict[str, Tensor], data: TensorDict) -> tuple[Tensor, dict[str, Tensor]]:
    weight_B = data["weight"][::2] / data["num_groups"]
    return (loss_B * weight_B).sum(), {name: (values * weight_B).sum() for name, values in metrics_B.items()}
