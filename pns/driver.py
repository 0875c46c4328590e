"""The stages in order, each resumed or run: reverse RL of the negative generator, then preference optimisation of the backbone.

warm_start     a supervised start (tiny world only; other backbones come trained)
rl             the backbone learns from right and wrong answers: the target
reward_model   Bradley-Terry on the target's right and wrong solutions, and a held-out one that only measures
reverse_rl     the generator learns to write solutions that look right and end wrong
synthesize     its negatives, filtered
pair           chosen = the target's own right solutions, rejected = plausible negatives
preference     DPO of the target
evaluate       start, target and result on every suite
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pns.config import Config, to_dict
from pns.data.problems import load_problem_sets
from pns.data.prompts import Prompts, load_tokenizer
from pns.errors import UserError
from pns.preflight import check_models
from pns.run.directory import RunDirectory
from pns.run.memory import PeakMemory
from pns.run.report import write_report
from pns.run.tracking import Tracker
from pns.stages import evaluate, pair, preference, reverse_rl, reward_model, rl, synthesize, warm_start
from pns.stages.context import Context
from workers import placement
from workers.fleet import Fleet
from workers.trackers import open_backends


@dataclass(frozen=True)
class Stage:
    """A stage, the stages whose output it reads, the sections of the configuration it depends on, and the roles it uses."""

    run: Callable[[Context], None]
    reads: tuple[str, ...]
    sections: tuple[str, ...]
    roles: tuple[str, ...]


STAGES: dict[str, Stage] = {
    "warm_start": Stage(warm_start.run, (), ("data", "models", "warm_start"), ()),
    "rl": Stage(rl.run, ("warm_start",), ("data", "models", "rl", "rollout.max_new_tokens"), ("rollout", "verifier")),
    "reward_model": Stage(reward_model.run, ("rl",), ("data", "models", "reward_model"), ("rollout", "verifier")),
    "reverse_rl": Stage(
        reverse_rl.run,
        ("rl", "reward_model"),
        ("data", "models", "reverse_rl", "reward", "evaluate.generator_samples", "evaluate.generator_temperature"),
        ("rollout", "verifier", "reward_model", "judge"),
    ),
    "synthesize": Stage(
        synthesize.run,
        ("reverse_rl", "reward_model"),
        ("data", "models", "reward", "synthesize"),
        ("rollout", "verifier", "reward_model", "judge"),
    ),
    "pair": Stage(pair.run, ("rl", "synthesize", "reward_model"), ("data", "pair"), ("rollout", "verifier", "reward_model")),
    "preference": Stage(preference.run, ("rl", "pair"), ("data", "preference"), ()),
    "evaluate": Stage(
        evaluate.run,
        ("warm_start", "rl", "preference"),
        ("data", "models", "evaluate.temperature", "evaluate.samples_per_problem"),
        ("rollout", "verifier"),
    ),
}


def run(config: Config, first: str | None = None, last: str | None = None) -> Path:
    """Run the stages from `first` (redone with everything after it) until `last`; finished ones are not run again.

    Returns the run directory. Raises UserError before anything is started or written where the inputs are wrong.
    """
    selected = select(last)
    check_models(config, selected)
    problems = load_problem_sets(config)
    with RunDirectory.open(Path(config.runs) / config.name, to_dict(config)) as run_directory:
        redone = list(STAGES)[list(STAGES).index(first) :] if first else []
        pending = [
            name for name in selected if name in redone or not run_directory.is_done(name, STAGES[name].sections, STAGES[name].reads)
        ]
        if not pending:
            print(f"{run_directory.path}: every stage is done; --from STAGE runs one again")
            return run_directory.path
        with Cluster(config) as device, PeakMemory() as memory:
            run_directory.set_aside(redone)  # only now: a start that fails changes nothing
            fleet = Fleet(config, device)
            try:
                tracker = Tracker(run_directory, config.tracking, open_backends)
                ctx = Context(config, run_directory, fleet, problems, prompts(config), tracker)
                fleet.start(*dict.fromkeys(role for name in pending for role in STAGES[name].roles))
                for name in pending:
                    with run_directory.stage(name, STAGES[name].sections, STAGES[name].reads):
                        STAGES[name].run(ctx)
                tracker.close()
            finally:
                fleet.shutdown()
                run_directory.record_peak_memory(memory.gib)
        write_report(run_directory)
    return run_directory.path


def select(last: str | None) -> list[str]:
    """The stages until `last`, in order."""
    names = list(STAGES)
    return names[: names.index(last) + 1] if last else names


def prompts(config: Config) -> Prompts:
    """The chat template of the backbone; a warm start on the tiny world brings its own tokenizer."""
    if config.warm_start.steps and config.warm_start.task == "solve":
        from pns.data.tiny_tokenizer import build_tokenizer

        return Prompts(build_tokenizer(), config.data)
    model = config.warm_start.samples_from if config.warm_start.steps else config.models.backbone
    return Prompts(load_tokenizer(model, config.models.trust_remote_code), config.data)


class Cluster:
    """Ray, for as long as the run lasts: the cluster of RAY_ADDRESS (as in a submitted job), else a local one.

    Entering gives the device, "cpu" or "cuda", after the placement has been checked against what the cluster offers (UserError).
    """

    def __init__(self, config: Config) -> None:
        self._config = config

    def __enter__(self) -> str:
        import ray

        address = os.environ.get("RAY_ADDRESS")
        if address:
            ray.init(address=address, log_to_driver=False, logging_level="WARNING")
            device = placement.resolve_device(self._config.placement.device, ray.cluster_resources().get("GPU", 0))
        else:
            gpus = count_gpus()
            device = placement.resolve_device(self._config.placement.device, gpus)
            resources = placement.local_resources(self._config.placement, device)
            placement.check(self._config.placement, {"CPU": resources["num_cpus"], "GPU": gpus}, device)
            ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR", **resources)
            return device
        try:
            placement.check(self._config.placement, ray.cluster_resources(), device)
        except UserError:
            ray.shutdown()
            raise
        return device

    def __exit__(self, *error: object) -> None:
        import ray

        ray.shutdown()


def count_gpus() -> int:
    """CUDA devices of this machine."""
    import torch

    return torch.cuda.device_count()
