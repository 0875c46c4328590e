"""The process reward model as a service: the probability that each step of a solution is correct.

Three forms are told apart by what the checkpoint holds:

- two outputs, read at a token `<extra_0>` after every step: Qwen2.5-Math-PRM (arXiv 2501.07301; model cards
  of Qwen/Qwen2.5-Math-PRM-7B, -72B and Qwen2.5-Math-7B-PRM800K). Its own system turn, the problem as the user
  turn, and steps without white space around them; softmax, of which the second output is for "correct".
- `v_head` with one output, read at a line end after every step: Skywork-o1-Open-PRM (GitHub,
  SkyworkAI/skywork-o1-prm-inference, `prepare_input`). The first token, the problem and a line end, without a
  chat template; sigmoid.
- `score` with one output and no bias, read at the last token of every step: what this project trains
  (`StepLabelObjective`). The policy's own chat template and the text as it is; sigmoid.

An outcome reward model has the same weights as one of the last two forms and cannot be told from it: named
here, it gives numbers that mean nothing.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from pns.algo.formatting import THINK_TAGS
from pns.config import RewardConfig, ServicePool
from pns.data.prompts import BOXED, break_added_tokens, find_tokenizer, render_open_turn
from pns.errors import UserError
from workers.rewards.reward_head import load_body, load_head, trusts_code
from workers.rewards.service import Outcome, ScoringPool, micro_batches
from workers.runtime import Runtime
from workers.sizes import FORWARD_TOKENS

SEPARATOR = "<extra_0>"
KIND = "process reward model"
_WAY_OUT = "name a model of one of the forms in workers/rewards/process_reward.py"
_CHARACTERS_PER_TOKEN = 3  # a guess that sizes requests before they are tokenized

# The prompt's turns of "role" and "content", and the steps of the solution.
Solution = tuple[Sequence[Mapping[str, str]], tuple[str, ...]]
Probabilities = tuple[float, ...]
_Form = Enum("_Form", ["separator", "line_end", "last_token"])


class ProcessReward:
    """A causal body of transformers' own and a head, read once for each step; float32 on CPU, bfloat16 with a
    float32 head on a GPU. No code of the checkpoint runs where transformers knows its model type.

    Raises UserError where `model_path` holds no such model, whole and trained, with a tokenizer.
    """

    def __init__(self, model_path: str, runtime: Runtime, forward_tokens: int = 0) -> None:
        self._path, self._device = model_path, runtime.device
        self._forward_tokens = forward_tokens or FORWARD_TOKENS[runtime.device]
        try:
            self._load(runtime)
        except OSError as error:
            raise UserError(f"{KIND} {model_path}: {str(error).splitlines()[0]}") from error

    def _load(self, runtime: Runtime) -> None:
        head, head_names = load_head(self._path, KIND, outputs=(1, 2))
        last_layer = head[-1] if isinstance(head, torch.nn.Sequential) else head
        num_outputs = len(last_layer.weight)
        tokenizer: Any = find_tokenizer(self._path, trusts_code(self._path, runtime))
        if tokenizer is None:
            raise UserError(f"{KIND} {self._path} has no tokenizer: name a complete checkpoint")
        self._form = _form_of(self._path, num_outputs, head_names, tokenizer)
        self._body = load_body(self._path, runtime, head_names, KIND)
        # As of the reward model: bfloat16 would round to three digits.
        self._head, self._tokenizer = head.to(self._device), tokenizer
        config = self._body.config.get_text_config()
        self._vocabulary, self._max_length = config.vocab_size, config.max_position_embeddings
        ends = {_Form.separator: SEPARATOR, _Form.line_end: "\n", _Form.last_token: ""}[self._form]
        self._end_ids = self._encode(ends)[-1:]
        self._control = _control_ids(tokenizer)

    def score(self, solutions_B: Sequence[Solution]) -> list[Outcome[Probabilities]]:
        """The probability in [0, 1] that it is correct, for each step of each solution. Missing: "empty" (no
        step), "too_long" (beyond the model's positions), "token_id" (outside its vocabulary),
        "not_finite"."""
        read_B = [self._read(messages, steps) for messages, steps in solutions_B]
        outcomes: list[Outcome[Probabilities]] = [Outcome(None, self._refusal(*read)) for read in read_B]
        lengths = {row: len(read_B[row][0]) for row, each in enumerate(outcomes) if each.cause is None}
        # The last bits of a probability depend on what shares its forward pass, and that on timing. On a CPU,
        # where runs are the same to the bit, a row is alone.
        alone = [[row] for row in lengths]
        for rows in alone if self._device == "cpu" else micro_batches(lengths, self._forward_tokens):
            for row, values in zip(rows, self._forward([read_B[row] for row in rows]), strict=True):
                finite = all(map(math.isfinite, values))
                outcomes[row] = Outcome(tuple(values)) if finite else Outcome(None, "not_finite")
        return outcomes

    def _read(
        self, messages: Sequence[Mapping[str, str]], steps: Sequence[str]
    ) -> tuple[list[int], list[int]]:
        """Token ids of problem and steps, and the place of each step's end among them. Steps are tokenized
        one by one, as the published models' own code does: no token lies across an end."""
        token_ids, ends = self._encode(self._prompt(messages, steps)), []
        for step in steps:
            text = step if self._form is _Form.last_token else step.strip()
            # The tokenizer reads its control tokens anywhere in a text: in a step they would end a turn, or
            # pass for a step's end.
            token_ids += [number for number in self._encode(text) if number not in self._control]
            token_ids += self._end_ids
            ends.append(len(token_ids) - 1)
        return token_ids, ends

    def _prompt(self, messages: Sequence[Mapping[str, str]], steps: Sequence[str]) -> str:
        if self._form is _Form.last_token:
            return render_open_turn(self._tokenizer, messages, steps[0] if steps else "")
        problem = next(turn["content"] for turn in reversed(messages) if turn["role"] == "user")
        if self._form is _Form.separator:
            turns = [{"role": "system", "content": BOXED}, {"role": "user", "content": problem}]
            return render_open_turn(self._tokenizer, turns, "")
        return (self._tokenizer.bos_token or "") + break_added_tokens(self._tokenizer, problem) + "\n"

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False) if text else []

    def _refusal(self, token_ids: Sequence[int], ends: Sequence[int]) -> str | None:
        if not ends:
            return "empty"
        if len(token_ids) > self._max_length:
            return "too_long"
        return None if max(token_ids) < self._vocabulary else "token_id"

    @torch.inference_mode()
    def _forward(self, read_B: Sequence[tuple[list[int], list[int]]]) -> list[list[float]]:
        ids_BT = pad_sequence([torch.tensor(ids) for ids, _ in read_B], batch_first=True)
        # Attention is causal and padding is on the right: no token that is read sees the padding, and no mask
        # is needed.
        hidden_BTD = self._body(input_ids=ids_BT.to(self._device), use_cache=False).last_hidden_state
        counts = [len(ends) for _, ends in read_B]
        rows_K = torch.repeat_interleave(torch.arange(len(read_B)), torch.tensor(counts))
        ends_K = torch.tensor([end for _, ends in read_B for end in ends])
        logits_KO = self._head(hidden_BTD[rows_K.to(self._device), ends_K.to(self._device)].float())
        two_outputs = logits_KO.shape[1] == 2
        correct_K = logits_KO.softmax(-1)[:, 1] if two_outputs else logits_KO[:, 0].sigmoid()
        return [part.tolist() for part in correct_K.split(counts)]


