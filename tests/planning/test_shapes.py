"""Shapes: parameter counts as published, and where a shape is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pns.errors import UserError
from pns.planning.shapes import SHAPES, find_model, read_shape, table_name

ROOT = Path(__file__).parents[2]

# Billions, from the model cards; of Llama and of the distilled models from the Hub's count of safetensors.
PUBLISHED = {
    "Qwen2.5-0.5B": 0.494,
    "Qwen2.5-1.5B": 1.54,
    "Qwen2.5-3B": 3.09,
    "Qwen2.5-7B": 7.61,
    "Qwen2.5-14B": 14.7,
    "Qwen2.5-32B": 32.5,
    "Qwen2.5-72B": 72.7,
    "Qwen3-0.6B": 0.6,
    "Qwen3-1.7B": 1.72,
    "Qwen3-4B": 4.02,
    "Qwen3-8B": 8.19,
    "Qwen3-14B": 14.8,
    "Qwen3-32B": 32.8,
    "Llama-3.1-8B": 8.03,
    "Llama-3.1-70B": 70.6,
    "Llama-3.2-1B": 1.24,
    "Llama-3.2-3B": 3.21,
    "DeepSeek-R1-Distill-Qwen-1.5B": 1.78,
    "DeepSeek-R1-Distill-Qwen-7B": 7.62,
    "DeepSeek-R1-Distill-Qwen-14B": 14.8,
    "DeepSeek-R1-Distill-Llama-8B": 8.03,
}


def test_parameter_counts_are_the_published_ones() -> None:
    assert SHAPES.keys() == PUBLISHED.keys()
    for name, billions in PUBLISHED.items():
        assert SHAPES[name].parameters / 1e9 == pytest.approx(billions, rel=0.01), name


def test_parameters_by_hand() -> None:
    shape = SHAPES["Qwen2.5-7B"]
    layer = (
        3584 * 3584 * 2  # q, o
        + 3584 * 512 * 2  # k, v
        + 3584 + 2 * 512  # their biases
        + 3 * 3584 * 18944  # gate, up, down
        + 2 * 3584  # norms
    )  # fmt: skip
    assert shape.layer_parameters == layer
    assert shape.parameters == 28 * layer + 3584 + 2 * 152064 * 3584
    assert shape.kv_bytes() == 2 * 28 * 512 * 2


def test_the_shipped_models_have_the_weights_that_their_shapes_say() -> None:
    from safetensors import safe_open

    for name in ("qwen2", "qwen3", "llama"):
        directory = ROOT / "recipes/tiny" / name
        with safe_open(directory / "model.safetensors", framework="np") as stored:
            sizes = {key: stored.get_slice(key).get_shape() for key in stored.keys()}  # noqa: SIM118
        num = sum(size[0] * (size[1] if len(size) > 1 else 1) for size in sizes.values())
        assert read_shape(directory / "config.json").parameters == num, name


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("Qwen/Qwen2.5-Math-7B-Instruct", "Qwen2.5-7B"),
        ("Qwen/Qwen2.5-Coder-14B", "Qwen2.5-14B"),
        ("Qwen/Qwen2.5-Math-RM-72B", "Qwen2.5-72B"),
        ("Qwen/Qwen3-4B-Instruct-2507", "Qwen3-4B"),
        ("Skywork/Skywork-Reward-V2-Qwen3-4B", "Qwen3-4B"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "Llama-3.1-8B"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "DeepSeek-R1-Distill-Qwen-7B"),
        ("Qwen/Qwen3-30B-A3B", None),
        ("someone/Qwen2.5-7.5B", None),
        ("someone/other", None),
    ],
)
def test_a_version_has_the_shape_of_its_base(name: str, known: str | None) -> None:
    assert table_name(name) == known


def test_a_downloaded_model_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert find_model("someone/other") is None
    snapshot = tmp_path / "models--someone--other" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    config = json.loads((ROOT / "recipes/tiny/qwen2/config.json").read_text())
    (snapshot / "config.json").write_text(json.dumps(config))
    found = find_model("someone/other")
    assert found is not None
    assert found.shape.hidden == 128
    assert found.source == "config.json in the Hub's cache"


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    config = json.loads((ROOT / "recipes/tiny/qwen2/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_experts": 8}))
    with pytest.raises(UserError, match="num_experts"):
        find_model(str(tmp_path))
