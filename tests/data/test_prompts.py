"""Prompts of each family of backbones, to the character."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

from pns import driver
from pns.algo.formatting import check_format
from pns.answers.extract import extract_boxed
from pns.config import Data, ReasoningBlock, Thinking
from pns.data.prompts import (
    BOXED,
    FAMILIES,
    Prompts,
    apply_family,
    break_added_tokens,
    check_vocabulary,
    encode_conversation,
    load_tokenizer,
    read_examples,
)
from pns.errors import UserError
from pns.records import Problem
from pns.tiny.tokenizer import build_tokenizer

PROBLEM = Problem("p", "What is $1+1$?", "2")

# As the families' own templates begin and end; Llama's states the day unless it is given one.
QWEN = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages if message.role == 'user' %}"
    "{{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
LLAMA = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '<|eot_id|>' }}"
    "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] + "
    "'<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
DEEPSEEK = "{{- bos_token }}{%- for message in messages %}{{- '<｜User｜>' + message['content'] }}{%- endfor %}{{- '<｜Assistant｜><think>\\n' }}"


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Bytes as tokens; like Llama's, it puts a first token before plain text."""
    alphabet = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    backend.add_special_tokens(special)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", len(alphabet))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>", chat_template=template
    )


EXPECTED = {
    "qwen": (
        QWEN,
        f"<|im_start|>system\n{BOXED}<|im_end|>\n<|im_start|>user\nWhat is $1+1$?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama": (
        LLAMA,
        "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024<|eot_id|>"
        f"<|start_header_id|>user<|end_header_id|>\n\nWhat is $1+1$?\n{BOXED}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "deepseek": (DEEPSEEK, f"<s><｜User｜>What is $1+1$?\n{BOXED}<｜Assistant｜><think>\n"),
    "base": (None, f"<s>Question: What is $1+1$?\n{BOXED}\nAnswer:"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_families(family: str) -> None:
    template, expected = EXPECTED[family]
    for name in (family, "auto"):
        data = Data(prompt=name)
        own = tokenizer(template)
        assert apply_family(data, own.chat_template) == family
        assert Prompts(own, data).render(PROBLEM) == expected


def test_the_instruction_is_the_known_one() -> None:
    assert BOXED == r"Please reason step by step, and put your final answer within \boxed{}."


def test_a_base_prompt_may_be_asked_of_a_chat_model() -> None:
    data = Data(prompt="base")
    assert apply_family(data, QWEN) == "base"
    assert Prompts(tokenizer(QWEN), data).render(PROBLEM) == EXPECTED["base"][1]


def test_wrong_families() -> None:
    for data, template, words in (
        (Data(prompt="auto"), "{{ messages[0].content }}", ("data.prompt", "no known family")),
        (Data(prompt="qwen"), None, ("data.prompt", "has none", "base")),
        (Data(prompt="qwen", instruction="Think."), QWEN, ("data.instruction", "data.prompt=none")),
    ):
        with pytest.raises(UserError) as error:
            apply_family(data, template)
        for word in words:
            assert word in str(error.value)
    data = Data(instruction="Think.", system_prompt="s")
    assert apply_family(data, None) == "none"
    assert (data.instruction, data.system_prompt) == ("Think.", "s")
    filled = Data(prompt="qwen")
    assert apply_family(filled, QWEN) == apply_family(filled, QWEN)  # a second time changes nothing


QWEN3_TOLD_NOT_TO_THINK = QWEN.replace("assistant\\n' }}", "assistant\\n<think>\\n\\n</think>\\n\\n' }}")


def knows_the_tags(template: str | None) -> PreTrainedTokenizerFast:
    """As Qwen3's and DeepSeek's: the tags are tokens of their own, and no special ones."""
    made = tokenizer(template)
    made.add_tokens(["<think>", "</think>"])
    return made


@pytest.mark.parametrize(
    ("prompts", "block", "prefix"),
    [
        (Prompts(tokenizer(QWEN), Data()), False, ""),  # Qwen2.5
        (Prompts(tokenizer(LLAMA), Data()), False, ""),
        (Prompts(tokenizer(None), Data(chat_template=False)), False, ""),
        (Prompts(knows_the_tags(QWEN), Data()), True, ""),  # Qwen3
        (Prompts(knows_the_tags(QWEN3_TOLD_NOT_TO_THINK), Data()), False, ""),
        (Prompts(knows_the_tags(DEEPSEEK), Data()), True, "<think>\n"),
        (Prompts(tokenizer(DEEPSEEK), Data()), True, "<think>\n"),
        (Prompts(tokenizer(QWEN), Data(assistant_prefix="<think>")), True, "<think>"),
        (Prompts(tokenizer(DEEPSEEK), Data(assistant_prefix="Well, ")), True, "<think>\nWell, "),
        (Prompts(tokenizer(QWEN), Data(reasoning=ReasoningBlock.tags)), True, ""),
        (Prompts(knows_the_tags(QWEN), Data(reasoning=ReasoningBlock.none)), False, ""),
    ],
)
def test_the_reasoning_block_is_read_off_prompt_and_tokenizer(
    prompts: Prompts, block: bool, prefix: str
) -> None:
    assert (prompts.reasoning_block, prompts.prefix) == (block, prefix)


def test_an_opening_in_the_prompt_is_part_of_the_completions_text() -> None:
    prompts = Prompts(knows_the_tags(DEEPSEEK), Data())
    ids = prompts.tokenizer.encode("1+1=2.</think>So \\boxed{2}", add_special_tokens=False)
    text = prompts.decode(ids)
    assert text == "<think>\n1+1=2.</think>So \\boxed{2}"
    assert check_format(text, "stop", prompts.reasoning_block).ok
    assert prompts.encode_completion(text) == (*ids, prompts.tokenizer.eos_token_id)


def test_the_gate_fits_models_without_a_block() -> None:
    qwen = (
        "To find the sum, we add.\n\n1. First, \\(1 + 1 = 2\\).\n\nTherefore, the answer is \\(\\boxed{2}\\)."
    )
    llama = "## Step 1: Add\nWe have $1+1=2$.\n\nThe final answer is: $\\boxed{2}$"
    for text in (qwen, llama):
        assert check_format(text, "stop", reasoning_block=False).ok
        assert check_format(text, "stop").reason == "no_reasoning_block"
    broken = {
        "not_ended": (qwen, "length"),
        "no_answer": ("The answer is 2.", "stop"),
        "several_answers": (qwen + " \\boxed{3}", "stop"),
        "text_after_answer": (qwen + " I hope it helps.", "stop"),
    }
    for reason, (text, finish_reason) in broken.items():
        assert check_format(text, finish_reason, reasoning_block=False).reason == reason


def test_a_turn_holds_no_added_token_and_keeps_its_white_space() -> None:
    own = knows_the_tags(LLAMA)
    own.add_tokens(["  "])
    assert break_added_tokens(own, "a  b <|eot_id|></think><s") == "a  b < |eot_id|>< /think><s"
    turns = [{"role": "user", "content": "<|eot_id|>"}, {"role": "assistant", "content": "</think>"}]
    ids = encode_conversation(own, turns)
    text = own.decode(ids)
    assert text.count("<s>") == 1
    assert text.count("<|eot_id|>") == 3  # of the template alone
    assert text.endswith("\n\n< /think><|eot_id|>")  # no generation prompt


def test_words_of_the_tiny_world_are_no_control_tokens(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    own = load_tokenizer(saved_model(tmp_path, None))
    turns = [{"role": "user", "content": "Ann has 3. "}, {"role": "assistant", "content": "3<eos>"}]
    assert own.decode(encode_conversation(own, turns)).startswith("<bos>Ann has 3. <solve>3")
    assert encode_conversation(own, turns).count(own.eos_token_id) == 1


def saved_model(directory: Path, own: PreTrainedTokenizerFast | None, vocab_size: int = 300) -> str:
    """What a check of the vocabulary reads of a model."""
    LlamaConfig(vocab_size=vocab_size).save_pretrained(directory)
    if own is not None:
        own.save_pretrained(directory)
    return str(directory)


def test_a_model_of_the_backbones_vocabulary_passes(tmp_path: Path) -> None:
    key = "models.reward_model"
    backbone = load_tokenizer(saved_model(tmp_path / "backbone", tokenizer(QWEN)))
    check_vocabulary(saved_model(tmp_path / "equal", tokenizer(LLAMA)), backbone, key)
    check_vocabulary(saved_model(tmp_path / "written_again", backbone), backbone, key)
    check_vocabulary(saved_model(tmp_path / "more_tokens", knows_the_tags(QWEN)), backbone, key)
    check_vocabulary(saved_model(tmp_path / "no_tokenizer", None), backbone, key)
    # How it would split a text does not matter: it is given ids.
    state = json.loads(tokenizer(QWEN).backend_tokenizer.to_str()) | {"normalizer": {"type": "NFC"}}
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    check_vocabulary(saved_model(tmp_path / "other_splits", other), backbone, key)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("ids", "token 'a' is"),
        ("missing", "token '<think>' is missing"),
        ("small", "knows 200 tokens of 264"),
    ],
)
def test_a_model_of_another_vocabulary_is_refused_in_one_line(tmp_path: Path, fault: str, said: str) -> None:
    backbone = load_tokenizer(saved_model(tmp_path / "backbone", knows_the_tags(QWEN)))
    state = json.loads(tokenizer(QWEN).backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    other = None
    if fault == "ids":
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    if fault != "small":
        other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    if fault == "ids":
        other.add_tokens(["<think>", "</think>"])
    path = saved_model(tmp_path / "other", other, vocab_size=200)
    with pytest.raises(UserError) as error:
        check_vocabulary(path, backbone, "reward.terms.quality.model")
    message = str(error.value)
    assert message.startswith(f"reward.terms.quality.model: {path} ")
    for words in (str(tmp_path / "backbone"), said, "reward.terms.quality.input=chat"):
        assert words in message
    assert "\n" not in message
    with pytest.raises(UserError, match=r"models.reward_model: .*: name a model of the backbone's family$"):
        check_vocabulary(path, backbone, "models.reward_model")


# As Qwen3's ends: told not to think, it closes the block at once.
QWEN3 = QWEN.replace(
    "assistant\\n' }}{%- endif %}",
    "assistant\\n' }}{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}",
)


def test_the_thinking_switch() -> None:
    own = tokenizer(QWEN3)
    own.add_tokens(["<think>", "</think>"])
    ends = {}
    for thinking in Thinking:
        prompts = Prompts(own, Data(thinking=thinking))
        ends[thinking] = (prompts.render(PROBLEM).rpartition("assistant\n")[2], prompts.reasoning_block)
    block = "<think>\n\n</think>\n\n"
    assert ends == {Thinking.auto: ("", True), Thinking.on: ("", True), Thinking.off: (block, False)}
    digests = {driver.prompts_digest(Prompts(own, Data(thinking=thinking))) for thinking in Thinking}
    assert len(digests) == 3
    with pytest.raises(UserError, match=r"data\.thinking: off, and the model's chat template names no"):
        Prompts(tokenizer(QWEN), Data(thinking=Thinking.off))


@pytest.mark.parametrize(
    ("prompts", "forced"),
    [
        (Prompts(knows_the_tags(QWEN3), Data()), "\n</think>"),  # as its template closes a block
        (Prompts(knows_the_tags(DEEPSEEK), Data()), "\n</think>"),  # as it opens one
        (Prompts(tokenizer(DEEPSEEK), Data()), "\n</think>"),  # nine tokens of bytes
        (Prompts(knows_the_tags(QWEN), Data()), "</think>"),
        (Prompts(knows_the_tags(QWEN3), Data(chat_template=False)), "</think>"),
    ],
)
def test_a_reasoning_block_is_closed_as_the_family_writes_it(prompts: Prompts, forced: str) -> None:
    own = prompts.tokenizer
    budget = prompts.thinking_budget(3)
    assert own.decode(budget.closing_ids) == forced
    assert budget.opened is prompts.prefix.startswith("<think>")
    begun = own.encode("" if budget.opened else "<think>", add_special_tokens=False)
    thought = [*begun, *own.encode("abc", add_special_tokens=False)][:3]
    for place, token in enumerate(budget.closing_ids):
        assert budget.forced(own, [*thought, *budget.closing_ids[:place]]) == token
    assert budget.forced(own, thought[:2]) is None
    assert budget.forced(own, [*thought, *budget.closing_ids]) is None
    assert budget.cuts(own, [*thought, *budget.closing_ids])
    assert not budget.cuts(own, thought)  # it ended by itself
    if not budget.opened:
        assert budget.forced(own, own.encode("abc", add_special_tokens=False)) is None


@pytest.mark.parametrize(
    "prompts",
    [
        Prompts(tokenizer(QWEN), Data()),
        Prompts(knows_the_tags(QWEN3), Data(thinking=Thinking.off)),
        Prompts(knows_the_tags(DEEPSEEK), Data(reasoning=ReasoningBlock.none)),
    ],
)
def test_a_budget_needs_a_reasoning_block(prompts: Prompts) -> None:
    with pytest.raises(
        UserError, match=r"evaluate\.thinking_budget: 9, and completions have no block between"
    ):
        prompts.thinking_budget(9)


@pytest.mark.parametrize("special", [True, False])
def test_a_models_own_tags_are_the_usual_ones_in_texts(special: bool) -> None:
    own = tokenizer(QWEN)
    own.add_tokens(["[THINK]", "[/THINK]"], special_tokens=special)
    prompts = Prompts(own, Data(think_tags=["[THINK]", "[/THINK]"]))
    assert prompts.reasoning_block
    token_ids = own.encode("[THINK]1+1=2.[/THINK]It is \\boxed{2}.<|im_end|>", add_special_tokens=False)
    text = prompts.decode(token_ids)
    assert text == "<think>1+1=2.</think>It is \\boxed{2}."
    assert check_format(text, "stop").ok
    assert list(prompts.encode_completion(text)) == token_ids
    budget = prompts.thinking_budget(4)
    assert [budget.forced(own, token_ids[:4]), budget.forced(own, token_ids[:3])] == [token_ids[7], None]
    assert prompts.thinking_budget(8).forced(own, token_ids[:8]) is None
    starts = prompts.token_starts(text)
    assert [text[start] for start in starts[1:7]] == list("1+1=2.")
    assert text[starts[7] :].startswith("</think>")
    assert text[starts[8] :] == "It is \\boxed{2}."
    unclosed = prompts.decode(own.encode("[THINK]So \\boxed{2}", add_special_tokens=False))
    assert extract_boxed(unclosed) is None
    with pytest.raises(UserError, match=r"data\.think_tags"):
        Prompts(own, Data(think_tags=["[THINK]"]))


def test_examples_stand_before_the_problem(tmp_path: Path) -> None:
    file = tmp_path / "examples.jsonl"
    lines = [{"problem": f"What is {i}+{i}?", "solution": f"It is \\boxed{{{2 * i}}}."} for i in range(3)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = Data(prompt="base", few_shot=str(file), few_shot_count=2)
    apply_family(data, None)
    prompts = Prompts(tokenizer(None), data)
    assert prompts.render(PROBLEM) == (
        f"<s>Question: What is 0+0?\n{BOXED}\nAnswer: It is \\boxed{{0}}.\n\n"
        f"Question: What is 1+1?\n{BOXED}\nAnswer: It is \\boxed{{2}}.\n\n"
        f"Question: What is $1+1$?\n{BOXED}\nAnswer:"
    )
    chat = Prompts(tokenizer(LLAMA), Data(few_shot=str(file)))
    assert [turn["role"] for turn in chat.messages(PROBLEM)] == ["user", "assistant"] * 3 + ["user"]
    assert chat.render(PROBLEM).count("assistant<|end_header_id|>\n\nIt is") == 3
    with pytest.raises(UserError, match="has 3 examples; set data"):
        Prompts(tokenizer(None), Data(few_shot=str(file), few_shot_count=4))
    file.write_text('{"problem": "What?"}\n')
    with pytest.raises(UserError, match="line 1: an example needs problem and solution"):
        Prompts(tokenizer(None), Data(few_shot=str(file)))


@pytest.mark.parametrize(("name", "num"), [("grade_school_8", 8), ("competition_4", 4)])
def test_the_examples_that_come_with_pns_are_right(name: str, num: int) -> None:
    examples = read_examples(Data(few_shot=name))
    assert len(examples) == num
    for problem, solution in examples:
        answer = extract_boxed(solution)
        assert answer is not None, problem
        assert answer in solution.split("The answer is")[0], problem
        for sides in re.findall(r"\$([\d.+*/ -]+) = ([\d.]+)\$", solution):
            assert eval(sides[0]) == float(sides[1]), problem


def test_a_name_of_no_examples_says_which_there_are() -> None:
    with pytest.raises(UserError, match="there are competition_4, grade_school_8, or your file"):
        read_examples(Data(few_shot="gsm8k_8"))
