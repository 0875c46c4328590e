"""A verdict's grades filled in by vLLM: what a judge with `pool.engine=vllm` asks instead of transformers.

A round for each grade: every prompt so far goes in with one token to come, one of those that a grade may be,
and the verdict's fixed text is put behind it. Prompts are cached: a round reads only what is new, and
candidates of one problem share instructions and problem.

Importing this module imports vLLM (many CPU seconds): only the actor that runs it does so.
"""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from pns.errors import UserError
from workers.checkpoints import local_directory
from workers.runtime import Runtime
from workers.sizes import VLLM_BATCHED_TOKENS, VLLM_JUDGE_BATCH, VLLM_JUDGE_SHARE

_CPU_CACHE_BYTES = 2**28


class VllmGrades:
    """An engine on one device, a share of it, or on `gpus` of one machine (tensor parallel)."""

    def __init__(self, model_path: str, runtime: Runtime, gpus: float) -> None:
        tensor_parallel = max(1, int(gpus))
        arguments: dict[str, Any] = {
            "dtype": "bfloat16",
            "max_num_seqs": VLLM_JUDGE_BATCH,
            "max_num_batched_tokens": VLLM_BATCHED_TOKENS,
            "max_model_len": -1,  # the model's own, or what the cache holds
            "gpu_memory_utilization": VLLM_JUDGE_SHARE * min(1.0, gpus or 1.0),
            "tensor_parallel_size": tensor_parallel,
            "distributed_executor_backend": "mp" if tensor_parallel > 1 else None,
            "trust_remote_code": runtime.trust_remote_code,
            "skip_tokenizer_init": True,  # prompts and replies are token ids
            "generation_config": "vllm",
            "logprobs_mode": "processed_logprobs",  # of the allowed tokens alone
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "seed": 0,
        }
        if runtime.device == "cpu":
            arguments |= {
                "dtype": "float32",
                "enforce_eager": True,
                "max_num_batched_tokens": None,
                "block_size": 32,  # a block is the least that is cached: vLLM's 128 tokens are whole prompts
                "kv_cache_memory_bytes": _CPU_CACHE_BYTES,
            }
        try:
            self.engine = LLMEngine.from_engine_args(
                EngineArgs(model=str(local_directory(model_path)), **arguments)
            )
        except ValueError as error:  # a model that it does not know, or too little memory
            said = " ".join(str(error).split())
            raise UserError(
                f"vLLM does not start with the judge {model_path}: {said} (raise pool.gpus, or set "
                "pool.engine=transformers)"
            ) from error
        self.max_tokens = self.engine.model_config.max_model_len
        self._num_asked = 0

    def fill_in(
        self, prompts: Sequence[list[int]], between: Sequence[list[int]], grades: Sequence[int]
    ) -> list[tuple[list[int], list[list[float]]] | None]:
        """Of each prompt the reply's ids, one of `grades` and the fixed text in turns, and the probabilities
        of the grades at each place; None where one was not finite."""
        replies: list[list[int]] = [[] for _ in prompts]
        probabilities: list[list[list[float]]] = [[] for _ in prompts]
        params = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            allowed_token_ids=list(grades),
            logprobs=len(grades),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        for fixed in [*between, []]:
            asked = [[*prompt, *reply] for prompt, reply in zip(prompts, replies, strict=True)]
            for row, log_probs in enumerate(self._next(asked, params)):
                of_grades = np.exp([log_probs.get(grade, -np.inf) for grade in grades])
                probabilities[row].append((of_grades / of_grades.sum()).tolist())
                replies[row] += [grades[int(of_grades.argmax())], *fixed]
        return [
            (reply, places) if np.isfinite(places).all() else None
            for reply, places in zip(replies, probabilities, strict=True)
        ]

    def _next(self, asked: Sequence[list[int]], params: SamplingParams) -> list[dict[int, float]]:
        """Token id -> natural-log probability, of the one token after each."""
        engine, answers = self.engine, {}
        for tokens in asked:
            engine.add_request(str(self._num_asked), {"prompt_token_ids": tokens}, params)
            answers[str(self._num_asked)] = dict[int, float]()
            self._num_asked += 1
        try:
            while engine.has_unfinished_requests():
                for output in engine.step():
                    request = cast(RequestOutput, output)
                    if request.finished:
                        [entry] = cast(list[dict[int, Any]], request.outputs[0].logprobs)
                        answers[request.request_id] = {token: own.logprob for token, own in entry.items()}
        except Exception:
            engine.abort_request(list(answers))  # a batch that failed is halved and comes again
            raise
        return list(answers.values())
