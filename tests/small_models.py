r"""Small models for tests of whole runs: a byte-pair tokenizer, and the few seconds of supervised training that
teach a model of random weights *how* a completion may look, and nothing about problems. And parts of reward
models, drawn at random."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config

VOCABULARY = 1500  # at most: 32 problems give fewer merges
ANSWERS = ("3", "4", "5", r"\frac{1}{2}")
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

REASONINGS = (
    r"Let $x$ be the number. Then $\frac{x}{2}+x=y$, so $x=y-1$.",
    r"We have \[\sqrt{a^2+b^2}=c.\] Thus $a < b$.",
    r"By symmetry, $\angle ABC = 90^\circ$",
    r"There are $\binom{n}{k}$ ways, naïvely.",
    "She has <<6-2=4>>4 left.\nSo 4.",
    r"First, $2x+1=7$, hence $x=3$",
    r"Half of them: $1 \div 2 = \frac{1}{2}$",
)


def build_tokenizer(
    texts: list[str], special: Sequence[str], tags: Sequence[str] = (), **options: Any
) -> PreTrainedTokenizerFast:
    """Trained on `texts`; `special` tokens have the first ids; `options` are the tokenizer's."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - 2,
            special_tokens=list(special),
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    # As in Qwen3: they are text.
    backend.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in tags])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def teach(
    model: PreTrainedModel,
    prompts: list[list[int]],
    draw_completion: Callable[[random.Random], list[int]],
    steps: int = 260,
) -> None:
    """Supervised training on drawn completions after drawn prompts (token ids)."""
    rng = random.Random(0)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        batch = [(rng.choice(prompts), draw_completion(rng)) for _ in range(16)]
        width = max(len(prompt) + len(answer) for prompt, answer in batch)
        ids, labels = torch.zeros(16, width, dtype=torch.long), torch.full((16, width), -100)
        for i, (prompt, answer) in enumerate(batch):
            ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        taught = labels[:, 1:] != -100
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[taught]), labels[:, 1:][taught])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


HIDDEN = 32  # width of the reward models
QWEN = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Bytes as tokens; like Llama's, it puts a first token before plain text."""
    alphabet = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    special += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    backend.add_special_tokens(special)
    backend.add_tokens(["[tool]"])
    first = [("<s>", len(alphabet))]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=first)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", pad_token="<pad>", chat_template=template
    )


def body_config(kind: type = Qwen2Config, **settings: Any) -> Any:
    shape = {
        "vocab_size": 272,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    return kind(**(shape | settings))


def drawn(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator) / 4
