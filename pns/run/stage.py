"""Stages as functions of values, kept by content.

A stage is a function of a context, its settings and the values it is given; it returns an artefact. Where its
output lies is a digest of everything that decides it: its settings, the set-up of the roles it uses that
bears on results, the seed, the prompts, and the digests of its inputs. The method is a function that calls a
`Plan` with stages and values; nothing is made while it does, so that what is missing is known before anything
starts.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from pns.config import Config
from pns.fields import walk_keys
from pns.files import read_json, sha256_of_json, sha256_of_tree, stat_of_tree, write_json
from pns.records import to_json
from pns.run.place import Place

# Keys of the configuration that decide results through a role, whatever stage uses it.
ROLE_KEYS = {
    "rollout": ("rollout.max_new_tokens", "rollout.engine"),  # each engine draws in its own way
    "verifier": ("reward.verify_seconds",),
    "policy": ("policy.dtype", "policy.lora"),
}


class Artefact:
    """What a stage makes: a directory whose file names only the subclass knows."""

    def __init__(self, directory: Path, digest: str = "") -> None:
        self.directory = directory
        self.digest = digest


class OutputFile:
    """A file of an artefact, whose class states its name once: `scores_file = OutputFile("scores.json")`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, artefact: Artefact, owner: type) -> Path:
        return artefact.directory / self._name


class ModelFiles:
    """A checkpoint that no stage made: a directory, which counts by its content, or a Hub id."""

    def __init__(self, model: str | Path) -> None:
        self.model = str(model)


A = TypeVar("A", bound=Artefact)


@dataclass(frozen=True)
class Stage(Generic[A]):
    """A stage: `make(ctx, settings, *inputs)` writes what `artefact` names, and returns it."""

    name: str
    make: Callable[..., A]
    artefact: type[A]
    settings: Callable[[Config], Any]  # what it depends on, from the configuration: a dataclass
    roles: Callable[[Any], tuple[str, ...]]  # the roles it uses, from its settings


def stage(
    artefact: type[A], settings: Callable[[Config], Any], roles: Callable[[Any], tuple[str, ...]]
) -> Callable[[Callable[..., A]], Stage[A]]:
    """Make a stage of a function of the same name."""

    def decorate(make: Callable[..., A]) -> Stage[A]:
        return Stage(make.__name__, make, artefact, settings, roles)

    return decorate


@dataclass(frozen=True)
class Step:
    """One stage of a plan with what it is given, and where its output lies."""

    name: str
    asked_as: str  # its name without the part of the plan that it is in: what --from and --until say
    stage: Stage[Any]
    settings: Any
    inputs: tuple[Any, ...]
    place: Place
    made_from: dict[str, Any] = field(repr=False)  # what the place's digest is of, for people to read

    @property
    def roles(self) -> tuple[str, ...]:
        return self.stage.roles(self.settings)

    def is_done(self) -> bool:
        """Whether the output is there. Raises UserError for a damaged one, or where an input is another."""
        return self.place.is_done(self.made_from, f"make it again with --from {self.name}")


class Contents:
    """Digests of files and directories, kept with sizes and times: gigabytes are hashed once."""

    def __init__(self, path: Path | None) -> None:
        """`path`: where they are kept; None: nothing is read, and every name stands for itself."""
        self._path = path
        self._kept: dict[str, Any] = read_json(path) if path and path.is_file() else {}

    def digest(self, name: str) -> str:
        """Of an absolute path that exists the digest of its content; any other text (a Hub id) as it is."""
        path = Path(name)
        if self._path is None or not path.is_absolute() or not path.exists():
            return name
        stat = stat_of_tree(path)
        if name not in self._kept or self._kept[name]["stat"] != stat:
            self._kept[name] = {"stat": stat, "sha256": sha256_of_tree(path)}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # At once: after a crash gigabytes are not hashed again.
            write_json(self._path, self._kept)
        return f"sha256:{self._kept[name]['sha256']}"


class Plan:
    """The steps of a run, noted as the method calls it; the value of a call is the artefact that will be
    there.

    `attempts` counts, per step, how often `--from` asked for it to be made anew: it is part of the digest, so
    that nothing that another run reads is overwritten.
    """

    def __init__(
        self,
        store: Path,
        config: Config,
        prompts_digest: str,
        attempts: Mapping[str, int] | None = None,
        contents: Contents | None = None,
    ) -> None:
        self._store, self._config, self._prompts_digest = store, config, prompts_digest
        self._contents = contents or Contents(store / "contents.json")
        self._attempts = attempts or {}
        self._part = ""
        self.steps: list[Step] = []

    def part(self, name: str, config: Config) -> "Plan":
        """The same plan for a part of the method that it has several times: steps are named after the part as
        well, and stages have their settings from `config`."""
        part = copy.copy(self)  # the list of steps is one
        part._part, part._config = f"{self._part}_{name}", config
        return part

    def __call__(self, stage: Stage[A], *inputs: Any, name: str = "") -> A:
        """The artefact of `stage` for `inputs`: artefacts of earlier calls, models, problems, or a dict of
        them. `name` tells apart two uses of one stage in a run."""
        asked_as = name or stage.name
        name = asked_as + self._part
        if name in (step.name for step in self.steps):
            raise ValueError(f"two steps of the run are called {name}")
        settings = stage.settings(self._config)
        made_from = {
            "stage": stage.name,
            "settings": to_json(settings),
            "roles": self._role_values(stage.roles(settings)),
            "seed": self._config.seed,
            "prompts": self._prompts_digest,
            "inputs": [self._described(value) for value in inputs],
            "attempt": self._attempts.get(asked_as, 0),
        }
        # Models and data that settings name count by their content: where they lie does not matter.
        digest = sha256_of_json(self._with_contents(made_from))
        place = Place(self._store / f"{stage.name}-{digest[:16]}")  # 64 bits: enough for any number of runs
        self.steps.append(Step(name, asked_as, stage, settings, inputs, place, made_from))
        return stage.artefact(place.directory, digest)

    def until(self, last: str | None) -> list[Step]:
        """The steps in order, up to the last one that is asked for as `last` (None: all)."""
        ends = [index + 1 for index, step in enumerate(self.steps) if step.asked_as == last]
        return self.steps[: ends[-1]] if last else self.steps

    def _role_values(self, roles: Sequence[str]) -> dict[str, Any]:
        # Reward terms are roles without keys of their own: stages declare the rules of the reward.
        prefixes = tuple(prefix for role in roles for prefix in ROLE_KEYS.get(role, ()))
        keys = [key for key in walk_keys(self._config) if key.name.startswith(prefixes)]
        return {key.name: to_json(key.value) for key in keys}

    def _described(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: self._described(inner) for key, inner in value.items()}
        if isinstance(value, Artefact):
            # The directory is named for the reader of a manifest; `Place.is_done` compares what it holds.
            return {"stage": value.directory.name, "digest": value.digest}
        if isinstance(value, ModelFiles):
            return {"model": value.model, "digest": self._contents.digest(value.model)}
        return None if value is None else {"digest": value.digest}

    def _with_contents(self, value: Any) -> Any:
        if isinstance(value, dict):
            # Of a model that is an input the digest stands beside its path.
            kept = {key: inner for key, inner in value.items() if key != "model" or "digest" not in value}
            return {key: self._with_contents(inner) for key, inner in kept.items()}
        if isinstance(value, list):
            return [self._with_contents(inner) for inner in value]
        return self._contents.digest(value) if isinstance(value, str) else value
