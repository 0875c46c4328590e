"""Record what TRL computes for the preference losses that both have, in `trl_losses.json` beside this file.

Needs trl==1.16.0 (with transformers, accelerate and datasets), which the tests do not: they read the recorded
values. To record again:

    python -m venv .trl && .trl/bin/pip install trl==1.16.0 numpy
    .trl/bin/python tests/parity/record_trl_losses.py

TRL's own trainers compute every number: the methods that turn a batch into a loss run on trainers that carry
the attributes those methods read, with a model that answers with prescribed log-probabilities. Batches hold
one pair, so that a batch's loss is the pair's.
"""

from __future__ import annotations

import json
import math
import platform
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
import trl
from accelerate import Accelerator
from torch import Tensor
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

TRL = "1.16.0"
SEED = 20240601
NUM_PAIRS = 16
# Token ids; a sequence is one prompt token, the number of its row, and completion tokens.
COMPLETION, PADDING = 0, 1
CASES: list[tuple[str, dict[str, float]]] = [
    ("sigmoid", {"beta": 0.1}),
    ("sigmoid", {"beta": 2.0}),
    ("ipo", {"beta": 0.1}),
    ("ipo", {"beta": 0.7}),
    ("hinge", {"beta": 0.1}),
    ("hinge", {"beta": 0.4}),
    ("cdpo", {"beta": 0.1, "label_smoothing": 0.1}),
    ("cdpo", {"beta": 0.5, "label_smoothing": 0.4}),
    ("robust", {"beta": 0.1, "label_smoothing": 0.1}),
    ("robust", {"beta": 0.5, "label_smoothing": 0.4}),
    ("rpo", {"beta": 0.1, "nll_weight": 1.0}),
    ("rpo", {"beta": 0.5, "nll_weight": 0.2}),
    ("length_normalised", {"beta": 5.0}),
    ("length_normalised", {"beta": 0.1}),
    ("simpo", {"beta": 2.0, "target_margin": 1.0}),
    ("simpo", {"beta": 2.5, "target_margin": 0.0}),
    ("orpo", {"odds_ratio_weight": 0.1}),
    ("orpo", {"odds_ratio_weight": 1.0}),
    ("kto", {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}),
    ("kto", {"beta": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.7}),
]


class Prescribed(torch.nn.Module):
    """A language model whose completion tokens have given log-probabilities: those of `rows[k]` after prompt
    token k."""

    is_gradient_checkpointing = False

    def __init__(self, rows: list[Tensor]) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, input_ids: Tensor, fused_lm_head: bool = False, **_: Any) -> SimpleNamespace:
        width = input_ids.shape[1]
        log_probs = torch.stack(
            [
                torch.nn.functional.pad(self.rows[k], (0, width - 1 - len(self.rows[k])))
                for k in input_ids[:, 0].tolist()
            ]
        )
        if fused_lm_head:
            zeros = torch.zeros_like(log_probs)
            return SimpleNamespace(
                log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
            )
        real = log_probs < 0
        safe = torch.where(real, log_probs, -1.0)
        # Of the tokens COMPLETION and PADDING.
        logits = torch.stack([safe, torch.log(-torch.expm1(safe))], dim=-1)
        return SimpleNamespace(logits=torch.nn.functional.pad(logits, (0, 0, 0, 1)))


