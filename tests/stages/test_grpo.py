"""The loop of RL: what a step samples, rewards and trains on, and that an interrupted stage goes on without a
step skipped, repeated or sampled twice."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from pns.algo.masks import TooManyMaskedError
from pns.config import Advantage, GrpoConfig, RatioLevel
from pns.errors import UserError
from pns.files import read_json, read_jsonl
from pns.records import Rollout
from pns.run.stopping import StopRequest, current_request, interruptible
from pns.stages import grpo
from pns.stages.artefacts import TrainedModel
from pns.stages.context import draw
from workers.training.objectives import GrpoObjective, GspoObjective

SMALL = {
    "steps": 5,
    "problems_per_step": 2,
    "completions_per_problem": 2,
    "checkpoint_every": 2,
    "kl_coefficient": 0.0,
}


def half_right(bench: Any) -> None:
    """Every second completion is right: each group has an advantage."""
    bench.fleet.rollout.write = lambda problem, sample, model: bench.solution(
        10 + int(problem[1:]) if sample % 2 else 77
    )


def trained(bench: Any, settings: Mapping[str, Any], **options: Any) -> TrainedModel:
    """The stage's artefact, made from "backbone"."""
    run = grpo.GrpoRun("rl", GrpoConfig(**SMALL | settings), 30, options.get("max_masked", 0.5))
    stop = options.get("stop", lambda step, metrics: False)
    problems = list(bench.problems(6).problems)
    with bench.making() as ctx:
        artefact = TrainedModel(ctx.directory)
        grpo.train(ctx, run, artefact, "backbone", problems, grpo.accuracy, stop)
    return artefact


def steps_of(rollouts: Sequence[Rollout]) -> list[int]:
    return [rollout.step for rollout in rollouts]


def metrics_of(artefact: TrainedModel) -> list[dict[str, float]]:
    rows = read_jsonl(artefact.directory / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(len(rows)))
    return [row["values"] for row in rows]


def test_steps_draw_sample_train_and_hand_over_the_weights(bench: Any) -> None:
    half_right(bench)
    artefact = trained(bench, {})
    policy, rollout = bench.fleet.policy, bench.fleet.rollout
    assert policy.loads == [("backbone", "language_model", 5, bench.seed)]
    assert rollout.loaded == ["backbone"]
    assert rollout.updates == [f"backbone+{step}" for step in range(1, 6)]
    assert read_json(artefact.directory / "model" / "weights.json") == "backbone+5"
    assert not policy.references
    rollouts = artefact.rollouts()
    assert steps_of(rollouts) == [step for step in range(5) for _ in range(4)]
    for step in range(5):
        drawn = draw(bench.problems(6).problems, 2, step, bench.seed)
        own = [r.problem.id for r in rollouts if r.step == step]
        assert own == [problem.id for problem in drawn for _ in range(2)]
        # Sampled with the weights of the step before.
        assert {r.completion.weights_version for r in rollouts if r.step == step} == {step}
    assert not list(artefact.directory.glob("*unfinished*"))
    for values in metrics_of(artefact):
        assert (values["accuracy"], values["reward"], values["no_update"]) == (0.5, 0.5, 0.0)
        assert values["completion_tokens"] > 0


def test_the_batch_is_what_was_sampled(bench: Any) -> None:
    half_right(bench)
    artefact = trained(bench, {"steps": 1, "clip_low": 0.1, "clip_high": 0.3, "updates_per_step": 2})
    [(batch, objective), (again, _)] = bench.fleet.policy.trained
    assert again is batch
    assert bench.fleet.policy.ends_of_steps == [False, True]  # the schedule counts steps
    assert objective == GrpoObjective(0.1, 0.3, 0.0)
    rollouts = artefact.rollouts()
    assert batch.completion_ids == [r.completion.token_ids for r in rollouts]
    assert batch.prompt_ids == [bench.prompts.encode(r.problem) for r in rollouts]
    assert set(batch.token_values) == {"old_log_probs"}
    sampled = [r.completion.log_probs for r in rollouts]
    assert [tuple(row) for row in batch.token_values["old_log_probs"]] == sampled
    assert batch.row_values["advantages"] == pytest.approx([-1, 1, -1, 1], rel=1e-3)


