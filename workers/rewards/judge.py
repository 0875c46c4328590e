"""The chain-of-thought judge as a service: rubric scores 0-3 of a solution, within the grammar of a verdict.

One prefill reads the prompt; then four times the likeliest of the tokens 0-3 is taken, and the verdict's
fixed text is fed in between, on the cached keys and values. Temperature 0; no reply can leave the grammar.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from pns.algo.judging import (
    MAX_SCORE,
    Scores,
    Template,
    make_nonce,
    parse_verdict,
    render_text,
    render_tiny,
    verdict_parts,
)
from pns.config import RewardConfig, ServicePool
from pns.errors import UserError
from workers.rewards.service import FORWARD_TOKENS, Outcome, ScoringPool, micro_batches
from workers.runtime import Runtime

_CHARACTERS_PER_TOKEN = 3  # a guess that sizes requests before they are tokenized

Candidate = tuple[str, str]  # problem text, solution text


class Judge:
    """A language model that grades (problem, solution) pairs. A tokenizer with the token `<judge>` is the
    tiny world's; any other model is prompted through its chat template. float32 on CPU, bfloat16 on a GPU.

    Raises UserError where it cannot be loaded, has no chat template or does not write 0-3 as single tokens.
    """

    def __init__(self, model_path: str, runtime: Runtime, seed: int = 0, forward_tokens: int = 0) -> None:
        self._device, self._seed = runtime.device, seed
        self._forward_tokens = forward_tokens or FORWARD_TOKENS[runtime.device]
        dtype = torch.float32 if runtime.device == "cpu" else torch.bfloat16
        trust = {"trust_remote_code": runtime.trust_remote_code}
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model_path, **trust)
            model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype, **trust)
        except OSError as error:
            raise UserError(f"judge {model_path}: {str(error).splitlines()[0]}") from error
        self._model = model.to(self._device).eval()
        self._template = Template.TINY if "<judge>" in self._tokenizer.get_vocab() else Template.TEXT
        if self._template is Template.TEXT and not self._tokenizer.chat_template:
            raise UserError(f"judge {model_path} has no chat template: name an instruction-tuned model")
        digits = [self._encode(str(digit)) for digit in range(MAX_SCORE + 1)]
        if any(len(ids) != 1 for ids in digits):
            digits_said = f"each of the digits 0 to {MAX_SCORE} as one token"
            raise UserError(f"judge {model_path} does not write {digits_said}: name another model")
        self._digits_V = torch.tensor([ids[0] for ids in digits], device=self._device)
        self._between = [self._encode(part) for part in verdict_parts(self._template, "")[1:4]]

    def score(self, candidates_B: Sequence[Candidate]) -> list[Outcome[Scores]]:
        """Scores (relevance, coherence, completeness, clarity). Missing: "too_long" (for the model's context
        with the verdict), "not_finite", "unparsable"."""
        nonces, prompts = [], []
        for problem, solution in candidates_B:
            nonces.append(make_nonce(self._seed, problem, solution, self._template))
            prompts.append(self._prompt(problem, solution, nonces[-1]))
        reply_tokens = 4 + sum(map(len, self._between))  # four digits and what stands between them
        room = self._model.config.max_position_embeddings - reply_tokens
        outcomes: list[Outcome[Scores]] = [Outcome(None, "too_long")] * len(prompts)
        lengths = {row: len(prompt) for row, prompt in enumerate(prompts) if len(prompt) <= room}
        for rows in micro_batches(lengths, self._forward_tokens):
            replies = self._decode([prompts[row] for row in rows])
            for row, reply_ids in zip(rows, replies, strict=True):
                outcomes[row] = self._read(reply_ids, nonces[row])
        return outcomes

    def _prompt(self, problem: str, candidate: str, nonce: str) -> list[int]:
        """Token ids up to the verdict's first digit."""
        if self._template is Template.TINY:
            return self._encode(render_tiny(problem, candidate, nonce))
        # The tokenizer reads every token that was added to it anywhere in a text, special or not, and
        # some end a turn. Those of white space do not.
        for token in self._tokenizer.get_added_vocab():
            if not token.isspace():
                broken = token[:1] + " " + token[1:]
                problem, candidate = problem.replace(token, broken), candidate.replace(token, broken)
        messages = render_text(problem, candidate, nonce)
        # Without thinking: the verdict is fed to the model, it has no room to think in.
        options = {"add_generation_prompt": True, "tokenize": False, "enable_thinking": False}
        text = self._tokenizer.apply_chat_template(messages, **options)
        return self._encode(text + verdict_parts(self._template, nonce)[0])

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False) if text else []

    def _read(self, reply_ids: list[int] | None, nonce: str) -> Outcome[Scores]:
        if reply_ids is None:
            return Outcome(None, "not_finite")
        before, *_, after = verdict_parts(self._template, nonce)
        scores = parse_verdict(before + self._tokenizer.decode(reply_ids) + after, self._template, nonce)
        return Outcome(scores) if scores else Outcome(None, "unparsable")

    @torch.inference_mode()
    def _decode(self, prompts: list[list[int]]) -> list[list[int] | None]:
        """Reply ids: four digits with the fixed text between them; None where a logit was not finite."""
        num_rows = len(prompts)
        rows = [torch.tensor(prompt) for prompt in prompts]
        ones = [torch.ones_like(row) for row in rows]
        # Padding is on the left, so that every row continues at the same column.
        ids_BT = pad_sequence(rows, batch_first=True, padding_side="left").to(self._device)
        mask_BT = pad_sequence(ones, batch_first=True, padding_side="left").to(self._device)
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
        finite_B = torch.ones(num_rows, dtype=torch.bool, device=self._device)
        cache: Any = None
        reply: list[torch.Tensor] = []
        for between in [*self._between, None]:
            output = self._model(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            logits_BV = output.logits[:, -1, self._digits_V].float()
            finite_B &= logits_BV.isfinite().all(-1)
            ids_BT = self._digits_V[logits_BV.argmax(-1)][:, None]
            if between:
                fixed_BT = torch.tensor(between, device=self._device).expand(num_rows, -1)
                ids_BT = torch.cat([ids_BT, fixed_BT], 1)
            reply.append(ids_BT)
            added = ids_BT.shape[1]
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(num_rows, added)], 1)
            positions_BT = positions_BT[:, -1:] + torch.arange(1, added + 1, device=self._device)
        replies = zip(torch.cat(reply, 1).tolist(), finite_B.tolist(), strict=True)
        return [ids if finite else None for ids, finite in replies]


def _num_tokens(candidate: Candidate) -> int:
    return sum(map(len, candidate)) // _CHARACTERS_PER_TOKEN + 1


class JudgePool(ScoringPool[Candidate, Scores]):
    """Judge actors: items are (problem text, solution text), values four scores 0-3;
    `pns.algo.judging.rubric_score` makes them one number."""

    def __init__(
        self,
        name: str,
        pool: ServicePool,
        runtime: Runtime,
        seed: int,
        deadline_seconds: float = RewardConfig.deadline_seconds,
    ) -> None:
        build = functools.partial(Judge, runtime=runtime, seed=seed, forward_tokens=pool.batch_tokens)
        super().__init__(name, pool, runtime, build, _num_tokens, deadline_seconds)
