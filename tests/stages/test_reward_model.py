"""Two reward models on disjoint problems: their pairs, their quality, and a resume between the two."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pns.config import Config, RewardModelStage
from pns.errors import UserError
from pns.files import read_json, read_jsonl, write_jsonl
from pns.records import Completion, Problem, Reward, Rollout, Verdict
from pns.run.stage import ModelFiles
from pns.stages.artefacts import RewardModels, TrainedModel
from pns.stages.reward_model import pairwise_quality, reward_model, right_wrong_pairs
from pns.stages.stream import stable_seed
from workers.training.objectives import BradleyTerryObjective


def config_of(**changes: Any) -> Config:
    small = {"steps": 2, "pairs_per_step": 3, "samples_per_problem": 2, "held_out_fraction": 0.25}
    return Config(reward_model=RewardModelStage(**small | changes))


def made(bench: Any, config: Config, target: TrainedModel | None = None) -> RewardModels:
    """Of eight problems, whose first sample is right and whose second is wrong."""
    bench.fleet.rollout.write = lambda problem, sample, model: bench.solution(
        77 if sample % 2 else 10 + int(problem[1:])
    )
    target = target or TrainedModel(bench.store / "target")
    with bench.making() as ctx:
        settings = reward_model.settings(config)
        return reward_model.make(ctx, settings, target, ModelFiles("initial"), bench.problems(8))


def trained_problems(bench: Any) -> list[set[str]]:
    """Problems of each loaded model's training steps, told by their prompts."""
    by_prompt = {bench.prompts.encode(problem): problem.id for problem in bench.problems(8).problems}
    steps = [{by_prompt[ids] for ids in batch.prompt_ids} for batch, _ in bench.fleet.policy.trained]
    return [steps[0] | steps[1], steps[2] | steps[3]]


def test_two_models_see_disjoint_halves(bench: Any) -> None:
    bench.fleet.policy.score = lambda prompt, completion: float(len(completion))
    models = made(bench, config_of())
    policy = bench.fleet.policy
    assert policy.loads == [
        ("initial", "score", 2, stable_seed(bench.seed, name)) for name in ("main", "held_out")
    ]
    main, held_out = trained_problems(bench)
    assert main
    assert held_out
    assert not main & held_out
    quality = read_json(models.all_quality_file)
    assert quality == {name: read_json(models.quality_file(name)) for name in ("main", "held_out")}
    for name in ("main", "held_out"):
        assert (quality[name]["training_pairs"], quality[name]["held_out_pairs"]) == (3, 1)
        assert (models.directory / name / "weights.json").is_file()
    assert models.main == models.model("main") == str(models.directory / "main")
    assert bench.fleet.rollout.loaded == [str(bench.store / "target" / "model")]
    stages = [row["stage"] for row in read_jsonl(models.directory / "metrics.jsonl")]
    assert stages == ["reward_model"] * 2 + ["reward_model_held_out"] * 2
    assert bench.counts() == {"pairs": 8, "prompts_too_long": 0, "samples": 16}


def test_pairs_are_right_and_wrong_completions_of_one_problem(bench: Any) -> None:
    models = made(bench, config_of())
    pairs = read_jsonl(models.pairs_file)
    assert [pair["problem_id"] for pair in pairs] == [f"p{i}" for i in range(8)]
    for i, pair in enumerate(pairs):
        assert (pair["chosen"], pair["rejected"]) == (bench.solution(10 + i), bench.solution(77))
    batch, objective = bench.fleet.policy.trained[0]
    assert objective == BradleyTerryObjective(centre=0.01)
    assert len(batch.prompt_ids) == 6  # both sides of three pairs, in turn
    assert batch.prompt_ids[::2] == batch.prompt_ids[1::2]
    assert set(batch.completion_ids[1::2]) == {bench.prompts.encode_completion(bench.solution(77))}
    # Held-out pairs are not trained on.
    scored = {ids for batch in bench.fleet.policy.scored for ids in batch.prompt_ids}
    assert not scored & {ids for batch, _ in bench.fleet.policy.trained for ids in batch.prompt_ids}


