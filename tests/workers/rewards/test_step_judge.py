"""The step judge: a small model with random weights, against the same model without cache and batch; and the
shipped one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from pns.algo.judging import Template
from pns.algo.step_judging import (
    NUM_NOTED,
    VERDICTS,
    render_tiny,
    render_tiny_problem,
    step_nonce,
    verdict_parts,
)
from pns.errors import UserError
from pns.tiny import world
from pns.tiny.step_judge import solution_steps, step_agreement, step_candidates, step_labels
from pns.tiny.tokenizer import build_tokenizer
from workers.rewards.step_judge import StepJudge
from workers.runtime import Runtime

SHIPPED = Path(__file__).parents[3] / "recipes" / "tiny" / "step_judge"


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory, tokenizer = tmp_path_factory.mktemp("step_judge"), build_tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        max_position_embeddings=512,
        initializer_range=0.2,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def items(num: int) -> list[tuple[str, tuple[str, ...]]]:
    return [
        (
            f"Bob has {n}. How many has Bob? ",
            (*(f"Bob has {k}+{n}=19. " for k in range(n % 13)), f"</think>\\boxed{{{n}}}"),
        )
        for n in range(num)
    ]


def test_each_step_gets_the_likelier_grade_whatever_the_batch(model_path: str) -> None:
    judge = StepJudge(model_path, Runtime())
    outcomes = judge.score(items(14))
    assert outcomes == judge.score(items(14)[::-1])[::-1]  # to the bit
    judge._batches = lambda lengths: [list(lengths)]  # together, with padding, as on a GPU
    assert judge.score(items(14)) == outcomes
    labels = [outcome.value or () for outcome in outcomes]
    assert [len(own) for own in labels] == [len(steps) for _, steps in items(14)]
    assert 0.1 < sum(map(sum, labels)) / sum(map(len, labels)) < 0.9
    # The same, without cache, padding or batch.
    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    tokenizer, names = build_tokenizer(), VERDICTS[Template.TINY]
    encode = tokenizer.encode
    digits = [encode(digit)[0] for digit in "0123456789"]
    grades = [encode(name)[0] for name in names]
    for (problem, steps), own in list(zip(items(14), labels, strict=True))[11:14]:
        nonce = step_nonce(0, problem, steps, Template.TINY)
        ids = encode(render_tiny_problem(problem), add_special_tokens=False)
        for _ in range(96):
            likeliest = model(torch.tensor([ids])).logits[0, -1].argmax().item()
            if likeliest == tokenizer.eos_token_id:
                break
            ids.append(likeliest)
        text = tokenizer.decode(ids) + render_tiny(steps, nonce)
        for part, label in zip(verdict_parts(Template.TINY, nonce, len(steps)), own, strict=False):
            ids = encode(text + part, add_special_tokens=False)
            for _ in range(NUM_NOTED[Template.TINY]):
                ids.append(digits[model(torch.tensor([ids])).logits[0, -1, digits].argmax().item()])
            assert model(torch.tensor([ids])).logits[0, -1, grades].argmax().item() == label
            text = tokenizer.decode(ids) + names[label]


def test_what_cannot_be_graded_is_missing_alone(model_path: str) -> None:
    judge = StepJudge(model_path, Runtime())
    outcomes = judge.score([("How many? ", ("1 ",) * 100), ("How many? ", ()), *items(1)])
    assert [outcome.cause for outcome in outcomes] == ["too_long", "unparsable", None]
    torch.nn.init.constant_(judge._model.lm_head.weight, float("nan"))
    assert [outcome.cause for outcome in judge.score(items(2))] == ["not_finite"] * 2


def test_a_model_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"^step judge /nowhere: "):
        StepJudge("/nowhere", Runtime())


def test_the_shipped_judge_agrees_with_the_checker() -> None:
    problems = world.problems("test", None, 24, 1)
    candidates = step_candidates(problems, [], random.Random(1))
    asked = [(problem.prompt, solution_steps(text)) for problem, text in candidates]
    exact = [step_labels(problem, solution_steps(text)) for problem, text in candidates]
    outcomes = StepJudge(str(SHIPPED), Runtime()).score(asked)
    quality = step_agreement(
        [(outcome.value or (), labels) for outcome, labels in zip(outcomes, exact, strict=True)]
    )
    assert quality["balanced_accuracy"] > 0.7
