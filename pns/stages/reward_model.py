"""The reward model and the held-out one: centre-regularised Bradley-Terry on the target's solutions."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pns.algo.metrics import expected_calibration_error
from pns.algo.pairs import match_by_length
from pns.algo.reward import sigmoid
from pns.config import Config, RewardModelStage
from pns.errors import UserError
from pns.files import read_json, write_json, write_jsonl
from pns.records import PreferencePair, Problem, Rollout, Verdict
from pns.run.stage import stage
from pns.stages.artefacts import AnyModel, RewardModels, TrainedModel
from pns.stages.context import Context, Problems, draw
from pns.stages.scoring import Draws, by_problem, by_verdict, roll_out
from pns.stages.stream import stable_seed
from workers.rollout.engine import Sampling
from workers.training.batching import Batch
from workers.training.objectives import BradleyTerryObjective


@dataclass(frozen=True)
class RewardModelSettings:
    reward_model: RewardModelStage
    max_new_tokens: int
    max_masked_fraction: float


def reward_model_settings(config: Config) -> RewardModelSettings:
    limits = config.rollout.max_new_tokens, config.reward.max_masked_fraction
    return RewardModelSettings(config.reward_model, *limits)


@stage(RewardModels, reward_model_settings, lambda settings: ("rollout", "verifier", "policy"))
def reward_model(
    ctx: Context, settings: RewardModelSettings, target: TrainedModel, initial: AnyModel, problems: Problems
) -> RewardModels:
    """Both, from `initial`, on pairs that `target` sampled for `problems` and while it was trained."""
    models = RewardModels(ctx.directory)
    fitting, own = ctx.fitting(problems), settings.reward_model
    sampling = Sampling(own.temperature, 1.0, settings.max_new_tokens)
    draws = Draws("reward_model", own.samples_per_problem, sampling, settings.max_masked_fraction)
    rollouts = roll_out(ctx, draws, fitting, model=target.model)
    write_jsonl(models.rollouts_file, rollouts)
    rollouts += last_rollouts(target, own.rl_steps)
    pairs = right_wrong_pairs(rollouts, own.max_length_ratio)
    write_jsonl(models.pairs_file, pairs)
    if len({pair.problem_id for pair in pairs}) < len(models.names):
        raise UserError(f"reward_model: {too_few(rollouts, len(pairs))}")
    prompts = {rollout.problem.id: rollout.problem for rollout in rollouts}
    quality = {}
    for name, problem_ids in zip(models.names, halves(pairs, ctx.seed), strict=True):
        quality_file = models.quality_file(name)
        if not quality_file.exists():
            own_pairs = [pair for pair in pairs if pair.problem_id in problem_ids]
            write_json(quality_file, train_one(ctx, own, models, name, initial, own_pairs, prompts))
        quality[name] = read_json(quality_file)
    write_json(models.all_quality_file, quality)
    ctx.place.count(pairs=len(pairs), samples=len(fitting) * own.samples_per_problem)
    return models


def halves(pairs: Sequence[PreferencePair], seed: int) -> tuple[set[str], set[str]]:
    """The problems of the main and of the held-out model. They see disjoint ones: the held-out model measures
    what the other may have been hacked by."""
    ids = list(dict.fromkeys(pair.problem_id for pair in pairs))
    order = [ids[i] for i in np.random.default_rng(seed).permutation(len(ids))]
    return set(order[::2]), set(order[1::2])


def too_few(rollouts: Sequence[Rollout], num_pairs: int) -> str:
    """Why there are not pairs of two problems, one for each model, and the way out."""
    well_formed = [rollout for rollout in rollouts if rollout.reward.format_ok]
    counts = Counter(rollout.reward.verdict for rollout in well_formed)
    right, wrong = counts[Verdict.CORRECT], counts[Verdict.WRONG]
    said = (
        f"{num_pairs} (correct, incorrect) pairs: of {len(rollouts)} completions {len(well_formed)} are "
        f"well-formed, {right} right, {wrong} wrong, {counts[Verdict.UNVERIFIED]} undecided"
    )
    if not well_formed:
        return f"{said}; completions have no box or no end: see data.prompt, rollout.max_new_tokens"
    if not right:
        return (
            f"{said}; problems too hard for the model, or answers of another kind: see browse/ and the file"
        )
    if not wrong:
        return f"{said}; problems too easy for the model: name harder ones"
    return f"{said}, seldom of one problem; raise reward_model.samples_per_problem or name more problems"


def last_rollouts(target: TrainedModel, num_steps: int) -> list[Rollout]:
    """The rollouts of the last `num_steps` steps of the target's RL."""
    if not num_steps:
        return []
    rollouts = target.rollouts()
    last = max(rollout.step for rollout in rollouts)
    return [rollout for rollout in rollouts if rollout.step > last - num_steps]


