"""The way of somebody with problems of their own and a model: `pns init`, `plan`, `run`, `export`, `evaluate`, on the
command line, with what README and the command before say. One run serves all tests."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TINY = ROOT / "recipes" / "tiny"
LIMIT_SECONDS = 900  # of one command; half a minute where nothing else runs
# What makes the stages short and fits them to a machine without a GPU; the rest is what `pns init` wrote.
SHORT = [
    "placement.device=cpu",
    "rollout.engine=transformers",
    "rollout.max_new_tokens=96",
    "data.max_prompt_tokens=128",
    "rl.steps=2",
    "rl.problems_per_step=8",
    "rl.completions_per_problem=4",
    "reward_model.rl_steps=2",
    "reward_model.steps=2",
    "reward_model.pairs_per_step=4",
    "reverse_rl.steps=2",
    "reverse_rl.problems_per_step=8",
    "reverse_rl.completions_per_problem=4",
    "synthesize.samples_per_problem=4",
    "preference.steps=2",
    "preference.pairs_per_step=4",
]
# Models of the user's own, and that the tiny backbone's template takes no system turn.
OWN = [
    f"reward.terms.coherence.model={TINY / 'judge'}",
    f"models.reward_model={TINY / 'reward_model'}",
    "data.prompt=none",
]


def pns(directory: Path, *words: object, code: int = 0) -> str:
    """What a command printed, on both outputs."""
    command = [sys.executable, "-m", "pns.cli", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, timeout=LIMIT_SECONDS, env=environment
    )
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def arithmetic(num: int, seed: int) -> list[dict[str, Any]]:
    """Problems in the words that the tiny models know, with GSM8K's names of fields and a number as answer."""
    random_numbers = random.Random(seed)
    problems = []
    while len(problems) < num:
        have, more = random_numbers.randint(10, 20), random_numbers.randint(2, 9)
        question = f"Ann has {have}. Dan has {more} more than Ann. How many has Dan? "
        if question not in [own["question"] for own in problems]:
            problems.append({"question": question, "answer": have + more})
    return problems


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stranger's directory, with 60 problems."""
    directory = tmp_path_factory.mktemp("stranger")
    problems = arithmetic(60, 0)
    for name, part in (("train", problems[:45]), ("test", problems[45:])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(own) + "\n" for own in part))
    return directory


@pytest.fixture(scope="module")
def finished(home: Path) -> Path:
    """The page of the run, made as each command says."""
    files = ("--train", "train.jsonl", "--suite", "own=test.jsonl")
    said = pns(home, "init", "own", "--backbone", TINY / "qwen2-mixed", *files)
    assert "data.jsonl.fields.problem=question" in said  # the way out, which is taken
    assert "pns plan own.yaml" in said
    words = ["own.yaml", "data.jsonl.fields.problem=question", *OWN, *SHORT]
    assert "rollout" in pns(home, "plan", *words)
    said = pns(home, "run", *words)
    page = home / "runs" / "own"
    assert said.splitlines()[0].startswith("own: rl, reward_model, reverse_rl, synthesize, pair, preference")
    assert f"Report: {page.relative_to(home)}/report.html" in said or f"Report: {page}/report.html" in said
    return page


def test_the_run_ends_with_a_report(finished: Path) -> None:
    assert "own" in json.loads((finished / "report.json").read_text())["suites"]
    assert "<html" in (finished / "report.html").read_text()


def test_the_export_loads_where_others_load_it(home: Path, finished: Path) -> None:
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pns(home, "export", finished, "exported")
    pairs = load_dataset(str(home / "exported" / "pairs"), split="train")
    assert {"prompt", "chosen", "rejected"} <= set(pairs.column_names)
    assert len(pairs) > 0
    tokenizer = AutoTokenizer.from_pretrained(home / "exported" / "model")
    model = AutoModelForCausalLM.from_pretrained(home / "exported" / "model")
    assert model.get_input_embeddings().weight.shape[0] >= len(tokenizer)
    result = f"{finished}/evaluate/result.jsonl"
    recipe = home / "runs" / "own" / "config.yaml"
    said = pns(home, "evaluate", "exported/model", "--recipe", recipe, "--against", result, "out=runs/again")
    assert "not distinguishable" in said
    scores = json.loads((home / "runs" / "again" / "evaluate" / "scores.json").read_text())
    before = json.loads((finished / "evaluate" / "scores.json").read_text())
    assert scores["own"]["model"]["accuracy"] == before["own"]["result"]["accuracy"]
