"""The vLLM engine: in process, new weights in the live model. For vLLM 0.31 on CPU and 0.24 on GPU.

Departures from vLLM's defaults, each for a reason:
- Sampling is greedy over perturbed scores (`SeededNoise`): vLLM's own per-request generators fail on CPU when
  a prompt is prefilled in parts, and give other samples than the other engine. Penalties come before the
  noise, so they are not vLLM's own, which come after it.
- Stop texts are watched here, with the other engine's `StopWatch`: vLLM reads no tokenizer.
- A reasoning block's budget is a matter of the same scores.
- `generation_config="vllm"`: a checkpoint's top-k or repetition penalty must not enter a sample silently.
- On CPU, float32 and no compilation; on GPU, bfloat16 and CUDA graphs.

Importing this module imports vLLM (many CPU seconds): only the actor that runs it does so, with the
environment of `workers.rollout.pool` set before.
"""

import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any, cast

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.worker_base import WorkerBase

from pns.data.thinking import ThinkingBudget
from pns.errors import UserError
from workers.checkpoints import end_token_ids, local_directory, weight_files
from workers.rollout.engine import (
    NO_PENALTIES,
    Penalties,
    Request,
    Sample,
    Sampling,
    Weights,
    check_names,
    force,
    penalise,
    perturb,
    stop_watch,
    tensors_of,
    tokenizer_of,
)
from workers.runtime import Runtime
from workers.sizes import VLLM_BATCHED_TOKENS

# Key of SamplingParams.extra_args: (seed, temperature, top_p, top_k, min_p, penalties, thinking), the last
# None or (directory of the tokenizer, values of the budget).
_NOISE = "pns_noise"
# Greedy even where a sample is asked for: `SeededNoise` has made the scores one.
_GREEDY: dict[str, Any] = {"temperature": 0.0, "detokenize": False}
_NOT_ARCHITECTURE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")


