"""What can be wrong with models and tokenizers, found before anything heavy is imported or started."""

import json
import re
from collections.abc import Collection
from pathlib import Path

from pns.config import Config, GeneratorStart, services, step_services
from pns.errors import UserError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def check_models(config: Config, stages: Collection[str]) -> None:
    """Every model that `stages` use is a directory with a config, weights and a tokenizer of the model's
    vocabulary size, or a Hub id.

    Raises UserError.
    """
    named = {"models.backbone": config.models.backbone}
    if "reward_model" in stages and config.models.reward_model:
        named["models.reward_model"] = config.models.reward_model
    if "reverse_rl" in stages:
        for name, term in config.reward.terms.items():
            if term.weight > 0 and term.model and not term.endpoint.url:
                named[f"reward.terms.{name}.model"] = term.model
        if config.reverse_rl.start is GeneratorStart.path:
            named["models.generator"] = config.models.generator
    if "label_steps" in stages:
        for name in step_services(config):
            if not services(config)[name].url:
                named[f"bcpg.{name}.model"] = services(config)[name].model
    for key, value in named.items():
        check_model(key, value)


def check_model(key: str, value: str) -> None:
    """One model directory or Hub id, named by the configuration's `key`. Raises UserError."""
    path = Path(value)
    if not value:
        raise UserError(f"{key} is empty: name a model directory or a Hub id")
    if not path.exists():
        # In a directory that is there, `models/absnt` is a path with a slip, not a Hub id.
        if HUB_ID.fullmatch(value) and not path.parent.is_dir():
            return
        raise UserError(f"{key}: {value} is neither a directory that exists nor a Hub id (owner/name)")
    config_file, tokenizer_file = path / "config.json", path / "tokenizer.json"
    if not config_file.is_file():
        raise UserError(f"{key}: {value} has no config.json; name a directory saved by save_pretrained")
    if not list(path.glob("*.safetensors")):
        raise UserError(f"{key}: {value} has no *.safetensors; save the model with safe_serialization")
    if not tokenizer_file.is_file():
        raise UserError(f"{key}: {value} has no tokenizer.json; save the tokenizer beside the model")
    model = json.loads(config_file.read_text(encoding="utf-8"))
    tokenizer = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    # Unigram tokenizers have a list, whose places are the ids.
    ids = [*(vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary)))]
    ids += [token["id"] for token in tokenizer.get("added_tokens", [])]
    size = max(ids, default=-1) + 1
    # A smaller tokenizer is fine: many models pad their embeddings to a round number.
    if size > model.get("vocab_size", 0):
        fault = f"{value} has a tokenizer of {size} tokens and a model of {model.get('vocab_size')}"
        way_out = "resize the model's embeddings or use the model's own tokenizer"
        raise UserError(f"{key}: {fault}; {way_out}")