def right_wrong_pairs(rollouts: Sequence[Rollout], max_length_ratio: float) -> list[PreferencePair]:
    """(correct, incorrect) completions of one problem, matched in length, each used once."""
    prompts = {rollout.problem.id: rollout.problem.prompt for rollout in rollouts}
    correct = by_problem(by_verdict(rollouts, Verdict.CORRECT))
    wrong = by_problem(by_verdict(rollouts, Verdict.WRONG))
    pairs = []
    for identity, rights in correct.items():
        wrongs = wrong.get(identity, [])
        lengths = [len(c.token_ids) for c in rights], [len(c.token_ids) for c in wrongs]
        for right, other in match_by_length(*lengths, max_length_ratio):
            texts = rights[right].text, wrongs[other].text
            pairs.append(PreferencePair(identity, prompts[identity], *texts, "rs"))
    return pairs


def train_one(
    ctx: Context,
    settings: RewardModelStage,
    models: RewardModels,
    name: str,
    initial: AnyModel,
    pairs: list[PreferencePair],
    prompts: Mapping[str, Problem],
) -> dict[str, float]:
    """Train one reward model, export it, and return its quality on the held-out problems."""
    seed = stable_seed(ctx.seed, name)
    ids = list(dict.fromkeys(pair.problem_id for pair in pairs))
    # By problem: two pairs of one problem are too much alike. Drawn: files are often sorted, and the
    # problems of rl stand at the end.
    order = np.random.default_rng(seed).permutation(len(ids))
    held_out_ids = {ids[i] for i in order[: round(len(ids) * settings.held_out_fraction)]}
    held_out = [pair for pair in pairs if pair.problem_id in held_out_ids]
    training = [pair for pair in pairs if pair.problem_id not in held_out_ids]
    if not training:
        fault = f"no (correct, incorrect) pairs for the {name} model"
        raise UserError(f"reward_model: {fault}; raise reward_model.samples_per_problem")
    policy = ctx.fleet.policy
    policy.load(initial.model, "score", settings.optimizer, settings.steps, seed)
    ctx.track.begin("reward_model" if name == "main" else f"reward_model_{name}", settings.steps, 0)
    objective = BradleyTerryObjective(settings.centre)
    for step in range(settings.steps):
        drawn = draw(training, settings.pairs_per_step, step, seed)
        ctx.track.log(step, policy.train_step(text_pair_batch(ctx, drawn, prompts), objective))
    ctx.track.end()
    quality = {"training_pairs": float(len(training)), "held_out_pairs": float(len(held_out))}
    if held_out:
        scores = policy.scores(text_pair_batch(ctx, held_out, prompts))
        quality |= pairwise_quality(np.array(scores).reshape(-1, 2))
    policy.export(models.model(name))
    return quality


def pairwise_quality(scores_B2: np.ndarray) -> dict[str, float]:
    """How well scores (pairs, 2) of chosen and rejected sides tell them apart."""
    chosen_B, rejected_B = scores_B2[:, 0], scores_B2[:, 1]
    # Both orders of every pair: with the right side always first, a perfect model would look miscalibrated.
    margins = np.concatenate([chosen_B - rejected_B, rejected_B - chosen_B])
    probabilities = np.array([sigmoid(margin) for margin in margins])
    first_is_right = np.repeat([1.0, 0.0], len(chosen_B))
    return {
        "pairwise_accuracy": float((chosen_B > rejected_B).mean()),
        "calibration_error": expected_calibration_error(probabilities, first_is_right),
        "chosen_mean": float(chosen_B.mean()),
        "rejected_mean": float(rejected_B.mean()),
    }


def text_pair_batch(ctx: Context, pairs: Sequence[PreferencePair], prompts: Mapping[str, Problem]) -> Batch:
    """Rows chosen, rejected, chosen, rejected, ..."""
    prompt_ids = [ctx.prompts.encode(prompts[pair.problem_id]) for pair in pairs]
    texts = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
    encoded = [ctx.prompts.encode_completion(text) for text in texts]
    return Batch([ids for ids in prompt_ids for _ in range(2)], encoded)
