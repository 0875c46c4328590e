"""The methods, each like its paper's section: stages called with values."""

from dataclasses import replace

from pns.config import (
    OWN,
    BcpgStart,
    Config,
    DataSource,
    Method,
    StudyPairs,
    external_pairs,
    labels_steps,
    other_negatives,
    stages,
)
from pns.recipe import study_arms
from pns.run.stage import ModelFiles, Plan
from pns.stages.artefacts import AnyModel, Negatives, TrainedModel
from pns.stages.bcpg import bcpg
from pns.stages.choose import choose, pair_arm, solve
from pns.stages.context import World
from pns.stages.evaluate import evaluate
from pns.stages.label_steps import label_steps
from pns.stages.negatives import SOURCES
from pns.stages.pair import pair
from pns.stages.preference import preference
from pns.stages.reward_model import reward_model
from pns.stages.rl import rl
from pns.stages.sample import sample


def pns(run: Plan, config: Config, world: World) -> None:
    """RL of the backbone, reward models from its solutions, negatives, and preference optimisation on pairs
    of the two (arXiv 2602.03516); with pairs from outside, preference optimisation of the backbone alone."""
    backbone = world.backbone
    if external_pairs(config):
        # Not on the tiny world: its problems are all of a few templates, so every one would overlap.
        decontaminated = config.data.decontaminate and config.data.source is DataSource.jsonl
        benchmarks = world.suites.benchmarks() if decontaminated else None
        result = run(preference, backbone, None, world.preference, benchmarks)
        run(evaluate, {"backbone": backbone, "result": result}, world.suites)
        return
    target = run(rl, backbone, world.train)
    rewards = run(reward_model, target, initial_reward_model(config, target), world.reward)
    rejected = SOURCES[config.negatives](run, config, world, target, rewards)
    pairs = run(pair, target, rejected, rewards, world.preference, backbone)
    result = run(preference, target, pairs, world.preference, None)
    run(evaluate, {"backbone": backbone, "target": target, "result": result}, world.suites)


def bcpg_nsa(run: Plan, config: Config, world: World) -> None:
    """Rounds of sampling, labelling the steps of wrong completions, and offline training (arXiv 2505.14403):
    each arm by its objective, on the same samples in the first round, on its own in later ones."""
    models: dict[str, AnyModel] = {"backbone": world.backbone}
    start: AnyModel = world.backbone
    rejected: dict[str, Negatives] = {}
    if "rl" in stages(config):
        target = run(rl, world.backbone, world.train)
        if config.bcpg.start is BcpgStart.target:
            start = models["target"] = target
        if others := other_negatives(config):
            rewards = run(reward_model, target, initial_reward_model(config, target), world.reward)
            for source in others:
                rejected[source] = SOURCES[source](run.part(source, config), config, world, target, rewards)
    for name, arm in config.bcpg.arms.items():
        own = replace(config, bcpg=replace(config.bcpg, arms={name: arm}))
        others_of_arm = {source: rejected[source] for source in arm.negatives if source != OWN}
        model = start
        for number, problems in enumerate(world.preference.shares(config.bcpg.rounds), start=1):
            part = run.part(f"{name}_{number}", own)
            samples = part(sample, model, problems)
            labels = part(label_steps, samples, others_of_arm, problems) if labels_steps(own) else None
            model = part(bcpg, model, samples, others_of_arm, labels)
        models[name] = model
    run(evaluate, models, world.suites)


def study(run: Plan, config: Config, world: World) -> None:
    """Arms that start from one RL-trained model with one pair of reward models, and differ in where their
    negatives are from, and in what they do with them. Arms that say the same of a stage share its output."""
    backbone = world.backbone
    target = run(rl, backbone, world.train)
    rewards = run(reward_model, target, initial_reward_model(config, target), world.reward)
    solutions = run(solve, target, world.preference)
    arms = study_arms(config)
    rejected = {
        name: SOURCES[own.negatives](run.part(name, own), own, world, target, rewards)
        for name, own in arms.items()
    }
    shared = {
        own.digest: own for name, own in rejected.items() if arms[name].study.pairs is StudyPairs.common
    }
    choice = run(choose, solutions, dict(zip(map(str, range(len(shared))), shared.values(), strict=True)))
    models: dict[str, AnyModel] = {"backbone": backbone, "target": target}
    for name, own in arms.items():
        part = run.part(name, own)
        of_arm = choice if own.study.pairs is StudyPairs.common else None
        inputs = target, solutions, rejected[name], rewards, world.preference, backbone, of_arm
        pairs = part(pair_arm, *inputs, name="pair")
        models[name] = part(preference, target, pairs, world.preference, None)
    run(evaluate, models, world.suites)


def initial_reward_model(config: Config, target: TrainedModel) -> AnyModel:
    return ModelFiles(config.models.reward_model) if config.models.reward_model else target


METHODS = {Method.pns: pns, Method.bcpg: bcpg_nsa, Method.study: study}
