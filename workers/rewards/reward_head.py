"""Body and head of a reward model, read from its checkpoint by the names that published models use."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from pns.errors import UserError
from workers.runtime import Runtime

HEADS = ("score", "v_head", "reward_head", "value_head", "classifier", "regression_layer")
# Linear; and (Qwen2.5-Math-RM) linear, ReLU, linear.
_LINEAR = {"weight", "bias"}
_MLP = {"0.weight", "0.bias", "2.weight", "2.bias"}


def trusts_code(model_path: str, runtime: Runtime) -> bool:
    """Whether what comes with a model is run: only where transformers has nothing of its own."""
    stored, _ = PreTrainedConfig.get_config_dict(model_path)
    return runtime.trust_remote_code and stored.get("model_type") not in CONFIG_MAPPING


def load_body(model_path: str, runtime: Runtime, head_names: set[str], kind: str = "reward model") -> Any:
    """The body of a model directory or Hub id, of which `head_names` are the tensors of the head; float32 on
    CPU, bfloat16 on a GPU.

    Raises UserError where weights are missing or left over; `kind` names the model in it.
    """
    trust = trusts_code(model_path, runtime)
    body, report = AutoModel.from_pretrained(
        model_path,
        config=AutoConfig.from_pretrained(model_path, trust_remote_code=trust),
        dtype=torch.float32 if runtime.device == "cpu" else torch.bfloat16,
        trust_remote_code=trust,
        output_loading_info=True,
    )
    missing = sorted(report["missing_keys"])
    if missing:  # drawn at random instead
        fault = f"lacks {len(missing)} weights ({missing[0]}, ...)"
        raise UserError(f"{kind} {model_path} {fault}: name a complete checkpoint")
    unused = sorted(name for name in report["unexpected_keys"] - head_names if "lm_head." not in name)
    if unused:
        fault = f"has {len(unused)} weights that its architecture does not use ({unused[0]}, ...)"
        raise UserError(f"{kind} {model_path} {fault}: name a causal model with one head")
    return body.base_model.to(runtime.device).eval()


def load_head(
    model_path: str, kind: str = "reward model", outputs: tuple[int, ...] = (1,)
) -> tuple[torch.nn.Module, set[str]]:
    """The head of a model directory or Hub id, (B, hidden) -> (B, one of `outputs`), in float32; and the
    names of its tensors in the checkpoint.

    Raises UserError where there is none, more than one, or one of another form or number of outputs (`kind`
    names the model in it); OSError where there are no safetensors.
    """
    file_of = _tensor_files(model_path)
    names = {name for name in file_of if name.partition(".")[0] in HEADS}
    if not names:
        way_out = f"name a {kind} that was trained here or published"
        raise UserError(f"{kind} {model_path} has no reward head ({', '.join(HEADS)}): {way_out}")
    if len({name.partition(".")[0] for name in names}) > 1:
        way_out = "name a model with one"
        raise UserError(f"{kind} {model_path} has several heads, {_said(names)}: {way_out}")
    # TRL puts its head into a module `summary`.
    tensors = {
        name.partition(".")[2].removeprefix("summary."): _read(model_path, file_of[name], name)
        for name in names
    }
    if tensors.keys() not in (_LINEAR, {"weight"}, _MLP) or len(tensors) < len(names):
        fault = f"has a head of an unknown form, {_said(names)}"
        raise UserError(f"{kind} {model_path} {fault}: name a model with a linear head or one hidden layer")
    num_outputs = tensors["2.weight" if "2.weight" in tensors else "weight"].shape[0]
    if num_outputs not in outputs:
        raise UserError(several_outputs(model_path, num_outputs, kind))
    head = _module(tensors, num_outputs)
    head.load_state_dict(tensors)
    return head.requires_grad_(False), names


def several_outputs(model_path: str, num_outputs: int, kind: str = "reward model") -> str:
    """What is wrong with a model that gives several numbers."""
    if kind != "reward model":
        needed = "it needs one for each step, or two (wrong, correct)"
        return f"{kind} {model_path} has {num_outputs} outputs: {needed}; name another model"
    return (
        f"reward model {model_path} has {num_outputs} outputs: it grades steps or several objectives, and a "
        "term needs one number a completion; name an outcome reward model"
    )


def _module(tensors: dict[str, torch.Tensor], num_outputs: int) -> torch.nn.Module:
    if "weight" in tensors:
        return torch.nn.Linear(tensors["weight"].shape[1], num_outputs, bias="bias" in tensors)
    num_hidden, num_inputs = tensors["0.weight"].shape
    first, last = torch.nn.Linear(num_inputs, num_hidden), torch.nn.Linear(num_hidden, num_outputs)
    return torch.nn.Sequential(first, torch.nn.ReLU(), last)


def _tensor_files(model_path: str) -> dict[str, str]:
    """Tensor name -> name of its file, of one file of weights or of several with an index."""
    try:
        single = cached_file(model_path, SAFE_WEIGHTS_NAME)
    except OSError:
        index = Path(cached_file(model_path, SAFE_WEIGHTS_INDEX_NAME))
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    with safe_open(single, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), SAFE_WEIGHTS_NAME)


def _read(model_path: str, file: str, name: str) -> torch.Tensor:
    with safe_open(cached_file(model_path, file), framework="pt") as tensors:
        return tensors.get_tensor(name).float()


def _said(names: set[str]) -> str:
    return ", ".join(sorted(names))
