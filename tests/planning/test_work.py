"""Counts: the roles are those that the stages declare, the tokens those that their code samples and trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from pns import driver
from pns.config import NEGATIVE_SOURCES, Layout
from pns.planning import work
from pns.planning.assumptions import Assumptions
from pns.planning.plan import StageTime
from pns.planning.work import Lengths, Phase, SamplingWork, Updates
from pns.recipe import load
from pns.stages.negatives import SOURCES

RECIPE = Path(__file__).parents[2] / "recipes/tiny-qwen2.yaml"
BCPG = ["method=bcpg", "bcpg.step_judge.model=a/judge", "bcpg.process_reward.model=a/prm"]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["negatives=rs"],
        ["negatives=mixed"],
        ["negatives=mixed", "mixture.starts=[backbone,target]", "synthesize.min_log_prob=-2"],
        ["negatives=rs", "synthesize.max_log_prob=-0.1", "pair.perplexity_samples=0"],
        ["negatives=rs", "pair.prefer=likely", "pair.perplexity_samples=0"],
        ["reward.terms.coherence.weight=0"],
        ["reward.terms.second={kind: reward_model, weight: 0.1, model: a/b}", "pair.scored_by=second"],
        ["reverse_rl.refresh_every=10"],
        ["preference.data.hub=a/b", f"preference.data.revision={'a' * 40}"],
        BCPG,
        [*BCPG, "bcpg.rounds=2", "bcpg.start=target", "bcpg.rule=judge", "bcpg.arms.rft.objective=rft"],
        [*BCPG, "bcpg.arms.nsa.negatives=[own,pns,rs]"],
        [*BCPG, "bcpg.arms.nsa.negatives=[mixed]", "bcpg.arms.nsa.objective=bcpg", "bcpg.rounds=2"],
    ],
)
def test_roles_are_those_of_the_driver(overrides: list[str]) -> None:
    config = load(RECIPE, overrides)
    assert {stage: own.roles for stage, own in work.work_of(config).items()} == driver.roles_used(config)


def phases_of(*words: str) -> dict[str, list[Phase]]:
    return {stage: own.phases for stage, own in work.work_of(load(RECIPE, list(words))).items()}


def test_work_of_the_tiny_recipe_by_hand() -> None:
    words = ["data.tiny.num_preference=100", "data.tiny.num_reward=50", "reverse_rl.refresh_every=0"]
    phases = phases_of(*words)
    # No KL in rl, and the engine's own log-probabilities: no other forward pass.
    assert phases["rl"] == [
        Phase("step", 60, SamplingWork("backbone", 320, 40, 96), {}, Updates("backbone", 320, 40), syncs=True)
    ]
    step, measuring = phases["reverse_rl"]
    assert (step.times, step.scored) == (70, {"plausibility": 160, "coherence": 160})
    assert step.updates == Updates("backbone", 160, 20, forwards=1, has_reference=True)
    assert (measuring.times, measuring.sampling) == (2, SamplingWork("backbone", 512, 512, 96))
    sampling, training = phases["reward_model"]
    assert sampling.sampling == SamplingWork("backbone", 400, 50, 96)
    assert (training.times, training.updates) == (
        240,
        Updates("reward model", 32, 16, score_head=True, together=2),
    )
    assert phases["synthesize"][0].sampling == SamplingWork("backbone", 400, 100, 96)
    # 800 of the target and 400 negatives by two reward models, and both sides of 100 pairs.
    assert phases["pair"][1].scored == {"plausibility": 2 * 100 + 2 * (800 + 400)}
    assert phases["evaluate"] == [Phase("sampling", 3, SamplingWork("backbone", 700, 700, 96))]


def test_the_log_probs_of_negatives_are_counted_where_the_likeliest_goes_first() -> None:
    words = ["data.tiny.num_preference=100", "pair.perplexity_samples=0"]
    log_probs = Phase("log-probs", 1, updates=Updates("backbone", 400, 100, 0, forwards=1))
    assert log_probs in phases_of(*words, "pair.prefer=likely")["pair"]
    assert log_probs not in phases_of(*words)["pair"]


def test_other_forward_passes_and_refreshing_are_counted() -> None:
    words = [
        "rl.kl_coefficient=0.1",
        "rl.importance_cap=2",
        "rl.updates_per_step=3",
        "reverse_rl.refresh_every=20",
        "reverse_rl.refresh_steps=10",
    ]
    phases = phases_of(*words)
    assert phases["rl"][0].updates == Updates("backbone", 320, 40, updates=3, forwards=2, has_reference=True)
    refreshing = phases["reverse_rl"][2]
    assert (refreshing.times, refreshing.updates) == (
        30,
        Updates("reward model", 32, 16, score_head=True, together=2),
    )


def test_a_step_with_overlap_takes_what_is_longer_of_sampling_and_training() -> None:
    [step] = phases_of("rl.overlap=true", "rl.importance_cap=2")["rl"]
    assert step.overlaps
    seconds = {"rollout": 10.0, "judge": 12.0, "other log-probs": 2.0, "update": 5.0, "sync": 1.0}
    assert [StageTime("rl", "step", 1, 0, 0, 0, seconds, own).once for own in (False, True)] == [20, 13]


def test_suites_are_sampled_as_they_are_decoded(tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text('{"problem": "1", "answer": "1"}\n' * 5)
    words = ["data.source=jsonl", "data.benchmarks=[math500,aime24]", f"data.jsonl.suites.own={own}"]
    words += [f"data.jsonl.train={own}", "data.prompt=auto", "evaluate.per_suite.own.max_new_tokens=50"]
    phases = phases_of(*words)["evaluate"]
    samplings = [phase.sampling for phase in phases]
    # AIME has 30 problems and is drawn 32 times.
    assert samplings == [SamplingWork("backbone", 500 + 30 * 32, 530, 96), SamplingWork("backbone", 5, 5, 50)]
    assert work.problem_counts(load(RECIPE, words)) == {"train": 5, "reward": 5, "preference": 5}


def test_lengths_are_told_or_assumed() -> None:
    config = load(RECIPE, ["rollout.max_new_tokens=1000", "data.max_prompt_tokens=512"])
    assert work.lengths_of(config, Assumptions()) == Lengths(150, 340, 512, 1000)
    assert work.lengths_of(config, Assumptions(), 70, 2000) == Lengths(70, 1000, 512, 1000)


def test_shared_prompts_are_held_once() -> None:
    lengths, updates = Lengths(100, 50, 200, 100), Updates("backbone", rows=8, prompts=2)
    assert work.held_tokens(updates, lengths, Layout.shared) == 8 * 50 + 2 * 100
    assert work.held_tokens(updates, lengths, Layout.packed) == 8 * 150


def test_every_source_of_negatives_is_planned() -> None:
    for source in SOURCES:
        config = load(RECIPE, [f"negatives={source}", f"sources.file={RECIPE}"])
        assert "synthesize" in work.work_of(config)
    assert set(NEGATIVE_SOURCES) == set(SOURCES)


def test_work_of_bcpg_by_hand() -> None:
    """Eight samples of 50 problems a round, half of them wrong. The first round's samples are one for all
    arms, and so are labels and reference of the same negatives."""
    words = ["bcpg.rounds=2", "data.tiny.num_preference=100", "bcpg.problems_per_step=10", "bcpg.steps=5"]
    words += ["bcpg.arms.rft.objective=rft", "bcpg.arms.masked.objective=masked"]
    words += ["bcpg.arms.pairs.objective=rpo", "bcpg.arms.pairs.negatives=[rs]"]
    phases = phases_of(*BCPG, *words)
    sampling = Phase("sampling", 1, SamplingWork("backbone", 400, 50, 96))
    assert phases["sample_nsa_1"] == phases["sample_nsa_2"] == phases["sample_rft_2"] == [sampling]
    assert phases["sample_rft_1"] == phases["sample_masked_1"] == []
    labels = Phase("labels", 1, scored={"step_judge": 200, "process_reward": 200})
    assert phases["label_steps_nsa_1"] == phases["label_steps_masked_2"] == [labels]
    assert phases["label_steps_masked_1"] == []
    assert not any(stage.startswith("label_steps_rft") for stage in phases)
    reference = Phase("reference", 1, updates=Updates("backbone", 400, 50, updates=0, forwards=1))
    step = Phase("step", 5, updates=Updates("backbone", 80, 10))
    assert phases["bcpg_nsa_1"] == phases["bcpg_masked_2"] == [reference, step]
    assert phases["bcpg_masked_1"] == [step]
    assert phases["bcpg_rft_2"] == [Phase("step", 5, updates=Updates("backbone", 40, 10))]
    # Four right ones of its own and four drawn by `rs`: 40 pairs a step, and all 400 in the reference pass.
    assert phases["bcpg_pairs_1"] == [
        reference,
        Phase("step", 5, updates=Updates("backbone", 80, 40, together=2)),
    ]
    assert phases["synthesize_rs"][0].sampling == SamplingWork("backbone", 400, 100, 96)
    assert phases["evaluate"][0].times == 5
    asked = work.work_of(load(RECIPE, [*BCPG, *words]), Assumptions(wrong_share=0.25))
    assert asked["label_steps_nsa_1"].phases[0].scored == {"step_judge": 100, "process_reward": 100}
