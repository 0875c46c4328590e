"""What the stages make. Each class alone knows the names of its files."""

from pathlib import Path
from typing import Any

from pns.files import read_json, read_jsonl
from pns.records import Answered, LabelledCompletion, Rollout, from_json
from pns.run.stage import Artefact, ModelFiles, OutputFile


class TrainedModel(Artefact):
    """A checkpoint that a stage trained, with the rollouts it was trained on where it was RL."""

    rollouts_file = OutputFile("rollouts.jsonl")

    @property
    def model(self) -> str:
        return str(self.directory / "model")

    def rollouts(self) -> list[Rollout]:
        return [from_json(Rollout, row) for row in read_jsonl(self.rollouts_file)]


AnyModel = TrainedModel | ModelFiles  # what a stage may start from


class Generator(TrainedModel):
    """A generator of negatives, and its figures before and after reverse RL."""

    before_file = OutputFile("before.json")  # written before training, which an interruption may follow
    figures_file = OutputFile("generator.json")


class RewardModels(Artefact):
    """Two reward models trained on disjoint problems: `main` is in the reward, `held_out` only measures."""

    names = ("main", "held_out")
    rollouts_file = OutputFile("rollouts.jsonl")
    pairs_file = OutputFile("pairs.jsonl")
    all_quality_file = OutputFile("quality.json")

    @property
    def main(self) -> str:
        return self.model("main")

    def model(self, name: str) -> str:
        return str(self.directory / name)

    def quality_file(self, name: str) -> Path:
        """Of one model; written when that model is complete."""
        return self.directory / f"{name}.json"


class Negatives(Artefact):
    """Wrong completions that may serve as rejected sides, all samples (not of a mixture, whose parts have
    them), and why others were not kept."""

    negatives_file = OutputFile("negatives.jsonl")
    rollouts_file = OutputFile("rollouts.jsonl")
    counts_file = OutputFile("counts.json")
    sources_file = OutputFile("sources.json")  # of a mixture alone

    def sources(self) -> dict[str, str]:
        """Completion id -> the source that it is from; empty where all are of one."""
        return read_json(self.sources_file) if self.sources_file.is_file() else {}

    def negatives(self) -> list[Rollout]:
        return [from_json(Rollout, row) for row in read_jsonl(self.negatives_file)]


class Pairs(Artefact):
    """Preference pairs, and the quality of their rejected sides."""

    pairs_file = OutputFile("pairs.jsonl")
    standard_file = OutputFile("preference.jsonl")  # the same pairs in the form that other trainers read
    rollouts_file = OutputFile("rollouts.jsonl")
    scores_file = OutputFile("scores.json")  # of the reward model, per source
    quality_file = OutputFile("quality.json")


class PreferenceTrained(TrainedModel):
    """The preference-trained backbone, and what its pairs were."""

    data_file = OutputFile("data.json")


class Samples(Artefact):
    """Completions of one policy with their verdicts and its log-probabilities of their tokens."""

    rollouts_file = OutputFile("rollouts.jsonl")

    def rollouts(self) -> list[Rollout]:
        return [from_json(Rollout, row) for row in read_jsonl(self.rollouts_file)]


class StepLabels(Artefact):
    """The steps of wrong completions with their labels, and how well those who label agree."""

    labels_file = OutputFile("labels.jsonl")
    quality_file = OutputFile("quality.json")

    def labels(self) -> list[LabelledCompletion]:
        return [from_json(LabelledCompletion, row) for row in read_jsonl(self.labels_file)]


class BcpgTrained(TrainedModel):
    """An offline-trained model, and what its samples were."""

    data_file = OutputFile("data.json")


class Evaluation(Artefact):
    """Scores of models on suites, their completions, and pages to read them."""

    scores_file = OutputFile("scores.json")
    suites_file = OutputFile("suites.json")
    pages = OutputFile("browse")

    def completions_file(self, model: str) -> Path:
        return self.directory / f"{model}.jsonl"

    def scores(self) -> dict[str, Any]:
        return read_json(self.scores_file)

    def completions(self, model: str) -> list[Answered]:
        return [from_json(Answered, row) for row in read_jsonl(self.completions_file(model))]
