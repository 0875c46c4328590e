"""`pns rescore`: the rewards of a run's stored rollouts by other rules, beside those that it trained on.

Values that services gave are kept with every rollout, so most rules need none of them again: then nothing
heavy is imported, and a run that is under way can be looked at. The run itself is not changed.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from pns.algo.advantages import rollout_advantages
from pns.algo.masks import mask_report
from pns.algo.rescoring import Comparison, answered, compare, measured, rewarded_anew, unknown_terms
from pns.algo.reward import reward_rules
from pns.config import Config, ReverseRl, RewardConfig, RewardTerm, Synthesize, TermKind
from pns.errors import UserError
from pns.fields import check_ranges
from pns.files import read_json, read_jsonl, sha256_of_json, write_json, write_jsonl
from pns.preflight import ModelKind, check_model
from pns.recipe import merge_layers, override_layer, raise_first, reward_faults, term_faults
from pns.records import Rollout, from_json, to_json
from pns.run.place import UNFINISHED, Place, locked
from pns.stages.artefacts import Generator, Negatives, RewardModels

RESCORED_STAGES = ("reverse_rl", "synthesize")  # those whose reward is the composite one

Settings = TypeVar("Settings")
Advantages = Callable[[Sequence[Rollout]], list[float]]


@dataclass(frozen=True)
class Stored:
    """What a stage has kept: the whole steps of its rollouts, and what it was made from (its record)."""

    name: str
    place: Path
    record: Mapping[str, Any]
    rules: RewardConfig
    group_size: int  # completions of a problem
    advantages: Advantages | None
    rollouts: list[Rollout]

    @property
    def own_reward_model(self) -> str:
        """The reward model of the run that the stage used. Raises UserError where it is gone, or where the
        stage used several: no one of them gave all values."""
        if (self.place / "refreshed").is_dir():
            raise UserError(
                f"{self.place}: its reward model was refreshed on the way (refreshed/): values of one would "
                "stand beside those of others; ask one for all, with reward.terms.NAME.model=DIR and "
                "reward.terms.NAME.input=tokens"
            )
        names = [name for name in self.record["contents"] if name.startswith("reward_model-")]
        models = [RewardModels(self.place.parent / name).main for name in names]
        if not models or not Path(models[0]).is_dir():
            raise UserError(
                f"{self.place}: its reward model is gone: name one with reward.terms.NAME.model=DIR"
            )
        return models[0]


def rescore_run(
    directory: Path, overrides: list[str], name: str, out: Path | None = None, ask_failed: bool = False
) -> Path:
    """Reward the rollouts of the stage `name` by the run's rules with `overrides`, write them to `out` with a
    comparison beside them (.json), and print it; returns `out`.

    Only services whose term has another source are asked, or whose value is not there and needed now; of the
    others failures stay as well, unless `ask_failed`. Raises UserError.
    """
    config = changed_config(directory, overrides)
    stored = read_stored(directory, name)
    rules = reward_rules(config)
    digest = sha256_of_json([stored.place.name, to_json(rules)])[:10]
    own = directory / "rescored" / f"{name}-{digest}.jsonl"
    if out and out.exists():
        raise UserError(f"--out {out} exists: remove it, or name another")
    if out and not out.parent.is_dir():
        raise UserError(f"--out {out}: {out.parent} is not a directory that exists")
    rows = [measured(rollout, stored.rules, rules, ask_failed) for rollout in stored.rollouts]
    asked = Counter(term for row in rows for term in unknown_terms(row, rules))
    rows = with_earlier(rows, own, rules, ask_failed)
    if any(unknown_terms(row, rules) for row in rows):
        rows = ask(config, rules, stored, rows, own)
    rescored = rewarded_anew(rows, stored.group_size, rules, name)
    comparison = compare(stored.rollouts, rescored, asked, stored.advantages)
    failures = mask_report([rollout.reward for rollout in rescored])
    file = out or own
    file.parent.mkdir(exist_ok=True)
    write_jsonl(file, rescored)
    made_from = {"stage": stored.place.name, "rules": to_json(rules)}
    write_json(file.with_suffix(".json"), {**to_json(comparison), "failures": failures, **made_from})
    unfinished_file(own).unlink(missing_ok=True)
    Console().print(comparison_table(comparison, name))
    for line in comparison_lines(comparison):
        print(line)
    print(f"{file}, {file.with_suffix('.json').name}")
    return file


def changed_config(directory: Path, overrides: list[str]) -> Config:
    """The configuration of a run with other rules of the reward. Raises UserError for another key."""
    file = directory / "config.yaml"
    if not file.is_file():
        raise UserError(f"{directory} is not a run directory (no config.yaml); name one like runs/tiny-qwen2")
    for word in overrides:
        if not word.startswith("reward."):
            way_out = "only the rules of the reward change here; pns run takes any key"
            raise UserError(f"rescore: {word.partition('=')[0]} is not below reward.: {way_out}")
    layers = [(cast(DictConfig, OmegaConf.load(file)), directory), override_layer(overrides)]
    config = merge_layers(Config, layers, f"{file} or an override")
    check_ranges(config)
    raise_first(fault for check in (term_faults, reward_faults) for fault in check(config))
    return config


def read_stored(directory: Path, name: str) -> Stored:
    """The rollouts that the stage `name` of a run has kept so far. Raises UserError where there are none."""
    place = (directory / name).resolve()
    record = Place(place).manifest()
    if record is None and (place / "progress.json").is_file():
        record = read_json(place / "progress.json")
    if record is None:
        raise UserError(f"{directory}: stage {name} has not begun; run its recipe until {name} at least")
    if record["stage"] != name:
        fault = f"the rollouts of {name} are of {record['stage']}, whose reward is the ordinary one"
        raise UserError(f"{directory}: {fault}: choose another --stage, or a run with negatives=pns")
    settings = record["settings"]
    rules = recorded(RewardConfig(gates={}, terms={}), settings["rules"], place)
    if name == "reverse_rl":
        rl = recorded(ReverseRl(), settings["reverse_rl"], place)
        max_new_tokens = settings["max_new_tokens"]
        advantages: Advantages | None = partial(
            rollout_advantages, settings=rl, max_new_tokens=max_new_tokens
        )
        group_size = rl.completions_per_problem
        rows_per_step = group_size * rl.problems_per_step
        file = Generator(place).rollouts_file
    else:
        advantages, rows_per_step = None, 1  # all of one step, written at once
        group_size = recorded(Synthesize(), settings["synthesize"], place).samples_per_problem
        file = Negatives(place).rollouts_file
    # While the stage is under way, the last step may be half written.
    rows = read_jsonl(file, growing=True) if file.is_file() else []
    whole = rows[: len(rows) // rows_per_step * rows_per_step]
    if not whole:
        raise UserError(f"{file} has no whole step of rollouts yet: wait for one")
    rollouts = [from_json(Rollout, row) for row in whole]
    return Stored(name, place, record, rules, group_size, advantages, rollouts)


def recorded(empty: Settings, values: Mapping[str, Any], place: Path) -> Settings:
    """Settings as a stage's record has them. Raises UserError for those of another version."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(empty), dict(values))
    except OmegaConfBaseException as error:
        fault = str(error).splitlines()[0]
        raise UserError(f"{place}: {fault}; use the version of pns that made the run") from error
    return cast(Settings, OmegaConf.to_object(merged))


