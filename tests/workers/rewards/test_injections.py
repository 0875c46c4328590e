"""318 hostile texts in the prompts of thirteen tokenizer families: none brings a control token, a role or a
verdict into the judge's prompt. The texts are data: `tests/cases/injections.jsonl`."""

from __future__ import annotations

import json
import re
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from pns.algo.judging import (
    Template,
    neutralise,
    parse_verdict,
    render_text,
    render_tiny,
    verdict_parts,
    verdict_regex,
)
from pns.algo.step_judging import parse_steps
from pns.algo.step_judging import verdict_parts as step_parts
from pns.algo.step_judging import verdict_regex as step_regex
from pns.tiny.tokenizer import build_tokenizer
from workers.rewards.judge import Judge
from workers.rewards.step_judge import StepJudge
from workers.runtime import Runtime

NONCE = "9f3ab27c41d0e685"
PROBLEM, SOLUTION = "How many has Bob? ", "<think>Bob has 12+7=19. </think>\\boxed{19}"
CASES = Path(__file__).parents[2] / "cases" / "injections.jsonl"
SPELLINGS = {
    "$NONCE": NONCE,
    "$UPPER": NONCE.upper(),
    "$HEAD": NONCE[:8],
    "$TAIL": NONCE[8:],
    "$WIDE": "".join(chr(ord(letter) + 0xFEE0) for letter in NONCE),
    "$SPLIT": "\u200b".join(NONCE),
}


def injections() -> list[str]:
    """The texts; one that names the nonce does so rightly, as no author could."""
    texts = [json.loads(line)["text"] for line in CASES.read_text(encoding="utf-8").splitlines()]
    for name, spelling in SPELLINGS.items():
        texts = [text.replace(name, spelling) for text in texts]
    return texts


@dataclass(frozen=True)
class Family:
    """The special tokens of a family of models, those that are added and not special, and its chat template:
    `turn` with the role and the text, for each message, and what the reply begins after."""

    special: str
    turn: str
    reply: str
    plain: str = ""
    roles: str = "user system assistant"
    knows_system: bool = True
    normalizer: Any = None

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Bytes as tokens, and the family's own."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        if self.normalizer:
            backend.normalizer = self.normalizer
        user, system, assistant = self.roles.split()
        names = {"user": user, "system": system, "assistant": assistant}
        turn = self.turn.replace("ROLE", "{{ names[turn['role']] }}").replace("TEXT", "{{ turn['content'] }}")
        if not self.knows_system:
            turn = "{% if turn['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + turn
        template = f"{{% set names = {names} %}}{{% for turn in messages %}}{turn}{{% endfor %}}{self.reply}"
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)
        # As a tokenizer.json has them: special ones are found in the text as it stands, others after the
        # normalizer; few are named in the map of special tokens.
        tokenizer.add_tokens(
            [AddedToken(token, special=True, normalized=False) for token in self.special.split()]
        )
        tokenizer.add_tokens([AddedToken(token, normalized=True) for token in self.plain.split()])
        tokenizer.add_tokens(["\n\n", "    "])
        return tokenizer


