"""Records what TRL's DPOTrainer computes on the tiny model, for
`tests/workers/training/test_training_parity.py`: `trl_training.json` beside this file.

Ten optimizer steps in float32 on the CPU for each loss, from the same weights, on the same pairs in the same
order. A recorded loss is that of the step's pairs before the step's update. TRL gets one pair at a time and
accumulates: its "sft" term is a mean over the tokens of a micro-batch, and the length-normalised likelihood
of RPO only when that is one row.

    pip install '.[bench]'
    python tests/parity/record_trl_training.py
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback
from trl import DPOConfig, DPOTrainer

from pns.config import Data
from pns.data.prompts import Prompts
from pns.tiny import world as tiny_world

ROOT = Path(__file__).parents[2]
MODEL = "recipes/tiny/qwen2"
STEPS, PAIRS_PER_STEP, SEED = 10, 8, 0
LEARNING_RATE, CLIP = 1e-4, 1.0

# Our loss: its hyper-parameters, and TRL's settings for the same.
LOSSES: dict[str, tuple[dict[str, float], dict[str, Any]]] = {
    "sigmoid": ({"beta": 0.1}, {"loss_type": ["sigmoid"]}),
    "ipo": ({"beta": 0.1}, {"loss_type": ["ipo"]}),
    "hinge": ({"beta": 0.1}, {"loss_type": ["hinge"]}),
    "robust": ({"beta": 0.1, "label_smoothing": 0.1}, {"loss_type": ["robust"], "label_smoothing": 0.1}),
    "rpo": ({"beta": 0.1, "nll_weight": 0.5}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    "length_normalised": ({"beta": 5.0}, {"loss_type": ["sigmoid_norm"]}),
}


class TokenIdTrainer(DPOTrainer):
    """Takes rows of token ids as they are."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self.logged.append({"loss": logs["loss"], "grad_norm": logs["grad_norm"]})


def draw_pairs(tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """A right solution and one with an error of a random kind, for problems of all suites."""
    prompts, rng = Prompts(tokenizer, Data()), Random(SEED)
    return [
        {
            "prompt_ids": list(prompts.encode(problem)),
            "chosen_ids": list(prompts.encode_completion(tiny_world.random_solution(problem, rng))),
            "rejected_ids": list(
                prompts.encode_completion(
                    tiny_world.corrupt(problem, rng, rng.choice(tiny_world.ERROR_KINDS))
                )
            ),
        }
        for problem in tiny_world.problems("preference", None, STEPS * PAIRS_PER_STEP, seed=SEED)
    ]


def train(
    pairs: list[dict[str, list[int]]], tokenizer: PreTrainedTokenizerBase, **loss: Any
) -> list[dict[str, float]]:
    losses = Losses()
    with tempfile.TemporaryDirectory() as directory:
        settings = DPOConfig(
            output_dir=directory,
            use_cpu=True,
            bf16=False,
            seed=SEED,
            max_steps=STEPS,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=PAIRS_PER_STEP,
            train_sampling_strategy="sequential",
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=CLIP,
            precompute_ref_log_probs=True,
            gradient_checkpointing=False,
            max_length=None,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **loss,
        )
        model = AutoModelForCausalLM.from_pretrained(
            ROOT / MODEL, dtype=torch.float32, attn_implementation="sdpa"
        )
        assert model.config.attention_dropout == 0.0
        TokenIdTrainer(
            model,
            args=settings,
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
            callbacks=[losses],
        ).train()
    assert len(losses.logged) == STEPS
    return losses.logged


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("trl_training.json"))
    output = parser.parse_args().output
    tokenizer = AutoTokenizer.from_pretrained(ROOT / MODEL)
    pairs = draw_pairs(tokenizer)
    recorded = {
        "model": MODEL,
        "steps": STEPS,
        "pairs_per_step": PAIRS_PER_STEP,
        "learning_rate": LEARNING_RATE,
        "clip_grad": CLIP,
        "versions": {name: version(name) for name in ("trl", "transformers", "torch", "accelerate")},
        "losses": {
            name: {"hyper_parameters": ours, "steps": train(pairs, tokenizer, beta=ours["beta"], **theirs)}
            for name, (ours, theirs) in LOSSES.items()
        },
    }
    lines = ",\n".join(f"  {json.dumps(pair)}" for pair in pairs)
    head = json.dumps(recorded, indent=1).removesuffix("\n}")
    output.write_text(f'{head},\n "pairs": [\n{lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()