def test_dynamic_sampling_draws_until_enough_groups_differ(bench: Any) -> None:
    """Of six problems two are solved sometimes. A step needs two of those: it draws two by two, at most four
    times, and trains on them alone."""
    bench.fleet.rollout.write = lambda problem, sample, model: bench.solution(
        10 + int(problem[1:]) if problem in ("p0", "p1") and sample % 2 else 77
    )
    options = {"steps": 3, "dynamic_sampling": 3}
    artefact = trained(bench, options)
    rollouts = artefact.rollouts()
    for step, (values, (batch, _)) in enumerate(
        zip(metrics_of(artefact), bench.fleet.policy.trained, strict=True)
    ):
        own = [r for r in rollouts if r.step == step]
        assert len({r.completion.id for r in own}) == len(own) == values["completions"]
        assert len(own) in (4, 8, 12, 16)
        differing = [r.completion.token_ids for r in own if r.problem.id in ("p0", "p1")][:4]
        assert batch.completion_ids == differing
        # One draw fewer would not have done.
        assert len([r for r in own[:-4] if r.problem.id in ("p0", "p1")]) < 4
    assert max(values["completions"] for values in metrics_of(artefact)) > 4


def test_a_step_whose_draws_all_agree_trains_on_nothing(bench: Any) -> None:
    artefact = trained(bench, {"steps": 1, "dynamic_sampling": 2})  # all are right
    [values] = metrics_of(artefact)
    assert (values["no_signal"], values["no_update"], values["completions"]) == (1.0, 1.0, 12.0)
    assert bench.fleet.policy.passed == 1


def test_a_step_of_several_draws_goes_on_after_an_interruption(bench: Any) -> None:
    bench.fleet.rollout.write = lambda problem, sample, model: bench.solution(
        10 + int(problem[1:]) if problem in ("p0", "p1") and sample % 2 else 77
    )
    options = {"steps": 2, "dynamic_sampling": 3}
    bench.fleet.policy.interrupt_at = 1
    with pytest.raises(KeyboardInterrupt):
        trained(bench, options)
    bench.fleet.policy.interrupt_at = None
    bench.fleet.rollout.take_asked()
    resumed = trained(bench, options).rollouts()
    assert not bench.fleet.rollout.take_asked()  # all that the two steps need was sampled before
    assert len({(r.step, r.completion.id) for r in resumed}) == len(resumed)
    undisturbed = type(bench)(bench.store.parent / "other", bench.prompts, type(bench.fleet)(bench.prompts))
    undisturbed.fleet.rollout.write = bench.fleet.rollout.write
    assert trained(undisturbed, options).rollouts() == resumed


def test_a_kl_term_needs_the_reference_and_rows_without_advantage(bench: Any) -> None:
    trained(bench, {"steps": 1, "kl_coefficient": 0.1})  # all are right: no advantage
    assert bench.fleet.policy.references == ["backbone"]
    [(batch, objective)] = bench.fleet.policy.trained
    assert objective.kl_coefficient == 0.1
    assert batch.row_values["advantages"] == [0.0] * 4
    assert all(np.all(row == -2) for row in batch.token_values["ref_log_probs"])


