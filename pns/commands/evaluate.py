"""`pns evaluate MODEL`: the evaluate stage on any model, without a recipe. Its directory is a run directory
with that one stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pns.config import Config, Placement, Pool, to_dict
from pns.data.benchmarks import decoding
from pns.data.problems import ProblemSets, load_suites
from pns.data.prompts import Prompts, apply_family, load_tokenizer
from pns.driver import STAGES, Cluster
from pns.errors import UserError
from pns.files import read_jsonl, write_json
from pns.run.directory import RunDirectory
from pns.run.tracking import Tracker
from pns.stages import evaluate
from pns.stages.context import Context
from workers.fleet import Fleet
from workers.metric_backends import open_backends

MODEL_ROLES = ("rollout", "verifier")


def run(config: Config, against: Path | None = None) -> Path:
    """Evaluate `config.models.backbone` on the suites of `config.data` and print the table; returns the
    directory, <runs>/<name>.

    A finished evaluation is not run again; an interrupted one asks for the missing completions. `against` is
    the directory of another evaluation of the same suites: its paired differences are added. Raises UserError
    before anything starts where the inputs are wrong.
    """
    suites, identities = load_suites(config)
    prompts = load_prompts(config)
    problems = ProblemSets([], [], [], suites, identities)
    name = Path(config.models.backbone).name
    with RunDirectory.open(Path(config.runs) / config.name, to_dict(config)) as directory:
        stage = STAGES["evaluate"]
        try:
            done = directory.is_done("evaluate", stage.sections, ())
        except UserError as error:
            raise UserError(
                f"{str(error).partition(': redo')[0]}: choose another directory with out=DIR"
            ) from None
        earlier = read_other(against, directory, evaluate.describe(config, identities)) if against else None
        if not done:
            with Cluster(only_rollout(config)) as device:
                fleet = Fleet(config, device)
                try:
                    tracker = Tracker(directory, config.tracking, open_backends)
                    fleet.start(*MODEL_ROLES)
                    with directory.stage("evaluate", stage.sections, ()):
                        evaluate.measure(
                            Context(config, directory, fleet, problems, prompts, tracker),
                            {name: config.models.backbone},
                        )
                    tracker.close()
                finally:
                    fleet.shutdown()
        scores = directory.read_json(directory.stage_dir("evaluate") / "scores.json")
        if earlier is not None:
            other, rows = earlier
            scores = compare(
                scores, name, read_jsonl(directory.stage_dir("evaluate") / f"{name}.jsonl"), other, rows
            )
            write_json(
                directory.path / "comparison.json",
                {suite: found[name]["against"] for suite, found in scores.items()},
            )
        for item in tables(scores, name):
            Console().print(item)
        for suite, identity in identities.items():
            if identity.without_answer:
                print(f"{suite}: not asked, the source has no answer: {', '.join(identity.without_answer)}")
        print(f"{directory.stage_dir('evaluate')}: scores.json, {name}.jsonl, browse/index.html")
        return directory.path


def show_prompt(config: Config) -> None:
    """Print the first problem's prompt as the model reads it, special tokens included, and how each suite is
    decoded."""
    suites, _ = load_suites(config)
    prompts = load_prompts(config)
    problem = next(iter(suites.values()))[0]
    print(prompts.render(problem))
    print(
        f"--- data.prompt={config.data.prompt}, {len(prompts.encode(problem))} tokens, problem {problem.id}"
    )
    for suite in suites:
        print(f"{suite}: {vars(decoding(config, suite))}")


def load_prompts(config: Config) -> Prompts:
    """The model's tokenizer with the prompt keys filled; `config.data.prompt` becomes the family's name."""
    tokenizer = load_tokenizer(config.models.backbone, config.models.trust_remote_code)
    config.data.prompt = apply_family(config.data, tokenizer.chat_template)
    return Prompts(tokenizer, config.data)


def only_rollout(config: Config) -> Config:
    """The same with a placement in which no other role asks for a device."""
    placement = Placement(**{f.name: getattr(config.placement, f.name) for f in fields(Placement)})
    placement.policy = placement.reward_model = placement.judge = Pool(1, 0.0, 0.0)
    return Config(**{f.name: getattr(config, f.name) for f in fields(Config)} | {"placement": placement})


def read_other(
    path: Path, directory: RunDirectory, suites: Mapping[str, Mapping[str, Any]]
) -> tuple[str, list[dict[str, Any]]]:
    """Name and rows of the model that an evaluation's directory holds (or of one `<model>.jsonl` in it).
    Raises UserError unless there is one model, asked the same `suites` with the same decoding."""
    folder = path.parent if path.suffix == ".jsonl" else path / "evaluate"
    files = (
        [path]
        if path.suffix == ".jsonl"
        else [file for file in sorted(folder.glob("*.jsonl")) if ".unfinished" not in file.name]
    )
    if len(files) != 1:
        found = (
            f"has {len(files)} models ({', '.join(file.name for file in files)})"
            if files
            else "has no finished evaluation"
        )
        raise UserError(f"--against {path}: {folder} {found}; name one DIR/evaluate/MODEL.jsonl")
    if folder.resolve() == directory.stage_dir("evaluate").resolve():
        raise UserError(f"--against {path} is the evaluation itself: name another")
    theirs = directory.read_json(folder / "suites.json")
    for suite, mine in suites.items():
        for what in ("sha256", "decoding"):
            if suite not in theirs or theirs[suite][what] != mine[what]:
                other = theirs[suite][what] if suite in theirs else "absent"
                raise UserError(
                    f"--against {path}: {what} of {suite} is {other} there and {mine[what]} here; evaluate both in the same way"
                )
    return files[0].stem, read_jsonl(files[0])


def compare(
    scores: dict[str, dict[str, Any]],
    name: str,
    rows: Sequence[Mapping[str, Any]],
    other: str,
    other_rows: Sequence[Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    """`scores` with the difference of `name` from `other`. Raises UserError unless both were asked the same
    problems."""
    label = other if other != name else f"{other} (other)"
    asked: dict[str, dict[str, dict[str, list[float]]]] = {}
    for model, found in ((label, other_rows), (name, rows)):
        for row in found:
            problem = row["problem"]
            asked.setdefault(problem["suite"], {}).setdefault(model, {}).setdefault(problem["id"], []).append(
                row["verdict"] == "correct"
            )
    for suite, by_model in asked.items():
        if len(by_model) != 2 or {p: len(s) for p, s in by_model[name].items()} != {
            p: len(s) for p, s in by_model[label].items()
        }:
            raise UserError(
                f"--against: the two evaluations differ in the problems or samples of {suite}; evaluate both with the same keys"
            )
    accuracies = {
        model: {
            suite: [sum(asked[suite][model][p]) / len(asked[suite][model][p]) for p in asked[suite][name]]
            for suite in asked
        }
        for model in (label, name)
    }
    evaluate.compare(scores, accuracies, label, name)
    return scores


def tables(scores: Mapping[str, Mapping[str, Any]], name: str) -> list[Table]:
    """Terminal tables of one model: the suites, differences from other models, and by subject and level where
    the problems have them."""
    table = Table(
        "suite", "n", "k", "accuracy % [95 %]", "pass@k", "maj@k", "cut", "none", "long", "?", title=name
    )
    table.caption = "k samples a problem; completions cut at the token limit, without an answer, not asked (prompt too long), undecided (?)"
    table.columns[0].no_wrap = table.columns[3].no_wrap = True
    for suite, models in scores.items():
        found = models[name]
        best = [
            f"{100 * list(found[key].values())[-1]:.1f}" if key in found else ""
            for key in ("pass_at", "majority_at")
        ]
        counts = [str(found[what]) for what in evaluate.COUNTED]
        samples = str(found.get("samples_per_problem", ""))
        table.add_row(
            suite,
            str(found["n"]),
            samples,
            _share(found),
            *best,
            *counts,
            end_section=suite == list(scores)[-2],
        )
    shown = [table]
    for other in scores["mean"][name].get("against", {}):
        differences = Table("suite", "difference % [95 %]", "p", "", title=f"{name} against {other}")
        for suite, models in scores.items():
            d = models[name]["against"][other]
            interval = f"{100 * d['difference']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]"
            differences.add_row(suite, interval, f"{d['p_value']:.4f}", d["verdict"])
        shown.append(differences)
    for what in ("subject", "level"):
        groups = Table("suite", what, "n", "accuracy % [95 %]")
        for suite, models in scores.items():
            for group, found in models[name].get(f"by_{what}", {}).items():
                groups.add_row(suite, group, str(found["n"]), _share(found))
        if groups.row_count:
            shown.append(groups)
    return shown


def _share(found: Mapping[str, float]) -> str:
    return f"{100 * found['accuracy']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"
