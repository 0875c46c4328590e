"""A model directory as `save_pretrained` writes it, read without torch or transformers: configuration, the
tensors of its safetensors files, its vocabulary and its chat template."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pns.errors import UserError

HEADS = ("lm_head.", "score.", "v_head.", "reward_head.", "value_head.", "classifier.", "regression_layer.")
# Dense decoders whose tensors are known here, by model_type; of others transformers alone knows them.
_DECODERS = ("llama", "mistral", "qwen2", "qwen3")
# Of a configuration's architectures: what has no head that writes.
_NO_LANGUAGE_MODEL = ("Classification", "QuestionAnswering", "MaskedLM", "RewardModel", "Model")
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_SAMPLED = 65536  # elements of a tensor that are looked at, in two places
_NOT_FINITE = 0x7F80  # all bits of a bfloat16's exponent
_LONGEST_HEADER = 100_000_000  # bytes, as the format allows


@dataclass(frozen=True)
class Tensor:
    """One tensor of a safetensors file: `dtype` in the format's words, the place of its bytes in `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class ModelDirectory:
    """The files of the model directory `path`, that the configuration names by `key`. Everything raises
    UserError with key, file and way out."""

    def __init__(self, key: str, path: Path) -> None:
        self.key, self.path = key, path

    def fault(self, what: str, way_out: str) -> UserError:
        return UserError(f"{self.key}: {self.path} {what}: {way_out}")

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """config.json, or that of its text model."""
        own = self._json("config.json", "name a directory saved by save_pretrained")
        return own | own.get("text_config", {})

    @cached_property
    def tokenizer(self) -> Mapping[str, Any]:
        return self._json("tokenizer.json", "save the tokenizer beside the model")

    @cached_property
    def tokenizer_config(self) -> Mapping[str, Any]:
        file = "tokenizer_config.json"
        return self._json(file, "save the tokenizer again") if (self.path / file).is_file() else {}

    def _json(self, name: str, way_out: str) -> dict[str, Any]:
        file = self.path / name
        if not file.is_file():
            raise self.fault(f"has no {name}", way_out)
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            line = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
            raise self.fault(
                f"has a {name} that is no JSON{line}", "copy it again, or save it anew"
            ) from error
        if not isinstance(value, dict):
            raise self.fault(f"has a {name} that is no JSON object", "copy it again, or save it anew")
        return value

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name, of the files that are read: those of the index, else model.safetensors,
        else all."""
        index = "model.safetensors.index.json"
        if (self.path / "model.safetensors").is_file() or not (self.path / index).is_file():
            single = self.path / "model.safetensors"
            files = [single] if single.is_file() else sorted(self.path.glob("*.safetensors"))
            if not files:
                way_out = "save the model with safe_serialization"
                if (self.path / "adapter_config.json").is_file():
                    way_out = "merge the adapter into its base, and save that"
                raise self.fault("has no *.safetensors", way_out)
            return {name: tensor for file in files for name, tensor in self._header(file)}
        weight_map = self._json(index, "copy it again").get("weight_map", {})
        for name in dict.fromkeys(weight_map.values()):
            if not (self.path / name).is_file():
                raise self.fault(f"lacks {name}, which {index} names", "fetch the whole checkpoint again")
        found = {
            name: tensor
            for file in dict.fromkeys(weight_map.values())
            for name, tensor in self._header(self.path / file)
        }
        if missing := sorted(weight_map.keys() - found.keys()):
            raise self.fault(f"lacks {missing[0]}, which {index} names", "fetch the whole checkpoint again")
        return found

    def _header(self, file: Path) -> Iterator[tuple[str, Tensor]]:
        """The format: 8 bytes with the header's length, the header as JSON, the tensors' bytes."""
        again = "copy or save the model again"
        size = file.stat().st_size
        try:
            with open(file, "rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
                    raise ValueError("its header is longer than the file")
                header = json.loads(opened.read(length))
            header.pop("__metadata__", None)
            for name, said in header.items():
                begin, end = said["data_offsets"]
                if 8 + length + end > size:
                    raise ValueError(f"it ends in the middle of {name}")
                yield (
                    name,
                    Tensor(file, said["dtype"], tuple(said["shape"]), 8 + length + begin, 8 + length + end),
                )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            cause = (
                "its header is no JSON"
                if isinstance(error, UnicodeDecodeError | json.JSONDecodeError)
                else error
            )
            raise self.fault(f"has a damaged {file.name} ({cause})", again) from error

    def check_weights(self, head: bool) -> None:
        """All tensors that the configuration asks for are there, in their shapes, with finite numbers where
        they are looked at; `head`: that of a language model too."""
        prefix = "model."
        have = {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items()}
        expected = expected_shapes(self.config, head)
        if missing := [name for name in expected if name not in have]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            fault = f"lacks the tensor {missing[0]}{more}"
            raise self.fault(fault, "it would be drawn at random; name a complete checkpoint")
        for name, shape in expected.items():
            if have[name].shape != shape:
                own, asked = list(have[name].shape), list(shape)
                fault = f"has {name} of shape {own}, and its config.json asks for {asked}"
                raise self.fault(fault, "name the configuration that was saved with it")
        for name, tensor in self.tensors.items():
            if not is_finite(tensor):
                fault = f"has numbers that are not finite in {name}"
                raise self.fault(fault, "name a checkpoint from before they came")

    def check_architecture(self, language_model: bool) -> None:
        """transformers has the model_type (or the model brings its own code), and a `language_model` is no
        classifier."""
        kind = self.config.get("model_type", "")
        if not self.config.get("auto_map") and not known_to_transformers(kind):
            fault = f"is of model_type {kind!r}, which the installed transformers does not have"
            raise self.fault(fault, "name another model, or install a version that has it")
        named = self.config.get("architectures") or [""]
        if language_model and named[0].endswith(_NO_LANGUAGE_MODEL):
            raise self.fault(f"is a {named[0]}", "name a language model (...ForCausalLM)")

    def check_vocabulary(self) -> None:
        """The tokenizer has no id beyond the model's. A smaller one is fine: many models pad embeddings."""
        vocabulary = self.tokenizer.get("model", {}).get("vocab", {})
        # Unigram tokenizers have a list, whose places are the ids.
        ids = [*(vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary)))]
        ids += [token["id"] for token in self.tokenizer.get("added_tokens", [])]
        size, known = max(ids, default=-1) + 1, self.config.get("vocab_size", 0)
        if size > known:
            fault = f"has a tokenizer of {size} tokens and a model of {known}"
            raise self.fault(fault, "resize the model's embeddings or use the model's own tokenizer")

    @cached_property
    def chat_template(self) -> str | None:
        """The template that transformers takes; None: the tokenizer has none."""
        file = self.path / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        said = self.tokenizer_config.get("chat_template")
        if isinstance(said, list):  # several, by their names
            return {own["name"]: own["template"] for own in said}.get("default")
        return said

    def render(self, messages: Sequence[Mapping[str, str]], **values: Any) -> str:
        """The turns and the opening of the assistant's, through the chat template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: form}
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
        said = {name: self._token(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        try:
            template = environment.from_string(self.chat_template or "")
            return template.render(messages=messages, add_generation_prompt=True, **(said | values))
        except (TemplateError, TypeError, ValueError) as error:
            where = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
            raise self.fault(f"has a chat template that fails ({error}{where})", "mend it") from error

    def _token(self, name: str) -> str:
        value = self.tokenizer_config.get(name)
        return str(value["content"] if isinstance(value, dict) else value or "")

    @property
    def context(self) -> int | None:
        """Tokens of prompt and completion together, at most."""
        value = self.config.get("max_position_embeddings")
        return value if isinstance(value, int) else None

    def linear_layers(self) -> set[str]:
        """Names of the modules whose weight is a matrix, but the embedding and heads."""
        return {
            name.removesuffix(".weight")
            for name, tensor in self.tensors.items()
            if name.endswith(".weight")
            and len(tensor.shape) == 2
            and "embed" not in name
            and not name.startswith(HEADS)
        }


def expected_shapes(config: Mapping[str, Any], head: bool) -> dict[str, tuple[int, ...]]:
    """Tensor name, without `model.`, -> shape, of the decoders that are known here; none of others, and of
    quantised ones, whose tensors have other names."""
    kind = config.get("model_type")
    if kind not in _DECODERS or config.get("quantization_config"):
        return {}
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    query, inner = heads * size, config["intermediate_size"]
    key_value = (config.get("num_key_value_heads") or heads) * size
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key_value, hidden),
        "self_attn.v_proj.weight": (key_value, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if kind == "qwen2" or config.get("attention_bias"):
        widths = {"q": query, "k": key_value, "v": key_value}
        layer |= {f"self_attn.{name}_proj.bias": (width,) for name, width in widths.items()}
    if kind == "qwen3":
        layer |= {f"self_attn.{name}_norm.weight": (size,) for name in "qk"}
    embedding = {"embed_tokens.weight": (config["vocab_size"], hidden), "norm.weight": (hidden,)}
    layers = range(config["num_hidden_layers"])
    expected = embedding | {f"layers.{i}.{name}": shape for i in layers for name, shape in layer.items()}
    if head and not config.get("tie_word_embeddings", False):
        expected["lm_head.weight"] = embedding["embed_tokens.weight"]
    return expected


def is_finite(tensor: Tensor) -> bool:
    """Of floating-point numbers, at its beginning and in its middle."""
    if tensor.dtype not in _FLOATS or not math.prod(tensor.shape):
        return True
    kind = np.dtype(_FLOATS[tensor.dtype])
    count = min(math.prod(tensor.shape), _SAMPLED)
    middle = (math.prod(tensor.shape) - count) // 2
    for start in {0, middle}:
        place = tensor.begin + start * kind.itemsize
        values = np.fromfile(tensor.file, kind, count, offset=place)
        broken = values & _NOT_FINITE == _NOT_FINITE if tensor.dtype == "BF16" else ~np.isfinite(values)
        if broken.any():
            return False
    return True


def known_to_transformers(kind: str) -> bool:
    """Whether the installed transformers has the model_type; looked up in the text of its tables, as its
    import takes seconds. True where it is not installed here."""
    package = find_spec("transformers")
    if package is None or not package.submodule_search_locations:
        return True
    tables = Path(package.submodule_search_locations[0]) / "models" / "auto"
    return any(f'"{kind}"' in file.read_text(encoding="utf-8") for file in tables.glob("*.py"))


def _refuse(message: str) -> None:
    """What templates call where they take no such turn."""
    raise TemplateError(message)


class _Generation(Extension):
    """The tag {% generation %} of templates for training, which shows nothing of itself."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
