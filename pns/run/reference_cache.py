"""Log-probabilities under a reference policy, computed once and kept for every later run with the same model,
tokenizer and rows.

`<directory>/<digest of the key>.logprobs` is one line of JSON, the header, and the values of all rows end to
end, little-endian float32. A file is used only if it is exactly what the key and the rows ask for; any
other is computed again and replaced.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pns.errors import UserError
from pns.files import replacing, sha256_of_files, sha256_of_json

if TYPE_CHECKING:
    from workers.training.batching import Batch
    from workers.training.policy import Policy

_FORMAT = 1  # another number makes all files of before unknown
_WEIGHTS = ("*.safetensors", "*.bin")
_MODEL_FILES = (*_WEIGHTS, "*.index.json", "config.json", "adapter_config.json", "*.py")
# Of all kinds of tokenizers; a checkpoint has some of them.
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "*.model", "*.tiktoken", "*_tokens*.json", "*.jinja")


@dataclass(frozen=True)
class ReferenceKey:
    """Everything reference log-probabilities depend on; the first three are SHA-256 in hexadecimal."""

    model: str  # weights, configuration and code
    tokenizer: str  # tokenizer and chat template
    rows: str  # token ids of every prompt and completion, in order
    dtype: str  # the forward pass's compute dtype

    @property
    def digest(self) -> str:
        return sha256_of_json(asdict(self))


def reference_key(
    model: Path,
    tokenizer: Path,
    prompt_ids: Sequence[Sequence[int] | np.ndarray],
    completion_ids: Sequence[Sequence[int] | np.ndarray],
    dtype: str,
) -> ReferenceKey:
    """The key for rows of `prompt_ids` and `completion_ids` under the checkpoint in directory `model`
    (adapters included), with the tokenizer and chat template in directory `tokenizer`. Contents are read, in
    pieces; names and times of directories do not matter.

    Raises UserError where there are no weights or no tokenizer (a Hub id has to be resolved to its snapshot's
    directory first).
    """
    if not any(path for pattern in _WEIGHTS for path in model.glob(pattern)):
        kinds = " or ".join(_WEIGHTS)
        raise UserError(f"{model} holds no weights ({kinds}): name the directory of a checkpoint")
    if not any(tokenizer.glob("tokenizer*")):
        fault = "holds no tokenizer files (tokenizer*)"
        raise UserError(f"{tokenizer} {fault}: name a checkpoint with a tokenizer")
    rows = hashlib.sha256()
    for prompt, completion in zip(prompt_ids, completion_ids, strict=True):
        rows.update(np.asarray([len(prompt), len(completion), *prompt, *completion], dtype="<i8").tobytes())
    weights, words = _hash_files(model, _MODEL_FILES), _hash_files(tokenizer, _TOKENIZER_FILES)
    return ReferenceKey(weights, words, rows.hexdigest(), dtype)


def reference_log_probs(policy: Policy, directory: Path, model: Path, rows: Batch) -> Sequence[np.ndarray]:
    """Log-probabilities of every completion token under the checkpoint in directory `model`, which `policy`
    holds untrained: those kept in `directory`, or computed and kept there."""
    key = reference_key(model, model, rows.prompt_ids, rows.completion_ids, policy.compute_dtype)
    kept = load_log_probs(directory, key, [len(ids) for ids in rows.completion_ids])
    if kept is not None:
        return kept
    computed = policy.log_probs(rows)
    save_log_probs(directory, key, computed)
    return computed


def load_log_probs(
    directory: Path, key: ReferenceKey, lengths: Sequence[int]
) -> list[NDArray[np.float32]] | None:
    """The rows kept for `key`, of `lengths` values each; None where there is no file, or one that is damaged
    or was made otherwise."""
    try:
        with open(directory / f"{key.digest}.logprobs", "rb") as file:
            header, values = file.readline(), file.read()
    except FileNotFoundError:
        return None
    if header != _header(key, lengths, values) or len(values) != 4 * sum(lengths):  # 4 bytes: float32
        return None
    flat = np.frombuffer(values, dtype="<f4").astype(np.float32)
    if not np.isfinite(flat).all():
        return None
    ends = np.cumsum(lengths, dtype=np.int64)
    return [flat[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def save_log_probs(
    directory: Path, key: ReferenceKey, rows: Iterable[Sequence[float] | NDArray[Any]]
) -> Path:
    """Keep `rows` of log-probabilities for `key`, and return the file. Readers and other writers of the same
    key see an old file or a whole new one. Raises ValueError for a value that is not finite."""
    arrays = [np.asarray(row, dtype="<f4") for row in rows]
    for number, array in enumerate(arrays):
        if not np.isfinite(array).all():
            raise ValueError(f"reference log-probabilities of row {number} are not finite")
    values = b"".join(array.tobytes() for array in arrays)
    path = directory / f"{key.digest}.logprobs"
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(_header(key, [len(array) for array in arrays], values))
        file.write(values)
    return path


def _header(key: ReferenceKey, lengths: Sequence[int], values: bytes) -> bytes:
    fields = {
        "format": _FORMAT,
        **asdict(key),
        "num_rows": len(lengths),
        "lengths": hashlib.sha256(np.asarray(lengths, dtype="<i8").tobytes()).hexdigest(),
        "values": hashlib.sha256(values).hexdigest(),
    }
    return json.dumps(fields).encode() + b"\n"


def _hash_files(directory: Path, patterns: Sequence[str]) -> str:
    paths = {path for pattern in patterns for path in directory.glob(pattern) if path.is_file()}
    return sha256_of_files((path.name, path) for path in sorted(paths))
