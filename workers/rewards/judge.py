"""The chain-of-thought judge as a service: rubric scores 0-3 of a solution, within the grammar of a verdict.

One prefill reads the prompt; then four times the likeliest of the tokens 0-3 is taken, and the verdict's
fixed text is fed in between, on the cached keys and values. Temperature 0; no reply can leave the grammar.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jinja2
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from pns.algo.judging import (
    MAX_SCORE,
    Judgement,
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
_DECIMALS = 6  # of a probability, as it is kept
_PASSES = 8  # over a text, to take out what a tokenizer makes its own tokens of

Candidate = tuple[str, str]  # problem text, solution text
Probabilities = tuple[tuple[float, ...], ...]


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
        # The tokenizer reads every token that was added to it anywhere in a text, special or not, and some
        # end a turn. Those of white space do not, and a single letter cannot be broken up.
        self._added = {
            number: token
            for token, number in self._tokenizer.get_added_vocab().items()
            if len(token) > 1 and not token.isspace()
        }
        self._has_system_turn = self._template is Template.TEXT and self._knows_system_turns()

    def score(self, candidates_B: Sequence[Candidate]) -> list[Outcome[Judgement]]:
        """Scores (relevance, coherence, completeness, clarity), each with the probabilities of 0 to 3 at its
        place: those of a path on which every digit before was the likeliest one. Missing: "too_long" (for the
        model's context with the verdict), "not_finite", "unparsable"."""
        nonces, prompts = [], []
        for problem, solution in candidates_B:
            nonces.append(make_nonce(self._seed, problem, solution, self._template))
            prompts.append(self._prompt(problem, solution, nonces[-1]))
        reply_tokens = 4 + sum(map(len, self._between))  # four digits and what stands between them
        room = self._model.config.max_position_embeddings - reply_tokens
        outcomes: list[Outcome[Judgement]] = [Outcome(None, "too_long")] * len(prompts)
        lengths = {row: len(prompt) for row, prompt in enumerate(prompts) if len(prompt) <= room}
        # The last bits of a probability depend on what shares its forward pass, and that on timing. On a CPU,
        # where runs are the same to the bit, a row is alone.
        alone = [[row] for row in lengths]
        for rows in alone if self._device == "cpu" else micro_batches(lengths, self._forward_tokens):
            replies = self._decode([prompts[row] for row in rows])
            for row, reply in zip(rows, replies, strict=True):
                outcomes[row] = self._read(reply, nonces[row])
        return outcomes

    def _prompt(self, problem: str, candidate: str, nonce: str) -> list[int]:
        """Token ids up to the verdict's first digit."""
        if self._template is Template.TINY:
            return self._encode(render_tiny(problem, candidate, nonce))
        messages = render_text(problem, candidate, nonce, self._without_added)
        if not self._has_system_turn:
            messages = [{"role": "user", "content": "\n\n".join(turn["content"] for turn in messages)}]
        return self._encode(self._chat(messages) + verdict_parts(self._template, nonce)[0])

    def _chat(self, messages: list[dict[str, str]]) -> str:
        # Without thinking: the verdict is fed to the model, it has no room to think in.
        options = {"add_generation_prompt": True, "tokenize": False, "enable_thinking": False}
        return self._tokenizer.apply_chat_template(messages, **options)

    def _knows_system_turns(self) -> bool:
        try:
            self._chat([{"role": "system", "content": "-"}, {"role": "user", "content": "-"}])
        except jinja2.TemplateError:  # as Gemma's raises
            return False
        return True

    def _without_added(self, text: str) -> str:
        """`text` in which the tokenizer finds none of its added tokens: they are broken up by a space, and
        left out where it sees them in another spelling, as a normalizer makes it do."""
        for _ in range(_PASSES):
            ids = self._encode(text)
            found = self._added.keys() & set(ids)
            if not found:
                return text
            broken = text
            for token in sorted(self._added[number] for number in found):
                broken = broken.replace(token, token[:1] + " " + token[1:])
            if broken == text:
                broken = self._tokenizer.decode([number for number in ids if number not in found])
            text = broken
        return "[...]"

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False) if text else []

    def _read(self, reply: tuple[list[int], Probabilities] | None, nonce: str) -> Outcome[Judgement]:
        if reply is None:
            return Outcome(None, "not_finite")
        ids, probabilities = reply
        before, *_, after = verdict_parts(self._template, nonce)
        scores = parse_verdict(before + self._tokenizer.decode(ids) + after, self._template, nonce)
        return Outcome(Judgement(scores, probabilities)) if scores else Outcome(None, "unparsable")

    @torch.inference_mode()
    def _decode(self, prompts: list[list[int]]) -> list[tuple[list[int], Probabilities] | None]:
        """Reply ids, four digits with the fixed text between them, and the probabilities at the digits'
        places (4, 4); None where a logit was not finite."""
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
        probabilities: list[torch.Tensor] = []
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
            probabilities.append(logits_BV.double().softmax(-1))
            ids_BT = self._digits_V[logits_BV.argmax(-1)][:, None]
            if between:
                fixed_BT = torch.tensor(between, device=self._device).expand(num_rows, -1)
                ids_BT = torch.cat([ids_BT, fixed_BT], 1)
            reply.append(ids_BT)
            added = ids_BT.shape[1]
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(num_rows, added)], 1)
            positions_BT = positions_BT[:, -1:] + torch.arange(1, added + 1, device=self._device)
        rounded_B = [
            tuple(tuple(round(p, _DECIMALS) for p in place) for place in row)
            for row in torch.stack(probabilities, 1).tolist()
        ]
        ids_B = torch.cat(reply, 1).tolist()
        return [
            (ids, rounded) if finite else None
            for ids, rounded, finite in zip(ids_B, rounded_B, finite_B.tolist(), strict=True)
        ]


def _num_tokens(candidate: Candidate) -> int:
    return sum(map(len, candidate)) // _CHARACTERS_PER_TOKEN + 1


class JudgePool(ScoringPool[Candidate, Judgement]):
    """Judge actors: items are (problem text, solution text), values four scores 0-3 with the digits'
    probabilities; `pns.algo.judging` makes them one number (`rubric_score`, `expected_score`)."""

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