def _form_of(path: str, num_outputs: int, head_names: set[str], tokenizer: Any) -> _Form:
    """Raises UserError for a head that none of the forms has, and a tokenizer that cannot read it."""
    if num_outputs == 2:
        form, fault = _Form.separator, f"has two outputs and no token {SEPARATOR} at which to read them"
        known = SEPARATOR in tokenizer.get_vocab()
    elif all(name.startswith("v_head.") for name in head_names):
        return _Form.line_end
    else:
        form, fault = _Form.last_token, f"has a head of an unknown form, {', '.join(sorted(head_names))}"
        known = head_names == {"score.weight"}
    if not known:
        raise UserError(f"{KIND} {path} {fault}: {_WAY_OUT}")
    if not tokenizer.chat_template:
        raise UserError(f"{KIND} {path} has a tokenizer without a chat template: {_WAY_OUT}")
    return form


def _control_ids(tokenizer: Any) -> set[int]:
    """The tokens that no text of a step may hold: those that were added to the tokenizer, but white space and
    the tags of a reasoning block. Of the tiny world's tokenizer every word is added."""
    added = tokenizer.get_added_vocab()
    if len(added) == len(tokenizer):
        return set(tokenizer.all_special_ids)
    return {number for token, number in added.items() if not token.isspace() and token not in THINK_TAGS}


def _num_tokens(solution: Solution) -> int:
    messages, steps = solution
    num_characters = sum(len(turn["content"]) for turn in messages) + sum(map(len, steps))
    return num_characters // _CHARACTERS_PER_TOKEN + len(steps) + 1


class ProcessRewardPool(ScoringPool[Solution, Probabilities]):
    """Process-reward actors: items are (messages of the problem's prompt, steps of a solution), values the
    probability in [0, 1] that each step is correct."""

    def __init__(
        self,
        name: str,
        pool: ServicePool,
        runtime: Runtime,
        deadline_seconds: float = RewardConfig.deadline_seconds,
    ) -> None:
        build = functools.partial(ProcessReward, runtime=runtime, forward_tokens=pool.batch_tokens)
        super().__init__(name, pool, runtime, build, _num_tokens, deadline_seconds)