def test_rows_without_advantage_or_reward_take_no_part(bench: Any) -> None:
    """Of four problems one is right every time, one has a masked completion, one is mixed, one wrong."""
    answers = {"p0": ("10", "10"), "p1": (bench.undecided, "11"), "p2": ("12", "3"), "p3": ("3", "3")}
    bench.fleet.rollout.write = lambda problem, sample, model: bench.solution(answers[problem][sample % 2])
    run = grpo.GrpoRun("rl", GrpoConfig(**SMALL | {"steps": 1, "problems_per_step": 4}), 30, 0.5)
    with bench.making() as ctx:
        artefact = TrainedModel(ctx.directory)
        problems = list(bench.problems(4).problems)
        grpo.train(ctx, run, artefact, "backbone", problems, grpo.accuracy, lambda step, metrics: False)
    [(batch, _)] = bench.fleet.policy.trained
    mixed = [r.completion.token_ids for r in artefact.rollouts() if r.problem.id == "p2"]
    assert batch.completion_ids == mixed
    # They count in the mean: the advantages of the two that are trained on stand for all seven unmasked.
    unmasked = [len(r.completion.token_ids) for r in artefact.rollouts() if not r.reward.masked]
    share = sum(map(len, mixed)) / sum(unmasked)
    assert batch.row_values["advantages"] == pytest.approx([share, -share], rel=1e-3)
    [values] = metrics_of(artefact)
    assert values["masked/verdict/timeout"] == 1
    assert (values["masked_rate"], values["accuracy"]) == (1 / 8, 0.5)


def test_a_step_without_any_advantage_is_no_update(bench: Any) -> None:
    artefact = trained(bench, {"steps": 2})
    assert not bench.fleet.policy.trained
    assert [values["no_update"] for values in metrics_of(artefact)] == [1.0, 1.0]
    assert bench.fleet.rollout.updates == ["backbone+0", "backbone+0"]
    assert bench.fleet.policy.passed == 2  # the schedule goes on


def test_steps_without_a_signal_stop_the_run_with_the_cause(bench: Any) -> None:
    bench.fleet.rollout.write = lambda problem, sample, model: bench.malformed
    with pytest.raises(UserError, match=r"in 3 steps in a row .*\(100% malformed\).*data.reasoning"):
        trained(bench, {"max_steps_without_signal": 3})
    assert len(read_jsonl(bench.store / "stage" / "metrics.jsonl")) == 3


def test_a_kl_term_alone_is_no_signal(bench: Any) -> None:
    with pytest.raises(UserError, match=r"in 2 steps in a row .*100% correct"):
        trained(bench, {"max_steps_without_signal": 2, "kl_coefficient": 0.1})
    assert len(bench.fleet.policy.trained) == 2


def test_a_signal_now_and_then_goes_on(bench: Any) -> None:
    def write(problem: str, sample: int, model: str) -> str:
        """All are right but for the first ones of every third step."""
        wrong = model in ("backbone+0", "backbone") and sample == 0
        return bench.solution(77 if wrong else 10 + int(problem[1:]))

    bench.fleet.rollout.write = write
    artefact = trained(bench, {"steps": 3, "max_steps_without_signal": 3})
    assert [values["no_signal"] for values in metrics_of(artefact)] == [0.0, 1.0, 1.0]


def test_a_gradient_that_is_not_finite_stops_the_run(bench: Any) -> None:
    half_right(bench)
    bench.fleet.policy.skips = lambda step: float(step == 1)
    with pytest.raises(UserError, match=r"rl: the gradient of step 1 is not finite .*rl.max_skipped_updates"):
        trained(bench, {})
    assert len(bench.fleet.policy.trained) == 2


def test_skipped_updates_that_are_allowed(bench: Any) -> None:
    half_right(bench)
    bench.fleet.policy.skips = lambda step: float(step == 1)
    assert len(metrics_of(trained(bench, {"max_skipped_updates": 1}))) == 5


def test_at_another_temperature_the_policy_gives_the_old_log_probabilities(bench: Any) -> None:
    half_right(bench)
    trained(bench, {"steps": 1, "temperature": 0.7, "kl_coefficient": 0.1})
    [(batch, objective)] = bench.fleet.policy.trained
    assert objective.temperature == 0.7
    assert bench.fleet.policy.temperatures == [0.7, 0.7]  # policy and reference
    assert all(np.all(row == -1) for row in batch.token_values["old_log_probs"])


