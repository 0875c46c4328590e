"""The reward model of reverse RL, trained on with what the generator writes: no fixed cue pays for long."""

import os
from collections.abc import Sequence
from pathlib import Path

from pns.config import ReverseRl, RewardConfig, RewardModelStage
from pns.files import PARTIAL, read_jsonl, remove
from pns.records import PreferencePair, Rollout, Verdict, from_json
from pns.stages.artefacts import RewardModels, TrainedModel
from pns.stages.context import Context, draw
from pns.stages.reward_model import halves, right_wrong_pairs, text_pair_batch
from pns.stages.scoring import by_verdict, load_terms
from pns.stages.stream import stable_seed
from workers.training.objectives import BradleyTerryObjective


class Refresher:
    """Trains the run's own reward model on, before every `reverse_rl.refresh_every`-th step and for
    `refresh_steps` steps, as its stage does. Half of the pairs are those it was trained on; half are right
    solutions, of `target` and of the generator, beside the wrong ones that the generator has written since
    the last time.

    The models lie in the stage's directory by their step, and an interrupted stage takes them up again.
    """

    def __init__(
        self,
        ctx: Context,
        reverse: ReverseRl,
        training: RewardModelStage,
        rules: RewardConfig,
        rewards: RewardModels,
        target: TrainedModel,
        generator: TrainedModel,
    ) -> None:
        self._ctx, self._training, self._rules = ctx, training, rules
        self._every, self._num_steps = reverse.refresh_every, reverse.refresh_steps
        self._rewards, self._target, self._generator = rewards, target, generator
        self._directory = ctx.directory / "refreshed"
        self._served = rewards.main  # what a stage begins with

    def is_due(self, step: int) -> bool:
        """Whether the reward of `step` is of a model that is still to be made."""
        return bool(self._every and step and step % self._every == 0) and not self._path(step).is_dir()

    def latest(self, step: int) -> str:
        """The model in the reward of `step`."""
        made = [path for path in self._directory.glob("step-*") if path <= self._path(step)]
        return str(max(made, default=self._rewards.main))

    def serve(self, step: int) -> None:
        """Have the model of `step` in the reward."""
        if (model := self.latest(step)) != self._served:
            load_terms(self._ctx, self._rules, model)
            self._served = model

    def refresh(self, step: int) -> None:
        """Make the model of `step`, in the policy's processes, which hold it afterwards. Where the generator
        has written nothing that a right solution can stand beside, the model before is taken again."""
        written, solved = self._generator.rollouts(), self._target.rollouts()
        fresh = self._fresh_pairs(written, solved, step)
        first = [from_json(PreferencePair, row) for row in read_jsonl(self._rewards.pairs_file)]
        own_problems, _ = halves(first, self._ctx.seed)
        before = [pair for pair in first if pair.problem_id in own_problems]
        sampled = [from_json(Rollout, row) for row in read_jsonl(self._rewards.rollouts_file)]
        problems = {rollout.problem.id: rollout.problem for rollout in (*solved, *sampled, *written)}
        policy, seed = self._ctx.fleet.policy, stable_seed(self._ctx.seed, "refresh", step)
        policy.load(self.latest(step), "score", self._training.optimizer, self._num_steps, seed)
        objective = BradleyTerryObjective(self._training.centre)
        half = max(1, self._training.pairs_per_step // 2)
        for number in range(self._num_steps if fresh else 0):
            pairs = [*draw(before, half, number, seed), *draw(fresh, half, number, seed)]
            policy.train_step(text_pair_batch(self._ctx, pairs, problems), objective)
        partial = self._directory / f"{PARTIAL}{step}"
        remove(partial)
        self._directory.mkdir(exist_ok=True)
        policy.export(partial)
        os.replace(partial, self._path(step))

    def _fresh_pairs(
        self, written: Sequence[Rollout], solved: Sequence[Rollout], step: int
    ) -> list[PreferencePair]:
        newest = [rollout for rollout in written if step - self._every <= rollout.step < step]
        right = by_verdict([*solved, *newest], Verdict.CORRECT)
        wrong = by_verdict(newest, Verdict.WRONG)
        return right_wrong_pairs([*right, *wrong], self._training.max_length_ratio)

    def _path(self, step: int) -> Path:
        return self._directory / f"step-{step:08d}"
