"""What this project calls of the GPU environment's libraries binds to their signatures, on a machine that has
neither a GPU nor those libraries: recorded by `tests/parity/record_gpu_signatures.py`. The same calls bind to
the installed (CPU) environment."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import tomllib
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RECORDER = "tests/parity/record_gpu_signatures.py"
CONTRACT = runpy.run_path(str(ROOT / RECORDER))
RECORD = json.loads(CONTRACT["RECORD"].read_text(encoding="utf-8"))
USES = [use for use in CONTRACT["uses"]() if use.name not in CONTRACT["OURS"]]
AGAIN = f"not recorded: run python {RECORDER}"


def faults(use: Any, entry: str) -> list[str]:
    """Why a use does not fit the recorded `entry` of its name."""
    if entry == "value":
        return ["it is no function"] if use.alternatives is not None else []
    signature, further = CONTRACT["parse"](entry)
    if use.override is not None:
        return override_faults(use.override, signature)
    if use.alternatives is None:
        return []
    found = [binding_faults(signature, further, count, names) for count, names in use.alternatives]
    # Of a call that has a keyword on a condition, one form has to fit.
    if all(found):
        return found[0]
    fits = next(form for form, wrong in zip(use.alternatives, found, strict=True) if not wrong)
    return binding_faults(signature, further, fits[0], fits[1] | use.optional)


def binding_faults(signature: Signature, further: set[str], count: int, names: frozenset[str]) -> list[str]:
    try:
        bound = signature.bind(*range(count), **dict.fromkeys(names))
    except TypeError as error:
        return [str(error)]
    rest = next((p.name for p in signature.parameters.values() if p.kind is Parameter.VAR_KEYWORD), "")
    unknown = set(bound.arguments.get(rest, {})) - further
    return [f"{', '.join(sorted(unknown))}: taken by nothing"] if further and unknown else []


def override_faults(ours: Signature, theirs: Signature) -> list[str]:
    """The library calls our method as it would call its own."""
    positional = [p for p in theirs.parameters.values() if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
    named = [p.name for p in theirs.parameters.values() if p.kind is Parameter.KEYWORD_ONLY]
    try:
        ours.bind(*positional, **dict.fromkeys(named))
        ours.bind(**dict.fromkeys([p.name for p in positional] + named))
    except TypeError as error:
        return [str(error)]
    return []


def all_faults(uses: list[Any], entries: dict[str, str]) -> list[str]:
    return [
        f"{use.path}:{use.line}: {use.name}: {fault}"
        for use in uses
        for fault in (faults(use, entries[use.name]) if use.name in entries else [AGAIN])
    ]


def test_every_call_binds_to_the_gpu_environment() -> None:
    assert len({use.name for use in USES if use.alternatives}) > 50
    assert all_faults(USES, RECORD["names"]) == []
    assert set(RECORD["names"]) == {use.name for use in USES}, AGAIN


def test_every_call_binds_to_the_installed_environment() -> None:
    library = CONTRACT["Library"]([Path(str(importlib.util.find_spec("verl").origin)).parents[1]])
    names = {
        name: is_bound
        for name, is_bound in CONTRACT["names_used"]().items()
        if name.split(".")[0] in library.packages
    }
    assert {name.split(".")[0] for name in names} >= {"torch", "transformers", "verl", "vllm"}
    entries = {name: library.record(name, is_bound) for name, is_bound in names.items()}
    assert all_faults([use for use in USES if use.name in entries], entries) == []
    assert "enable_gqa" in entries["torch.nn.attention.varlen.varlen_attn"]


def test_the_record_is_of_the_gpu_environment() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = [*project["dependencies"], *project["optional-dependencies"]["gpu"]]
    exact = dict(pin.split("==") for pin in pins if "==" in pin)
    assert {name: exact[name] for name in RECORD["versions"] if name in exact} == {
        name: version for name, version in RECORD["versions"].items() if name != "flash-attn"
    }
    built = f"FLASH_ATTN_VERSION={RECORD['versions']['flash-attn']}\n"
    assert built in (ROOT / "docker/Dockerfile").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("path", "old", "new", "fault"),
    [
        (
            "workers/training/attention.py",
            "**grouping)",
            "enable_gqa=True)",
            "unexpected keyword.*enable_gqa",
        ),
        (
            "workers/training/attention.py",
            "softmax_scale=scaling",
            "scale=scaling",
            "unexpected keyword.*scale",
        ),
        ("workers/rollout/engine_vllm.py", '"max_num_seqs"', '"max_seqs"', "unexpected keyword.*max_seqs"),
        ("workers/rollout/engine_vllm.py", '"kv_cache_memory_bytes"', '"kv_bytes"', "unexpected.*kv_bytes"),
        ("workers/rollout/engine_vllm.py", "weights_iterator=", "weights=", "unexpected keyword.*weights"),
        (
            "workers/rollout/engine_vllm.py",
            "update_state(self, batch",
            "update_state(self, a, batch",
            "missing",
        ),
        ("workers/rollout/engine_vllm.py", "output.finished", "output.is_finished", AGAIN),
        ("workers/training/policy.py", "device_name=", "device=", "device: taken by nothing"),
        ("workers/training/rank.py", "reshard_after_forward=", "reshard=", "unexpected keyword.*reshard"),
        ("workers/rollout/engine_transformers.py", "dtype=self.dtype", "precision=0", "precision: taken by"),
    ],
)
def test_a_call_that_does_not_fit_is_found(path: str, old: str, new: str, fault: str) -> None:
    source = (ROOT / path).read_text(encoding="utf-8")
    assert old in source
    uses = CONTRACT["Reader"](path, source.replace(old, new)).uses
    uses = [use for use in uses if use.name not in CONTRACT["OURS"]]
    found = all_faults(uses, RECORD["names"])
    assert found
    for line in found:
        assert re.search(fault, line)


def test_attention_takes_what_models_give_it() -> None:
    [function] = [
        part
        for part in CONTRACT["Reader"]("workers/training/attention.py").tree.body
        if getattr(part, "name", "") == "packed_attention"
    ]
    signature = CONTRACT["_signature"](function, is_method=False)
    for count, names in RECORD["attention_calls"].values():
        bound = signature.bind(*range(count), **dict.fromkeys(names), segments=None)
        assert bound.arguments.get("kwargs", {}) == {}
