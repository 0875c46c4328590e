"""Problems to token ids through the model's chat template, and back; how each family is asked."""

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pns.algo.formatting import THINK_TAGS
from pns.config import Data, PromptFamily, ReasoningBlock, Thinking
from pns.data.thinking import ThinkingBudget
from pns.errors import UserError
from pns.files import json_lines
from pns.records import Problem

# The examples that come with PNS, beside the package as its recipes are.
FEW_SHOT = Path(__file__).parents[2] / "recipes" / "few_shot"
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."

# What each family puts into the keys of `Data`; keys that are not named stay empty.
FAMILIES: dict[str, dict[str, str | bool]] = {
    "qwen": {"system_prompt": BOXED},  # Qwen2.5, Qwen2.5-Math, Qwen3
    "llama": {"instruction": f"\n{BOXED}"},  # Llama 3 instruct
    # DeepSeek-R1 and its distillations, which are to be asked without a system turn.
    "deepseek": {"instruction": f"\n{BOXED}"},
    "base": {  # no instruction tuning: a text to be continued
        "chat_template": False,
        "problem_prefix": "Question: ",
        "instruction": f"\n{BOXED}\nAnswer:",
        "stop": "\nQuestion:",
    },
}
# In chat templates.
_MARKS = {"<|im_start|>": "qwen", "<|start_header_id|>": "llama", "<\uff5cUser\uff5c>": "deepseek"}
_TEXT_KEYS = ("system_prompt", "problem_prefix", "instruction", "assistant_prefix", "stop")
# The keys of `Data` that a family fills, as they are where it leaves them alone.
PROMPT_KEYS: dict[str, str | bool] = {"chat_template": True} | dict.fromkeys(_TEXT_KEYS, "")

# Llama 3 templates put the day into the system turn: without a fixed one (the templates' own default) scores
# would depend on it.
_TEMPLATE_ARGUMENTS = {"date_string": "26 Jul 2024"}


def apply_family(data: Data, chat_template: str | None) -> PromptFamily:
    """Fill the prompt keys of `data` as `data.prompt` says, and return the family (none: the keys stand
    as they are).

    `auto` reads it off the tokenizer's `chat_template` (None: base). Raises UserError for an unknown
    template, and where a key is set beside a family.
    """
    name = data.prompt
    if name == PromptFamily.none:
        return name
    if name == PromptFamily.auto:
        found = [family for mark, family in _MARKS.items() if mark in (chat_template or "")]
        if chat_template is not None and not found:
            raise UserError(
                "data.prompt: the model's chat template is of no known family: name one with "
                f"data.prompt=NAME ({', '.join(FAMILIES)}), or set data.prompt=none with data.system_prompt "
                "and data.instruction as the model wants them"
            )
        name = PromptFamily(found[0] if found else "base")
    filled = PROMPT_KEYS | FAMILIES[name]
    for key, empty in PROMPT_KEYS.items():
        if getattr(data, key) not in (empty, filled[key]):
            way_out = "set data.prompt=none, or leave the key to the family"
            raise UserError(f"data.{key} is set and data.prompt is {data.prompt}: {way_out}")
        setattr(data, key, filled[key])
    if data.chat_template and chat_template is None:
        fault = f"{name} needs a chat template and the model's tokenizer has none"
        raise UserError(f"data.prompt: {fault}; use data.prompt=base")
    return name


class Messages:
    """Problems as conversations, for a server that has tokenizer and chat template itself."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self._tags = _think_tags(data)
        self.examples = read_examples(data)

    def messages(self, problem: Problem) -> list[dict[str, str]]:
        """The conversation before the assistant's turn; an example is a turn of each side."""
        system = self.data.system_prompt
        turns = [{"role": "system", "content": system}] if system else []
        for text, solution in self.examples:
            turns += [
                {"role": "user", "content": self._asked(text)},
                {"role": "assistant", "content": solution},
            ]
        return [*turns, {"role": "user", "content": self._asked(problem.prompt)}]

    def _asked(self, problem: str) -> str:
        return self.data.problem_prefix + problem + self.data.instruction

    def canonical(self, text: str) -> str:
        """With <think>, </think> for `data.think_tags`."""
        return _replaced(text, self._tags, THINK_TAGS)


