"""Shapes of language models: what decides their memory and their work, known without network or torch.

A directory has them in its config.json; so has a model of the Hub that this machine has downloaded. The table
is for the other models of the Hub, which a plan must not have to fetch.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pns.errors import UserError


@dataclass(frozen=True)
class Shape:
    """A decoder-only transformer with grouped-query attention and a gated feed-forward part (Qwen2, Qwen3,
    Llama, Mistral); lengths are numbers of elements."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    tied: bool  # the head is the embedding
    qkv_bias: bool = False
    qk_norm: bool = False
    max_positions: int = 32768

    @property
    def query_width(self) -> int:
        return self.heads * self.head_size

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_size

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer."""
        attention = 2 * self.hidden * (self.query_width + self.kv_width)  # q and o; k and v
        biases = (self.query_width + 2 * self.kv_width) * self.qkv_bias
        norms = 2 * self.hidden + 2 * self.head_size * self.qk_norm
        feed_forward = 3 * self.hidden * self.intermediate
        return attention + biases + norms + feed_forward

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embedding, and as many of a head of its own."""
        return self.vocabulary * self.hidden

    @property
    def body_parameters(self) -> int:
        """All weights but a head: embedding, layers, last norm."""
        return self.embedding_parameters + self.layers * self.layer_parameters + self.hidden

    @property
    def parameters(self) -> int:
        """All weights; a tied head counts once."""
        return self.body_parameters + (0 if self.tied else self.embedding_parameters)

    @property
    def multiplied_parameters(self) -> int:
        """Weights that every token is multiplied with: all but the embedding, which is looked up."""
        return self.layers * self.layer_parameters + self.embedding_parameters

    def kv_bytes(self, element_bytes: int = 2) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_width * element_bytes

    def lora_parameters(self, rank: int) -> int:
        """Weights of adapters on every linear layer but the head: rank times (inputs + outputs) of each."""
        attention = 2 * (self.hidden + self.query_width) + 2 * (self.hidden + self.kv_width)
        feed_forward = 3 * (self.hidden + self.intermediate)
        return self.layers * rank * (attention + feed_forward)


@dataclass(frozen=True)
class KnownModel:
    """A model of a plan: `source` says where its shape is from."""

    name: str
    shape: Shape
    source: str


def _qwen2(
    hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, tied: bool, vocabulary: int
) -> Shape:
    return Shape(
        vocabulary, hidden, layers, heads, kv_heads, hidden // heads, intermediate, tied, qkv_bias=True
    )


def _qwen3(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, tied: bool) -> Shape:
    return Shape(
        151936, hidden, layers, heads, kv_heads, 128, intermediate, tied, qk_norm=True, max_positions=40960
    )


def _llama3(hidden: int, layers: int, heads: int, head_size: int, intermediate: int, tied: bool) -> Shape:
    return Shape(128256, hidden, layers, heads, 8, head_size, intermediate, tied, max_positions=131072)


