"""The tiny reward model: its labels and rows, the block that compares, a short training, the shipped one."""

from __future__ import annotations

import math
import random
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from pns.commands.tiny import tiny_config
from pns.data.prompts import Prompts
from pns.errors import UserError
from pns.records import Problem
from pns.stages.context import Context
from pns.tiny import deepened as deepening
from pns.tiny import world
from pns.tiny.deepened import (
    UNKNOWN,
    Grader,
    RowsOf,
    deepened,
    expectations,
    fit_comparison,
    fitted_candidates,
    train,
)
from pns.tiny.outcome_reward import outcome_rows, token_labels
from pns.tiny.settings import TinyTask, WarmStart
from pns.tiny.step_judge import step_candidates
from pns.tiny.tokenizer import build_tokenizer
from workers.rewards.reward_model import RewardModel
from workers.runtime import Runtime

TINY = Path(__file__).parents[2] / "recipes" / "tiny"
SOLVER = str(TINY / "qwen2")
SETTINGS = WarmStart(
    task=TinyTask.outcome_reward, samples_from=SOLVER, layers=6, steps=3, curriculum_steps=3, batch_size=8
)
PROBLEM = Problem(
    "p", "Bob has 12. Cal has 7 more than Bob. Eve has 3 times Cal. How many has Eve? ", "57", "base"
)


class Kept:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.losses.append(metrics["loss"])


def own_context(kept: Kept | None = None) -> Context:
    """One for what needs no actor."""
    nothing = cast(Any, None)
    prompts = Prompts(build_tokenizer(), tiny_config(SETTINGS, Path("out")).data)
    return Context(0, nothing, nothing, prompts, cast(Any, kept), nothing)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        # One token a digit, a word and a sign; the wrong step's last token is the first of which it is known.
        ("<think>Cal has 12+7=19. So Eve has 19*3=57. </think>\\boxed{57}", [1.0] * 28),
        (
            "<think>Cal has 12+7=19. So Eve has 19+3=22. </think>\\boxed{22}",
            [1.0] * 11 + [UNKNOWN] * 10 + [0.0] * 7,
        ),
        ("<think>Cal has 12+7=19. Cal has 12+7=19. So Eve has 19*3=57. </think>\\boxed{57}", None),
        ("", [0.0]),
    ],
)
def test_a_token_is_right_until_the_first_wrong_step(text: str, labels: list[float] | None) -> None:
    ctx = own_context()
    found = token_labels(ctx, PROBLEM, text)
    assert len(found) == len(ctx.prompts.encode_completion(text))
    if labels is not None:
        assert found == labels
    else:  # a surplus step is wrong, the answer is not
        assert found[-2:] == [0.0, 1.0]


def test_rows_hold_labels_of_solutions_alone_and_end_with_the_end_token() -> None:
    ctx = own_context()
    right, wrong = "<think>Cal has 12+7=19. So Eve has 19*3=57. </think>\\boxed{57}", "<think>no"
    read = outcome_rows(ctx, [(PROBLEM, right), (PROBLEM, wrong)])
    num_prompt = len(ctx.prompts.encode(PROBLEM))
    num_wrong = len(ctx.prompts.encode_completion(wrong))
    assert read.labels_BT[0].tolist() == [UNKNOWN] * num_prompt + [1.0] * 28
    assert read.of_solution_BT.sum(1).tolist() == [28, num_wrong]
    end = num_prompt + num_wrong - 1
    assert read.token_ids_BT[1, end] == ctx.prompts.tokenizer.eos_token_id
    assert (read.labels_BT[1, end:] != UNKNOWN).sum() == 1
    assert read.labels_BT[1, end] == 0


def test_blocks_are_added_that_the_solver_does_not_notice() -> None:
    torch.manual_seed(0)
    grader = deepened(SOLVER, 6)
    weights = dict(grader.model.base_model.named_parameters())
    trained = {name for name, weight in weights.items() if weight.requires_grad}
    assert trained == {"norm.weight", *(n for n in weights if n.startswith(("layers.4.", "layers.5.")))}
    read = outcome_rows(own_context(), [(PROBLEM, "<think>Cal has 12+7=19. </think>\\boxed{19}")])
    assert not grader.scores(read.token_ids_BT).any()
    with pytest.raises(UserError, match="has 4: give at least 6"):
        deepened(SOLVER, 5)


def test_the_comparing_block_looks_at_the_token_before() -> None:
    torch.manual_seed(0)
    grader = deepened(SOLVER, 6)
    read = outcome_rows(own_context(), [(PROBLEM, "<think>Cal has 12+7=19. </think>\\boxed{19}")])
    seen: dict[str, torch.Tensor] = {}
    grader.comparing.register_forward_pre_hook(lambda _, given: seen.update(solved=given[0]))
    grader.comparing.self_attn.register_forward_hook(lambda _, given, gave: seen.update(added=gave[0]))
    with torch.no_grad():
        grader.scores(read.token_ids_BT)
        read_VH = torch.linalg.qr(grader.model.base_model.embed_tokens.weight.T).Q.T
        expected_BTV = grader.solver_norm(seen["solved"])[:, :-1] @ read_VH.T
    # It is added in orthogonal directions: lengths stay.
    lengths_BT = deepening.LOUDNESS_OF_EXPECTED * expected_BTV.norm(dim=-1)
    assert torch.allclose(seen["added"][:, 1:].norm(dim=-1), lengths_BT, rtol=0.02)


def test_a_reward_model_compares_and_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepening, "NUM_FITTED", 100)
    monkeypatch.setattr(deepening, "FIT_STEPS", 300)
    kept = Kept()
    ctx = own_context(kept)
    torch.manual_seed(0)
    grader = deepened(SOLVER, 6)
    rows_of = partial(outcome_rows, ctx)
    sampled = [(PROBLEM, "<think>no</think>\\boxed{1}")] * 8
    fit_comparison(grader, fitted_candidates(ctx, sampled), rows_of)
    fresh = step_candidates(world.problems("test", None, 40, 1), [], random.Random(1))
    _, log_probs = expectations(grader, fresh, rows_of)
    compared = added_by_comparing(grader, fresh, rows_of)
    assert torch.corrcoef(torch.stack([compared, log_probs]))[0, 1].abs() > 0.2
    train(ctx, SETTINGS, grader, sampled, rows_of)
    assert len(kept.losses) == 3
    assert kept.losses[0] == pytest.approx(math.log(2))


def added_by_comparing(grader: Grader, candidates: list[Any], rows_of: RowsOf) -> torch.Tensor:
    """Of all tokens of the solutions, the number that the comparing block's feed-forward part adds."""
    states, _ = expectations(grader, candidates, rows_of)
    with torch.no_grad():
        added_NH = grader.comparing.mlp(states)
    return added_NH @ torch.linalg.svd(grader.comparing.mlp.down_proj.weight.detach()).U[:, 0]


def test_the_shipped_model_tells_right_solutions() -> None:
    ctx, rng = own_context(), random.Random(0)
    model = RewardModel(str(TINY / "reward_model"), Runtime())
    num_better = 0
    fresh = world.problems("test", None, 60, 0)
    for problem in fresh:
        wrong = world.corrupt(problem, rng, rng.choice(("arithmetic", "operator", "operand", "entity")))
        texts = str(problem.solution), wrong
        asked = [(*ctx.prompts.encode(problem), *ctx.prompts.encode_completion(text)) for text in texts]
        right_score, wrong_score = (outcome.value for outcome in model.score(asked))
        num_better += (right_score or 0.0) > (wrong_score or 0.0)
    assert num_better / len(fresh) >= 0.75
