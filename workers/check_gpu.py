"""Whether a machine can run the GPU roles: libraries, attention, engine.

    python -m workers.check_gpu                # a line a check, with seconds; exit code 0 where all pass
    python -m workers.check_gpu --device cpu   # what needs no GPU, by torch's attention and the plain engine

Takes about a GiB of the GPU's memory and what vLLM needs beside it, for a minute or two.
"""

import argparse
import importlib.util
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from workers.rollout.engine import Engine, Request, Sampling
from workers.runtime import Runtime, process_environment

LIBRARIES = ("ray", "transformers", "peft", "tensordict")
GPU_LIBRARIES = (*LIBRARIES, "verl", "vllm")
VOCABULARY, END = 64, 1
HEADS, KEY_HEADS, HEAD_SIZE = 8, 2, 64
# bfloat16 has 8 bits: of attention's outputs, which are averages of numbers near 1, and of its gradients.
TOLERANCES = {"cuda": 0.03, "cpu": 1e-4}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m workers.check_gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = parser.parse_args(arguments).device
    if device == "cuda" and not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} sees none; --device cpu checks what needs none")
        return 1
    os.environ |= process_environment("rollout", device, cpus=1, vllm=True)  # read when vLLM is imported
    checks = {"device": describe, "imports": load_libraries, "attention": attend, "engine": generate}
    failed = [name for name, check in checks.items() if not passes(name, check, device)]
    print(f"failed on {device}: {', '.join(failed)}" if failed else f"all {len(checks)} passed on {device}")
    return 1 if failed else 0


def passes(name: str, check: Callable[[str], str], device: str) -> bool:
    """Print the check's line."""
    began = time.monotonic()
    try:
        passed, text = True, check(device)
    except Exception as error:  # whatever it is, it is the verdict
        traceback.print_exc()
        passed, text = False, " ".join(f"{type(error).__name__}: {error}".split())[:200]
    verdict = "ok" if passed else "FAILED"
    print(f"{name:<11}{verdict:<7}{time.monotonic() - began:7.1f} s  {text}", flush=True)
    return passed


def describe(device: str) -> str:
    if device == "cpu":
        return f"{os.cpu_count()} cores, torch {torch.__version__}"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    major, minor = torch.cuda.get_device_capability()
    torch.ones(1, device="cuda").item()  # the driver answers
    return f"{len(names)} x {names[0]}, capability {major}.{minor}, CUDA {torch.version.cuda}"


def load_libraries(device: str) -> str:
    libraries = GPU_LIBRARIES if device == "cuda" else LIBRARIES
    for library in libraries:
        importlib.import_module(library)
    flash = "no flash-attn"
    if importlib.util.find_spec("flash_attn"):
        importlib.import_module("flash_attn")  # a build for another torch fails here
        flash = f"flash-attn {version('flash-attn')}"
    return ", ".join([*(f"{library} {version(library)}" for library in libraries), flash])


def attend(device: str) -> str:
    """Rows that share beginnings, forward and backward with fewer heads of keys than of queries, beside
    torch's attention with a mask, in float32."""
    from workers.training.attention import packed_attention, segments_of

    segments = segments_of([(40, [30, 50, 9]), (0, [128])])
    count = sum(segments.leading) + sum(segments.branches)
    # Families of the tokens, and their branches; -1 is the trunk.
    families = [0] * 70 + [1] * 128 + [0] * 59
    branches = [-1] * 40 + [0] * 30 + [0] * 128 + [1] * 50 + [2] * 9
    place = torch.tensor([families, branches])
    same_family = place[0][:, None] == place[0]
    same_row = (place[1][:, None] == place[1]) | (place[1] == -1)
    seen = (same_family & same_row).tril().to(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    draw = torch.Generator().manual_seed(0)
    shapes = [(1, heads, count, HEAD_SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    plain = [torch.randn(shape, generator=draw).to(device, dtype).float() for shape in shapes]
    weight = torch.randn((1, count, HEADS, HEAD_SIZE), generator=draw).to(device, dtype)

    def with_gradients(inputs: list[Tensor], attention: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        output = attention(*leaves)
        (output * weight.to(output.dtype)).sum().backward()
        return [output.detach().float(), *(leaf.grad.float() for leaf in leaves if leaf.grad is not None)]

    def masked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, seen, enable_gqa=True).transpose(1, 2)

    def packed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return packed_attention(torch.nn.Module(), query, key, value, None, segments)[0]

    expected = with_gradients(plain, masked)
    found = with_gradients([tensor.to(dtype) for tensor in plain], packed)
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
    if max(errors) > TOLERANCES[device]:
        raise ValueError(f"relative errors of output and gradients {errors}, allowed {TOLERANCES[device]}")
    return f"{HEADS} heads on {KEY_HEADS}, forward and backward, relative error {max(errors):.1e}"


def generate(device: str) -> str:
    """A model of random weights answers: by vLLM, on a CPU by the plain engine."""
    requests = [
        Request(str(i), tuple(random.Random(i).choices(range(2, VOCABULARY), k=12)), i) for i in range(4)
    ]
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory))
        engine: Engine
        if device == "cuda":
            from workers.rollout.engine_vllm import VllmEngine

            free, total = torch.cuda.mem_get_info()
            engine = VllmEngine(Runtime("cuda"), max_batch=8, memory_fraction=min(0.1, 0.8 * free / total))
        else:
            from workers.rollout.engine_transformers import TransformersEngine

            engine = TransformersEngine(Runtime("cpu"), max_batch=8)
        engine.load(directory)
        samples = list(engine.generate(requests, Sampling(1.0, max_new_tokens=8)))
    if {sample.id for sample in samples} != {request.id for request in requests}:
        raise ValueError(f"{len(requests)} requests, answers to {sorted(sample.id for sample in samples)}")
    num_tokens = sum(len(sample.token_ids) for sample in samples)
    return f"{type(engine).__name__}: {len(samples)} completions, {num_tokens} tokens"


def write_model(directory: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    settings = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * HEAD_SIZE,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=0,
        dtype="float32",
    )
    Qwen2ForCausalLM(settings).save_pretrained(directory)


if __name__ == "__main__":
    sys.exit(main())