# From the config.json of each on the Hub. Instruct, Base, Coder and Math versions have their base's shape
# (Math ones fewer positions).
SHAPES: dict[str, Shape] = {
    "Qwen2.5-0.5B": _qwen2(896, 24, 14, 2, 4864, True, 151936),
    "Qwen2.5-1.5B": _qwen2(1536, 28, 12, 2, 8960, True, 151936),
    "Qwen2.5-3B": _qwen2(2048, 36, 16, 2, 11008, True, 151936),
    "Qwen2.5-7B": _qwen2(3584, 28, 28, 4, 18944, False, 152064),
    "Qwen2.5-14B": _qwen2(5120, 48, 40, 8, 13824, False, 152064),
    "Qwen2.5-32B": _qwen2(5120, 64, 40, 8, 27648, False, 152064),
    "Qwen2.5-72B": _qwen2(8192, 80, 64, 8, 29568, False, 152064),
    "Qwen3-0.6B": _qwen3(1024, 28, 16, 8, 3072, True),
    "Qwen3-1.7B": _qwen3(2048, 28, 16, 8, 6144, True),
    "Qwen3-4B": _qwen3(2560, 36, 32, 8, 9728, True),
    "Qwen3-8B": _qwen3(4096, 36, 32, 8, 12288, False),
    "Qwen3-14B": _qwen3(5120, 40, 40, 8, 17408, False),
    "Qwen3-32B": _qwen3(5120, 64, 64, 8, 25600, False),
    "Llama-3.1-8B": _llama3(4096, 32, 32, 128, 14336, False),
    "Llama-3.1-70B": _llama3(8192, 80, 64, 128, 28672, False),
    "Llama-3.2-1B": _llama3(2048, 16, 32, 64, 8192, True),
    "Llama-3.2-3B": _llama3(3072, 28, 24, 128, 8192, True),
    # Of Qwen2.5-Math, with a head of its own at every size.
    "DeepSeek-R1-Distill-Qwen-1.5B": _qwen2(1536, 28, 12, 2, 8960, False, 151936),
    "DeepSeek-R1-Distill-Qwen-7B": _qwen2(3584, 28, 28, 4, 18944, False, 152064),
    "DeepSeek-R1-Distill-Qwen-14B": _qwen2(5120, 48, 40, 8, 13824, False, 152064),
    "DeepSeek-R1-Distill-Llama-8B": _llama3(4096, 32, 32, 128, 14336, False),
}


QWEN_MATH_POSITIONS = 4096  # Qwen2.5-Math-7B, -Instruct, -PRM-7B, ...


def find_model(name: str) -> KnownModel | None:
    """The model `name`, a directory or a Hub id; None where nothing here describes it. Raises UserError for a
    config.json that has no such shape."""
    if (Path(name) / "config.json").is_file():
        return KnownModel(name, read_shape(Path(name) / "config.json"), "config.json")
    if (cached := cached_config(name)) is not None:
        return KnownModel(name, read_shape(cached), "config.json in the Hub's cache")
    if (similar := table_name(name)) is not None:
        shape = SHAPES[similar]
        if "Qwen2.5-Math-" in name:
            shape = replace(shape, max_positions=QWEN_MATH_POSITIONS)
        return KnownModel(name, shape, f"table, as {similar}")
    return None


def table_name(name: str) -> str | None:
    """The entry of `SHAPES` that a Hub id is a version of, by its name: Qwen/Qwen2.5-Math-7B-Instruct and
    OWNER/Reward-Qwen2.5-7B are Qwen2.5-7B."""
    plain = re.sub(r"-(?:Math|Coder|RM|PRM)(?=-)", "", name.rpartition("/")[2])
    plain = plain.replace("Meta-Llama", "Llama")
    # The longest first: a name that ends with another's is the more special.
    for known in sorted(SHAPES, key=len, reverse=True):
        if re.search(rf"(?<![A-Za-z0-9]){re.escape(known)}(?![\w.])(?!-A\d)", plain):
            return known
    return None


def cached_config(name: str) -> Path | None:
    """config.json of a Hub id in the local cache, where Hugging Face's libraries keep downloads."""
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser()
    snapshots = cache / f"models--{name.replace('/', '--')}" / "snapshots"
    return next(iter(sorted(snapshots.glob("*/config.json"))), None)


def read_shape(file: Path) -> Shape:
    """The shape in a config.json. Raises UserError where it has none of this kind."""
    config: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    config = config.get("text_config", config)  # of models that see, too
    experts = [key for key in ("num_experts", "num_local_experts", "n_routed_experts") if config.get(key)]
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    missing = [key for key in needed if key not in config]
    if experts or missing:
        fault = f"{experts[0]} (a mixture of experts)" if experts else f"no {missing[0]}"
        raise UserError(f"{file} has {fault}: a plan knows dense decoders alone")
    heads, kind = config["num_attention_heads"], config.get("model_type", "")
    return Shape(
        vocabulary=config["vocab_size"],
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate=config["intermediate_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=kind == "qwen2" or bool(config.get("attention_bias")),
        qk_norm=kind == "qwen3",
        max_positions=config.get("max_position_embeddings", 32768),
    )