def test_an_interruption_between_the_two_models_keeps_the_first(bench: Any) -> None:
    policy = bench.fleet.policy
    export = policy.export

    def export_and_stop(directory: Any) -> None:
        export(directory)
        policy.interrupt_at = 0  # of the next model

    policy.export = export_and_stop
    with pytest.raises(KeyboardInterrupt):
        made(bench, config_of())
    policy.export = export
    first = bench.store / "stage" / "main.json"
    changed = first.stat().st_mtime_ns
    assert not (bench.store / "stage" / "held_out.json").exists()
    policy.loads.clear()
    bench.fleet.rollout.take_asked()
    models = made(bench, config_of())
    assert first.stat().st_mtime_ns == changed
    assert [seed for *_, seed in policy.loads] == [stable_seed(bench.seed, "held_out")]
    assert set(read_json(models.all_quality_file)) == {"main", "held_out"}
    main, held_out = trained_problems(bench)
    assert not main & held_out
    stages = [row["stage"] for row in read_jsonl(models.directory / "metrics.jsonl")]
    assert stages == ["reward_model"] * 2 + ["reward_model_held_out"] * 2


def test_completions_are_not_sampled_again_for_the_second_model(bench: Any) -> None:
    """As after an interruption while the first one trains."""
    bench.fleet.policy.interrupt_at = 1
    with pytest.raises(KeyboardInterrupt):
        made(bench, config_of())
    assert len(bench.fleet.rollout.take_asked()) == 16
    made(bench, config_of())
    assert bench.fleet.rollout.take_asked() == []


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda bench: bench.solution(77), "0 right, 16 wrong, 0 undecided; problems too hard"),
        (lambda bench: "no box", "0 are well-formed, 0 right, 0 wrong, 0 undecided; completions have no box"),
    ],
)
def test_without_pairs_the_verdicts_are_counted(bench: Any, answer: Any, words: str) -> None:
    with bench.making() as ctx:
        bench.fleet.rollout.write = lambda problem, sample, model: answer(bench)
        settings = reward_model.settings(config_of())
        target = TrainedModel(bench.store / "target")
        with pytest.raises(UserError, match=f"0 .correct, incorrect. pairs: of 16 completions .*{words}"):
            reward_model.make(ctx, settings, target, ModelFiles("initial"), bench.problems(8))


def rollout_of(step: int, problem: str, answer: str, verdict: Verdict, length: int) -> Rollout:
    completion = Completion(f"{problem}#{step}", problem, answer, tuple(range(length)), (), "stop")
    return Rollout(step, Problem(problem, "?", "1"), completion, Reward(1.0, True, verdict))


def test_rollouts_of_the_last_steps_of_rl_give_pairs_too(bench: Any) -> None:
    target = TrainedModel(bench.store / "target")
    target.directory.mkdir(parents=True)
    rollouts = []
    for step in range(3):
        rollouts.append(rollout_of(step, f"q{step}", "right", Verdict.CORRECT, 4))
        rollouts.append(rollout_of(step, f"q{step}", "wrong", Verdict.WRONG, 4))
    write_jsonl(target.rollouts_file, rollouts)
    models = made(bench, config_of(rl_steps=2), target)
    pairs = read_jsonl(models.pairs_file)
    assert [pair["problem_id"] for pair in pairs[8:]] == ["q1", "q2"]
    assert (pairs[8]["chosen"], pairs[8]["rejected"]) == ("right", "wrong")
    assert len(read_jsonl(models.rollouts_file)) == 16  # only what was sampled here


def test_sides_are_matched_in_length_and_used_once() -> None:
    sides = [("right", Verdict.CORRECT, length) for length in (4, 10, 30)]
    sides += [("wrong", Verdict.WRONG, length) for length in (5, 5, 12)]
    rollouts = [rollout_of(0, "q", f"{text}{length}", verdict, length) for text, verdict, length in sides]
    pairs = right_wrong_pairs(rollouts, 1.5)
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("right4", "wrong5"), ("right10", "wrong12")]
    assert {(pair.problem_id, pair.prompt, pair.source) for pair in pairs} == {("q", "?", "rs")}


def test_no_pairs_stop_the_stage(bench: Any) -> None:
    with pytest.raises(
        UserError,
        match=r"0 .* pairs: .* 4 right, 4 wrong, 0 undecided.*; raise reward_model.samples_per_problem",
    ):
        made(bench, config_of(samples_per_problem=1))  # all are right


def test_quality_by_hand() -> None:
    quality = pairwise_quality(np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 3.0], [1.0, 0.0]]))
    assert quality["pairwise_accuracy"] == 0.5
    assert (quality["chosen_mean"], quality["rejected_mean"]) == (1.0, 1.0)
    sure = [1 / (1 + math.exp(-margin)) for margin in (2, 0, -3, 1)]
    assert 0 < quality["calibration_error"] <= max(1 - p for p in sure)