class VllmEngine:
    """`Engine` on one device, or on `tensor_parallel` GPUs of one machine. `memory_fraction` of the GPU is
    for weights and cache; `kv_cache_gib` is the cache's size on CPU. `sleeps`: the engine can give its memory
    back and take it again (vLLM's sleep mode, level 2, which a CPU does not have: there it stays)."""

    def __init__(
        self,
        runtime: Runtime,
        max_batch: int = 256,
        memory_fraction: float = 0.85,
        kv_cache_gib: float = 0.25,
        tensor_parallel: int = 1,
        sleeps: bool = False,
    ) -> None:
        self.sleeps = sleeps and runtime.device == "cuda"
        self.arguments: dict[str, Any] = {
            "dtype": "bfloat16",
            "max_num_seqs": max_batch,
            "max_num_batched_tokens": max(VLLM_BATCHED_TOKENS, max_batch),
            "max_model_len": -1,  # the model's own, or what the cache holds
            "gpu_memory_utilization": memory_fraction,
            "tensor_parallel_size": tensor_parallel,
            # Not Ray's, which vLLM takes by itself in a placement group, whatever GPUs the process sees.
            "distributed_executor_backend": "mp" if tensor_parallel > 1 else None,
            "enable_sleep_mode": self.sleeps,
            "trust_remote_code": runtime.trust_remote_code,
            "skip_tokenizer_init": True,  # prompts and completions are token ids
            "generation_config": "vllm",
            "logits_processors": [SeededNoise],
            "enable_prefix_caching": True,  # the completions of a problem share its prompt
            "async_scheduling": False,
            "disable_log_stats": True,
            "seed": 0,
        }
        if runtime.device == "cpu":
            self.arguments |= {
                "dtype": "float32",
                "enforce_eager": True,
                "enable_prefix_caching": False,
                "max_num_batched_tokens": None,
                "kv_cache_memory_bytes": int(kv_cache_gib * 2**30),
            }
        self.engine: LLMEngine | None = None
        self.architecture: dict[str, Any] = {}
        self.running: set[str] = set()
        self.version = 0

    def load(self, model_path: str) -> None:
        directory = self.directory = local_directory(model_path)
        self.end_ids = end_token_ids(directory)
        architecture = json.loads((directory / "config.json").read_text())
        for key in list(architecture):
            if key in _NOT_ARCHITECTURE or key.endswith("token_id"):
                del architecture[key]
        if self.engine is not None and architecture == self.architecture:
            # Into the live engine: a new one takes seconds, on a GPU a minute.
            tensors: dict[str, torch.Tensor] = {}
            for file in weight_files(directory):
                tensors |= load_file(file)
            self.update_weights(tensors, version=0)
            return
        if self.engine is not None and self.sleeps:
            raise UserError(
                f"{model_path} has another architecture than the model before it, and an engine that sleeps "
                "is the only one of its process: place rollout and policy apart (placement.colocate=[])"
            )
        if self.engine is not None:
            self.engine.engine_core.shutdown()
            self.engine = None
            gc.collect()  # vLLM's objects refer to each other
            torch.cuda.empty_cache()
        try:
            self.engine = LLMEngine.from_engine_args(EngineArgs(model=str(directory), **self.arguments))
        except ValueError as error:  # a model that it does not know, or too little memory
            said = " ".join(str(error).split())
            raise UserError(
                f"vLLM does not start with {model_path}: {said} (set rollout.memory_fraction or "
                "placement.rollout.gpus, on a CPU rollout.kv_cache_gib; or rollout.engine=transformers)"
            ) from error
        self.architecture, self.weight_names, self.version = architecture, set(), 0
        for file in weight_files(directory):
            with safe_open(file, framework="pt") as stored:
                self.weight_names |= set(stored.keys())

    def update_weights(self, weights: Weights, version: int) -> None:
        engine = self.engine
        assert engine is not None  # after `load`
        given = engine.collective_rpc(_reload, args=(weights,))[0]
        check_names(self.weight_names, given, bool(engine.model_config.hf_config.tie_word_embeddings))
        if not engine.reset_prefix_cache():  # its keys and values are of the old weights
            raise RuntimeError(
                "vLLM's prefix cache could not be reset after a weight update: requests are still running"
            )
        self.version = version

    def sleep(self) -> None:
        """Weights and cache are dropped; on a CPU nothing is."""
        if self.engine is not None and self.sleeps:
            self.engine.sleep(level=2)

    def wake_up(self) -> None:
        if self.engine is not None and self.sleeps:
            self.engine.wake_up()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Sample]:
        trusted = bool(self.arguments["trust_remote_code"])
        watch, thinking = stop_watch(self.directory, sampling, trusted), sampling.thinking
        if thinking:
            tokenizer_of(str(self.directory), trusted)  # where it has none, first of all
        params = {}
        budget = (str(self.directory), astuple(thinking)) if thinking else None
        drawn_how = (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p)
        how = (*drawn_how, sampling.penalties, budget)
        changed = sampling.temperature > 0 or sampling.penalties != NO_PENALTIES or thinking is not None
        # Token by token where there is something to watch for.
        kind = RequestOutputKind.DELTA if watch else RequestOutputKind.FINAL_ONLY
        for request in requests:
            params[request.id] = SamplingParams(
                **_GREEDY,
                output_kind=kind,
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=list(self.end_ids),
                logprobs=0,  # of the chosen token alone
                flat_logprobs=True,  # one list of numbers, not a dictionary for each token
                skip_clone=True,  # nobody else has it: vLLM would copy it deeply
                extra_args={_NOISE: (request.seed, *how)} if changed else None,
            )
        prompts = [(request.id, list(request.prompt_ids)) for request in requests]
        drawn: dict[str, tuple[list[int], list[float]]] = {request.id: ([], []) for request in requests}
        for output in self._run(prompts, params):
            name, completion = output.request_id, output.outputs[0]
            if name not in drawn:
                continue  # what came after the stop
            token_ids, log_probs = drawn[name]
            stopped = False
            chosen_log_probs = cast(Any, completion.logprobs).logprobs
            for token, log_prob in zip(completion.token_ids, chosen_log_probs, strict=True):
                token_ids.append(token)
                log_probs.append(log_prob)
                if stopped := watch is not None and watch.ends(token_ids):
                    break
            if stopped and not output.finished:
                self._abort(name)
            if stopped or output.finished:
                del drawn[name]
                reason = "stop" if stopped else str(completion.finish_reason)
                yield Sample(name, tuple(token_ids), tuple(log_probs), reason, self.version)

    def log_probs(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        # One token is the least: vLLM scores prompts only while it generates.
        params = SamplingParams(
            **_GREEDY,
            output_kind=RequestOutputKind.FINAL_ONLY,
            max_tokens=1,
            prompt_logprobs=0,
            flat_logprobs=True,
        )
        pairs = zip(prompt_ids, completion_ids, strict=True)
        texts = {str(i): [*prompt, *completion] for i, (prompt, completion) in enumerate(pairs)}
        results: list[np.ndarray] = [np.zeros(0, dtype=np.float32)] * len(texts)
        for output in self._run(list(texts.items()), dict.fromkeys(texts, params)):
            i = int(output.request_id)
            first = len(prompt_ids[i])
            # The first token of a text has none.
            of_prompt = cast(Any, output.prompt_logprobs).logprobs
            results[i] = np.array(of_prompt[first - 1 :], dtype=np.float32)
        return results

    def _run(
        self, prompts: list[tuple[str, list[int]]], params: dict[str, SamplingParams]
    ) -> Iterator[RequestOutput]:
        engine = self.engine
        assert engine is not None  # after `load`
        longest = engine.model_config.max_model_len
        for name, tokens in prompts:
            if len(tokens) >= longest:
                raise UserError(
                    f"request {name}: {len(tokens)} tokens leave no room in the {longest} that the model and "
                    "its cache hold: raise rollout.kv_cache_gib (CPU) or rollout.memory_fraction (GPU), or "
                    "shorten the prompt"
                )
        running = self.running = {name for name, _ in prompts}
        try:
            for name, tokens in prompts:
                engine.add_request(name, {"prompt_token_ids": tokens}, params[name])
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        running.discard(output.request_id)
                    yield cast(RequestOutput, output)
        finally:
            if running:  # the caller has left early, or a step failed
                engine.abort_request(list(running))

    def _abort(self, name: str) -> None:
        assert self.engine is not None
        self.engine.abort_request([name])
        self.running.discard(name)


class SeededNoise(LogitsProcessor):
    """Gives each request's scores their penalties and their own noise, so that vLLM's greedy choice is the
    sample of `workers.rollout.engine.perturb`."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.rows: dict[int, _Row] = {}
        self.trust_remote_code = bool(vllm_config.model_config.trust_remote_code)

    def is_argmax_invariant(self) -> bool:
        return False  # True would leave it out of greedy requests

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.rows, batch_update, _noise_of)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        groups: dict[tuple[float, float, int, float], list[int]] = {}
        for number, row in self.rows.items():
            if row.penalties != NO_PENALTIES:
                logits[number] = penalise(logits[number], row.prompt_ids, row.output_ids, row.penalties)
            if row.how[0] > 0:  # the temperature
                groups.setdefault(row.how, []).append(number)
        for how, numbers in groups.items():
            seeds = [self.rows[number].seed for number in numbers]
            steps = [len(self.rows[number].output_ids) for number in numbers]
            index = torch.tensor(numbers, device=logits.device)
            logits[index] = perturb(logits[index], seeds, steps, *how)
        for number, row in self.rows.items():
            if row.thinking is None:
                continue
            directory, budget = row.thinking
            token = budget.forced(tokenizer_of(directory, self.trust_remote_code), row.output_ids)
            if token is not None:
                force(logits[number], token)
        return logits


@dataclass(frozen=True)
class _Row:
    """A row of vLLM's batch; `how`: temperature, top_p, top_k, min_p. `output_ids` grows. `thinking`: the
    tokenizer's directory, and the budget."""

    seed: int
    how: tuple[float, float, int, float]
    penalties: Penalties
    prompt_ids: list[int]
    output_ids: list[int]
    thinking: tuple[str, ThinkingBudget] | None


def _noise_of(params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]) -> _Row | None:
    noise = (params.extra_args or {}).get(_NOISE)
    if noise is None:
        return None
    seed, temperature, top_p, top_k, min_p, penalties, budget = noise
    own: Any = tuple(penalties)
    thinking = (budget[0], ThinkingBudget(*budget[1])) if budget else None
    return _Row(seed, (temperature, top_p, top_k, min_p), own, prompt_ids or [], output_ids, thinking)


def _reload(worker: WorkerBase, weights: Weights) -> set[str]:
    """Runs in each worker; the names of what was loaded. The reload does not process a tied head anew (it
    belongs to the embedding), and on CPU the head multiplies with a packed copy of its weight: without the
    second step it keeps the old one."""
    runner = worker.model_runner
    own_rank: int = cast(Any, worker).rank  # among the replica's workers
    given = set()

    def on_device() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors_of(weights, own_rank):
            given.add(name)
            yield name, tensor.to(runner.device)

    runner.reload_weights(weights_iterator=on_device())
    head = getattr(runner.get_model(), "lm_head", None)
    if head is not None and runner.model_config.hf_config.tie_word_embeddings:
        head.quant_method.process_weights_after_loading(head)
    return given
