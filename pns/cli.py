"""The `pns` command. Nothing heavy is imported before the arguments and the configuration are known to be
right."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from pns import config as configuration
from pns.config import STAGES
from pns.errors import UserError, did_you_mean
from pns.recipe import load


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 on success, 2 for wrong use with one line on stderr, 130 after Ctrl-C; other errors keep
    their traceback."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if unknown := [
        word for word in rest if "=" not in word or word.startswith("-") or "overrides" not in options
    ]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:  # overrides that stand after an option
        options.overrides += rest
    try:
        options.handler(options)
    except UserError as error:
        print(f"pns: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "pns: interrupted; the same command continues from the last complete checkpoint", file=sys.stderr
        )
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pns",
        description="Learn from plausible negative samples: reverse RL of a negative generator, then preference optimisation.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a recipe's stages, or continue an interrupted run")
    add_recipe(run)
    run.add_argument(
        "--from",
        dest="first",
        type=stage_name,
        metavar="STAGE",
        help="run STAGE and all after it again (old output is set aside)",
    )
    run.add_argument(
        "--until",
        dest="last",
        type=stage_name,
        metavar="STAGE",
        help=f"stop after STAGE, one of: {', '.join(STAGES)}",
    )
    run.set_defaults(handler=run_recipe)

    plan = commands.add_parser("plan", help="check a recipe and show its placement and stages; start nothing")
    add_recipe(plan)
    plan.set_defaults(handler=plan_recipe)

    report = commands.add_parser(
        "report", help="print a run's tables again and rebuild report.json and the plots"
    )
    report.add_argument("directory", type=Path, help="run directory, e.g. runs/tiny-qwen2")
    report.set_defaults(handler=report_run)

    evaluate = commands.add_parser(
        "evaluate", help="score a model on benchmarks, or continue an interrupted evaluation; needs no recipe"
    )
    evaluate.add_argument("model", help="model directory or Hub id")
    evaluate.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="benchmarks=[gsm8k,math500,...], out=DIR (default runs/evaluate-MODEL), data.root=DIR (local copies), any configuration key",
    )
    evaluate.add_argument(
        "--recipe", type=Path, help="a YAML file whose suites, engine, placement and prompt are used"
    )
    evaluate.add_argument(
        "--against",
        type=Path,
        metavar="DIR",
        help="an earlier evaluation (DIR, or DIR/evaluate/MODEL.jsonl) to compare with",
    )
    evaluate.add_argument(
        "--show-prompt",
        action="store_true",
        help="print one prompt as the model reads it, and how suites are decoded",
    )
    evaluate.set_defaults(handler=evaluate_model)

    config = commands.add_parser(
        "config", help="print every configuration key with default, range and meaning, or a recipe's values"
    )
    config.add_argument(
        "subject",
        nargs="?",
        default="",
        metavar="KEY|RECIPE",
        help="a key or a section, e.g. rl.optimizer, or a YAML file for its merged values (default: all keys)",
    )
    config.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="with a recipe: configuration keys to change"
    )
    config.set_defaults(handler=show_config)

    export = commands.add_parser(
        "export", help="write a run's pairs and trained model, each with a card, for other tools and the Hub"
    )
    export.add_argument("directory", type=Path, help="run directory, e.g. runs/tiny-qwen2")
    export.add_argument("out", type=Path, help="directory to be made: OUT/pairs and OUT/model")
    part = export.add_mutually_exclusive_group()
    part.add_argument("--pairs-only", action="store_true", help="no model")
    part.add_argument("--model-only", action="store_true", help="no pairs")
    export.set_defaults(handler=export_run)

    verify = commands.add_parser(
        "verify", help="compare predictions with gold answers: correct, wrong or unverified, with a reason"
    )
    verify.add_argument(
        "cases",
        type=Path,
        help="JSONL with gold and prediction (a completion or an answer), optional unordered, tolerance, unit",
    )
    verify.add_argument(
        "--out",
        type=Path,
        required=True,
        help="JSONL with verdict, extracted, reason and seconds, one line a case, in order",
    )
    verify.add_argument(
        "--processes",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="worker processes (default: the cores, %(default)s)",
    )
    verify.add_argument(
        "--seconds",
        type=float,
        default=5.0,
        metavar="LIMIT",
        help="time limit of one case (default %(default)g)",
    )
    verify.add_argument("--force", action="store_true", help="replace an existing --out file")
    verify.set_defaults(handler=verify_cases)
    return parser


def add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="a YAML file, e.g. recipes/tiny-qwen2.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="configuration keys to change, e.g. rl.steps=10"
    )


def stage_name(word: str) -> str:
    """The argument of --from and --until."""
    if word not in STAGES:
        near = did_you_mean(word, STAGES) or f"; the stages are {', '.join(STAGES)}"
        raise argparse.ArgumentTypeError(f"unknown stage {word!r}{near}")
    return word


def show_config(options: argparse.Namespace) -> None:
    from pns.commands.config import print_config

    print_config(options.subject, options.overrides)


def run_recipe(options: argparse.Namespace) -> None:
    config = load(options.recipe, options.overrides)
    if options.first and options.last and STAGES.index(options.first) > STAGES.index(options.last):
        raise UserError(f"--from {options.first} comes after --until {options.last}: exchange them")
    for option, stage in (("--from", options.first), ("--until", options.last)):
        if stage and stage not in configuration.stages(config):
            raise UserError(
                f"{option} {stage}: with pairs from preference.data the stages are {', '.join(configuration.stages(config))}"
            )
    check_early(config, options.last)
    from pns import driver

    driver.run(config, options.first, options.last)


def plan_recipe(options: argparse.Namespace) -> None:
    config = load(options.recipe, options.overrides)
    check_early(config, None)
    from workers import placement

    print(
        f"{options.recipe}: run directory {Path(config.runs) / config.name}, stages {' -> '.join(configuration.stages(config))}"
    )
    print(placement.table(config.placement))


def check_early(config: configuration.Config, last: str | None) -> None:
    """What needs no heavy import to be found wrong."""
    from pns.preflight import check_models

    asked = configuration.stages(config)
    check_models(config, asked[: asked.index(last) + 1] if last else asked)


def report_run(options: argparse.Namespace) -> None:
    if not (options.directory / "config.yaml").is_file():
        raise UserError(
            f"{options.directory} is not a run directory (no config.yaml); name one like runs/tiny-qwen2"
        )
    from pns.run.directory import RunDirectory
    from pns.run.report import write_report

    write_report(RunDirectory(options.directory))


def evaluate_model(options: argparse.Namespace) -> None:
    out = Path("runs") / f"evaluate-{Path(options.model).name}"
    settings = [f"models.backbone={options.model}"]
    if not options.recipe:
        settings += ["data.source=jsonl", "data.prompt=auto"]
    for word in options.overrides:
        key, _, value = word.partition("=")
        if key == "out":
            out = Path(value)
        elif key == "benchmarks":
            settings += ["data.source=jsonl", f"data.benchmarks={value}"]
        else:
            settings.append(word)
    config = load(options.recipe, [*settings, f"runs={out.parent}", f"name={out.name}"], training=False)
    from pns.preflight import check_model

    check_model("MODEL", options.model)
    from pns.commands import evaluate as evaluation

    if options.show_prompt:
        evaluation.show_prompt(config)
    else:
        evaluation.run(config, options.against)


def export_run(options: argparse.Namespace) -> None:
    from pns.commands.export import export

    export(options.directory, options.out, pairs=not options.model_only, model=not options.pairs_only)


def verify_cases(options: argparse.Namespace) -> None:
    from pns.commands.verify import verify_file

    verify_file(options.cases, options.out, options.processes, options.seconds, options.force)


if __name__ == "__main__":
    sys.exit(main())
