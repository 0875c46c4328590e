"""The recipes of real backbones, launched by name, through every stage: a model of the backbone's architecture
with two small layers, its family's chat template and special tokens, and sizes, paths and device overridden.

As in `test_real_problems`, the model is first taught how a completion looks, and it judges itself. What a stage
computes is checked there; here, that prompt family, reasoning block, end tokens and architecture of each recipe
go through.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import processors
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    set_seed,
)

from pns.config import Data, PromptFamily
from pns.data.problems import read_problems
from pns.data.prompts import Prompts, apply_family
from small_models import (
    ANSWERS,
    HIDDEN,
    QWEN,
    REASONINGS,
    body_config,
    build_tokenizer,
    chat_tokenizer,
    drawn,
    teach,
)

ROOT = Path(__file__).parents[1]
PROBLEMS = ROOT / "tests" / "cases" / "problems.jsonl"
NUM_PROBLEMS = 16  # of the 32, those with the shortest prompts
MAX_NEW_TOKENS = 60


# Templates as the families have them, without tools.
CHATML = "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
QWEN2_TEMPLATE = (
    "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    f"{{%- for message in messages %}}{CHATML}{{%- endfor %}}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
QWEN3_TEMPLATE = (
    "{%- for message in messages %}{%- if message.role == 'assistant' %}"
    "{%- set parts = message.content.split('</think>') %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if loop.last %}{{- '<think>\\n' + (parts[0].split('<think>')[-1].strip('\\n') if parts | length > 1 else '') + '\\n</think>\\n\\n' }}{%- endif %}"
    "{{- parts[-1].lstrip('\\n') + '<|im_end|>\\n' }}"
    f"{{%- else %}}{CHATML}{{%- endif %}}{{%- endfor %}}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
LLAMA3_TEMPLATE = (
    "{{- bos_token }}{%- set system = messages[0].content | trim if messages[0].role == 'system' else '' %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\nToday Date: ' }}"
    "{{- (date_string if date_string is defined else strftime_now('%d %b %Y')) + '\\n\\n' + system + '<|eot_id|>' }}"
    "{%- for message in messages if message.role != 'system' %}"
    "{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)

# As of DeepSeek's distillations: the prompt opens the reasoning block.
DEEPSEEK_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}{%- if message.role == 'user' %}{{- '<\uff5cUser\uff5c>' + message.content }}"
    "{%- else %}{{- '<\uff5cAssistant\uff5c>' + message.content.split('</think>')[-1] + eos_token }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<\uff5cAssistant\uff5c><think>\n' }}{%- endif %}"
)

SMALL = [
    "placement.device=cpu",
    "placement.rollout.replicas=1",
    "placement.policy.replicas=1",
    "placement.verifier_processes=1",
    "rollout.engine=transformers",
    f"rollout.max_new_tokens={MAX_NEW_TOKENS}",
    "policy.max_tokens_per_micro_batch=4096",
    "data.benchmarks=[]",
    "data.decontaminate=false",  # its suite is its training set
    f"evaluate={{max_new_tokens: {MAX_NEW_TOKENS}, generator_samples: 16}}",
]
SHORT = [
    *SMALL,
    "reward.terms.plausibility.pool.replicas=1",
    "reward.terms.coherence.pool.replicas=1",
    "rl={steps: 2, problems_per_step: 8, completions_per_problem: 4}",
    "reward_model={steps: 2, pairs_per_step: 4}",
    "reverse_rl={steps: 2, problems_per_step: 8, completions_per_problem: 4}",
    "synthesize.samples_per_problem=3",
    "pair.samples_per_problem=4",
    "preference={steps: 2, pairs_per_step: 4}",
]
SHORT_BCPG = [
    *SMALL,
    "bcpg.step_judge.pool.replicas=1",
    "bcpg.process_reward.pool.replicas=1",
    "data.max_prompt_tokens=512",  # then the two recipes have the same samples, which are drawn once
    "bcpg.segments.min_tokens=4",
    "bcpg={steps: 2, problems_per_step: 8, samples_per_problem: 8}",
]


@dataclass(frozen=True)
class Family:
    """What a recipe's backbone is made of: `special` are the tokens with the first ids; completions end with
    one of `ends`, the first the tokenizer's own."""

    recipe: str
    prompt: PromptFamily
    make: type[PreTrainedModel]
    config: type[Any]
    special: tuple[str, ...]
    ends: tuple[str, ...]
    template: str
    block: tuple[str, str]  # what opens and what closes the reasoning
    own: dict[str, Any]  # of the architecture's configuration


