"""The stages in order, each resumed or run: reverse RL of the negative generator, then preference
optimisation of the backbone.

warm_start     a supervised start (tiny world only; other backbones come trained)
rl             the backbone learns from right and wrong answers: the target
reward_model   Bradley-Terry on the target's right and wrong solutions, and a held-out one that only measures
reverse_rl     the generator learns to write solutions that look right and end wrong
synthesize     its negatives, filtered
pair           chosen = the target's own right solutions, rejected = plausible negatives
preference     the target learns from the pairs (given pairs: the backbone does, and the four stages before are left out)
evaluate       start, target and result on every suite
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from pns.config import Config, Decoding, stages, to_dict
from pns.data.problems import ProblemSets, load_problem_sets, removals
from pns.data.prompts import Prompts, apply_family, load_tokenizer
from pns.errors import UserError
from pns.files import write_json
from pns.preflight import check_models
from pns.run.directory import RunDirectory
from pns.run.memory import PeakMemory
from pns.run.report import write_report
from pns.run.tracking import Tracker
from pns.stages import evaluate, pair, preference, reverse_rl, reward_model, rl, synthesize
from pns.stages.context import Context
from pns.tiny import warm_start
from workers import placement
from workers.fleet import Fleet
from workers.metric_backends import open_backends


@dataclass(frozen=True)
class Stage:
    """A stage, the stages whose output it reads, the sections of the configuration it depends on, and the
    roles it uses."""

    run: Callable[[Context], None]
    reads: tuple[str, ...]
    sections: tuple[str, ...]
    roles: tuple[str, ...]


DECODING = tuple(f"evaluate.{f.name}" for f in fields(Decoding))

STAGES: dict[str, Stage] = {
    "warm_start": Stage(warm_start.run, (), ("data", "models", "warm_start"), ()),
    "rl": Stage(
        rl.run,
        ("warm_start",),
        ("data", "models", "rl", "rollout.max_new_tokens", "policy.lora"),
        ("rollout", "verifier"),
    ),
    "reward_model": Stage(
        reward_model.run, ("rl",), ("data", "models", "reward_model"), ("rollout", "verifier")
    ),
    "reverse_rl": Stage(
        reverse_rl.run,
        ("rl", "reward_model"),
        (
            "data",
            "models",
            "reverse_rl",
            "reward",
            "policy.lora",
            "evaluate.generator_samples",
            "evaluate.generator_temperature",
        ),
        ("rollout", "verifier", "reward_model", "judge"),
    ),
    "synthesize": Stage(
        synthesize.run,
        ("reverse_rl", "reward_model"),
        ("data", "models", "reward", "synthesize"),
        ("rollout", "verifier", "reward_model", "judge"),
    ),
    "pair": Stage(
        pair.run,
        ("rl", "synthesize", "reward_model"),
        ("data", "pair"),
        ("rollout", "verifier", "reward_model"),
    ),
    "preference": Stage(
        preference.run, ("warm_start", "rl", "pair"), ("data", "models", "preference", "policy.lora"), ()
    ),
    "evaluate": Stage(
        evaluate.run,
        ("warm_start", "rl", "preference"),
        (
            "data",
            "models",
            "rollout.max_new_tokens",
            "reward.verify_seconds",
            "evaluate.per_suite",
            *DECODING,
        ),
        ("rollout", "verifier"),
    ),
}


def run(config: Config, first: str | None = None, last: str | None = None) -> Path:
    """Run the stages from `first` (redone with everything after it) until `last`; finished ones are not run
    again.

    Returns the run directory. Raises UserError before anything is started or written where the inputs are
    wrong.
    """
    selected = select(config, last)
    check_models(config, selected)
    problems = load_problem_sets(config)
    with RunDirectory.open(Path(config.runs) / config.name, to_dict(config)) as run_directory:
        redone = list(STAGES)[list(STAGES).index(first) :] if first else []
        reads = {
            name: tuple(read for read in STAGES[name].reads if read in stages(config)) for name in selected
        }
        pending = [
            name
            for name in selected
            if name in redone or not run_directory.is_done(name, STAGES[name].sections, reads[name])
        ]
        if not pending:
            print(f"{run_directory.path}: every stage is done; --from STAGE runs one again")
            return run_directory.path
        with Cluster(config) as device, PeakMemory() as memory:
            run_directory.set_aside(redone)  # only now: a start that fails changes nothing
            report_removals(run_directory, problems)
            fleet = Fleet(config, device)
            try:
                tracker = Tracker(run_directory, config.tracking, open_backends)
                ctx = Context(config, run_directory, fleet, problems, prompts(config), tracker)
                fleet.start(*dict.fromkeys(role for name in pending for role in STAGES[name].roles))
                for name in pending:
                    with run_directory.stage(name, STAGES[name].sections, reads[name]):
                        STAGES[name].run(ctx)
                tracker.close()
            finally:
                fleet.shutdown()
                run_directory.record_peak_memory(memory.gib)
        write_report(run_directory)
    return run_directory.path


def select(config: Config, last: str | None) -> list[str]:
    """The stages of `config` until `last`, in order."""
    names = list(stages(config))
    return names[: names.index(last) + 1] if last else names


def report_removals(run_directory: RunDirectory, problems: ProblemSets) -> None:
    """Write what decontamination left out to decontamination.json, and say it in one line."""
    if problems.removed:
        found = removals(problems.removed)
        write_json(run_directory.path / "decontamination.json", found)
        counts = ", ".join(f"{part} {values['problems']}" for part, values in found.items())
        print(
            f"decontamination: problems removed because a suite has them: {counts} ({run_directory.path / 'decontamination.json'})"
        )


def prompts(config: Config) -> Prompts:
    """The chat template of the backbone; a warm start on the tiny world brings its own tokenizer."""
    if config.warm_start.steps and config.warm_start.task == "solve":
        from pns.tiny.tokenizer import build_tokenizer

        return Prompts(build_tokenizer(), config.data)
    model = config.warm_start.samples_from if config.warm_start.steps else config.models.backbone
    tokenizer = load_tokenizer(model, config.models.trust_remote_code)
    apply_family(config.data, tokenizer.chat_template)
    return Prompts(tokenizer, config.data)


class Cluster:
    """Ray, for as long as the run lasts: the cluster of RAY_ADDRESS (as in a submitted job), else a local
    one.

    Entering gives the device, "cpu" or "cuda", after the placement has been checked against what the cluster
    offers (UserError).
    """

    def __init__(self, config: Config) -> None:
        self._config = config

    def __enter__(self) -> str:
        import ray

        address = os.environ.get("RAY_ADDRESS")
        if address:
            ray.init(address=address, log_to_driver=False, logging_level="WARNING")
            device = placement.resolve_device(
                self._config.placement.device, ray.cluster_resources().get("GPU", 0)
            )
        else:
            gpus = count_gpus()
            device = placement.resolve_device(self._config.placement.device, gpus)
            resources = placement.local_resources(self._config.placement, device)
            placement.check(self._config.placement, {"CPU": resources["num_cpus"], "GPU": gpus}, device)
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                **resources,
            )
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
