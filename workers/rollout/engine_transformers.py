"""The plain engine, a transformers model in a loop: for small machines and for checking the other engine."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from pns.errors import UserError
from workers.checkpoints import end_token_ids, local_directory
from workers.rollout.engine import (
    NO_PENALTIES,
    Request,
    Sample,
    Sampling,
    StopWatch,
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


class TransformersEngine:
    """`Engine` on one device. `max_batch` sequences are decoded together and leave the batch as they end."""

    def __init__(self, runtime: Runtime, dtype: torch.dtype = torch.float32, max_batch: int = 256) -> None:
        self.device = torch.device(runtime.device)
        self.dtype = dtype
        self.max_batch = max_batch
        self.trust_remote_code = runtime.trust_remote_code
        self.version = 0
        self.model: Any = None

    def load(self, model_path: str) -> None:
        directory = self.directory = local_directory(model_path)
        self.end_ids = end_token_ids(directory)
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=self.dtype, trust_remote_code=self.trust_remote_code
        )
        self.model = model.to(self.device).eval()
        self.max_tokens = int(model.config.max_position_embeddings)
        self.version = 0

    def update_weights(self, weights: Weights, version: int) -> None:
        own = self.model.state_dict()
        given = set()
        for name, tensor in tensors_of(weights):
            given.add(name)
            if name in own:
                own[name].copy_(tensor)
        check_names(set(own), given, bool(self.model.config.tie_word_embeddings))
        self.version = version

    def sleep(self) -> None:
        """The weights wait in host memory, on a CPU where they are."""
        if self.model is not None:
            self.model = self.model.to("cpu")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def wake_up(self) -> None:
        if self.model is not None:
            self.model = self.model.to(self.device)

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Sample]:
        for request in requests:
            length = len(request.prompt_ids)
            if length >= self.max_tokens:
                room = f"leaves no room in {self.max_tokens}"
                raise UserError(f"request {request.id}: a prompt of {length} tokens {room}")
        watch = stop_watch(self.directory, sampling, self.trust_remote_code)
        if sampling.thinking:
            tokenizer_of(str(self.directory), self.trust_remote_code)  # where it has none, first of all
        ordered = sorted(requests, key=lambda request: len(request.prompt_ids))  # little padding in a batch
        for start in range(0, len(ordered), self.max_batch):
            yield from self._generate_batch(ordered[start : start + self.max_batch], sampling, watch)

    def _generate_batch(
        self, rows: list[Request], sampling: Sampling, watch: StopWatch | None
    ) -> Iterator[Sample]:
        drawn: dict[str, list[tuple[int, float]]] = {row.id: [] for row in rows}  # tokens, log-probabilities
        prompts = [torch.tensor(row.prompt_ids) for row in rows]
        # Padding is on the left, so that all rows continue at one column; the mask has room for what comes.
        input_ids = pad_sequence(prompts, batch_first=True, padding_side="left").to(self.device)
        width = input_ids.shape[1]
        mask = input_ids.new_ones(len(rows), width + sampling.max_new_tokens)
        for i, row in enumerate(rows):
            mask[i, : width - len(row.prompt_ids)] = 0
        positions = (mask.cumsum(dim=1) - 1).clamp_(min=0)
        cache = self._new_cache(width + sampling.max_new_tokens)
        done = [False] * len(rows)
        begin = 0
        for step in range(sampling.max_new_tokens):
            end = width + step
            logits = self.model(
                input_ids=input_ids,
                attention_mask=mask[:, :end],
                position_ids=positions[:, begin:end],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            chosen = self._scores(logits, rows, drawn, step, sampling).argmax(dim=-1)
            # Of the unmodified distribution: what the policy's loss compares its own with.
            chosen_log_probs = logits.float().log_softmax(dim=-1).gather(1, chosen[:, None])[:, 0]
            input_ids, begin = chosen[:, None], end
            of_rows = zip(chosen.tolist(), chosen_log_probs.tolist(), strict=True)
            for i, (token, log_prob) in enumerate(of_rows):
                if done[i]:
                    continue
                row = rows[i]
                drawn[row.id].append((token, log_prob))
                stopped = token in self.end_ids or (
                    watch is not None and watch.ends([own for own, _ in drawn[row.id][-watch.window :]])
                )
                longest = min(sampling.max_new_tokens, self.max_tokens - len(row.prompt_ids))
                if stopped or step + 1 == longest:
                    done[i] = True
                    token_ids, log_probs = zip(*drawn.pop(row.id), strict=True)
                    yield Sample(row.id, token_ids, log_probs, "stop" if stopped else "length", self.version)
            if all(done):
                return
            # Rows stay after their end until a quarter has ended: leaving costs a copy of the whole cache.
            if 4 * sum(done) >= len(rows):
                kept = [i for i, ended in enumerate(done) if not ended]
                index = torch.tensor(kept, device=self.device)
                rows, done = [rows[i] for i in kept], [False] * len(kept)
                cache.batch_select_indices(index)
                input_ids, mask, positions = input_ids[index], mask[index], positions[index]

    def _scores(
        self,
        logits: torch.Tensor,
        rows: list[Request],
        drawn: dict[str, list[tuple[int, float]]],
        step: int,
        sampling: Sampling,
    ) -> torch.Tensor:
        """Scores (B, V) whose argmax is the next token of each row."""
        if sampling.penalties != NO_PENALTIES:
            outputs = [[token for token, _ in drawn.get(row.id, [])] for row in rows]
            penalised = zip(logits, rows, outputs, strict=True)
            logits = torch.stack(
                [penalise(own, row.prompt_ids, output, sampling.penalties) for own, row, output in penalised]
            )
        if sampling.temperature == 0:
            scores = logits
        else:
            seeds, how = [row.seed for row in rows], (sampling.temperature, sampling.top_p)
            scores = perturb(logits, seeds, [step] * len(rows), *how, sampling.top_k, sampling.min_p)
        if sampling.thinking and sampling.thinking.forces_at(step):
            scores = scores.clone()  # the logits themselves are to be kept
            tokenizer = tokenizer_of(str(self.directory), self.trust_remote_code)
            for scores_V, row in zip(scores, rows, strict=True):
                output = [token for token, _ in drawn.get(row.id, [])]
                token = sampling.thinking.forced(tokenizer, output)
                if token is not None:
                    force(scores_V, token)
        return scores

    def _new_cache(self, capacity: int) -> Cache:
        config = self.model.config
        # Buffers hold every position: layers that attend to a window keep the library's own cache.
        if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
            return DynamicCache(config=config)
        return Cache(layers=[_BufferLayer(capacity) for _ in range(config.num_hidden_layers)])

    @torch.no_grad()
    def log_probs(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        pairs = zip(prompt_ids, completion_ids, strict=True)
        texts = [[*prompt, *completion] for prompt, completion in pairs]
        results: list[np.ndarray] = [np.zeros(0, dtype=np.float32)] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), self.max_batch):
            batch = order[start : start + self.max_batch]
            rows = [torch.tensor(texts[i]) for i in batch]
            input_ids = pad_sequence(rows, batch_first=True).to(self.device)
            mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(self.device)
            logits = self.model(input_ids=input_ids, attention_mask=mask).logits[:, :-1]
            chosen = logits.float().log_softmax(dim=-1).gather(2, input_ids[:, 1:, None])
            token_log_probs = chosen[:, :, 0].cpu().numpy()
            for row, i in enumerate(batch):
                first = len(prompt_ids[i]) - 1
                results[i] = token_log_probs[row, first : first + len(completion_ids[i])].copy()
        return results


class _BufferLayer(DynamicLayer):
    """Keys and values of a layer in buffers (B, heads, capacity, D): a step writes one column."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.length = capacity, 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [
                x.new_empty(*x.shape[:2], self.capacity, x.shape[3]) for x in (key_states, value_states)
            ]
        begin, self.length = self.length, self.length + key_states.shape[2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, begin : self.length] = new
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)
