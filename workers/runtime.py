"""What every worker process needs, whatever its role."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Runtime:
    """Where workers run, how models are opened, and how long waits may take."""

    device: str = "cpu"  # "cpu" or "cuda"
    trust_remote_code: bool = False  # whether code that comes with a checkpoint is run
    start_timeout_seconds: float = 600.0  # for processes to come up and models to load
    step_timeout_seconds: float = 3600.0  # for one training step, checkpoint or export


# Freed memory stays in the process: a model's buffers are of the same sizes again and again, and giving them
# back to the system costs page faults at every step.
ALLOCATOR_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**26),
}

# Of a process that runs vLLM, set before it is imported.
VLLM_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core lives in the process
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the other one calls logits processors in another way
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # weight updates are functions, sent to its own workers
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