class Prompts(Messages):
    """Renders problems with a tokenizer's chat template.

    The prompt is [system turn] + user turn (`data.problem_prefix`, problem, `data.instruction`) + generation
    prompt + `data.assistant_prefix`; without `data.chat_template` it is the text of the user turn alone, with
    the tokenizer's own first token. Threads may share it: a tokenizer serves one at a time.
    """

    def __init__(self, tokenizer: Any, data: Data) -> None:
        super().__init__(data)
        self.tokenizer = tokenizer
        self._in_use = threading.RLock()
        self._template_arguments: dict[str, Any] = dict(_TEMPLATE_ARGUMENTS)
        if data.thinking is not Thinking.auto:
            if not data.chat_template or "enable_thinking" not in (tokenizer.chat_template or ""):
                fault = f"{data.thinking}, and the model's chat template names no enable_thinking"
                raise UserError(f"data.thinking: {fault}: leave it auto")
            self._template_arguments["enable_thinking"] = data.thinking is Thinking.on
        # Tags that decoding would leave out with the other special tokens.
        added = tokenizer.added_tokens_decoder.items()
        own_tags = {number: str(token) for number, token in added if token.special}
        self._special_tags = {number: tag for number, tag in own_tags.items() if tag in self._tags}
        begun = self._begun_turn()
        opening, closing = self._tags
        block_is_open = self._block_is_open = begun.rfind(opening) > begun.rfind(closing)
        # What completions begin with although the prompt holds it: the prefix, and before it the opening of
        # the reasoning block where the template itself writes it.
        opened_by_template = block_is_open and opening not in data.assistant_prefix
        prefix = (begun[begun.rfind(opening) :] if opened_by_template else "") or data.assistant_prefix
        self.prefix = _replaced(prefix, self._tags, THINK_TAGS)
        # Whether completions begin with a reasoning block. A prompt that closes one (Qwen3 told not to
        # think) leaves none to be written.
        writes_block = block_is_open or (opening not in begun and opening in tokenizer.get_vocab())
        self.reasoning_block = data.reasoning is ReasoningBlock.tags or (
            data.reasoning is ReasoningBlock.auto and writes_block
        )

    def thinking_budget(self, tokens: int) -> ThinkingBudget:
        """That closes the reasoning block after `tokens` tokens: with the closing tag, on a line of its own
        where the chat template writes the tags so. Raises UserError for a model that has no block."""
        opening, closing = self._tags
        if not self.reasoning_block:
            fault = f"{tokens}, and completions have no block between {opening} and {closing}"
            way_out = "name the model's own tags (data.think_tags), switch its thinking on (data.thinking)"
            raise UserError(f"evaluate.thinking_budget: {fault}: {way_out}, or leave the budget out")
        written = (self.tokenizer.chat_template or "") if self.data.chat_template else ""
        # Of a template it is the source, in which a line may end as an escape.
        lines = (opening + "\n", opening + "\\n", "\n" + closing, "\\n" + closing)
        forced = "\n" + closing if any(line in written for line in lines) else closing
        closing_ids = self.tokenizer.encode(forced, add_special_tokens=False)
        if self.tokenizer.decode(closing_ids, skip_special_tokens=False) != forced:
            fault = f"{tokens}, and the model's tokenizer cannot write {closing!r}"
            raise UserError(f"evaluate.thinking_budget: {fault}: name the model's own tags, data.think_tags")
        return ThinkingBudget(tokens, opening, closing, self._block_is_open, tuple(closing_ids))

    def encode(self, problem: Problem) -> tuple[int, ...]:
        """Prompt ids (T,)."""
        with self._in_use:
            text, templated = self._text(self.messages(problem)), self.data.chat_template
            return tuple(self.tokenizer.encode(text, add_special_tokens=not templated))

    def _text(self, messages: list[dict[str, str]]) -> str:
        """The prompt's text, without the first token that a plain one gets from the tokenizer."""
        prefix = self.data.assistant_prefix
        if not self.data.chat_template:
            return self._shown(messages) + prefix
        turns = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **self._template_arguments
        )
        return turns + prefix

    def _shown(self, messages: list[dict[str, str]]) -> str:
        """Of a plain text: the examples, a blank line after each, and the problem."""
        asked = [message["content"] for message in messages if message["role"] != "system"]
        pairs = zip(asked[:-1:2], asked[1::2], strict=True)
        return "".join(f"{text} {solution}\n\n" for text, solution in pairs) + asked[-1]

    def _begun_turn(self) -> str:
        """What stands between a question and its completion."""
        question = "QUESTION"
        return self._text([{"role": "user", "content": question}]).rpartition(question)[2]

    def render(self, problem: Problem) -> str:
        """The prompt's text as the model reads it, special tokens included."""
        # Clean-up would take spaces away that the model reads.
        return self.tokenizer.decode(list(self.encode(problem)), clean_up_tokenization_spaces=False)

    def encode_completion(self, text: str) -> tuple[int, ...]:
        """Completion ids (T,) with the end token, of a text as `decode` gives it: `prefix` is part of the
        prompt."""
        completion = _replaced(text.removeprefix(self.prefix), THINK_TAGS, self._tags)
        with self._in_use:
            token_ids = self.tokenizer.encode(completion, add_special_tokens=False)
        return (*token_ids, self.tokenizer.eos_token_id)

    def token_starts(self, text: str) -> list[int]:
        """The first character in `text`, as `decode` gives it, of each token of `encode_completion` but the
        end token."""
        completion = text.removeprefix(self.prefix)
        own = _replaced(completion, THINK_TAGS, self._tags)
        with self._in_use:
            encoded = self.tokenizer(own, add_special_tokens=False, return_offsets_mapping=True)
        starts = [start for start, _ in encoded["offset_mapping"]]
        if self._tags != THINK_TAGS:
            # A start is where the text before it ends; in a tag of several tokens, somewhere in it.
            starts = [len(_replaced(own[:start], self._tags, THINK_TAGS)) for start in starts]
        return [start + len(text) - len(completion) for start in starts]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of completion ids, without the end token and other special tokens, with `prefix` before it and
        <think>, </think> for `data.think_tags`."""
        begin, text = 0, ""
        for i, token in enumerate(token_ids if self._special_tags else ()):
            if token in self._special_tags:
                text += self._decode(token_ids[begin:i]) + self._special_tags[token]
                begin = i + 1
        text += self._decode(token_ids[begin:])
        return self.prefix + self.canonical(text)

    def _decode(self, token_ids: Sequence[int]) -> str:
        with self._in_use:
            text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def fitting(self, problems: Sequence[Problem]) -> tuple[list[Problem], int]:
        """The problems whose prompt has at most `data.max_prompt_tokens` tokens, and how many have not.
        Raises UserError if none has."""
        limit = self.data.max_prompt_tokens
        lengths = [len(self.encode(problem)) for problem in problems]
        kept = [problem for problem, length in zip(problems, lengths, strict=True) if length <= limit]
        if not kept:
            shortest = f"the shortest of {len(problems)} prompts has {min(lengths)}"
            raise UserError(f"data.max_prompt_tokens: {limit}; {shortest}: raise it")
        return kept, len(problems) - len(kept)


def read_examples(data: Data) -> list[tuple[str, str]]:
    """(problem, solution) of `data.few_shot`. Raises UserError with file and line."""
    if not data.few_shot:
        return []
    shipped = {path.stem: path for path in sorted(FEW_SHOT.glob("*.jsonl"))}
    file = shipped.get(data.few_shot, Path(data.few_shot))
    if not file.is_file():
        raise UserError(f"data.few_shot: {file} does not exist; there are {', '.join(shipped)}, or your file")
    examples = []
    for number, record in json_lines(file):
        if not (isinstance(record, dict) and record.get("problem") and record.get("solution")):
            fault = f"{file}, line {number}: an example needs problem and solution"
            raise UserError(f"data.few_shot: {fault}")
        examples.append((str(record["problem"]), str(record["solution"])))
    if len(examples) < max(1, data.few_shot_count):
        fault = f"{file} has {len(examples)} examples"
        raise UserError(f"data.few_shot: {fault}; set data.few_shot_count to at most as many")
    return examples[: data.few_shot_count or None]


def _think_tags(data: Data) -> tuple[str, str]:
    texts = [tag for tag in data.think_tags if tag and isinstance(tag, str)]  # [T] without quotes is a list
    if not len(data.think_tags) == len(texts) == len(set(texts)) == 2:
        fault = f"{data.think_tags} are not two different texts, an opening and a closing one"
        raise UserError(f"data.think_tags: {fault}")
    return data.think_tags[0], data.think_tags[1]


def _replaced(text: str, tags: tuple[str, str], by: tuple[str, str]) -> str:
    return text if tags == by else text.replace(tags[0], by[0]).replace(tags[1], by[1])


def break_added_tokens(tokenizer: Any, text: str) -> str:
    """`text` with a space in every token that was added to the tokenizer, special or not, but those of white
    space: the tokenizer reads them anywhere in a text, and some end a turn."""
    added = tokenizer.get_added_vocab()
    # Of the tiny world's tokenizer every word is an added token.
    for token in added if len(added) < len(tokenizer) else tokenizer.all_special_tokens:
        if not token.isspace():
            text = text.replace(token, token[:1] + " " + token[1:])
    return text


def encode_conversation(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
    """Token ids (T,) of whole turns ("role" and "content"), as `apply_chat_template` gives them; no content
    holds an added token."""
    turns = [
        {"role": message["role"], "content": break_added_tokens(tokenizer, message["content"])}
        for message in messages
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, **_TEMPLATE_ARGUMENTS)
    return tuple(tokenizer.encode(text, add_special_tokens=False))  # the template writes them


def render_open_turn(tokenizer: Any, messages: Sequence[Mapping[str, str]], begun: str) -> str:
    """The turns ("role" and "content", no content holding an added token) and the opening of an assistant's
    turn that begins with `begun`, as `apply_chat_template` gives them. A reasoning block that the template
    opens is left out where `begun` opens it."""
    turns = [
        {"role": message["role"], "content": break_added_tokens(tokenizer, message["content"])}
        for message in messages
    ]
    text: str = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=False, **_TEMPLATE_ARGUMENTS
    )
    before, opening, after = text.rpartition(THINK_TAGS[0])
    return before if opening and begun.startswith(opening + after) else text


def context_tokens(path: str, trust_remote_code: bool = False) -> int:
    """The most tokens, prompt and completion together, that the model of a directory or Hub id takes."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    return int(config.get_text_config().max_position_embeddings)