def test_importance_is_of_policy_over_engine_and_capped(bench: Any) -> None:
    """The engine gives -0.5 a token, the policy -1: exp(-0.5)."""
    half_right(bench)
    trained(bench, {"steps": 1, "importance_cap": 2.0})
    [(batch, _)] = bench.fleet.policy.trained
    assert np.concatenate(batch.token_values["importance"]) == pytest.approx(np.exp(-0.5))
    assert all(np.all(row == -1) for row in batch.token_values["old_log_probs"])
    bench.fleet.policy.trained.clear()
    run = grpo.GrpoRun("rl", GrpoConfig(**SMALL | {"importance_cap": 0.5}), 30, 0.5)
    rollouts = TrainedModel(bench.store / "stage").rollouts()
    with bench.making("again") as ctx:
        grpo.update(ctx, run, rollouts)
    [(batch, _)] = bench.fleet.policy.trained
    assert np.all(np.concatenate(batch.token_values["importance"]) == np.float32(0.5))


def test_variants_reach_advantages_and_objective(bench: Any) -> None:
    half_right(bench)
    sequence = {
        "advantage": Advantage.rloo,
        "ratio": RatioLevel.sequence,
        "clip_low": 3e-4,
        "clip_high": 4e-4,
    }
    trained(bench, {"steps": 1} | sequence)
    [(batch, objective)] = bench.fleet.policy.trained
    assert objective == GspoObjective(3e-4, 4e-4, 0.0)
    assert batch.row_values["advantages"] == pytest.approx([-1, 1, -1, 1])  # of two: the other's reward away


def test_long_completions_lose_reward(bench: Any) -> None:
    """Both of a group are right; the longer one reaches into the last tokens that are allowed."""
    texts = [bench.solution(10), bench.solution(10, "So Ann=3. So Ann=3. ")]
    bench.fleet.rollout.write = lambda problem, sample, model: texts[sample % 2].replace(
        "10", f"1{problem[1:]}"
    )
    run_settings = {"steps": 1, "problems_per_step": 1, "overlong_tokens": 20}
    artefact = trained(bench, run_settings)
    [(batch, _)] = bench.fleet.policy.trained
    short, long = (len(r.completion.token_ids) for r in artefact.rollouts())
    assert 10 < short < long <= 30
    assert batch.row_values["advantages"] == pytest.approx([1, -1])


def test_stop_is_told_every_step_and_ends_the_stage(bench: Any) -> None:
    half_right(bench)
    told: list[int] = []

    def stop(step: int, metrics: Mapping[str, float | None]) -> bool:
        told.append(step)
        return step == 2

    artefact = trained(bench, {}, stop=stop)
    assert told == [0, 1, 2]
    assert len(metrics_of(artefact)) == 3
    assert read_json(artefact.directory / "model" / "weights.json") == "backbone+3"


def test_too_many_masked_completions_stop_before_the_update(bench: Any) -> None:
    bench.fleet.rollout.write = lambda problem, sample, model: bench.solution(bench.undecided)
    with pytest.raises(TooManyMaskedError, match="rl, step 0: verdict failed for 4 of the 4 completions"):
        trained(bench, {})
    assert not bench.fleet.policy.trained
    assert not (bench.store / "stage" / "rollouts.jsonl").exists()


@pytest.mark.parametrize("interrupted", range(5))
def test_a_resumed_stage_takes_the_steps_that_were_left(bench: Any, interrupted: int) -> None:
    """Checkpoints after steps 2 and 4. The update of step `interrupted` fails: its rollouts are kept, and so
    are those since the checkpoint."""
    half_right(bench)
    told: list[int] = []

    def stop(step: int, metrics: Mapping[str, float | None]) -> bool:
        told.append(step)
        return False

    bench.fleet.policy.interrupt_at = interrupted
    with pytest.raises(KeyboardInterrupt):
        trained(bench, {})
    sampled = bench.fleet.rollout.take_asked()
    assert len(sampled) == 4 * (interrupted + 1)
    before = read_jsonl(bench.store / "stage" / "rollouts.jsonl")
    artefact = trained(bench, {}, stop=stop)
    first = interrupted // 2 * 2
    assert bench.fleet.policy.restored == ([first] if first else [])
    if first:
        updates = bench.fleet.rollout.updates[interrupted:]
        assert updates[0] == f"backbone+{first}"  # rollout has the checkpoint's weights before it samples
    assert told == [0, 1, 2, 3, 4]
    rollouts = artefact.rollouts()
    assert steps_of(rollouts) == [step for step in range(5) for _ in range(4)]
    assert len({(r.step, r.completion.id) for r in rollouts}) == 20
    assert read_jsonl(artefact.rollouts_file)[: len(before)] == before  # used again, not sampled again
    assert len(bench.fleet.rollout.take_asked()) == 20 - len(sampled)
    assert len(metrics_of(artefact)) == 5
    assert read_json(artefact.directory / "model" / "weights.json") == "backbone+5"


