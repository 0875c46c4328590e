"""What every worker process needs, whatever its role."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pns.config import Config

LOGS = "logs"  # below a run's directory: what its actors print


class Limit(NamedTuple):
    """How long a wait may take, and the key of the configuration that says so."""

    seconds: float
    key: str


@dataclass(frozen=True)
class Runtime:
    """Where workers run, how models are opened, and how long waits may take."""

    device: str = "cpu"  # "cpu" or "cuda"
    trust_remote_code: bool = False  # whether code that comes with a checkpoint is run
    start_timeout_seconds: float = 600.0  # for processes to come up
    load_timeout_seconds: float = 1800.0  # for a model to be read
    sync_timeout_seconds: float = 1200.0  # for weights to be gathered, or taken
    step_timeout_seconds: float = 3600.0  # for one training step, checkpoint or export, or one completion
    logs: str = ""  # directory for what actors print; "": only Ray keeps it

    @property
    def start_limit(self) -> Limit:
        return Limit(self.start_timeout_seconds, "placement.start_timeout_seconds")

    @property
    def load_limit(self) -> Limit:
        return Limit(self.load_timeout_seconds, "placement.load_timeout_seconds")

    @property
    def sync_limit(self) -> Limit:
        return Limit(self.sync_timeout_seconds, "placement.sync_timeout_seconds")

    @property
    def step_limit(self) -> Limit:
        return Limit(self.step_timeout_seconds, "placement.step_timeout_seconds")


def runtime_of(config: Config, device: str, directory: Path) -> Runtime:
    """Of the workers on `device`, "cpu" or "cuda", of a run with this directory."""
    placement = config.placement
    return Runtime(
        device,
        config.models.trust_remote_code,
        placement.start_timeout_seconds,
        placement.load_timeout_seconds,
        placement.sync_timeout_seconds,
        placement.step_timeout_seconds,
        str(directory.absolute() / LOGS),
    )


VERL_CPU = {"VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": "workers.training.verl_cpu"}
# Of a node alone: processes of several nodes that compile into one directory on shared storage disturb each
# other. The same path on every node.
_NODE_CACHE = f"{tempfile.gettempdir()}/pns-{os.getuid()}"
_ENVIRONMENT: dict[tuple[str, str], dict[str, str]] = {
    ("any", "cpu"): {
        # Freed memory stays in the process: a model's buffers are of the same sizes again and again, and
        # giving them back to the system costs page faults at every step.
        "MALLOC_MMAP_THRESHOLD_": str(2**30),
        "MALLOC_TRIM_THRESHOLD_": str(2**32),
        "MALLOC_TOP_PAD_": str(2**26),
    },
    ("policy", "any"): {
        # Against what verl, transformers and tokenizers print about every model and process.
        "TOKENIZERS_PARALLELISM": "false",
        "VERL_LOGGING_LEVEL": "ERROR",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONWARNINGS": "ignore::UserWarning:verl.workers.engine",
    },
    ("policy", "cpu"): VERL_CPU,
    ("policy", "cuda"): {"NCCL_CUMEM_ENABLE": "0"},  # as verl and vLLM: its buffers are never given back
    ("rollout", "any"): {"TOKENIZERS_PARALLELISM": "false"},
    ("rollout", "cuda"): {"TRITON_CACHE_DIR": f"{_NODE_CACHE}/triton"},
    ("vllm", "any"): {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core lives in the actor
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # the other one calls logits processors in another way
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # weight updates are functions, sent to its own workers
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    },
    # Unbound: several actors would be bound to the same cores. Compiling pays for no small model.
    ("vllm", "cpu"): {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1"},
    ("vllm", "cuda"): {"VLLM_CACHE_ROOT": f"{_NODE_CACHE}/vllm", "NCCL_CUMEM_ENABLE": "0"},
}
# Taken from the driver where it has them; those of the table too that are about the machine.
_PASSED_ON = ("HF_HOME", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA")
_YIELDING = ("NCCL_CUMEM_ENABLE", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT")


def process_environment(role: str, device: str, cpus: float, vllm: bool = False) -> dict[str, str]:
    """Environment variables of a process of "rollout" (with or without `vllm`), "policy" or a "reward" term,
    with `cpus` cores on `device` ("cpu" or "cuda")."""
    environment: dict[str, str] = {}
    for name in ("any", role, *(["vllm"] if vllm else [])):
        environment |= _ENVIRONMENT.get((name, "any"), {}) | _ENVIRONMENT.get((name, device), {})
    cores = str(max(1, int(cpus)))
    # A second thread slows small models on a CPU; reward services on a GPU have Ray's number.
    threads = {"policy": cores, "rollout": cores if device == "cpu" else "1"}
    if role in threads or device == "cpu":
        environment["OMP_NUM_THREADS"] = threads.get(role, "1")
    taken = (*_PASSED_ON, *(name for name in _YIELDING if name in environment))
    return environment | {name: os.environ[name] for name in taken if name in os.environ}
