"""A language model that fills in the grades of a verdict: what the judges have in common.

One prefill reads the prompt; then for each grade the likeliest of its tokens is taken, and the verdict's
fixed text is fed in between, on the cached keys and values. Temperature 0; no reply can leave the grammar.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from pns.algo.judging import Template
from pns.errors import UserError
from workers.rewards.service import micro_batches
from workers.runtime import Runtime
from workers.sizes import FORWARD_TOKENS

CHARACTERS_PER_TOKEN = 3  # a guess that sizes requests before they are tokenized
_DECIMALS = 6  # of a probability, as it is kept
_PASSES = 8  # over a text, to take out what a tokenizer makes its own tokens of

Probabilities = tuple[tuple[float, ...], ...]
Reply = tuple[list[int], Probabilities]


class VerdictModel:
    """A language model that grades. A tokenizer with the token `<judge>` is the tiny world's; any other model
    is prompted through its chat template. float32 on CPU, bfloat16 on a GPU. Without `with_model` a subclass
    has another engine, and sets `_max_tokens`.

    `role` stands in messages; `grades` are the texts of a grade for each template. Raises UserError where the
    model cannot be loaded, has no chat template or does not write every grade as a single token.
    """

    def __init__(
        self,
        role: str,
        model_path: str,
        runtime: Runtime,
        seed: int,
        forward_tokens: int,
        grades: Mapping[Template, Sequence[str]],
        with_model: bool = True,
    ) -> None:
        self._device, self._seed = runtime.device, seed
        self._forward_tokens = forward_tokens or FORWARD_TOKENS[runtime.device]
        dtype = torch.float32 if runtime.device == "cpu" else torch.bfloat16
        trust = {"trust_remote_code": runtime.trust_remote_code}
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model_path, **trust)
            self._model: Any = None
            if with_model:
                model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype, **trust)
                self._model = model.to(self._device).eval()
                self._max_tokens = model.config.max_position_embeddings
        except OSError as error:
            raise UserError(f"{role} {model_path}: {str(error).splitlines()[0]}") from error
        self._template = Template.TINY if "<judge>" in self._tokenizer.get_vocab() else Template.TEXT
        if self._template is Template.TEXT and not self._tokenizer.chat_template:
            raise UserError(f"{role} {model_path} has no chat template: name an instruction-tuned model")
        own_grades = grades[self._template]
        self._grades_V = self._tokens(own_grades)
        if len(self._grades_V) != len(own_grades):
            said = f"each of {', '.join(own_grades)} as one token"
            raise UserError(f"{role} {model_path} does not write {said}: name another model")
        # The tokenizer reads every token that was added to it anywhere in a text, special or not, and some
        # end a turn. Those of white space do not, and a single letter cannot be broken up.
        self._added = {
            number: token
            for token, number in self._tokenizer.get_added_vocab().items()
            if len(token) > 1 and not token.isspace()
        }
        self._has_system_turn = self._template is Template.TEXT and self._knows_system_turns()

    def _batches(self, lengths: Mapping[int, int]) -> list[list[int]]:
        """Rows, given with their lengths, as they go through the model together."""
        # The last bits of a probability depend on what shares its forward pass, and that on timing. On a CPU,
        # where runs are the same to the bit, a row is alone.
        alone = [[row] for row in lengths]
        return alone if self._device == "cpu" else micro_batches(lengths, self._forward_tokens)

    def _encode_chat(self, messages: list[dict[str, str]], reply_begins: str) -> list[int]:
        """Token ids of the messages and of the reply's first words."""
        if not self._has_system_turn:
            messages = [{"role": "user", "content": "\n\n".join(turn["content"] for turn in messages)}]
        return self._encode(self._chat(messages) + reply_begins)

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

    def _tokens(self, texts: Sequence[str]) -> torch.Tensor:
        """The ids of those of `texts` that are single tokens."""
        ids = [own[0] for own in map(self._encode, texts) if len(own) == 1]
        return torch.tensor(ids, device=self._device)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False) if text else []

    @torch.inference_mode()
    def _continued(self, ids: list[int], max_tokens: int) -> list[int]:
        """`ids` and the likeliest tokens after them, up to the end token, which is left out."""
        ids = ids[: self._max_tokens]
        cache: Any = None
        new = ids
        for _ in range(max_tokens):
            inputs = torch.tensor([new], device=self._device)
            output = self._model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, likeliest = output.past_key_values, int(output.logits[0, -1].argmax())
            if likeliest == self._tokenizer.eos_token_id:
                break
            new = [likeliest]
            ids = ids + new
        return ids

    @torch.inference_mode()
    def _fill_in(
        self, prompts: list[list[int]], between: Sequence[list[int]], choices: Sequence[torch.Tensor]
    ) -> list[Reply | None]:
        """Of each prompt the reply's ids, one of each of the `choices` (token ids (V,)) with the fixed text
        between them, and the choices' probabilities; None where a logit was not finite."""
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
        for choices_V, fixed in zip(choices, [*between, []], strict=True):
            output = self._model(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            logits_BV = output.logits[:, -1, choices_V].float()
            finite_B &= logits_BV.isfinite().all(-1)
            probabilities.append(logits_BV.double().softmax(-1))
            ids_BT = choices_V[logits_BV.argmax(-1)][:, None]
            if fixed:
                fixed_BT = torch.tensor(fixed, device=self._device).expand(num_rows, -1)
                ids_BT = torch.cat([ids_BT, fixed_BT], 1)
            reply.append(ids_BT)
            added = ids_BT.shape[1]
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(num_rows, added)], 1)
            positions_BT = positions_BT[:, -1:] + torch.arange(1, added + 1, device=self._device)
            # Of a row whose verdict is complete, while the others go on.
            positions_BT = positions_BT.clamp(max=self._max_tokens - 1)
        rounded_B = list(map(rounded, zip(*(place.tolist() for place in probabilities), strict=True)))
        ids_B = torch.cat(reply, 1).tolist()
        return [
            (ids, own) if finite else None
            for ids, own, finite in zip(ids_B, rounded_B, finite_B.tolist(), strict=True)
        ]

    @torch.inference_mode()
    def _guess(self, prompt: list[int], num_grades: int) -> Reply | None:
        """`_fill_in` of one prompt with grades alone, without text between them; for a prompt so short that
        reading it again costs less than a pass more. The grades to come are guessed, the best at first and
        then the last one again, and a pass tells all of them up to the first that was guessed wrongly."""
        reply: list[int] = []
        probabilities: list[list[float]] = []
        guess = int(self._grades_V[-1])
        while len(reply) < num_grades:
            num_open = num_grades - len(reply)
            ids = torch.tensor([[*prompt, *reply, *[guess] * (num_open - 1)]], device=self._device)
            logits_1KV = self._model(input_ids=ids, use_cache=False, logits_to_keep=num_open).logits
            for logits_V in logits_1KV[0, :, self._grades_V].float():
                if not logits_V.isfinite().all():
                    return None
                probabilities.append(logits_V.double().softmax(-1).tolist())
                reply.append(int(self._grades_V[logits_V.argmax()]))
                if reply[-1] != guess:
                    guess = reply[-1]
                    break
        return reply, rounded(probabilities)


def rounded(places: Sequence[Sequence[float]]) -> Probabilities:
    """As probabilities are kept: engines differ in the last bits."""
    return tuple(tuple(round(p, _DECIMALS) for p in place) for place in places)
