"""The cache of reference log-probabilities: reused for the same model, tokenizer and rows, and never
otherwise."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pns.errors import UserError
from pns.run.reference_cache import ReferenceKey, load_log_probs, reference_key, save_log_probs

MODEL = Path(__file__).parents[2] / "recipes" / "tiny" / "qwen2"
PROMPTS = [[5, 6, 7], [5, 6]]
COMPLETIONS = [[8, 9], [7, 8, 9]]
ROWS = [np.array([-0.5, -1e-9], dtype=np.float32), np.array([-30.0, 0.0, -2.25], dtype=np.float32)]
LENGTHS = [2, 3]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    shutil.copytree(MODEL, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def key() -> ReferenceKey:
    return reference_key(MODEL, MODEL, PROMPTS, COMPLETIONS, "float32")


def test_what_was_saved_comes_back(tmp_path: Path, key: ReferenceKey) -> None:
    assert load_log_probs(tmp_path / "cache", key, LENGTHS) is None
    save_log_probs(tmp_path / "cache", key, ROWS)
    found = load_log_probs(tmp_path / "cache", key, LENGTHS)
    assert found is not None
    assert [row.tolist() for row in found] == [row.tolist() for row in ROWS]
    assert {row.dtype for row in found} == {np.dtype(np.float32)}
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_same_content_elsewhere_has_the_same_key(model: Path, key: ReferenceKey) -> None:
    (model / "README.md").write_text("not part of the model")
    assert reference_key(model, model, PROMPTS, COMPLETIONS, "float32") == key


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("model.safetensors", "model"),
        ("config.json", "model"),
        ("adapter_model.safetensors", "model"),
        ("tokenizer.json", "tokenizer"),
        ("tokenizer_config.json", "tokenizer"),
        ("chat_template.jinja", "tokenizer"),
    ],
)
def test_every_file_of_model_and_tokenizer_counts(
    model: Path, key: ReferenceKey, file: str, part: str
) -> None:
    with open(model / file, "ab") as changed:
        changed.write(b" ")
    other = reference_key(model, model, PROMPTS, COMPLETIONS, "float32")
    assert other == replace(key, **{part: getattr(other, part)})
    assert other.digest != key.digest


@pytest.mark.parametrize(
    ("prompts", "completions"),
    [
        ([[5, 6, 7], [5, 4]], COMPLETIONS),
        (PROMPTS, [[8, 9], [7, 8, 1]]),
        ([[5, 6], [5, 6]], [[7, 8, 9], [7, 8, 9]]),  # the prompt ends elsewhere
        (PROMPTS[::-1], COMPLETIONS[::-1]),
        (PROMPTS[:1], COMPLETIONS[:1]),
    ],
)
def test_every_token_its_place_and_the_dtype_count(
    key: ReferenceKey, prompts: list[list[int]], completions: list[list[int]]
) -> None:
    other = reference_key(MODEL, MODEL, prompts, completions, "float32")
    assert other == replace(key, rows=other.rows)
    assert other.digest != key.digest
    assert reference_key(MODEL, MODEL, PROMPTS, COMPLETIONS, "bfloat16").digest != key.digest


def test_a_damaged_file_is_not_used_and_is_replaced(tmp_path: Path, key: ReferenceKey) -> None:
    path = save_log_probs(tmp_path, key, ROWS)
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        assert load_log_probs(tmp_path, key, LENGTHS) is None, f"cut at {end} of {len(whole)}"
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert load_log_probs(tmp_path, key, LENGTHS) is None, f"a bit of byte {at} flipped"
    path.write_bytes(whole + b"\0")
    assert load_log_probs(tmp_path, key, LENGTHS) is None
    save_log_probs(tmp_path, key, ROWS)
    assert path.read_bytes() == whole
    assert load_log_probs(tmp_path, key, LENGTHS) is not None


def test_a_file_of_another_key_or_other_lengths_is_not_used(tmp_path: Path, key: ReferenceKey) -> None:
    path = save_log_probs(tmp_path, key, ROWS)
    other = replace(key, model="0" * 64)
    path.rename(tmp_path / f"{other.digest}.logprobs")
    assert load_log_probs(tmp_path, other, LENGTHS) is None
    save_log_probs(tmp_path, key, ROWS)
    assert load_log_probs(tmp_path, key, [3, 2]) is None
    assert load_log_probs(tmp_path, key, [2, 3, 0]) is None


def test_values_that_are_not_finite_are_neither_kept_nor_used(tmp_path: Path, key: ReferenceKey) -> None:
    with pytest.raises(ValueError, match="row 1 are not finite"):
        save_log_probs(tmp_path, key, [ROWS[0], [-1.0, float("nan"), -1.0]])
    assert list(tmp_path.iterdir()) == []
    path = save_log_probs(tmp_path, key, ROWS)
    header, values = path.read_bytes().split(b"\n", 1)
    spoilt = np.array([-0.5, np.inf, -30, 0, -2.25], dtype="<f4").tobytes()
    old, new = (hashlib.sha256(each).hexdigest().encode() for each in (values, spoilt))
    path.write_bytes(header.replace(old, new) + b"\n" + spoilt)
    assert load_log_probs(tmp_path, key, LENGTHS) is None


def test_writers_at_the_same_time_leave_one_whole_file(tmp_path: Path, key: ReferenceKey) -> None:
    rows = [np.full(50_000, -float(i), dtype=np.float32) for i in range(4)]
    save_log_probs(tmp_path, key, rows)
    with ThreadPoolExecutor(8) as pool:
        writes = [pool.submit(save_log_probs, tmp_path, key, rows) for _ in range(16)]
        reads = [pool.submit(load_log_probs, tmp_path, key, [50_000] * 4) for _ in range(16)]
    assert all(write.result() for write in writes)
    for read in reads:
        found = read.result()
        assert found is not None
        assert [row[-1] for row in found] == [-0.0, -1.0, -2.0, -3.0]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_directory_without_weights_or_tokenizer_is_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"org/name holds no weights .*: name the directory"):
        reference_key(Path("org/name"), model, PROMPTS, COMPLETIONS, "float32")
    with pytest.raises(UserError, match="holds no tokenizer files"):
        reference_key(model, tmp_path, PROMPTS, COMPLETIONS, "float32")


def test_it_loads_no_heavy_library() -> None:
    code = "import sys, pns.run.reference_cache; assert not {'torch', 'transformers', 'ray', 'verl', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