@pytest.mark.parametrize("writes_for", [1, 4, 99])
@pytest.mark.parametrize("interrupted", [2, 4])
def test_a_checkpoint_that_is_being_written_is_finished_first(
    bench: Any, writes_for: int, interrupted: int
) -> None:
    """It is asked for twice a step: the one of step 2 is whole before or in step 3, or when the next one, that
    of step 4, or what interrupts the stage has to wait for it."""
    half_right(bench)
    policy = bench.fleet.policy
    policy.writes_for, policy.interrupt_at = writes_for, interrupted
    with pytest.raises(KeyboardInterrupt):
        trained(bench, {})
    artefact = trained(bench, {})
    assert policy.restored == [interrupted]
    assert read_json(artefact.directory / "model" / "weights.json") == "backbone+5"
    assert not (artefact.directory / "checkpoints").exists()


def test_processes_that_do_not_answer_are_not_asked_for_their_checkpoint(bench: Any) -> None:
    """What they have left is not taken for one."""
    half_right(bench)
    policy = bench.fleet.policy
    policy.writes_for, policy.interrupt_at, policy.interruption = 99, 2, TimeoutError("no answer")
    with pytest.raises(TimeoutError, match="no answer"):
        trained(bench, {})
    artefact = trained(bench, {})
    assert policy.restored == []
    assert read_json(artefact.directory / "model" / "weights.json") == "backbone+5"


def test_a_checkpoint_lost_after_an_error_is_told_beside_it(bench: Any) -> None:
    half_right(bench)
    policy = bench.fleet.policy
    policy.writes_for, policy.interrupt_at = 99, 2
    train_step = policy.train_step

    def fails(*of_batch: Any, **options: Any) -> dict[str, float]:
        if policy.interrupt_at == policy.steps:
            policy.save_fails = OSError("disk full")
        return train_step(*of_batch, **options)

    policy.train_step = fails
    with pytest.raises(KeyboardInterrupt):
        trained(bench, {})
    assert "the checkpoint after step 2 is lost: disk full" in bench.shown.getvalue()


def test_a_checkpoint_that_cannot_be_written_ends_the_stage(bench: Any) -> None:
    half_right(bench)
    bench.fleet.policy.save_fails = OSError("disk full")
    with pytest.raises(OSError, match="disk full"):
        trained(bench, {})
    assert len(bench.fleet.policy.trained) == 2  # told before the third step is trained
    assert not list((bench.store / "stage" / "checkpoints").glob("step-*"))
    bench.fleet.policy.save_fails = None
    assert read_json(trained(bench, {}).directory / "model" / "weights.json") == "backbone+5"


def sampled_ahead() -> None:
    """Until no rollouts are made in the background."""
    for thread in threading.enumerate():
        if thread.name == "rollouts ahead":
            thread.join()


OVERLAP = {"overlap": True, "importance_cap": 2.0}


def test_with_overlap_a_step_is_sampled_from_weights_one_step_older(bench: Any) -> None:
    """The engine writes which weights a completion is of."""
    half_right(bench)
    artefact = trained(bench, OVERLAP)
    versions = {rollout.step: rollout.completion.weights_version for rollout in artefact.rollouts()}
    assert versions == {0: 0, 1: 0, 2: 1, 3: 2, 4: 3}
    policy, rollout = bench.fleet.policy, bench.fleet.rollout
    assert rollout.updates == [f"backbone+{step}" for step in range(1, 6)]
    # Each step is asked for and trained on once, as without overlap.
    assert len(rollout.take_asked()) == 20
    assert len(policy.trained) == 5
    assert {"importance/mean", "importance/max", "importance/capped"} <= metrics_of(artefact)[-1].keys()