def sequences(numbers: list[int], lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and completion mask (B, S) of rows with a prompt token and so many completion
    tokens."""
    width = 1 + max(lengths)
    positions = torch.arange(width).expand(len(lengths), width)
    attention = (positions <= torch.tensor(lengths).unsqueeze(1)).long()
    ids = torch.where(attention == 1, COMPLETION, PADDING)
    ids[:, 0] = torch.tensor(numbers)
    return ids, attention, attention * (positions > 0)


def trainer(kind: type, model: torch.nn.Module, **attributes: Any) -> Any:
    made = object.__new__(kind)
    made.__dict__ |= {
        "model": model,
        "accelerator": Accelerator(cpu=True),
        "aux_loss_enabled": False,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "precompute_ref_logps": True,
        "is_encoder_decoder": False,
    } | attributes
    return made


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    pair: dict[str, Any],
    loss_types: list[str],
    weights: list[float],
    values: dict[str, float],
) -> Tensor:
    model = Prescribed([chosen, rejected])
    ids, attention, completion = sequences([0, 1], [len(chosen), len(rejected)])
    inputs = {
        "input_ids": ids,
        "attention_mask": attention,
        "completion_mask": completion,
        "ref_chosen_logps": tensor(pair["ref_chosen"]).sum().unsqueeze(0),
        "ref_rejected_logps": tensor(pair["ref_rejected"]).sum().unsqueeze(0),
    }
    made = trainer(
        DPOTrainer,
        model,
        loss_types=loss_types,
        loss_weights=weights,
        beta=values["beta"],
        label_smoothing=values.get("label_smoothing", 0.0),
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        use_weighting=False,
    )
    return made._compute_loss(model, inputs, return_outputs=False)


def kto(chosen: Tensor, rejected: Tensor, pair: dict[str, Any], values: dict[str, float]) -> Tensor:
    other = [tensor(row) for row in pair["kl"]]
    model = Prescribed([chosen, rejected, *other])
    ids, attention, completion = sequences([0, 1], [len(chosen), len(rejected)])
    kl_ids, kl_attention, kl_completion = sequences([2, 3], [len(row) for row in other])
    inputs = {
        "input_ids": ids,
        "attention_mask": attention,
        "completion_mask": completion,
        "KL_input_ids": kl_ids,
        "KL_attention_mask": kl_attention,
        "KL_completion_mask": kl_completion,
        "label": torch.tensor([True, False]),
        "ref_logps": torch.stack([tensor(pair["ref_chosen"]).sum(), tensor(pair["ref_rejected"]).sum()]),
        "ref_KL_logps": torch.stack([tensor(row).sum() for row in pair["ref_kl"]]),
    }
    made = trainer(KTOTrainer, model, loss_type="kto", calculate_KL=True, **values)
    return made._compute_loss(model, inputs, return_outputs=False)


def concatenated(kind: type, chosen: Tensor, rejected: Tensor, **attributes: Any) -> Tensor:
    """The reference-free trainers, which take logits and sides one by one."""
    model = Prescribed([chosen, rejected])
    batch = {}
    for side, number, row in (("chosen", 0, chosen), ("rejected", 1, rejected)):
        ids, attention, completion = sequences([number], [len(row)])
        batch |= {
            f"{side}_input_ids": ids,
            f"{side}_attention_mask": attention,
            f"{side}_labels": ids.masked_fill(completion == 0, -100),
        }
    return trainer(
        kind, model, pad_token_id=PADDING, padding_value=PADDING, **attributes
    ).get_batch_loss_metrics(model, batch)[0]


def trl_loss(
    loss: str, chosen: Tensor, rejected: Tensor, pair: dict[str, Any], values: dict[str, float]
) -> Tensor:
    match loss:
        case "sigmoid" | "ipo" | "hinge" | "robust":
            return dpo(chosen, rejected, pair, [loss], [1.0], values)
        case "cdpo":
            # DPOTrainer smooths labels in `aot` alone, which sorts margins over the batch: with one pair that
            # is cDPO.
            return dpo(chosen, rejected, pair, ["aot"], [1.0], values)
        case "length_normalised":
            return dpo(chosen, rejected, pair, ["sigmoid_norm"], [1.0], values)
        case "rpo":
            return dpo(chosen, rejected, pair, ["sigmoid", "sft"], [1.0, values["nll_weight"]], values)
        case "simpo":
            gamma = values["target_margin"]
            attributes = {
                "beta": values["beta"],
                "simpo_gamma": gamma,
                "cpo_alpha": 0.0,
                "alpha": 0.0,
                "label_smoothing": 0.0,
            }
            return concatenated(CPOTrainer, chosen, rejected, loss_type="simpo", **attributes)
        case "orpo":
            return concatenated(ORPOTrainer, chosen, rejected, beta=values["odds_ratio_weight"])
        case "kto":
            return kto(chosen, rejected, pair, values)
    raise ValueError(loss)


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def draw() -> list[dict[str, Any]]:
    """Token log-probabilities of pairs, and of two mismatched completions (`kl`) beside each; lengths from 1
    to 12 tokens."""
    random = np.random.default_rng(SEED)
    pairs = []
    for _ in range(NUM_PAIRS):
        pair: dict[str, Any] = {"kl": [], "ref_kl": []}
        for name in ("chosen", "rejected", "kl", "kl"):
            length = random.integers(1, 13)
            scale = math.exp(random.uniform(-3, 1))
            row, ref = (-random.exponential(scale, length) - 1e-3 for _ in range(2))
            if name == "kl":
                pair["kl"].append(row.tolist())
                pair["ref_kl"].append(ref.tolist())
            else:
                pair |= {name: row.tolist(), f"ref_{name}": ref.tolist()}
        pairs.append(pair)
    return pairs


def main() -> None:
    if trl.__version__ != TRL:
        raise SystemExit(f"trl is {trl.__version__}, and this script drives {TRL}: pip install trl=={TRL}")
    # ORPOTrainer casts to float32, which is coarser than the comparison.
    torch.Tensor.float = torch.Tensor.double
    pairs, cases = draw(), []
    for loss, values in CASES:
        case: dict[str, Any] = {
            "loss": loss,
            "hyper_parameters": values,
            "losses": [],
            "chosen_gradients": [],
            "rejected_gradients": [],
        }
        for pair in pairs:
            chosen, rejected = (
                tensor(pair["chosen"]).requires_grad_(),
                tensor(pair["rejected"]).requires_grad_(),
            )
            value = trl_loss(loss, chosen, rejected, pair, values)
            value.backward()
            assert value.dtype == torch.float64
            assert chosen.grad is not None
            assert rejected.grad is not None
            case["losses"].append(value.item())
            case["chosen_gradients"].append(chosen.grad[0].item())
            case["rejected_gradients"].append(rejected.grad[0].item())
        cases.append(case)
    versions = {
        "trl": TRL,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    recorded = {"versions": versions, "seed": SEED, "pairs": pairs, "cases": cases}
    text = json.dumps(recorded).replace("}, {", "},\n{") + "\n"
    Path(__file__).with_name("trl_losses.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
