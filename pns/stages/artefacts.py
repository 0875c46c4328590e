"""What the stages make. Each class alone knows the names of its files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pns.files import read_json, read_jsonl
from pns.records import Answered, PreferencePair, Rollout, from_json
from pns.run.stage import Artefact


class TrainedModel(Artefact):
    """A checkpoint that a stage trained, with the rollouts it was trained on where it was RL."""

    @property
    def model(self) -> str:
        return str(self.directory / "model")

    @property
    def rollouts_file(self) -> Path:
        return self.directory / "rollouts.jsonl"

    def rollouts(self) -> list[Rollout]:
        return [from_json(Rollout, row) for row in read_jsonl(self.rollouts_file)]


class Generator(TrainedModel):
    """A generator of negatives, and its figures before and after reverse RL."""

    @property
    def before_file(self) -> Path:
        return self.directory / "before.json"

    @property
    def figures_file(self) -> Path:
        return self.directory / "generator.json"


class RewardModels(Artefact):
    """Two reward models trained on disjoint problems: `main` is in the reward, `held_out` only measures."""

    names = ("main", "held_out")

    def model(self, name: str) -> str:
        return str(self.directory / name)

    def quality_file(self, name: str) -> Path:
        """Of one model; written when that model is complete."""
        return self.directory / f"{name}.json"

    @property
    def main(self) -> str:
        return self.model("main")

    @property
    def rollouts_file(self) -> Path:
        return self.directory / "rollouts.jsonl"

    @property
    def pairs_file(self) -> Path:
        return self.directory / "pairs.jsonl"

    @property
    def all_quality_file(self) -> Path:
        return self.directory / "quality.json"


class Negatives(Artefact):
    """Wrong completions that may serve as rejected sides, all that were sampled, and why the others were
    dropped."""

    @property
    def negatives_file(self) -> Path:
        return self.directory / "negatives.jsonl"

    @property
    def rollouts_file(self) -> Path:
        return self.directory / "rollouts.jsonl"

    @property
    def counts_file(self) -> Path:
        return self.directory / "counts.json"

    def negatives(self) -> list[Rollout]:
        return [from_json(Rollout, row) for row in read_jsonl(self.negatives_file)]


class Pairs(Artefact):
    """Preference pairs, in our form and in the standard one, and the quality of their rejected sides."""

    @property
    def pairs_file(self) -> Path:
        return self.directory / "pairs.jsonl"

    @property
    def standard_file(self) -> Path:
        return self.directory / "preference.jsonl"

    @property
    def rollouts_file(self) -> Path:
        return self.directory / "rollouts.jsonl"

    @property
    def scores_file(self) -> Path:
        """Reward-model scores per source."""
        return self.directory / "scores.json"

    @property
    def quality_file(self) -> Path:
        return self.directory / "quality.json"

    def pairs(self) -> Iterator[PreferencePair]:
        return (from_json(PreferencePair, row) for row in read_jsonl(self.pairs_file))


class PreferenceTrained(TrainedModel):
    """The preference-trained backbone, and what its pairs were."""

    @property
    def data_file(self) -> Path:
        return self.directory / "data.json"


class Evaluation(Artefact):
    """Scores of models on suites, their completions, and pages to read them."""

    @property
    def scores_file(self) -> Path:
        return self.directory / "scores.json"

    @property
    def suites_file(self) -> Path:
        return self.directory / "suites.json"

    @property
    def pages(self) -> Path:
        return self.directory / "browse"

    def completions_file(self, model: str) -> Path:
        return self.directory / f"{model}.jsonl"

    def scores(self) -> dict[str, Any]:
        return read_json(self.scores_file)

    def completions(self, model: str) -> list[Answered]:
        return [from_json(Answered, row) for row in read_jsonl(self.completions_file(model))]