def with_earlier(rows: Sequence[Rollout], file: Path, rules: RewardConfig, ask_failed: bool) -> list[Rollout]:
    """`rows` with what services answered when the same rules were asked for before, in `file`."""
    if not file.is_file():
        return list(rows)
    earlier: dict[tuple[int, str], Rollout] = {}
    for values in read_jsonl(file):
        row: Rollout = from_json(Rollout, values)
        reward = replace(row.reward, missing={}) if ask_failed else row.reward
        earlier[row.step, row.completion.id] = replace(row, reward=reward)
    known = []
    for row in rows:
        other = earlier.get((row.step, row.completion.id))
        same = other is not None and other.completion == row.completion
        known.append(answered(row, other.reward, unknown_terms(row, rules)) if other and same else row)
    return known


def unfinished_file(own: Path) -> Path:
    return own.with_suffix(UNFINISHED)


def ask(
    config: Config, rules: RewardConfig, stored: Stored, rows: Sequence[Rollout], own: Path
) -> list[Rollout]:
    """`rows` with what their services say. Raises UserError before anything starts where a model is wrong."""
    names = list(dict.fromkeys(name for row in rows for name in unknown_terms(row, rules)))
    terms = {name: config.reward.terms[name] for name in names}
    for name, term in terms.items():
        if term.model and not term.endpoint.url:
            kind = ModelKind.language_model if term.kind is TermKind.judge else ModelKind.scorer
            check_model(f"reward.terms.{name}.model", term.model, kind)
    own_model = stored.own_reward_model if any(map(_is_own, terms.values())) else ""
    print(f"asking {', '.join(names)}; an interrupted call goes on from here", flush=True)
    from pns import driver  # takes seconds: what is wrong has been said by now
    from pns.stages.rescoring import Rescorer, services

    own.parent.mkdir(exist_ok=True)
    with locked(own.parent / "lock", "wait for it to end"):
        prompts = driver.load_prompts(config)
        with services(config, names, own_model, own.parent.parent) as fleet:
            note = partial(print, flush=True)
            rescorer = Rescorer(rules, prompts, fleet.scorer, unfinished_file(own), note)
            return rescorer.answer(rows, stored.group_size, stored.name)


def _is_own(term: RewardTerm) -> bool:
    return term.kind is TermKind.reward_model and not term.model


def comparison_table(comparison: Comparison, title: str) -> Table:
    """Means and counts before and after."""
    table = Table("", "before", "after", title=f"{title}: {comparison.num_rollouts} rollouts")
    changes = {"reward": comparison.reward, **comparison.terms}
    for name, change in changes.items():
        table.add_row(name, *(spelt(value) for value in (change.before, change.after)))
    masked = comparison.masked
    table.add_row("masked", f"{masked.before:.0f}", f"{masked.after:.0f}")
    return table


def comparison_lines(comparison: Comparison) -> list[str]:
    asked = ", ".join(f"{name} of {count}" for name, count in comparison.asked.items())
    correlation = spelt(comparison.rank_correlation)
    both = f"{comparison.num_rewarded_in_both} rollouts rewarded in both"
    lines = [f"asked: {asked or 'no service'}", f"rank correlation of rewards: {correlation} ({both})"]
    if change := comparison.advantages:
        zeros = f"{change.became_zero} became zero, {change.became_nonzero} no longer are"
        lines.append(f"advantages: {change.changed_sign} of {change.num_both} changed sign, {zeros}")
    return lines


def spelt(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