CHATML_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML_ENDS = ("<|im_end|>", "<|endoftext|>")
LLAMA3_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 512}
FAMILIES = (
    Family(
        "qwen2.5-7b",
        PromptFamily.qwen,
        Qwen2ForCausalLM,
        Qwen2Config,
        CHATML_SPECIAL,
        CHATML_ENDS,
        QWEN2_TEMPLATE,
        ("", "\n"),
        {},
    ),
    Family(
        "llama-3.1-8b",
        PromptFamily.llama,
        LlamaForCausalLM,
        LlamaConfig,
        LLAMA3_SPECIAL,
        ("<|eot_id|>", "<|end_of_text|>"),
        LLAMA3_TEMPLATE,
        ("", "\n"),
        {"rope_parameters": LLAMA3_ROPE},
    ),
    Family(
        "qwen3-8b",
        PromptFamily.qwen,
        Qwen3ForCausalLM,
        Qwen3Config,
        CHATML_SPECIAL,
        CHATML_ENDS,
        QWEN3_TEMPLATE,
        ("<think>\n", "\n</think>\n\n"),
        {"head_dim": 32},
    ),
)


DEEPSEEK_SPECIAL = (
    *(f"<\uff5c{name}\u2581of\u2581sentence\uff5c>" for name in ("begin", "end")),
    *(f"<\uff5c{name}\uff5c>" for name in ("User", "Assistant")),
)
DEEPSEEK = Family(
    "bcpg-r1-distill-1.5b",
    PromptFamily.deepseek,
    Qwen2ForCausalLM,
    Qwen2Config,
    DEEPSEEK_SPECIAL,
    DEEPSEEK_SPECIAL[1:2],
    DEEPSEEK_TEMPLATE,
    ("", "\n</think>\n\n"),
    {},
)