def test_with_overlap_sampling_and_training_are_at_a_time(bench: Any) -> None:
    """The update of a step waits until the next one is asked for: one after the other would never end."""
    half_right(bench)
    asked = [threading.Event() for _ in range(3)]
    policy, rollout = bench.fleet.policy, bench.fleet.rollout
    stream, train_step = rollout.stream, policy.train_step

    def noticed(requests: Any, sampling: Any) -> Any:
        asked[int(requests[0].id.partition("/")[0])].set()
        yield from stream(requests, sampling)

    def waiting(*args: Any, **kwargs: Any) -> Any:
        assert asked[len(policy.trained) + 1].wait(timeout=60)
        return train_step(*args, **kwargs)

    rollout.stream, policy.train_step = noticed, waiting
    trained(bench, OVERLAP | {"steps": 3}, stop=lambda step, metrics: step == 1)  # no step follows the last
    assert len(policy.trained) == 2


def test_rollouts_of_other_weights_are_refused(bench: Any) -> None:
    half_right(bench)
    artefact = trained(bench, OVERLAP)
    step_3 = [rollout for rollout in artefact.rollouts() if rollout.step == 3]
    older = grpo.GrpoRun("rl", GrpoConfig(**SMALL | OVERLAP), 30, 0.5)
    grpo.check_versions(older, 3, step_3)
    with pytest.raises(RuntimeError, match=r"step 3 has rollouts of weights version \[2\]"):
        grpo.check_versions(grpo.GrpoRun("rl", GrpoConfig(**SMALL), 30, 0.5), 3, step_3)
    with pytest.raises(RuntimeError, match="step 4"):
        grpo.check_versions(older, 4, step_3)


def test_what_fails_in_the_background_fails_the_step(bench: Any) -> None:
    half_right(bench)
    fine = bench.fleet.rollout.write

    def write(problem: str, sample: int, model: str) -> str:
        if model == "backbone+1":
            raise ValueError("the engine is gone")
        return fine(problem, sample, model)

    bench.fleet.rollout.write = write
    with pytest.raises(ValueError, match="the engine is gone"):
        trained(bench, OVERLAP)
    assert len(bench.fleet.policy.trained) == 2  # step 2 is sampled during the update of step 1


@pytest.mark.parametrize("interrupted", range(5))
def test_a_resumed_stage_with_overlap_trains_on_what_an_uninterrupted_one_does(
    bench: Any, interrupted: int
) -> None:
    """Which weights a completion is of is what an interruption could change: the engine writes it."""
    fine = bench.solution
    bench.fleet.rollout.write = lambda problem, sample, model: fine(
        10 + int(problem[1:]) if sample % 2 else 77, f"So Ann={len(model)}{model[-1:]}. "
    )
    bench.fleet.policy.interrupt_at = interrupted
    with pytest.raises(KeyboardInterrupt):
        trained(bench, OVERLAP)
    sampled_ahead()
    resumed = trained(bench, OVERLAP)
    rows = read_jsonl(resumed.rollouts_file)
    assert [row["completion"]["weights_version"] for row in rows] == [
        max(0, step - 1) for step in range(5) for _ in range(4)
    ]
    assert len(bench.fleet.rollout.take_asked()) == 20
    assert not list(resumed.directory.glob("*unfinished*"))


def test_a_stop_with_overlap_leaves_no_rollouts_behind(bench: Any) -> None:
    half_right(bench)
    artefact = trained(bench, OVERLAP, stop=lambda step, metrics: step == 2)
    assert steps_of(artefact.rollouts()) == [step for step in range(3) for _ in range(4)]
    assert not list(artefact.directory.glob("*unfinished*"))


