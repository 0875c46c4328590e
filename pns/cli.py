"""The `pns` command. Nothing heavy is imported before the arguments and the configuration are known to be
right."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from pns.config import STAGES
from pns.errors import UserError, did_you_mean

Commands = Any  # argparse's collection of subparsers, which has no public name


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 on success, 2 for wrong use with one line on stderr, 130 after Ctrl-C; other errors keep
    their traceback."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    takes_overrides = "overrides" in options
    unknown = [word for word in rest if "=" not in word or word.startswith("-") or not takes_overrides]
    if unknown:
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
    except BrokenPipeError:  # `pns config | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def build_parser() -> argparse.ArgumentParser:
    description = (
        "Learn from plausible negative samples: reverse RL of a generator, then preference optimisation."
    )
    parser = argparse.ArgumentParser(prog="pns", description=description)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_run(commands)
    add_plan(commands)
    add_config(commands)
    add_report(commands)
    add_runs(commands)
    add_evaluate(commands)
    add_export(commands)
    add_verify(commands)
    add_tiny(commands)
    return parser


def add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="a YAML file, e.g. recipes/tiny-qwen2.yaml")
    overrides_help = "configuration keys to change, e.g. rl.steps=10"
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=overrides_help)


def stage_name(word: str) -> str:
    """The argument of --from and --until."""
    if word not in STAGES:
        near = did_you_mean(word, STAGES) or f"; the stages are {', '.join(STAGES)}"
        raise argparse.ArgumentTypeError(f"unknown stage {word!r}{near}")
    return word


def add_run(commands: Commands) -> None:
    def handle(options: argparse.Namespace) -> None:
        from pns.commands.run import run_recipe

        run_recipe(options.recipe, options.overrides, options.first, options.last)

    parser = commands.add_parser("run", help="make what is missing of a recipe's run, or go on with it")
    add_recipe(parser)
    first_help = "make STAGE and what follows from it anew (old output is kept until pns gc)"
    parser.add_argument("--from", dest="first", type=stage_name, metavar="STAGE", help=first_help)
    last_help = f"stop after STAGE, one of: {', '.join(STAGES)}"
    parser.add_argument("--until", dest="last", type=stage_name, metavar="STAGE", help=last_help)
    parser.set_defaults(handler=handle)


def add_plan(commands: Commands) -> None:
    def handle(options: argparse.Namespace) -> None:
        from pns.commands.run import plan_recipe

        plan_recipe(options.recipe, options.overrides)

    parser = commands.add_parser(
        "plan", help="check a recipe and show its stages and placement; start nothing"
    )
    add_recipe(parser)
    parser.set_defaults(handler=handle)


def add_config(commands: Commands) -> None:
    def handle(options: argparse.Namespace) -> None:
        from pns.commands.config import print_config

        print_config(options.subject, options.overrides)

    parser = commands.add_parser(
        "config", help="print keys with default, range and meaning, or a merged recipe"
    )
    subject_help = "a key or section, e.g. rl.steps or reward, or a recipe; nothing: every key"
    parser.add_argument("subject", nargs="?", default="", help=subject_help)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="with a recipe: keys to change")
    parser.set_defaults(handler=handle)


def add_report(commands: Commands) -> None:
    def handle(options: argparse.Namespace) -> None:
        from pns.commands.run import report_run

        report_run(options.directory)

    parser = commands.add_parser(
        "report", help="print a run's tables again; rebuild report.json and the plots"
    )
    parser.add_argument("directory", type=Path, help="a run, e.g. runs/tiny-qwen2")
    parser.set_defaults(handler=handle)


def add_runs(commands: Commands) -> None:
    def show(options: argparse.Namespace) -> None:
        from pns.commands.run import list_runs

        list_runs(options.runs)

    def collect(options: argparse.Namespace) -> None:
        from pns.commands.run import collect_garbage

        collect_garbage(options.runs, options.yes)

    runs_help = "the directory of runs (default %(default)s)"
    parser = commands.add_parser("runs", help="list runs and the outputs of their stages, with size and age")
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help=runs_help)
    parser.set_defaults(handler=show)
    parser = commands.add_parser("gc", help="remove stage outputs that no run leads to, after asking")
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help=runs_help)
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.set_defaults(handler=collect)


def add_evaluate(commands: Commands) -> None:
    parser = commands.add_parser(
        "evaluate", help="score a model on benchmarks, or go on with it; needs no recipe"
    )
    parser.add_argument("model", help="model directory or Hub id")
    overrides_help = (
        "benchmarks=[gsm8k,math500,...], out=DIR (default runs/evaluate-MODEL), data.root=DIR (local "
        "copies), any configuration key"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=overrides_help)
    recipe_help = "a YAML file whose suites, engine, placement and prompt are used"
    parser.add_argument("--recipe", type=Path, help=recipe_help)
    against_help = "an earlier evaluation (DIR, or DIR/evaluate/MODEL.jsonl) to compare with"
    parser.add_argument("--against", type=Path, metavar="DIR", help=against_help)
    show_help = "print one prompt as the model reads it, and how suites are decoded"
    parser.add_argument("--show-prompt", action="store_true", help=show_help)
    parser.set_defaults(handler=evaluate_model)


def evaluate_model(options: argparse.Namespace) -> None:
    from pns.preflight import check_model
    from pns.recipe import load

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
    check_model("MODEL", options.model)
    from pns.commands import evaluate

    if options.show_prompt:
        evaluate.show_prompt(config)
    else:
        evaluate.evaluate_model(config, options.against)


def add_export(commands: Commands) -> None:
    def handle(options: argparse.Namespace) -> None:
        from pns.commands.export import export

        export(options.directory, options.out, pairs=not options.model_only, model=not options.pairs_only)

    parser = commands.add_parser("export", help="write a run's pairs and trained model, each with a card")
    parser.add_argument("directory", type=Path, help="a run, e.g. runs/tiny-qwen2")
    parser.add_argument("out", type=Path, help="directory to be made: OUT/pairs and OUT/model")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--pairs-only", action="store_true", help="no model")
    part.add_argument("--model-only", action="store_true", help="no pairs")
    parser.set_defaults(handler=handle)


def add_verify(commands: Commands) -> None:
    def handle(options: argparse.Namespace) -> None:
        from pns.commands.verify import verify_file

        verify_file(options.cases, options.out, options.processes, options.seconds, options.force)

    parser = commands.add_parser(
        "verify", help="compare predictions with gold answers, with a reason for each"
    )
    cases_help = (
        "JSONL with gold and prediction (a completion or an answer), optional unordered, tolerance, unit"
    )
    parser.add_argument("cases", type=Path, help=cases_help)
    out_help = "JSONL with verdict, extracted, reason and seconds, one line a case, in order"
    parser.add_argument("--out", type=Path, required=True, help=out_help)
    num_cores = len(os.sched_getaffinity(0))
    processes_help = "worker processes (default: the cores, %(default)s)"
    parser.add_argument("--processes", type=int, default=num_cores, help=processes_help)
    limit_help = "time limit of one case (default %(default)g)"
    parser.add_argument("--seconds", type=float, default=5.0, metavar="LIMIT", help=limit_help)
    parser.add_argument("--force", action="store_true", help="replace an existing --out file")
    parser.set_defaults(handler=handle)


def add_tiny(commands: Commands) -> None:
    def handle(options: argparse.Namespace) -> None:
        from pns.commands.tiny import make_tiny

        make_tiny(options.out, options.overrides)

    parser = commands.add_parser("tiny", help="make a backbone or the judge of the tiny world")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    make = actions.add_parser("make", help="train one from nothing and write it to OUT")
    make.add_argument("out", type=Path, help="directory to be made")
    overrides_help = "settings of pns.tiny.settings, e.g. task=judge architecture=llama seed=1"
    make.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=overrides_help)
    make.set_defaults(handler=handle)


if __name__ == "__main__":
    sys.exit(main())
