"""What stages are given: a context, and values that count by their content."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pns.config import Data, Decoding, described_decoding
from pns.data.checker import Checker
from pns.data.problems import Identity, benchmark_problems
from pns.data.prompts import Messages, Prompts
from pns.files import sha256_of_json
from pns.records import Problem, to_json
from pns.run.place import Place
from pns.run.stage import ModelFiles
from pns.run.stopping import finishing_steps
from pns.run.tracking import Tracker
from workers.fleet import Fleet


@dataclass
class Context:
    """What every stage is given beside its settings and inputs. There is no configuration in it: what a stage
    depends on is what it declares."""

    seed: int
    place: Place
    fleet: Fleet
    messages: Messages
    track: Tracker
    shared: Path  # what all runs share, such as the cache of reference log-probabilities
    # Of the session's stages: digest of model and completions -> their raw scores. The arms of a study score
    # the same negatives of a source, and the same completions of the target.
    scores: dict[str, list[float]] = field(default_factory=dict)
    _writing: int | None = None  # the step of the checkpoint that is being written

    @property
    def prompts(self) -> Prompts:
        """How problems become token ids; every stage has it but an evaluation that asks a server."""
        assert isinstance(self.messages, Prompts)
        return self.messages

    @property
    def directory(self) -> Path:
        """Where the stage writes."""
        return self.place.directory

    @contextmanager
    def making(self, made_from: Mapping[str, Any]) -> Iterator[None]:
        """`Place.making`, with every checkpoint that was begun whole when it ends, also where the stage is
        interrupted or fails: the run goes on from it, and nothing writes into the place any more."""
        with self.place.making(made_from):
            try:
                yield
            except TimeoutError:  # of processes that do not answer: nor would they say what is written
                raise
            except BaseException:
                self._rescue_checkpoint()
                raise
            self.settle_checkpoint(waits=True)

    def fitting(self, problems: "Problems") -> list[Problem]:
        """Those whose prompt is not too long; the others are counted. Raises UserError if none is left."""
        kept, num_too_long = self.prompts.fitting(problems.problems)
        self.place.count(prompts_too_long=num_too_long)
        return kept

    def resume(self) -> int:
        """Steps done by the last complete checkpoint, whose state the policy takes; 0 where there is none."""
        self.settle_checkpoint(waits=True)
        checkpoint = self.place.latest_checkpoint()
        if checkpoint is None:
            return 0
        self.fleet.policy.restore(checkpoint.path)
        return checkpoint.step

    def steps(self, first_step: int, total: int) -> Iterator[int]:
        """The steps of a training loop, and between them checkpoints that have been written. After SIGTERM
        the step under way ends, its state becomes a checkpoint, and KeyboardInterrupt is raised; after the
        stage's last step the stage ends first."""
        with finishing_steps() as request:
            for step in range(first_step, total):
                yield step
                self.settle_checkpoint(waits=request.came)
                if request.came and step + 1 < total:
                    latest = self.place.latest_checkpoint()
                    if latest is None or latest.step <= step:  # else it was due after this step
                        self.checkpoint_policy(step + 1)
                        self.settle_checkpoint(waits=True)
                    request.obey()

    def save_policy(self, num_done: int, every: int, total: int) -> None:
        """A checkpoint after every `every` steps, but for the last step: its weights are exported at once."""
        if num_done % every == 0 and num_done < total:
            self.checkpoint_policy(num_done)

    def checkpoint_policy(self, num_done: int) -> None:
        """Begin a checkpoint after `num_done` steps, once the one before is whole. Training goes on while it
        is written; it counts from the next `settle_checkpoint` on that finds it whole."""
        self.settle_checkpoint(waits=True)
        self.fleet.policy.begin_save(self.place.begin_checkpoint(num_done))
        self._writing = num_done

    def settle_checkpoint(self, waits: bool = False) -> None:
        """Make the checkpoint that is being written the latest one, if it is whole; `waits`: once it is.
        Raises what writing failed with."""
        if self._writing is None:
            return
        step, self._writing = self._writing, None  # what failed is not asked for again
        if self.fleet.policy.is_saved(waits):
            self.place.end_checkpoint(step)
        else:
            self._writing = step

    def _rescue_checkpoint(self) -> None:
        """`settle_checkpoint` while an error is on its way, which is the one to be seen."""
        num_done = self._writing
        try:
            self.settle_checkpoint(waits=True)
        except Exception as error:
            self.track.note(f"the checkpoint after step {num_done} is lost: {error}")


@dataclass(frozen=True)
class Problems:
    """Problems of one part of the run, with the checker of their derivations where there is one."""

    problems: Sequence[Problem]
    checker: Checker | None = None

    @cached_property
    def digest(self) -> str:
        # With a checker a stage makes more of the same problems.
        return sha256_of_json([to_json(list(self.problems)), self.checker is not None])

    def shares(self, num: int) -> "list[Problems]":
        """`num` parts of about the same size, every num-th problem in each."""
        return [Problems(self.problems[first::num], self.checker) for first in range(num)]

    @property
    def by_id(self) -> dict[str, Problem]:
        return {problem.id: problem for problem in self.problems}


@dataclass(frozen=True)
class Suites:
    """The suites of an evaluation: their problems, what they are, and how each is decoded."""

    problems: Mapping[str, Sequence[Problem]]
    identities: Mapping[str, Identity]
    decodings: Mapping[str, Decoding]
    data: Data

    @cached_property
    def digest(self) -> str:
        """Of what is asked and how; not of where it comes from, which is in `identities`."""
        suites = {name: list(suite) for name, suite in self.problems.items()}
        decodings = {name: described_decoding(decoding) for name, decoding in self.decodings.items()}
        return sha256_of_json(to_json([suites, decodings]))

    def described(self) -> dict[str, dict[str, Any]]:
        """Suite -> identity and decoding: two evaluations compare where this is the same."""
        return {
            name: to_json(identity) | {"decoding": described_decoding(self.decodings[name])}
            for name, identity in self.identities.items()
        }

    def benchmarks(self) -> Problems:
        """What no training prompt may be: the problems of the suites, and of other benchmarks beside them."""
        suites = {name: list(suite) for name, suite in self.problems.items()}
        return Problems(list(benchmark_problems(suites, self.data)))


@dataclass(frozen=True)
class World:
    """What a run begins with: the backbone, and problems by what they are for."""

    backbone: ModelFiles
    train: Problems  # of rl and reverse RL
    reward: Problems  # of the reward models
    preference: Problems  # of synthesis and pairing
    suites: Suites  # of evaluation


Drawn = TypeVar("Drawn")


def draw(pool: Sequence[Drawn], num: int, step: int, seed: int) -> list[Drawn]:
    """The entries (problems, pairs) of one training step: consecutive slices of a fresh shuffle per epoch, a
    function of (seed, step) alone, so that a resumed stage neither skips nor repeats one."""
    drawn: list[Drawn] = []
    orders: dict[int, np.ndarray] = {}
    for index in range(step * num, (step + 1) * num):
        epoch, position = divmod(index, len(pool))
        if epoch not in orders:
            # A pair of numbers: with seed + epoch the runs of neighbouring seeds would share orders.
            orders[epoch] = np.random.default_rng([seed, epoch]).permutation(len(pool))
        drawn.append(pool[orders[epoch][position]])
    return drawn