@pytest.mark.parametrize("stopped", [0, 1, 4])
def test_after_sigterm_the_step_ends_and_is_kept(bench: Any, stopped: int) -> None:
    """Checkpoints are due after steps 2 and 4; after step 5 the stage is done."""
    half_right(bench)

    def stop(step: int, metrics: Mapping[str, float | None]) -> bool:
        if step == stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        return False

    with interruptible(StopRequest()):
        if stopped == 4:
            artefact = trained(bench, {}, stop=stop)
            assert current_request().came
        else:
            with pytest.raises(KeyboardInterrupt):
                trained(bench, {}, stop=stop)
    if stopped < 4:
        artefact = trained(bench, {})
        assert bench.fleet.policy.restored == [stopped + 1]
    assert len(bench.fleet.policy.trained) == 5  # no update was made twice
    assert len(bench.fleet.rollout.asked) == 20
    assert read_json(artefact.directory / "model" / "weights.json") == "backbone+5"


def test_an_interruption_while_sampling_loses_no_completion(bench: Any) -> None:
    """In the second step, with three of four completions there."""
    half_right(bench)
    stream = bench.fleet.rollout.stream

    def cut_in_the_second_step(requests: Any, sampling: Any) -> Any:
        bench.fleet.rollout.interrupt_after = 3 if requests[0].id.startswith("1/") else None
        return stream(requests, sampling)

    bench.fleet.rollout.stream = cut_in_the_second_step
    with pytest.raises(KeyboardInterrupt):
        trained(bench, {})
    bench.fleet.rollout.stream = stream
    bench.fleet.rollout.take_asked()
    artefact = trained(bench, {})
    asked = bench.fleet.rollout.take_asked()
    assert [key.split("/")[0] for key in asked] == ["1"] + ["2"] * 4 + ["3"] * 4 + ["4"] * 4
    assert steps_of(artefact.rollouts()) == [step for step in range(5) for _ in range(4)]


def test_masked_rollouts_after_the_checkpoint_are_asked_again(bench: Any) -> None:
    undecided = bench.solution(bench.undecided)
    bench.fleet.rollout.write = lambda problem, sample, model: [undecided, bench.solution(3)][sample % 2]
    bench.fleet.policy.interrupt_at = None
    run_stopped = pytest.raises(KeyboardInterrupt)

    def stop(step: int, metrics: Mapping[str, float | None]) -> bool:
        if step == 1:
            raise KeyboardInterrupt
        return False

    with run_stopped:
        trained(bench, {"checkpoint_every": 1}, stop=stop)
    assert len(bench.fleet.rollout.take_asked()) == 8
    half_right(bench)
    artefact = trained(bench, {"checkpoint_every": 1})
    asked = bench.fleet.rollout.take_asked()
    again = [key for key in asked if key.startswith("1/")]
    assert len(again) == 2
    assert all(int(key.rsplit("#", 1)[1]) % 2 == 0 for key in again)
    assert not any(key.startswith("0/") for key in asked)  # before the checkpoint: as they were
    masked = [r.step for r in artefact.rollouts() if r.reward.masked]
    assert masked == [0, 0]


def test_rates_over_all_completions(bench: Any) -> None:
    texts = [bench.malformed, bench.solution(10), bench.solution(bench.undecided), bench.solution(3) + "..."]
    bench.fleet.rollout.write = lambda problem, sample, model: texts[sample]
    run = grpo.GrpoRun("rl", GrpoConfig(**SMALL | {"steps": 1, "problems_per_step": 1}), 30, 0.5)
    run.settings.completions_per_problem = 4
    with bench.making() as ctx:
        artefact = TrainedModel(ctx.directory)
        problems = list(bench.problems(1).problems)
        grpo.train(ctx, run, artefact, "backbone", problems, grpo.accuracy, lambda step, metrics: False)
    [values] = metrics_of(artefact)
    expected = {"accuracy": 0.25, "format_rate": 0.5, "masked_rate": 0.25, "truncated_rate": 0.25}
    assert {name: values[name] for name in expected} == expected
    assert values["reward"] == pytest.approx(1 / 3)
