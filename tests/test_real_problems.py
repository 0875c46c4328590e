r"""Real problems through every stage: GSM8K and MATH training problems where `PNS_DATA` has them, else our
own in the same styles; a byte-pair tokenizer trained on them, a Qwen-style chat template.

Nothing of the tiny world is in it: problems with LaTeX and figures in Asymptote, prompts too long for the
limit, completions cut off, answers nobody can parse, judge prompts beyond the judge's context. The model has
two layers, begins with random weights, and every stage takes two steps. A random model writes no well-formed
completion, and without right and wrong ones there is nothing to pair. So it is first taught, for a few
seconds of ordinary supervised training, *how* a completion may look and nothing about problems: short texts
between the reasoning tags and an answer drawn blindly from the commonest answers, with a share of malformed,
endless and unparsable ones. The problems are those whose answers are so common. Some samples are then right
by chance, most are wrong, some have no reward.

Every count is recomputed from the stored samples by the code below, which shares nothing with the stages. The
second model keeps its random weights: without a right completion the run stops with one line, and goes on
from there when it is started again.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pns.algo.judging import Template, make_nonce, render_text, verdict_parts
from pns.algo.scores import COUNTED
from pns.config import STAGES, Data
from pns.data.problems import read_problems
from pns.data.prompts import Prompts
from pns.records import Problem
from small_models import ANSWERS, REASONINGS, build_tokenizer
from small_models import teach as teach_model

ROOT = Path(__file__).parents[1]
TRAIN = Path(os.environ["PNS_DATA"]) / "train"
OWN = ROOT / "tests" / "cases" / "problems.jsonl"

Row = dict[str, Any]

END, PAD = "<|im_end|>", "<|endoftext|>"
LIMIT = 32  # problems of every file
MAX_PROMPT_TOKENS = 150
MAX_NEW_TOKENS = 40
SYSTEM = r"Please reason step by step, and put your final answer within \boxed{}."
INSTRUCTION = "\nThink first."
PREFIX = "<think>"
WEIGHTS = {"wrong": 0.5, "plausibility": 0.25, "coherence": 0.25}

# As Qwen2.5 has it, without its tools.
CHAT_TEMPLATE = (
    "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
UNPARSABLE = ("???", r"\frac{3}{}", r"\ldots", "x+")

SETTINGS: Row = {
    "name": "real",
    "data": {
        "source": "jsonl",
        "system_prompt": SYSTEM,
        "instruction": INSTRUCTION,
        "max_prompt_tokens": MAX_PROMPT_TOKENS,
        "decontaminate": False,  # the longest problem is in every part on purpose
    },
    "rollout": {"engine": "transformers", "max_new_tokens": MAX_NEW_TOKENS, "max_batch": 64},
    "policy": {"max_tokens_per_micro_batch": 4096},
    "placement": {"device": "cpu", "verifier_processes": 1},
    "reward": {
        "terms": {name: {"weight": weight} for name, weight in WEIGHTS.items()},
        "max_masked_fraction": 0.8,
    },
    "rl": {
        "steps": 2,
        "problems_per_step": 8,
        "completions_per_problem": 4,
        "optimizer": {"learning_rate": 1.0e-4},
    },
    "reward_model": {"steps": 2, "pairs_per_step": 4, "samples_per_problem": 8, "held_out_fraction": 0.3},
    "reverse_rl": {
        "steps": 2,
        "problems_per_step": 8,
        "completions_per_problem": 4,
        "optimizer": {"learning_rate": 1.0e-4},
    },
    "synthesize": {"samples_per_problem": 3},
    "pair": {"samples_per_problem": 6},
    "preference": {"steps": 2, "pairs_per_step": 4},
    "evaluate": {"temperature": 1.0, "samples_per_problem": 2, "generator_samples": 20},
}


def rows(path: Path) -> list[Row]:
    """JSON lines; `str.splitlines` would also split at line separators inside a text."""
    content = path.read_bytes()
    return [
        json.loads(line)
        for line in (gzip.decompress(content) if path.suffix == ".gz" else content).split(b"\n")
        if line
    ]


# ------------------------------------------------------------------------------------------------------------- what the run is made of


def published() -> tuple[dict[str, list[Row]], list[Row]]:
    """The rows of each file of the run, and those that the tokenizer is trained on. Every file holds more
    than LIMIT; broken records do not count."""
    gsm8k, maths = rows(TRAIN / "gsm8k_train.jsonl"), rows(TRAIN / "math_train.jsonl.gz")
    broken = [row for row in maths if not row["answer"]]
    longest = max(maths, key=lambda row: len(row["problem"]))
    half = [row for row in maths if row["answer"] == ANSWERS[-1]]
    words, formulas = ([row for row in found if row["answer"] in ANSWERS[:-1]] for found in (gsm8k, maths))
    mixed = [row for both in zip(words, formulas, strict=False) for row in both]
    files = {
        "train": [*half[:4], *mixed[:36]],
        "reward": [*broken, longest, *mixed[40:80]],
        "preference": [longest, *half[4:10], broken[0], *mixed[80:120]],
        "gsm8k": words[-40:],
        "math": [longest, *half[10:16], *broken, *formulas[-40:]],
    }
    return files, mixed[:400]


def our_own() -> tuple[dict[str, list[Row]], list[Row]]:
    """As `published`: all 32 problems in every file, under ids of their own."""
    own = rows(OWN)
    broken = {**own[-1], "id": "broken", "answer": "", "note": "no answer"}
    figure = next(row for row in own if "[asy]" in row["problem"])
    dots = "".join(f"dot(({x},{x * x % 101})); " for x in range(400))  # beyond the model's 2048 tokens
    longest = {**figure, "id": "longest", "problem": figure["problem"].replace("[/asy]", f"{dots}\n[/asy]")}
    files = {
        "train": [longest, *own],
        "reward": [broken, longest, *own],
        "preference": [longest, broken, *own],
        "gsm8k": own,
        "math": [longest, broken, *reversed(own)],
    }
    named = {name: [row | {"id": f"{name}/{row['id']}"} for row in found] for name, found in files.items()}
    return named, own


class World:
    """The run's inputs: problems (as written to its files), tokenizer and models. `tags`: of a family that
    writes a reasoning block, which the prompt opens."""

    def __init__(self, directory: Path, tags: bool = True) -> None:
        self.directory = directory
        self.prefix = PREFIX if tags else ""
        self.files, taught = published() if TRAIN.is_dir() else our_own()
        self.problems = {
            name: [row for row in found if row["answer"]][:LIMIT] for name, found in self.files.items()
        }
        self.paths = {
            name: directory / f"{name}.jsonl{'.gz' if name in ('reward', 'math') else ''}"
            for name in self.files
        }
        for name, found in self.files.items():
            text = "".join(json.dumps(row, ensure_ascii=name == "train") + "\n" for row in found)
            self.paths[name].write_bytes(
                gzip.compress(text.encode()) if self.paths[name].suffix == ".gz" else text.encode()
            )
        texts = [row[key] for row in taught for key in ("problem", "solution")]
        self.tokenizer = build_tokenizer(
            texts,
            (PAD, "<|im_start|>", END),
            ("<think>", "</think>") if tags else (),
            eos_token=END,
            pad_token=PAD,
            chat_template=CHAT_TEMPLATE,
        )
        self.model = make_model(len(self.tokenizer), 2048)

    def save(self, name: str, model: Qwen2ForCausalLM) -> None:
        model.save_pretrained(self.directory / name)
        self.tokenizer.save_pretrained(self.directory / name)

    def prompt_ids(self, row: Row) -> list[int]:
        """The prompt written out by hand; the tokenizer is read from the file, not through transformers."""
        text = (
            f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{row['problem']}{INSTRUCTION}<|im_end|>\n"
            f"<|im_start|>assistant\n{self.prefix}"
        )
        return self.encode(text)

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    def fitting(self, name: str) -> list[Row]:
        return [row for row in self.problems[name] if len(self.prompt_ids(row)) <= MAX_PROMPT_TOKENS]

    def recipe(self, backbone: str, **changes: Row) -> Path:
        settings = json.loads(json.dumps(SETTINGS))
        for section, values in changes.items():
            settings[section] |= values
        settings["data"]["assistant_prefix"] = self.prefix
        settings["runs"] = str(self.directory / "runs")
        settings["models"] = {"backbone": str(self.directory / backbone)}
        settings["reward"]["terms"]["coherence"]["model"] = str(self.directory / "judge")
        jsonl = {name: str(self.paths[name]) for name in ("train", "reward", "preference")}
        settings["data"]["jsonl"] = {
            **jsonl,
            "suites": {name: str(self.paths[name]) for name in ("gsm8k", "math")},
            "limit": LIMIT,
        }
        path = self.directory / f"{backbone}.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path


def make_model(vocab_size: int, max_position: int, initializer_range: float = 0.05) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=max_position,
        tie_word_embeddings=True,
        initializer_range=initializer_range,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[2, 0], pad_token_id=0
    )  # two end tokens, as in Qwen2.5
    return model


def completion(rng: random.Random, babble: str, closing: str = "</think>") -> str:
    """What the model is taught to write after the prompt, which ends in the opening tag if there is one.
    `closing` stands between reasoning and answer. The end token is part of it."""
    reasoning, answer, kind = rng.choice(REASONINGS), rng.choice(ANSWERS), rng.random()
    if kind < 0.08:
        return babble  # beyond max_new_tokens
    if kind < 0.16:
        malformed = (
            f"{reasoning} \\boxed{{{answer}}}",
            f"{reasoning}{closing}\\boxed{{{answer}}} or \\boxed{{2}}",
            f"{reasoning}{closing}",
        )
        return rng.choice(malformed) + END
    if kind < 0.38:
        answer = rng.choice(UNPARSABLE)
    elif kind < 0.42:
        answer = r"\text{no answer}"
    return f"{reasoning}{closing}\\boxed{{{answer}}}" + (PAD if kind > 0.9 else END)


def teach(world: World) -> None:
    """Supervised training on completions after the shorter prompts, which end in the opening tag if there is
    one."""
    closing = "</think>" if world.prefix else "\n"
    prompts = sorted(
        (world.prompt_ids(row) for name in ("train", "gsm8k", "math") for row in world.fitting(name)), key=len
    )[:60]
    babbles = [row["solution"] for row in world.problems["math"] if len(row["solution"]) > 300]

    def draw(rng: random.Random) -> list[int]:
        return world.encode(completion(rng, rng.choice(babbles), closing))[: MAX_NEW_TOKENS + 10]

    teach_model(world.model, prompts, draw)


def make_judge(world: World) -> Qwen2ForCausalLM:
    """Random weights large enough for its digits to differ, and a context that about one in three of the
    problems' prompts exceeds."""
    lengths = []
    for row in world.fitting("train") + world.fitting("preference"):
        messages = render_text(row["problem"], PREFIX + REASONINGS[0] + r"</think>\boxed{2}", "0" * 16)
        lengths.append(
            len(
                world.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=True, return_dict=False
                )
            )
        )
    return make_model(
        len(world.tokenizer), sorted(lengths)[len(lengths) * 2 // 3] + 40, initializer_range=0.2
    )


def start(recipe: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pns.cli", "run", str(recipe), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="module")
def finished(world: World) -> Path:
    """The run directory of a whole run."""
    world.save("judge", make_judge(world))
    teach(world)
    world.save("backbone", world.model)
    done = start(world.recipe("backbone"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return world.directory / "runs" / "real"


# --------------------------------------------------------------------------------------------- what the counts are recomputed with

_CONTENT = r"(?:[^{}\\]|\\.|\{(?:[^{}\\]|\\.|\{(?:[^{}\\]|\\.)*\})*\})*"
_FORMED = re.compile(
    r"\s*<think>(?:(?!</?think>).)*</think>(?:(?!</?think>|\\boxed|\\fbox).)*"
    rf"\\boxed\s*\{{(?P<answer>(?=\s*[^\s}}]){_CONTENT})\}}[$. \n]*(?:\\\)|\\\])?[$. \n]*",
    re.DOTALL,
)


def answer_of(rollout: Row) -> str | None:
    """The boxed answer of a well-formed completion, None for a malformed one."""
    found = (
        _FORMED.fullmatch(rollout["completion"]["text"])
        if rollout["completion"]["finish_reason"] == "stop"
        else None
    )
    return found["answer"].strip() if found and not re.search(r"\\(?:boxed|fbox)", found["answer"]) else None


def number(answer: str) -> Fraction | None:
    if found := re.fullmatch(r"(-?)\\[dt]?frac\{(-?\d+)\}\{(-?\d+)\}", answer):
        return None if int(found[3]) == 0 else Fraction(int(found[1] + "1") * int(found[2]), int(found[3]))
    return Fraction(answer) if re.fullmatch(r"-?\d+(?:\.\d+)?", answer) else None


def is_right(answer: str, rollout: Row) -> bool:
    """Whether an answer equals the gold one, by comparing numbers. Of an answer that is no number the stored
    verdict is believed, but right it can only be as an equation such as `x=4` that ends in the gold answer."""
    gold, stated, stored = (
        rollout["problem"]["answer"],
        number(answer),
        rollout["reward"]["verdict"] == "correct",
    )
    if stated is None:
        assert not stored or answer.endswith(gold), rollout
        return stored
    return stated == number(gold)


def verdict_of(rollout: Row) -> str:
    """The stored verdict, checked."""
    answer, stored = answer_of(rollout), rollout["reward"]["verdict"]
    assert (stored == "correct") is (answer is not None and is_right(answer, rollout)), rollout
    assert stored != "unverified" or answer is None or number(answer) is None, rollout
    return str(stored)


def masked(found: Sequence[Row]) -> Counter[str]:
    """Masked completions by term and cause, as metrics name them."""
    return Counter(
        f"masked/{term}/{cause}"
        for row in found
        if row["reward"]["value"] is None
        for term, cause in row["reward"]["missing"].items()
    )


def metrics(run: Path, stage: str) -> list[dict[str, float | None]]:
    logged = [row for file in run.glob("*/metrics.jsonl") for row in rows(file)]
    found = [row for row in logged if row["stage"] == stage]
    assert [row["step"] for row in found] == list(range(len(found)))
    return [row["values"] for row in found]


def counts(run: Path, stage: str) -> dict[str, int]:
    return json.loads((run / stage / "manifest.json").read_text())["counts"]


def steps(run: Path, stage: str) -> Iterator[tuple[list[Row], dict[str, float | None]]]:
    """Rollouts and metrics of each step."""
    found = rows(run / stage / "rollouts.jsonl")
    logged = metrics(run, stage)
    assert len(logged) == 2
    assert {row["step"] for row in found} == {0, 1}
    for step, values in enumerate(logged):
        yield [row for row in found if row["step"] == step], values


SAMPLED = {
    "rl": "train",
    "reward_model": "reward",
    "reverse_rl": "train",
    "synthesize": "preference",
    "pair": "preference",
}


def samples(run: Path) -> dict[str, list[Row]]:
    """The rollouts of every stage that samples under the rules of format."""
    return {stage: rows(run / stage / "rollouts.jsonl") for stage in SAMPLED}


# ----------------------------------------------------------------------------------------------------------------------------- tests


def test_every_training_problem_is_read() -> None:
    files = {OWN: 32}
    if TRAIN.is_dir():  # two MATH records have no answer
        files |= {TRAIN / "gsm8k_train.jsonl": 7473, TRAIN / "math_train.jsonl.gz": 7498}
    for path, num in files.items():
        expected = [row for row in rows(path) if row["answer"]]
        problems = read_problems(path, "train")
        assert len(problems) == len({problem.id for problem in problems}) == num
        assert [(p.id, p.prompt, p.answer, p.solution) for p in problems] == [
            (row["id"], row["problem"], row["answer"], row["solution"]) for row in expected
        ]


def test_prompts_and_completions_survive_the_tokenizer(world: World) -> None:
    world.save("tokenizer", world.model)
    settings = Data(
        system_prompt=SYSTEM,
        instruction=INSTRUCTION,
        assistant_prefix=PREFIX,
        max_prompt_tokens=MAX_PROMPT_TOKENS,
    )
    prompts = Prompts(AutoTokenizer.from_pretrained(world.directory / "tokenizer"), settings)
    everything = [row for found in world.problems.values() for row in found]
    problems = [Problem(row["id"], row["problem"], row["answer"]) for row in everything]
    for row, problem in zip(everything, problems, strict=True):
        assert list(prompts.encode(problem)) == world.prompt_ids(row)
        text = PREFIX + row["solution"]
        ids = prompts.encode_completion(text)
        assert list(ids) == [*world.encode(row["solution"]), 2]
        assert prompts.decode(ids) == text
        offsets = prompts.token_starts(text)
        assert len(offsets) == len(ids) - 1
        assert offsets == sorted(offsets)
        assert offsets[0] == len(PREFIX)
    kept, dropped = prompts.fitting(problems)
    assert dropped > 0
    assert [p.id for p in kept] == [
        row["id"] for row in everything if len(world.prompt_ids(row)) <= MAX_PROMPT_TOKENS
    ]
    assert len(kept) + dropped == len(problems)


def test_the_run_meets_what_it_is_for(finished: Path, world: World) -> None:
    """Each kind of sample occurs, or the other tests would prove little."""
    for stage, found in samples(finished).items():
        verdicts = Counter(verdict_of(row) for row in found if answer_of(row) is not None)
        assert min(verdicts[verdict] for verdict in ("correct", "wrong", "unverified")) > 0, (stage, verdicts)
        assert any(answer_of(row) is None and row["completion"]["finish_reason"] == "stop" for row in found)
        assert any(row["completion"]["finish_reason"] == "length" for row in found)
        assert {
            row["completion"]["token_ids"][-1]
            for row in found
            if row["completion"]["finish_reason"] == "stop"
        } == {0, 2}
        assert any("$" in row["problem"]["prompt"] and "\\" in row["problem"]["prompt"] for row in found)
    causes = masked(samples(finished)["reverse_rl"])
    assert causes["masked/verdict/unparsable"] > 0
    assert causes["masked/coherence/too_long"] > 0
    assert any("[asy]" in row["problem"] for row in world.problems["math"])


def test_samples_are_those_of_the_problems_that_fit(finished: Path, world: World) -> None:
    for stage, name in SAMPLED.items():
        fitting = world.fitting(name)
        assert counts(finished, stage)["prompts_too_long"] == LIMIT - len(fitting) > 0
        found = samples(finished)[stage]
        by_id = {row["id"]: row for row in fitting}
        for row in found:
            problem = by_id[row["problem"]["id"]]
            assert (row["problem"]["prompt"], row["problem"]["answer"]) == (
                problem["problem"],
                problem["answer"],
            )
            assert row["completion"]["problem_id"] == problem["id"]
        assert len({(row["step"], row["completion"]["id"]) for row in found}) == len(found)
        per_problem = Counter(row["problem"]["id"] for row in found)
        if stage in ("rl", "reverse_rl"):
            assert set(per_problem.values()) == {4}  # 16 different problems in two steps
            assert len(per_problem) == 16
        else:
            assert list(per_problem) == [row["id"] for row in fitting]
            assert set(per_problem.values()) == {SETTINGS[stage]["samples_per_problem"]}
            assert counts(finished, stage)["samples"] == len(found)


def test_completions_end_or_are_cut(finished: Path, world: World) -> None:
    decode = world.tokenizer.backend_tokenizer.decode
    for row in (row for found in samples(finished).values() for row in found):
        ids, reason = row["completion"]["token_ids"], row["completion"]["finish_reason"]
        assert len(ids) == len(row["completion"]["log_probs"]) <= MAX_NEW_TOKENS
        assert not {0, 2} & set(ids[:-1])
        assert reason == ("stop" if ids[-1] in (0, 2) else "length")
        assert reason == "stop" or len(ids) == MAX_NEW_TOKENS
        assert row["completion"]["text"] == PREFIX + decode(ids, skip_special_tokens=True)


def test_log_probs_are_those_of_the_model_after_the_prompt(finished: Path, world: World) -> None:
    """The first step's samples come from the backbone after the prompt written out by hand; rollouts of
    `pair` from the trained one."""
    for model_path, found in (
        (world.directory / "backbone", next(steps(finished, "rl"))[0]),
        (finished / "rl" / "model", samples(finished)["pair"]),
    ):
        model = AutoModelForCausalLM.from_pretrained(model_path)
        for row in found[::11]:
            prompt, ids = (
                world.prompt_ids({"problem": row["problem"]["prompt"]}),
                row["completion"]["token_ids"],
            )
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
            assert row["completion"]["log_probs"] == pytest.approx(expected.tolist(), abs=1e-3)


def test_rewards_of_ordinary_rl(finished: Path) -> None:
    for row in (row for stage in ("rl", "reward_model", "pair") for row in samples(finished)[stage]):
        reward, formed = row["reward"], answer_of(row) is not None
        assert reward["format_ok"] is formed
        verdict = verdict_of(row)
        if formed and verdict == "unverified":
            assert reward["value"] is None
            assert set(reward["missing"]) == {"verdict"}
        else:
            assert reward["value"] == float(formed and verdict == "correct")
            assert not reward["missing"]


def test_composite_rewards(finished: Path) -> None:
    for row in (row for stage in ("reverse_rl", "synthesize") for row in samples(finished)[stage]):
        reward, formed, verdict = row["reward"], answer_of(row) is not None, verdict_of(row)
        assert reward["format_ok"] is formed
        if not formed:
            assert reward["value"] == -1
            assert not reward["missing"]
        elif verdict == "correct":
            assert reward["value"] == 0
        elif verdict == "unverified":
            assert reward["value"] is None
            assert set(reward["missing"]) == {"verdict"}
        else:
            assert 0 < reward["terms"]["plausibility"] < 1  # prompt and completion fit the reward model
            if "coherence" not in reward["terms"]:
                assert reward["value"] is None
                assert reward["missing"] == {"coherence": "too_long"}
            else:
                assert round(12 * reward["terms"]["coherence"], 9) in range(13)
                assert not reward["missing"]
                weighted = [WEIGHTS[name] * term for name, term in reward["terms"].items()]
                assert reward["value"] == pytest.approx(sum(weighted))
        if not formed or verdict != "wrong":
            assert not reward["terms"]


def test_the_judge_misses_the_longest_and_only_those(finished: Path) -> None:
    asked = [
        row
        for stage in ("reverse_rl", "synthesize")
        for row in samples(finished)[stage]
        if "plausibility" in row["reward"]["terms"]
    ]
    lengths: dict[bool, list[int]] = {True: [], False: []}
    for row in asked:
        lengths["coherence" not in row["reward"]["terms"]].append(len(row["problem"]["prompt"]))
    assert sum(lengths[True]) / len(lengths[True]) > sum(lengths[False]) / len(lengths[False])


def test_plausibility_is_the_reward_model_on_prompt_and_completion(finished: Path, world: World) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(
        finished / "reward_model" / "main", num_labels=1
    )
    asked = [row for row in samples(finished)["synthesize"] if "plausibility" in row["reward"]["terms"]][::7]
    assert asked
    for row in asked:
        ids = world.prompt_ids({"problem": row["problem"]["prompt"]}) + row["completion"]["token_ids"]
        with torch.no_grad():
            hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
            score = float(model.score(hidden))
        assert row["reward"]["terms"]["plausibility"] == pytest.approx(1 / (1 + math.exp(-score)), abs=1e-4)


def test_coherence_is_the_judge_on_problem_and_completion(finished: Path, world: World) -> None:
    """The judge's likeliest digits after the prompt its template gives, with a forward pass of its own for
    each."""
    model = AutoModelForCausalLM.from_pretrained(world.directory / "judge")
    asked = [row for row in samples(finished)["synthesize"] if "coherence" in row["reward"]["terms"]]
    assert len({row["reward"]["terms"]["coherence"] for row in asked}) > 2
    digits = [world.encode(digit)[0] for digit in "0123"]
    for row in asked[::9]:
        problem, text = row["problem"]["prompt"], row["completion"]["text"]
        nonce = make_nonce(0, problem, text, Template.TEXT)
        # No token of the tokenizer's own stands in what the judge reads.
        for token in (PAD, "<|im_start|>", END, "<think>", "</think>"):
            broken = f"{token[0]} {token[1:]}"
            problem, text = problem.replace(token, broken), text.replace(token, broken)
        messages = "".join(
            f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in render_text(problem, text, nonce)
        )
        first, *others, _ = verdict_parts(Template.TEXT, nonce)
        ids, total = world.encode(messages + "<|im_start|>assistant\n" + first), 0
        for between in [*others, ""]:
            with torch.no_grad():
                score = int(model(torch.tensor([ids])).logits[0, -1, digits].argmax())
            total += score
            ids = [*ids, digits[score], *world.encode(between)]
        assert row["reward"]["terms"]["coherence"] == pytest.approx(total / 12)


def test_metrics_of_ordinary_rl(finished: Path) -> None:
    for found, values in steps(finished, "rl"):
        num = len(found)
        rewards = [row["reward"]["value"] for row in found if row["reward"]["value"] is not None]
        assert (
            values["accuracy"]
            == sum(answer_of(row) is not None and verdict_of(row) == "correct" for row in found) / num
        )
        assert values["format_rate"] == sum(answer_of(row) is not None for row in found) / num
        assert (
            values["truncated_rate"]
            == sum(row["completion"]["finish_reason"] == "length" for row in found) / num
        )
        assert values["masked_rate"] == (num - len(rewards)) / num
        assert values["reward"] == pytest.approx(sum(rewards) / len(rewards))
        assert {key: value for key, value in values.items() if key.startswith("masked/")} == masked(found)


def test_metrics_of_reverse_rl(finished: Path) -> None:
    for found, values in steps(finished, "reverse_rl"):
        num = len(found)
        verdicts = Counter(verdict_of(row) for row in found if answer_of(row) is not None)
        assert values["format_rate"] == verdicts.total() / num
        assert values["wrong_rate"] == verdicts["wrong"] / num
        assert values["correct_rate"] == verdicts["correct"] / num
        assert values["masked_rate"] == sum(row["reward"]["value"] is None for row in found) / num
        assert {key: value for key, value in values.items() if key.startswith("masked/")} == masked(found)
        assert "wrong_mean" not in values  # a verdict: always 1
        for term in ("plausibility", "coherence"):
            known = [row["reward"]["terms"][term] for row in found if term in row["reward"]["terms"]]
            assert values[f"{term}_mean"] == pytest.approx(sum(known) / len(known))


def test_masked_completions_do_not_stop_the_update(finished: Path) -> None:
    for stage in ("rl", "reverse_rl"):
        for values in metrics(finished, stage):
            assert values["no_update"] == 0
            assert values["update_skipped"] == 0
            assert values["loss"] is not None
            assert values["grad_norm"] is not None


def test_reward_model_pairs(finished: Path, world: World) -> None:
    found, pairs = samples(finished)["reward_model"], rows(finished / "reward_model" / "pairs.jsonl")
    sides = {
        verdict: Counter(
            (row["problem"]["id"], row["completion"]["text"])
            for row in found
            if answer_of(row) is not None and verdict_of(row) == verdict
        )
        for verdict in ("correct", "wrong")
    }
    used = {
        side: Counter((pair["problem_id"], pair[side]) for pair in pairs) for side in ("chosen", "rejected")
    }
    assert used["chosen"] <= sides["correct"]
    assert used["rejected"] <= sides["wrong"]
    assert counts(finished, "reward_model")["pairs"] == len(pairs) > 0
    quality = json.loads((finished / "reward_model" / "quality.json").read_text())
    assert sum(
        quality[which][part]
        for which in ("main", "held_out")
        for part in ("training_pairs", "held_out_pairs")
    ) == len(pairs)
    assert len(metrics(finished, "reward_model")) == len(metrics(finished, "reward_model_held_out")) == 2


def test_kept_and_dropped_negatives_are_all_samples(finished: Path) -> None:
    found, negatives = samples(finished)["synthesize"], rows(finished / "synthesize" / "negatives.jsonl")
    counted = counts(finished, "synthesize")
    verdicts = Counter(verdict_of(row) for row in found if answer_of(row) is not None)
    assert counted["malformed"] == len(found) - verdicts.total()
    assert counted["correct"] == verdicts["correct"]
    assert counted["unverified"] == verdicts["unverified"]
    assert counted["kept"] == len(negatives) > 0
    dropped = {
        key: value for key, value in counted.items() if key not in ("samples", "kept", "prompts_too_long")
    }
    assert len(negatives) + sum(dropped.values()) == counted["samples"] == len(found)
    # `\text{no answer}` is wrong for math-verify and undecided for the second verifier.
    assert counted["second_verifier_undecided"] >= sum(
        answer_of(row) == r"\text{no answer}" for row in found if verdict_of(row) == "wrong"
    )
    for negative in negatives:
        assert negative in found
        answer = answer_of(negative)
        assert answer is not None
        assert verdict_of(negative) == "wrong"
        assert number(answer) not in (None, number(negative["problem"]["answer"]))
    assert len({(row["problem"]["id"], row["completion"]["text"]) for row in negatives}) == len(negatives)
    [values] = metrics(finished, "synthesize")
    assert values == {"kept": len(negatives), "kept_share": len(negatives) / len(found)}


def test_pairs(finished: Path, world: World) -> None:
    chosen: dict[str, list[Row]] = {}
    rejected: dict[str, list[Row]] = {}
    for row in samples(finished)["pair"]:
        if answer_of(row) is not None and verdict_of(row) == "correct":
            chosen.setdefault(row["problem"]["id"], []).append(row["completion"])
    for row in rows(finished / "synthesize" / "negatives.jsonl"):
        rejected.setdefault(row["problem"]["id"], []).append(row["completion"])

    def match(a: Row, b: Row) -> bool:
        shorter, longer = sorted((len(a["token_ids"]), len(b["token_ids"])))
        return longer <= 2 * shorter

    fitting = [row["id"] for row in world.fitting("preference")]
    both = [name for name in fitting if name in chosen and name in rejected]
    paired = [name for name in both if any(match(a, b) for a in chosen[name] for b in rejected[name])]
    pairs, counted = rows(finished / "pair" / "pairs.jsonl"), counts(finished, "pair")
    assert [pair["problem_id"] for pair in pairs] == paired
    assert counted["pairs"] == counted["kept"] == len(paired) > 0
    assert counted["no_chosen"] == len(fitting) - len(chosen)
    assert counted["no_rejected"] == len(chosen) - len(both)
    assert counted["length_ratio"] == len(both) - len(paired)
    for pair in pairs:
        assert pair["chosen"] in [completion["text"] for completion in chosen[pair["problem_id"]]]
        assert pair["rejected"] in [completion["text"] for completion in rejected[pair["problem_id"]]]
    problems = {row["id"]: row["problem"] for row in world.fitting("preference")}
    assert rows(finished / "pair" / "preference.jsonl") == [
        {
            "prompt": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": problems[pair["problem_id"]] + INSTRUCTION},
            ],
            "chosen": [{"role": "assistant", "content": pair["chosen"]}],
            "rejected": [{"role": "assistant", "content": pair["rejected"]}],
            **{key: pair[key] for key in ("problem_id", "source", "score_chosen", "score_rejected")},
        }
        for pair in pairs
    ]


def test_preference_trains_on_what_was_sampled(finished: Path, world: World) -> None:
    """The reference log-probabilities are those of the RL-trained backbone on prompt and texts; the prefix is
    in the prompt only."""
    pairs = rows(finished / "pair" / "pairs.jsonl")
    assert counts(finished, "preference")["pairs"] == len(pairs)
    (cached,) = (finished.parent / "reference_cache").iterdir()
    reference = np.frombuffer(cached.read_bytes().split(b"\n", 1)[1], dtype="<f4").tolist()
    model = AutoModelForCausalLM.from_pretrained(finished / "rl" / "model")
    for pair in pairs:
        for side in ("chosen", "rejected"):
            ids = [*world.encode(pair[side].removeprefix(PREFIX)), 2]
            prompt = world.prompt_ids({"problem": pair["prompt"]})
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            own, reference = reference[: len(ids)], reference[len(ids) :]
            assert own == pytest.approx(
                logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist(), abs=1e-3
            )
    assert not reference
    first, second = metrics(finished, "preference")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)  # no margin before the first update
    assert second["loss"] is not None


def test_scores_are_the_numbers_of_right_answers(finished: Path, world: World) -> None:
    scores = json.loads((finished / "evaluate" / "scores.json").read_text())
    assert set(scores) == {"gsm8k", "math", "mean"}
    totals: Counter[str] = Counter()
    by_id = {row["id"]: row for suite in ("gsm8k", "math") for row in world.problems[suite]}
    for model in ("backbone", "target", "result"):
        found = rows(finished / "evaluate" / f"{model}.jsonl")
        right: Counter[str] = Counter()
        counted: Counter[str] = Counter()
        for row in found:
            boxed = re.findall(
                rf"(?=\\boxed\s*\{{({_CONTENT})\}})", row["completion"]
            )  # also one within another
            closed = "</think>" in row["completion"]  # what an unclosed block holds is no answer
            cut = row["finish_reason"] == "length"
            stored = {"problem": row["problem"], "reward": row}
            correct = bool(boxed) and closed and not cut and is_right(boxed[-1].strip(), stored)
            right[row["problem"]["suite"]] += correct
            assert (row["verdict"] == "correct") is correct, row
            assert (row["reason"] == "truncated") is cut
            unasked = row["reason"] == "prompt_too_long"
            assert unasked is (len(world.prompt_ids(by_id[row["problem"]["id"]])) >= 2048)
            assert (row["reason"] == "no_answer") is (not cut and not unasked and row["extracted"] is None)
            counted += Counter({"unverified": row["verdict"] == "unverified", row["reason"]: 1})
        assert right.total() > 0
        for suite in ("gsm8k", "math"):
            own = [row["problem"]["id"] for row in found if row["problem"]["suite"] == suite]
            assert own == [row["id"] for row in world.problems[suite] for _ in range(2)]  # long prompts too
            assert scores[suite][model]["n"] == LIMIT
            assert scores[suite][model]["accuracy"] == right[suite] / len(own)
        assert 2 * scores["mean"][model]["n"] == len(found)
        assert scores["mean"][model]["accuracy"] == right.total() / len(found)
        assert {what: scores["mean"][model][what] for what in COUNTED} == {
            what: counted[what] for what in COUNTED
        }
        totals += Counter({what: counted[what] for what in COUNTED})
    assert totals["prompt_too_long"] == 6  # the longest problem, twice a model
    assert counts(finished, "evaluate") == {what: totals[what] for what in COUNTED}
    report = json.loads((finished / "report.json").read_text())
    assert report["suites"] == scores
    assert set(report["stages"]) == set(STAGES)
    for stage in STAGES:
        assert report["stages"][stage]["counts"] == counts(finished, stage)


def test_models_keep_tokenizer_and_end_tokens(finished: Path, world: World) -> None:
    for stage in ("rl", "reverse_rl", "preference"):
        saved = Tokenizer.from_file(str(finished / stage / "model" / "tokenizer.json"))
        text = world.problems["math"][0]["problem"] + END
        assert saved.encode(text, add_special_tokens=False).ids == world.encode(text)
        assert json.loads((finished / stage / "model" / "generation_config.json").read_text())[
            "eos_token_id"
        ] == [2, 0]
        tokenizer = AutoTokenizer.from_pretrained(finished / stage / "model")
        assert tokenizer.chat_template == CHAT_TEMPLATE
        assert (
            len(tokenizer)
            == json.loads((finished / stage / "model" / "config.json").read_text())["vocab_size"]
            == len(world.tokenizer)
        )


def test_no_right_completion_stops_the_run_once_and_again(world: World) -> None:
    """Random weights: no completion is right. A second start stops at the same place and leaves the finished
    stages alone."""
    world.save("untaught", make_model(len(world.tokenizer), 2048))
    if not (world.directory / "judge").exists():
        world.save("judge", make_judge(world))
    small = {"problems_per_step": 2, "completions_per_problem": 2, "kl_coefficient": 0.0}
    recipe = world.recipe("untaught", rl=small, reward_model={"samples_per_problem": 1})
    run = world.directory / "runs" / "untaught"
    recipe.write_text(recipe.read_text().replace("name: real", "name: untaught"))
    kept: list[tuple[bytes, bytes, int]] = []
    for _ in range(2):
        stopped = start(recipe, "--until", "reward_model")
        assert stopped.returncode == 2, stopped.stderr[-3000:]
        lines = [line for line in stopped.stderr.splitlines() if line.strip()]
        assert [line for line in lines if line.startswith("pns: ")] == lines[-1:]
        assert "(correct, incorrect) pairs: of " in lines[-1]
        assert "Traceback" not in stopped.stderr
        manifest = run / "rl" / "manifest.json"
        kept.append(
            (manifest.read_bytes(), (run / "rl" / "rollouts.jsonl").read_bytes(), manifest.stat().st_mtime_ns)
        )
        assert not (run / "reward_model" / "manifest.json").exists()
        assert len(metrics(run, "rl")) == 2
        assert not (run / "reverse_rl").exists()
    assert kept[0] == kept[1]
    assert all(row["reward"]["value"] == 0 for row in rows(run / "rl" / "rollouts.jsonl"))
    assert [values["no_update"] for values in metrics(run, "rl")] == [1, 1]


def test_a_family_without_a_reasoning_block(tmp_path: Path) -> None:
    """Qwen2.5-Instruct and Llama 3 write no tags: nothing is set, and a whole step of reverse RL trains."""
    world = World(tmp_path, tags=False)
    world.save("judge", make_judge(world))
    teach(world)
    world.save("backbone", world.model)
    shortened = [f"{stage}.steps=1" for stage in ("rl", "reward_model", "reverse_rl")]
    done = start(world.recipe("backbone"), "--until", "reverse_rl", *shortened)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = rows(tmp_path / "runs" / "real" / "reverse_rl" / "rollouts.jsonl")
    assert len(found) == 32
    assert not any("<think>" in row["completion"]["text"] for row in found)
    formed = [row["reward"] for row in found if row["reward"]["format_ok"]]
    assert len(formed) > 16
    whole = [reward for reward in formed if reward["verdict"] == "wrong" and reward["value"] is not None]
    assert whole
    assert all(set(reward["terms"]) == set(WEIGHTS) for reward in whole)
    [values] = metrics(tmp_path / "runs" / "real", "reverse_rl")
    assert (values["no_signal"], values["no_update"], values["update_skipped"]) == (0, 0, 0)
    assert (values["grad_norm"] or 0) > 0
