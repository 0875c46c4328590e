"""What the arms of a study have in common: the target's solutions, and which of them are the chosen sides."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pns.algo.pairs import lengths_match, num_shared
from pns.errors import UserError
from pns.files import read_json, write_json, write_jsonl
from pns.records import Completion, Verdict
from pns.run.stage import Artefact, ModelFiles, OutputFile, stage
from pns.stages.artefacts import Negatives, Pairs, RewardModels, Samples, TrainedModel
from pns.stages.context import Context, Problems
from pns.stages.pair import PairSettings, pair_roles, pair_settings, sample_solutions, write_pairs
from pns.stages.scoring import by_problem, by_verdict


class Choice(Artefact):
    """Problem id -> id of the right completion that the pairs of all arms have."""

    choice_file = OutputFile("choice.json")

    def choice(self) -> dict[str, str]:
        return read_json(self.choice_file)


@stage(Samples, pair_settings, lambda settings: ("rollout", "verifier"))
def solve(ctx: Context, settings: PairSettings, target: TrainedModel, problems: Problems) -> Samples:
    """Completions of the target, whose right ones may be chosen sides."""
    samples = Samples(ctx.directory)
    ctx.track.begin("solve", 1, 0)
    rollouts = sample_solutions(ctx, settings, ctx.fitting(problems), target)
    write_jsonl(samples.rollouts_file, rollouts)
    num_right = len(by_verdict(rollouts, Verdict.CORRECT))
    ctx.track.log(0, {"accuracy": num_right / len(rollouts)})
    ctx.track.end()
    ctx.place.count(samples=len(rollouts), right=num_right)
    return samples


@dataclass(frozen=True)
class ChooseSettings:
    max_length_ratio: float


@stage(Choice, lambda config: ChooseSettings(config.pair.max_length_ratio), lambda settings: ())
def choose(
    ctx: Context, settings: ChooseSettings, samples: Samples, sources: Mapping[str, Negatives]
) -> Choice:
    """Of every problem of which each source has a negative: the right completion that is nearest to all of
    them, by the shortest of the prefixes that it has in common with the nearest negative of each."""
    choice = Choice(ctx.directory)
    right = by_problem(by_verdict(samples.rollouts(), Verdict.CORRECT))
    wrong = [by_problem(negatives.negatives()) for negatives in sources.values()]
    chosen: dict[str, str] = {}
    for identity, candidates in right.items():
        negatives_of = [of_source.get(identity, []) for of_source in wrong]
        nearness = [
            (shared_with_all(own, negatives_of, settings.max_length_ratio), own) for own in candidates
        ]
        usable = [(shared, own) for shared, own in nearness if shared is not None]
        if usable:
            chosen[identity] = max(usable, key=lambda found: found[0])[1].id
    if not chosen:
        counts = ", ".join(f"{name} {len(of_source)}" for name, of_source in zip(sources, wrong, strict=True))
        fault = f"no problem has a right completion and a negative of every source (there are: {counts})"
        raise UserError(f"choose: {fault}: sample more, or give an arm study.pairs=own")
    write_json(choice.choice_file, chosen)
    ctx.place.count(problems=len(chosen))
    return choice


def shared_with_all(
    right: Completion, negatives: Sequence[Sequence[Completion]], max_length_ratio: float
) -> int | None:
    """The shortest, over sources, of the longest prefix in common with one of its negatives that may be
    paired with `right`; None where a source has none."""
    shortest = len(right.token_ids)
    for of_source in negatives:
        lengths = [
            num_shared(right.token_ids, own.token_ids)
            for own in of_source
            if lengths_match(len(right.token_ids), len(own.token_ids), max_length_ratio)
        ]
        if not lengths:
            return None
        shortest = min(shortest, max(lengths))
    return shortest


@stage(Pairs, pair_settings, pair_roles)
def pair_arm(
    ctx: Context,
    settings: PairSettings,
    target: TrainedModel,
    samples: Samples,
    negatives: Negatives,
    rewards: RewardModels,
    problems: Problems,
    backbone: ModelFiles,
    choice: Choice | None,
) -> Pairs:
    """As `pair`, of solutions that all arms share; with `choice` (None: without) also of right sides that
    they share."""
    ctx.track.begin("pair", 1, 0)
    chosen = choice.choice() if choice else None
    rollouts = samples.rollouts()
    return write_pairs(ctx, settings, target, rollouts, negatives, rewards, problems, backbone, chosen)