def generation_config(path: str) -> dict[str, Any] | None:
    """generation_config.json of a model directory or Hub id; None where it has none."""
    from transformers.utils.hub import cached_file

    try:
        file = cached_file(path, "generation_config.json")
    except OSError:
        return None
    return json.loads(Path(file).read_text()) if file else None


def load_tokenizer(path: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model directory or Hub id."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would break the progress line
    return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def find_tokenizer(path: str, trust_remote_code: bool = False) -> Any | None:
    """The tokenizer of a model directory or Hub id; None where it has none."""
    from transformers.utils.hub import cached_file

    try:
        # Without its files some architectures would get an empty tokenizer.
        cached_file(path, "tokenizer_config.json")
    except OSError:
        return None
    return load_tokenizer(path, trust_remote_code)


def check_vocabulary(path: str, tokenizer: Any, key: str, trust_remote_code: bool = False) -> None:
    """Raise UserError where the model of a directory or Hub id, named by `key`, cannot read the token ids of
    the backbone's `tokenizer`: its own has other tokens at them, or (it has none) there are more ids than the
    model knows. Tokens that it has beyond the backbone's do no harm."""
    from transformers import AutoConfig

    own = find_tokenizer(path, trust_remote_code)
    if own is not None:
        fault = _difference(own, tokenizer)
    else:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        num_known, num_needed = int(config.get_text_config().vocab_size), len(tokenizer)
        fault = f"it knows {num_known} tokens of {num_needed}" if num_known < num_needed else ""
    if not fault:
        return
    way_out = "name a model of the backbone's family"
    if key.startswith("reward.terms."):
        way_out += f", or set {key.removesuffix('.model')}.input=chat"
    backbone = f"the backbone {tokenizer.name_or_path}"
    raise UserError(f"{key}: {path} does not read the token ids of {backbone} ({fault}): {way_out}")


def _difference(own: Any, backbone: Any) -> str:
    """The first token of `backbone` that is another one in `own`; empty where there is none. How each splits
    a text does not matter: the ids are the backbone's."""
    known = own.get_vocab()
    for token, token_id in sorted(backbone.get_vocab().items(), key=lambda entry: entry[1]):
        if known.get(token) != token_id:
            there = f"is {known[token]}" if token in known else "is missing"
            return f"token {token!r} {there} there, {token_id} in the backbone"
    return ""