def make_tokenizer(family: Family, rows: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    texts = [row[key] for row in rows for key in ("problem", "solution")]
    tags = ("<think>", "</think>") if "</think>" in family.block[1] else ()
    options = {"eos_token": family.ends[0], "chat_template": family.template}
    if family.prompt is PromptFamily.qwen:
        return build_tokenizer(texts, family.special, tags, pad_token="<|endoftext|>", **options)
    # A plain text gets the first token from the tokenizer. Llama's has no padding token, DeepSeek's is the end.
    if family.prompt is PromptFamily.deepseek:
        options["pad_token"] = family.ends[0]
    bos = family.special[0]
    tokenizer = build_tokenizer(texts, family.special, tags, bos_token=bos, **options)
    first = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    tokenizer.backend_tokenizer.post_processor = first
    return tokenizer


def make_model(family: Family, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    set_seed(0)
    config = family.config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **family.own,
    )
    model = family.make(config)
    ends = tokenizer.convert_tokens_to_ids(list(family.ends))
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    return model


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def save_service(directory: Path, head: dict[str, torch.Tensor], added: Sequence[str] = ()) -> None:
    """A chat model of random weights that reads bytes, with the tensors of a head."""
    model = AutoModelForCausalLM.from_config(body_config(max_position_embeddings=8192))
    model.save_pretrained(directory, state_dict=model.state_dict() | head)
    tokenizer = chat_tokenizer(QWEN)
    tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
    tokenizer.save_pretrained(directory)


def prepare(family: Family, directory: Path) -> list[str]:
    """Problems, a taught backbone and a reward model of random weights; the overrides that name them."""
    everything = sorted(read_rows(PROBLEMS), key=lambda row: len(row["problem"]))
    rows = everything[:NUM_PROBLEMS]
    problems = directory / "problems.jsonl"
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = make_tokenizer(family, everything)
    scorer = make_model(family, tokenizer)
    backbone = make_model(family, tokenizer)
    data = Data(prompt=PromptFamily.auto)
    apply_family(data, family.template)
    prompts = Prompts(tokenizer, data)
    opening, closing = family.block

    def draw(rng: random.Random) -> list[int]:
        """A well-formed completion; the answer is drawn blindly, so some are right and most are wrong."""
        text = f"{opening}{rng.choice(REASONINGS)}{closing}\\boxed{{{rng.choice(ANSWERS)}}}{rng.choice(family.ends)}"
        return list(tokenizer.encode(text, add_special_tokens=False))

    teach(
        backbone, [list(prompts.encode(problem)) for problem in read_problems(problems, "train")], draw, 120
    )
    for name, model in (("backbone", backbone), ("scorer", scorer)):
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    return [
        f"models.backbone={directory / 'backbone'}",
        f"data.jsonl.train={problems}",
        f"data.jsonl.suites.own={problems}",
        f"runs={directory / 'runs'}",
    ]


def run_recipe(recipe: str, directory: Path, *words: str) -> Path:
    """Run a shipped recipe in a process of its own; returns the run's directory."""
    command = [sys.executable, "-m", "pns.cli", "run", recipe, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return directory / "runs" / recipe


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.recipe)
def test_every_stage_of_a_real_recipe(tmp_path: Path, family: Family) -> None:
    words = [*prepare(family, tmp_path), f"models.reward_model={tmp_path / 'scorer'}"]
    words += [f"reward.terms.coherence.model={tmp_path / 'backbone'}"]
    run = run_recipe(family.recipe, tmp_path, *words, *SHORT)
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["prompt"] == family.prompt
    assert set(json.loads((run / "report.json").read_text())["suites"]["own"]) >= {
        "backbone",
        "target",
        "result",
    }
    for stage in ("rl", "reward_model", "reverse_rl", "preference"):
        logged = [row["values"] for row in read_rows(run / stage / "metrics.jsonl") if row["stage"] == stage]
        assert len(logged) == 2, stage
        assert all(row["update_skipped"] == 0 for row in logged), stage
        assert max(row["grad_norm"] or 0 for row in logged) > 0, stage
    for stage in ("rl", "reverse_rl", "preference"):
        config = json.loads((run / stage / "model" / "config.json").read_text())
        assert config["architectures"] == [family.make.__name__]
    written = read_rows(run / "reverse_rl" / "rollouts.jsonl")
    well_formed = [row for row in written if row["reward"]["format_ok"]]
    assert len(well_formed) > len(written) / 2
    assert all(("<think>" in row["completion"]["text"]) is bool(family.block[0]) for row in well_formed)
    wrong = [row["reward"] for row in well_formed if row["reward"]["verdict"] == "wrong"]
    assert wrong
    assert all({"plausibility", "coherence"} <= reward["terms"].keys() for reward in wrong)
    pairs = read_rows(run / "pair" / "preference.jsonl")
    roles = [message["role"] for message in pairs[0]["prompt"]]
    assert roles == (["user"] if family.prompt is PromptFamily.llama else ["system", "user"])


def test_every_stage_of_the_bcpg_recipes(tmp_path: Path) -> None:
    """The 1.5 B's with both services, all through; the 14 B's, on the same architecture, up to its labels."""
    # Of Qwen2.5-Math-PRM's form: two outputs of one hidden layer, read at a separator.
    head = {"score.0.weight": drawn(HIDDEN, HIDDEN), "score.0.bias": drawn(HIDDEN)}
    head |= {"score.2.weight": drawn(2, HIDDEN), "score.2.bias": drawn(2)}
    save_service(tmp_path / "process_reward", head, ["<extra_0>"])
    save_service(tmp_path / "step_judge", {})
    words = [*prepare(DEEPSEEK, tmp_path), *SHORT_BCPG]
    words += [f"bcpg.{name}.model={tmp_path / name}" for name in ("step_judge", "process_reward")]
    run = run_recipe(DEEPSEEK.recipe, tmp_path, *words)
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["prompt"] == DEEPSEEK.prompt
    arms = ("rft", "bcpg", "nsa")
    assert set(json.loads((run / "report.json").read_text())["suites"]["own"]) == {"backbone", *arms}
    for arm in arms:
        logged = [row["values"] for row in read_rows(run / f"bcpg_{arm}_1" / "metrics.jsonl")]
        assert len(logged) == 2, arm
        assert all(row["update_skipped"] == 0 for row in logged), arm
        assert max(row["grad_norm"] or 0 for row in logged) > 0, arm
        config = json.loads((run / f"bcpg_{arm}_1" / "model" / "config.json").read_text())
        assert config["architectures"] == ["Qwen2ForCausalLM"]
    samples = read_rows(run / "sample_nsa_1" / "rollouts.jsonl")
    assert all(row["completion"]["text"].startswith("<think>") for row in samples)
    labels = read_rows(run / "label_steps_nsa_1" / "labels.jsonl")
    assert labels
    assert not any(row["missing"] for row in labels)
    steps = [step for row in labels for step in row["steps"]]
    assert len(steps) > len(labels)  # of several steps each
    assert {type(step["judge"]) for step in steps} == {bool}
    assert all(0 <= step["process_reward"] <= 1 for step in steps)
    longer = run_recipe("bcpg-r1-distill-14b", tmp_path, *words, "--until", "label_steps")
    steps = [
        step for row in read_rows(longer / "label_steps_nsa_1" / "labels.jsonl") for step in row["steps"]
    ]
    assert {(type(step["judge"]), step["process_reward"]) for step in steps} == {(bool, None)}