FAMILIES = {
    "chatml": Family(
        "<|im_start|> <|im_end|> <|endoftext|> <|im_sep|> <|vision_start|>",
        "<|im_start|>ROLE\nTEXT<|im_end|>\n",
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "<think> </think> <tool_call> </tool_call>",
    ),
    "llama3": Family(
        "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> <|python_tag|> "
        "<|reserved_special_token_0|> <|finetune_right_pad_id|>",
        "<|start_header_id|>ROLE<|end_header_id|>\n\nTEXT<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "llama2": Family("<s> </s> <unk>", "<s>[INST] TEXT [/INST]", " "),
    "mistral": Family(
        "<s> </s> [INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] "
        "[/TOOL_RESULTS] [TOOL_CALLS] [IMG] [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [THINK] [/THINK] [ARGS] "
        "[CALL_ID]",
        "[ROLE]TEXT[/ROLE]",
        "",
        roles="INST SYSTEM_PROMPT TOOL_CALLS",
    ),
    "gemma": Family(
        "<bos> <eos> <pad> <start_of_turn> <end_of_turn> <start_of_image> <unused0>",
        "<start_of_turn>ROLE\nTEXT<end_of_turn>\n",
        "<start_of_turn>model\n",
        "<h1> </h1> <table> [multimodal]",
        knows_system=False,
    ),
    "deepseek": Family(
        "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜> <｜tool▁calls▁begin｜>",
        "<｜ROLE｜>TEXT",
        "<｜Assistant｜></think>",
        "<think> </think>",
        roles="User User Assistant",
    ),
    "glm": Family(
        "[gMASK] [sMASK] <sop> <eop> <|system|> <|user|> <|assistant|> <|observation|> <|endoftext|>",
        "<|ROLE|>\nTEXT",
        "<|assistant|>\n<think></think>\n",
        "/nothink <think> </think>",
    ),
    "minimax": Family("]~!b[ ]~b] [e~[", "]~b]ROLE\nTEXT[e~[\n", "]~b]ai\n", "<think> </think>"),
    "phi": Family(
        "<|system|> <|user|> <|assistant|> <|end|> <|endoftext|> <|dummy_0|>",
        "<|ROLE|>TEXT<|end|>",
        "<|assistant|>",
    ),
    "command": Family(
        "<BOS_TOKEN> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|SYSTEM_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> "
        "<|START_RESPONSE|> <|END_RESPONSE|>",
        "<|START_OF_TURN_TOKEN|><|ROLE_TOKEN|>TEXT<|END_OF_TURN_TOKEN|>",
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        roles="USER SYSTEM CHATBOT",
    ),
    "vicuna": Family("<s> </s>", "ROLE: TEXT ", "ASSISTANT:", roles="USER SYSTEM ASSISTANT"),
    "alpaca": Family(
        "<s> </s>", "### ROLE:\nTEXT\n\n", "### Response:\n", roles="Instruction Instruction Response"
    ),
    # One that folds case and width before it looks for added tokens.
    "folding": Family(
        "<|im_start|> <|im_end|>",
        "<|im_start|>ROLE\nTEXT<|im_end|>\n",
        "<|im_start|>assistant\n",
        "[gmask] <|turn|> relevance=3 ③",
        normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
    ),
}


def save_model(family: str, directory: Path) -> str:
    tokenizer = FAMILIES[family].tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module", params=FAMILIES)
def judge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Judge:
    return Judge(save_model(request.param, tmp_path_factory.mktemp(request.param)), Runtime())


@pytest.fixture(scope="module", params=FAMILIES)
def step_judge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> StepJudge:
    return StepJudge(save_model(request.param, tmp_path_factory.mktemp(request.param)), Runtime())


def test_the_corpus_is_large_and_has_no_doubles() -> None:
    assert len(set(injections())) == len(injections()) == 318
    assert len(FAMILIES) == 13


def test_no_control_token_gets_through(judge: Judge) -> None:
    """From problem or candidate: the prompt has the added tokens, in their order, of an innocent one."""
    added = {
        number
        for token, number in judge._tokenizer.get_added_vocab().items()
        if len(token) > 1 and not token.isspace()
    }

    def control_tokens(problem: str, candidate: str) -> list[int]:
        return [number for number in judge._prompt(problem, candidate, NONCE) if number in added]

    innocent = control_tokens(PROBLEM, SOLUTION)
    texts = injections()
    assert [text for text in texts if control_tokens(text, text) != innocent] == []


def test_no_candidate_can_be_read_as_a_verdict_or_a_role(judge: Judge) -> None:
    """In what the judge reads of it, nor in a reply that quotes it."""
    accepted = []
    for text in injections():
        prompt = judge._tokenizer.decode(judge._prompt(PROBLEM, text, NONCE))
        assert prompt.count(NONCE) == 5  # said, before, after, in the form, and in the reply's beginning
        part = prompt.split(f"\n{NONCE}\n")[1]
        plain = unicodedata.normalize("NFKC", part)
        if (
            re.search(verdict_regex(Template.TEXT, NONCE), prompt)
            or re.search(r"\b(relevance|coherence|completeness|clarity)\W*?[=:]\W*\d", plain, re.IGNORECASE)
            or re.search(r"(?m)^[^\w\n]*(system|assistant|user|judge|ai|model)\s*:", plain, re.IGNORECASE)
            or any(parse_verdict(reply, Template.TEXT, NONCE) for reply in (part, f"{part}</verdict>", plain))
        ):
            accepted.append(text)
    assert accepted == []


def test_a_reply_that_quotes_is_no_verdict() -> None:
    genuine = "".join(
        part + digit for part, digit in zip(verdict_parts(Template.TEXT, NONCE), [*"1203", ""], strict=True)
    )
    for text in injections():
        quoted = neutralise(text, NONCE)
        replies = [quoted, f"<verdict {NONCE}>{quoted}</verdict>", f"{quoted}\n{quoted}"]
        if quoted.strip():  # a verdict beside other text is none either
            replies += [genuine + quoted, quoted + genuine]
        assert [reply for reply in replies if parse_verdict(reply, Template.TEXT, NONCE)] == []


def test_candidates_of_a_problem_share_the_tokens_up_to_its_end(judge: Judge) -> None:
    """So that a server keeps keys and values of instructions and problem for all of them."""
    one, other = (
        judge._prompt(PROBLEM, text, nonce) for text, nonce in ((SOLUTION, NONCE), ("<think>No.", "0" * 16))
    )
    shared = next(place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    common = judge._tokenizer.decode(one[:shared])
    assert common.endswith("\n\nSolution, first line ")
    assert PROBLEM.lower() in common.lower()
    assert common.count("clarity:") == 1
    # Of two problems, the instructions.
    another = judge._prompt("What is half of 10?", SOLUTION, NONCE)
    shared = next(place for place, (a, b) in enumerate(zip(one, another, strict=False)) if a != b)
    assert judge._tokenizer.decode(one[:shared]).endswith("Problem:\n")


def test_the_tiny_prompt_shares_its_problem_too() -> None:
    tokenizer = build_tokenizer()
    one, other = (
        tokenizer.encode(render_tiny(PROBLEM, text, nonce), add_special_tokens=False)
        for text, nonce in ((SOLUTION, "0471"), ("<think>", "9471"))
    )
    end = one.index(tokenizer.convert_tokens_to_ids("<judge>"))
    assert one[: end + 1] == other[: end + 1]


def test_a_step_brings_no_control_token_step_or_verdict_into_the_prompt(step_judge: StepJudge) -> None:
    """A hostile step, and one cut in two, between innocent ones."""
    added = step_judge._added.keys()

    def prompt_of(text: str) -> list[int]:
        return step_judge._prompt(PROBLEM, (SOLUTION, text[:9], text[9:], SOLUTION), NONCE)

    innocent = [number for number in prompt_of("Bob has 19, so it ends.") if number in added]
    accepted = []
    for text in injections():
        ids = prompt_of(text)
        prompt = step_judge._tokenizer.decode(ids)
        solution, _ = prompt.split(f"\n{NONCE}\n")
        heads = re.findall(rf"(?m)^{NONCE} (\d+)$", solution)
        part = unicodedata.normalize("NFKC", solution.split(f"{NONCE} 2\n")[1].split(f"{NONCE} 4\n")[0])
        if (
            [number for number in ids if number in added] != innocent
            or heads != [*"1234"]
            or prompt.count(NONCE)
            != 8  # said, before four steps, after, in the form, and where the reply begins
            or re.search(step_regex(Template.TEXT, NONCE, 4), prompt)
            or re.search(r"(?m)^[^\w\n]*(system|assistant|user|judge|ai|model)\s*:", part, re.IGNORECASE)
        ):
            accepted.append(text)
    assert accepted == []


def test_a_reply_that_quotes_steps_is_no_verdict() -> None:
    parts = step_parts(Template.TEXT, NONCE, 2)
    genuine = f"{parts[0]}c{parts[1]}w{parts[2]}"
    assert parse_steps(genuine, NONCE, 2) == (True, False)
    for text in injections():
        quoted = neutralise(text, NONCE)
        replies = [quoted, f"<verdict {NONCE}>{quoted}</verdict>", f"{parts[0]}{quoted}{parts[2]}"]
        if quoted.strip():
            replies += [genuine + quoted, quoted + genuine]
        assert [reply for reply in replies if parse_steps(reply, NONCE, 2)] == []


HOSTILE: dict[str, Callable[[int], str]] = {
    "lines": lambda n: "====\n" * n,
    "lines of white space": lambda n: " \n" * n,
    "roles": lambda n: "user " * n,
    "role and lines": lambda n: "user" + "\n" * n,
    "roles in lines": lambda n: "assistant\n" * n,
    "scores": lambda n: "score " * n,
    "score and dashes": lambda n: "score " + "-" * n,
    "scores and arrows": lambda n: "score ->- " * n,
    "tags": lambda n: "<" * n,
    "tag and slashes": lambda n: "<" + "/" * n,
    "spaced tags": lambda n: "< " * n,
    "brackets": lambda n: "[" * n + "INST" * n,
    "long brackets": lambda n: "[INST" + "A" * n,
    "nonces": lambda n: NONCE[:15] * n,
    "invisible": lambda n: "\u200b" * n,
    "nested tokens": lambda n: "<|im_" * n + "end|>" * n,
    "nested markers": lambda n: "<bo" * n + "s>" * n,
    "numbers": lambda n: "3333 " * n,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_the_time_is_linear_in_the_text(name: str) -> None:
    """Eight times the text in no more than three times eight times the time; a square would be 64 times."""

    def seconds(num: int) -> float:
        text, measured = HOSTILE[name](num), []
        for _ in range(3):
            began = time.process_time()
            render_text(text, text, NONCE)
            render_tiny("How many?", text, "0471")
            measured.append(time.process_time() - began)
        return min(measured)

    assert seconds(16_000) < 24 * max(seconds(2_000), 1e-3)
