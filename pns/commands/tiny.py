"""`pns tiny make OUT`: train a model of the tiny world. OUT.run is a run's page that keeps its own stage."""

import os
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from pns.config import Config, Device, EngineKind, Placement, PolicyConfig, RolloutEngine
from pns.errors import UserError
from pns.files import PARTIAL, read_json, remove
from pns.preflight import check_model
from pns.recipe import merge_layers, override_layer
from pns.tiny.settings import TinyTask, WarmStart, check_settings


def make_tiny(out: Path, words: Sequence[str]) -> None:
    """Train the model that `words` (key=value of `WarmStart`) ask for, and write it to `out`; what an
    interruption left in OUT.run goes on. Raises UserError before anything starts where an input is wrong."""
    settings = merge_layers(WarmStart, [override_layer(list(words))], "pns tiny make")
    check_settings(settings)
    if settings.task is not TinyTask.solve:
        check_model("samples_from", settings.samples_from)
    if settings.starts_from:
        check_model("starts_from", settings.starts_from)
    out = out.absolute()
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} exists: remove it, or name another directory")
    from pns import driver
    from pns.data.prompts import Prompts, load_tokenizer
    from pns.run.page import RunPage
    from pns.run.place import STORE
    from pns.run.stage import Plan
    from pns.run.terminal import open_terminal
    from pns.stages.session import session
    from pns.tiny.outcome_reward import outcome_reward_stage
    from pns.tiny.process_reward import process_reward_stage
    from pns.tiny.tokenizer import build_tokenizer
    from pns.tiny.warm_start import warm_start_stage

    stages = {TinyTask.process_reward: process_reward_stage, TinyTask.outcome_reward: outcome_reward_stage}
    config = tiny_config(settings, out)
    solves = settings.task is TinyTask.solve
    prompts = Prompts(build_tokenizer() if solves else load_tokenizer(settings.samples_from), config.data)
    with RunPage.open(Path(config.runs) / config.name) as page:
        plan = Plan(page.path / STORE, config, driver.prompts_digest(prompts), page.attempts)
        made = plan(stages.get(settings.task, warm_start_stage)(settings))
        (step,) = plan.steps
        if not step.is_done():
            with (
                closing(open_terminal()) as terminal,
                session(config, page, [step], prompts, page.attempts, terminal) as making,
            ):
                making.make(step)
        partial = out.with_name(f"{PARTIAL}{out.name}")
        remove(partial)
        # A copy: `out` is for the user to keep, move or change; the stage's own stays as it was hashed.
        shutil.copytree(made.model, partial)
        os.replace(partial, out)
        if made.quality_file.is_file():
            print(read_json(made.quality_file))
        print(f"{out}: the model; how it was made is in {page.path / step.name}")


def tiny_config(settings: WarmStart, out: Path) -> Config:
    """The set-up of the roles: a process each, on CPU, which is enough for models of a megabyte. With more,
    the order of sums and samples would change what is made."""
    return Config(
        name=f"{out.name}.run",
        runs=str(out.parent),
        seed=settings.seed,
        placement=Placement(device=Device.cpu),
        rollout=RolloutEngine(EngineKind.transformers, max_batch=128),
        policy=PolicyConfig(max_tokens_per_micro_batch=8192, gradient_checkpointing=False),
    )
