"""The `pns` command. Nothing heavy is imported before arguments and configuration are known to be right."""

import argparse
import errno
import gc
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pns.commands.completion import (
    ASKED,
    SHELLS,
    answer_shell,
    complete_override,
    complete_recipe,
    complete_run,
    completed_by,
    print_completion,
)
from pns.commands.config import print_config
from pns.commands.plan import PlanOptions, plan_recipe
from pns.commands.recipes import find_recipe, print_recipes
from pns.commands.rescore import RESCORED_STAGES, rescore_run
from pns.commands.run import collect_garbage, list_runs, report_runs, run_recipe
from pns.commands.services import scale, show_status
from pns.commands.submit import STOP_SECONDS, SubmitOptions, list_jobs, show_logs, stop_job, submit_recipe
from pns.commands.tiny import make_tiny
from pns.commands.verify import verify_file
from pns.config import ALL_STAGES, RewardConfig
from pns.errors import UserError, did_you_mean
from pns.planning.hardware import GPU_KINDS
from pns.preflight import check_backbone, check_model, check_problems, check_runs
from pns.recipe import load
from pns.run.page import way_on
from pns.run.stopping import StopRequest, current_request, interruptible
from pns.run.terminal import Show

_OF_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
Commands = Any  # argparse's collection of subparsers, which has no public name


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 on success, 2 for wrong use with one line on stderr or for a plan that does not fit, 130
    after Ctrl-C, 143 after SIGTERM; other errors keep their traceback."""
    parser = build_parser()
    if ASKED in os.environ:
        answer_shell(parser)
    # Not `parse_args`: it takes positional words in one run, and calls overrides after an option unknown.
    options, rest = parser.parse_known_args(arguments)
    takes_overrides = "overrides" in options
    unknown = [word for word in rest if "=" not in word or word.startswith("-") or not takes_overrides]
    if unknown:
        hint = f"; a key goes without dashes: {unknown[0].lstrip('-')}" if "=" in unknown[0] else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint if takes_overrides else ''}")
    if rest:  # overrides that stand after an option
        options.overrides += rest
    stop = StopRequest()
    try:
        with interruptible(stop):
            exit_code = options.handler(options)
    except UserError as error:  # all else keeps its traceback: it is ours to mend
        print(f"pns: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(stop.words(), file=sys.stderr)
        gc.freeze()  # at its exit Python would look through all objects of torch and Ray, for seconds
        return stop.exit_code
    except BrokenPipeError:
        # `pns config | head`: the reader has what it wanted. Python flushes stdout once more at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except TimeoutError as error:  # it says what was waited for, and the key of the limit
        print(f"pns: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        fault = storage_fault(error)
        if not fault:
            raise
        way_out = "make room or choose another place; the same command goes on"
        print(f"pns: {fault}; {way_out}", file=sys.stderr)
        return 2
    return exit_code or 0


def storage_fault(error: Exception) -> str:
    """What the storage refuses, of an error of this process or of an actor; empty: the error is another."""
    cause = getattr(error, "cause", error)  # what an actor raised has an error of Ray's around it
    if isinstance(cause, OSError) and cause.errno in _OF_STORAGE:
        return f"{cause.filename or 'storage'}: {cause.strerror}"
    # safetensors has an error of its own, with the system's words.
    full = (os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT))
    return next((f"storage: {words}" for words in full if words in str(cause)), "")


def build_parser() -> ArgumentParser:
    meaning = (
        "Learn from plausible negative samples: reverse RL of a generator, then preference optimisation."
    )
    parser = ArgumentParser(prog="pns", description=meaning)
    parser.add_argument("--version", action="version", version=f"pns {version('pns')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_recipe_commands(commands)
    add_init(commands)
    add_doctor(commands)
    add_run_commands(commands)
    add_job_commands(commands)
    add_rescore(commands)
    add_evaluate(commands)
    add_export(commands)
    add_verify(commands)
    add_tiny(commands)
    add_completion(commands)
    return parser


def add_command(
    commands: Commands, name: str, meaning: str, handler: Callable[[Namespace], int | None], example: str
) -> ArgumentParser:
    sentence = f"{meaning[0].upper()}{meaning[1:]}."
    parser = commands.add_parser(name, help=meaning, description=sentence, epilog=f"Example: {example}")
    parser.set_defaults(handler=handler)
    return parser


def add_overrides(parser: ArgumentParser, meaning: str) -> None:
    words = parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=meaning)
    completed_by(words, complete_override)


def add_over(parser: ArgumentParser) -> None:
    over_help = "a file of keys over the recipe's, e.g. cluster/placements/2x8.yaml; may be repeated"
    parser.add_argument(
        "--with", dest="over", type=Path, action="append", default=[], metavar="FILE", help=over_help
    )


def stage_name(word: str) -> str:
    """The argument of --from and --until."""
    if word not in ALL_STAGES:
        near = did_you_mean(word, ALL_STAGES) or f"; the stages are {', '.join(ALL_STAGES)}"
        raise argparse.ArgumentTypeError(f"unknown stage {word!r}{near}")
    return word


def add_recipe(parser: ArgumentParser) -> None:
    recipe = parser.add_argument("recipe", help="a name that pns recipes lists, or a YAML file")
    completed_by(recipe, complete_recipe)
    add_overrides(parser, "configuration keys to change, e.g. rl.steps=10")
    add_over(parser)


def add_show(parser: ArgumentParser) -> None:
    less = parser.add_mutually_exclusive_group()
    less.add_argument("--quiet", action="store_true", help="print only what the run came to")
    json_help = "print what happens as JSON lines: stage, progress, note, end"
    less.add_argument("--json", action="store_true", help=json_help)


def shown(options: Namespace) -> Show:
    return Show.quiet if options.quiet else Show.json if options.json else Show.auto


def add_stage_range(parser: ArgumentParser) -> None:
    first_help = "make STAGE and what follows from it anew (old output is kept until pns gc)"
    parser.add_argument("--from", dest="first", type=stage_name, metavar="STAGE", help=first_help)
    last_help = f"stop after STAGE, one of: {', '.join(ALL_STAGES)}"
    parser.add_argument("--until", dest="last", type=stage_name, metavar="STAGE", help=last_help)


def add_recipe_commands(commands: Commands) -> None:
    def run(options: Namespace) -> None:
        recipe = find_recipe(options.recipe)
        run_recipe(recipe, options.overrides, options.first, options.last, options.over, shown(options))

    run_help = "make what is missing of a recipe's run, or go on with it"
    runs = add_command(commands, "run", run_help, run, "pns run tiny-qwen2 rl.steps=20 name=short")
    plan_help = "what a run takes: roles, memory, time, cost, and what does not fit; starts nothing"
    plan_example = "pns plan qwen2.5-7b --gpu h100 --price 2.5"
    plans = add_command(commands, "plan", plan_help, handle_plan, plan_example)
    add_plan_options(plans)

    def study(options: Namespace) -> None:
        from pns.commands.study import run_study

        run_study(find_recipe(options.recipe), options.overrides, options.over)

    study_help = "make the runs of a study (arms, seeds, backbones), or go on with them; write its page"
    study_example = "pns study study-tiny study.seeds=[0,1]"
    studies = add_command(commands, "study", study_help, study, study_example)
    for parser in (runs, plans, studies):
        add_recipe(parser)
    add_stage_range(runs)
    add_show(runs)

    config_help = "print keys with default, range and meaning, or a merged recipe"

    def config(options: Namespace) -> None:
        print_config(options.subject, options.overrides, options.over)

    parser = add_command(commands, "config", config_help, config, "pns config preference")
    subject_help = "a key or section, e.g. rl.steps or reward, or a recipe (name or file); nothing: every key"
    parser.add_argument("subject", nargs="?", default="", help=subject_help)
    add_overrides(parser, "with a recipe: keys to change")
    add_over(parser)


def add_init(commands: Commands) -> None:
    recipes_help = "list the recipes that come with PNS: name, backbone, hardware, what it is"
    add_command(commands, "recipes", recipes_help, lambda options: print_recipes(), "pns recipes")

    def init(options: Namespace) -> None:
        from pns.commands.init import init_recipe

        out = options.out or Path(f"{options.name}.yaml")
        init_recipe(options.name, options.backbone, options.train, options.suite, out)

    init_help = "write a recipe for a model and problems of your own"
    init_example = "pns init own --backbone Qwen/Qwen2.5-1.5B-Instruct --train problems.jsonl"
    parser = add_command(commands, "init", init_help, init, init_example)
    parser.add_argument("name", help="of the recipe and its run")
    parser.add_argument("--backbone", default="", metavar="MODEL", help="model directory or Hub id")
    train_help = "JSON lines with problem and answer, or a training set's name, e.g. math_train"
    parser.add_argument("--train", default="", metavar="FILE", help=train_help)
    suite_help = "problems to score models on; may be repeated (none: two benchmarks by their names)"
    parser.add_argument("--suite", action="append", default=[], metavar="NAME=FILE", help=suite_help)
    parser.add_argument("--out", type=Path, metavar="FILE", help="default NAME.yaml; never replaced")


def add_doctor(commands: Commands) -> None:
    def handle(options: Namespace) -> int:
        from pns.commands.doctor import examine

        recipe = find_recipe(options.recipe) if options.recipe else None
        return examine(recipe, options.overrides, options.over, options.json)

    meaning = "what of this machine would stop a run or slow it down, each with a way out"
    parser = add_command(commands, "doctor", meaning, handle, "pns doctor tiny-qwen2")
    recipe_help = "a recipe to check against this machine too (exit code 2 with a fault, as without one)"
    completed_by(parser.add_argument("recipe", nargs="?", default="", help=recipe_help), complete_recipe)
    add_overrides(parser, "with a recipe: keys to change")
    add_over(parser)
    parser.add_argument("--json", action="store_true", help="the rows as JSON")


def add_plan_options(parser: ArgumentParser) -> None:
    cluster_help = (
        "YAML with nodes.NAME: count, gpus, gpu, cpus, memory_gb, ...; exit code 2 if it is too small"
    )
    parser.add_argument("--cluster", type=Path, metavar="FILE", help=cluster_help)
    gpu_help = f"plan for GPUs of this kind, in machines of eight: {', '.join(GPU_KINDS)}"
    parser.add_argument("--gpu", default="", metavar="KIND", help=gpu_help)
    parser.add_argument("--price", type=float, default=0.0, metavar="PRICE", help="of one GPU for an hour")
    prompt_help = "mean prompt, tokens (see --assumptions)"
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help=prompt_help)
    completion_help = "mean completion, tokens"
    parser.add_argument("--completion-tokens", type=int, metavar="N", help=completion_help)
    parser.add_argument("--json", action="store_true", help="all figures as JSON")
    parser.add_argument(
        "--assumptions", action="store_true", help="print what is taken for granted, with its source"
    )


def handle_plan(options: Namespace) -> int:
    own = PlanOptions(
        cluster=options.cluster,
        gpu=options.gpu,
        price=options.price,
        prompt_tokens=options.prompt_tokens,
        completion_tokens=options.completion_tokens,
        as_json=options.json,
        assumptions=options.assumptions,
    )
    return plan_recipe(find_recipe(options.recipe), options.overrides, own, options.over)


def add_run_commands(commands: Commands) -> None:
    report_help = "print a run's tables again and rebuild its report; or compare models over several runs"

    def handle_report(options: Namespace) -> None:
        report_runs(options.directories, options.against, options.json)

    report_example = "pns report runs/tiny-qwen2"
    report = add_command(commands, "report", report_help, handle_report, report_example)
    directories_help = "a run, e.g. runs/tiny-qwen2, or several of one recipe with other seeds"
    runs_shown = report.add_argument(
        "directories", type=Path, nargs="+", metavar="RUN", help=directories_help
    )
    completed_by(runs_shown, complete_run)
    against_help = "differences from this model too, beside those from the first; may be repeated"
    report.add_argument("--against", action="append", default=[], metavar="MODEL", help=against_help)
    report.add_argument("--json", type=Path, metavar="FILE", help="write the comparison there")
    status_help = "show what the services of a run do: replicas, queue, speed, failures"
    status = add_command(
        commands,
        "status",
        status_help,
        lambda options: show_status(options.directory, options.watch),
        "pns status runs/tiny-qwen2 --watch",
    )
    status.add_argument("--watch", action="store_true", help="until Ctrl-C or the end of the run")
    scale_help = "give services of a run that is at work another number of replicas"
    scaling = add_command(
        commands,
        "scale",
        scale_help,
        lambda options: scale(options.directory, options.overrides, options.timeout),
        "pns scale runs/tiny-qwen2 coherence=4",
    )
    for parser in (status, scaling):
        directory = parser.add_argument("directory", type=Path, help="a run, e.g. runs/tiny-qwen2")
        completed_by(directory, complete_run)
    terms_help = "a reward term and its replicas, e.g. coherence=4, until the run ends or is started again"
    scaling.add_argument("overrides", nargs="+", metavar="TERM=N", help=terms_help)
    timeout_help = "seconds to wait for it (default %(default)g)"
    scaling.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help=timeout_help)
    runs_help = "list runs and the outputs of their stages, with size and age"
    runs = add_command(commands, "runs", runs_help, lambda options: list_runs(options.runs), "pns runs")
    gc_help = "remove stage outputs that no run leads to, after asking"
    gc = add_command(
        commands, "gc", gc_help, lambda options: collect_garbage(options.runs, options.yes), "pns gc"
    )
    gc.add_argument("--yes", action="store_true", help="do not ask")
    where_help = "the directory of runs (default %(default)s)"
    for parser in (runs, gc):
        parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help=where_help)


def add_job_commands(commands: Commands) -> None:
    def submit(options: Namespace) -> None:
        how = SubmitOptions(
            address=options.address,
            first=options.first,
            last=options.last,
            id=options.id,
            env=options.env,
            labels=options.labels,
            package=options.package,
            follow=options.follow,
        )
        submit_recipe(find_recipe(options.recipe), options.overrides, how, options.over)

    submit_help = "make a recipe's run, or go on with it, as a job of a Ray cluster"
    submit_example = "pns submit qwen2.5-7b --address http://HEAD:8265 runs=/shared/runs --follow"
    submits = add_command(commands, "submit", submit_help, submit, submit_example)
    add_recipe(submits)
    add_stage_range(submits)
    follow_help = "show what it prints until it ends, and exit as it does; Ctrl-C leaves it running"
    submits.add_argument("--follow", action="store_true", help=follow_help)
    id_help = "id of the job (default: name of the run, and a number)"
    submits.add_argument("--id", help=id_help)
    env_help = "variable for driver and actors, e.g. HF_HOME=/shared/hf; may be given again"
    submits.add_argument("--env", action="append", default=[], metavar="KEY=VALUE", help=env_help)
    label_help = "label of the node that the driver runs on; may be given again"
    submits.add_argument(
        "--label", dest="labels", action="append", default=[], metavar="KEY=VALUE", help=label_help
    )
    package_help = "send this installation of pns along, in place of the cluster's own"
    submits.add_argument("--package", action="store_true", help=package_help)

    job = commands.add_parser("job", help="list the jobs of pns submit, show what they print, stop one")
    actions = job.add_subparsers(required=True, metavar="ACTION")
    list_help = "id, state, age and run of each"
    lists = add_command(
        actions, "list", list_help, lambda options: list_jobs(options.address), "pns job list"
    )
    logs_help = "print what a job's driver has printed"
    logs = add_command(
        actions,
        "logs",
        logs_help,
        lambda options: show_logs(options.job, options.address, options.follow),
        "pns job logs qwen2.5-7b --follow",
    )
    logs.add_argument("--follow", action="store_true", help=follow_help)
    stop_help = "end a job; pns submit goes on with its run later"
    stop = add_command(
        actions,
        "stop",
        stop_help,
        lambda options: stop_job(options.job, options.address, options.timeout),
        "pns job stop qwen2.5-7b",
    )
    timeout_help = "seconds to wait for its end (default %(default)g)"
    longest = STOP_SECONDS + 30.0
    stop.add_argument("--timeout", type=float, default=longest, metavar="SECONDS", help=timeout_help)
    for parser in (logs, stop):
        parser.add_argument("job", metavar="JOB", help="its id, or the name of its run: the last job of it")
    address_help = "URL of the cluster's dashboard (default: RAY_API_SERVER_ADDRESS, or RAY_ADDRESS)"
    for parser in (submits, lists, logs, stop):
        parser.add_argument("--address", metavar="URL", help=address_help)


def add_rescore(commands: Commands) -> None:
    def handle(options: Namespace) -> None:
        choice = options.stage, options.out, options.ask_failed
        rescore_run(options.directory, options.overrides, *choice)

    rescore_help = "reward a run's stored rollouts by other rules, and compare"
    rescore_example = "pns rescore runs/tiny-qwen2 reward.terms.coherence.weight=0.1"
    parser = add_command(commands, "rescore", rescore_help, handle, rescore_example)
    run_help = "a run, e.g. runs/tiny-qwen2; it is not changed"
    completed_by(parser.add_argument("directory", type=Path, help=run_help), complete_run)
    add_overrides(parser, "keys below reward. to change, e.g. reward.terms.coherence.weight=0.1")
    stage_help = "whose rollouts: %(choices)s (default %(default)s)"
    parser.add_argument("--stage", choices=RESCORED_STAGES, default=RESCORED_STAGES[0], help=stage_help)
    out_help = "new JSONL file of the rollouts (default RUN/rescored/STAGE-DIGEST.jsonl)"
    parser.add_argument("--out", type=Path, metavar="FILE", help=out_help)
    failed_help = "ask again for what a service failed to answer"
    parser.add_argument("--ask-failed", action="store_true", help=failed_help)


def add_evaluate(commands: Commands) -> None:
    evaluate_help = "score a model on benchmarks, or go on with it; needs no recipe"
    evaluate_example = "pns evaluate Qwen/Qwen2.5-7B-Instruct benchmarks=[gsm8k,math500] out=runs/base"
    parser = add_command(commands, "evaluate", evaluate_help, handle_evaluate, evaluate_example)
    parser.add_argument(
        "model", nargs="?", default="", help="model directory, Hub id, or http://HOST:PORT/v1 of a server"
    )
    name_help = "name of the model at the server; its key is in the environment (evaluate.endpoint)"
    parser.add_argument("--model", dest="served", metavar="NAME", help=name_help)
    outputs = "out=DIR (default runs/evaluate-MODEL), data.root=DIR (local copies)"
    add_overrides(parser, f"benchmarks=[gsm8k,math500,...], {outputs}, any configuration key")
    recipe_help = "name or YAML file of a recipe whose suites, engine, placement and prompt are used"
    parser.add_argument("--recipe", help=recipe_help)
    against_help = "an earlier evaluation (DIR, or DIR/evaluate/MODEL.jsonl) to compare with"
    parser.add_argument("--against", type=Path, metavar="DIR", help=against_help)
    rejudge_help = (
        "judge the stored completions of a run or an evaluation again, and print what changed; no MODEL"
    )
    parser.add_argument("--rejudge", type=Path, metavar="DIR", help=rejudge_help)
    golds_help = "of --rejudge: by the gold answers that the suites have now (data.root=DIR says where)"
    parser.add_argument("--new-golds", action="store_true", help=golds_help)
    show_help = "print one prompt as the model reads it, and how suites are decoded"
    parser.add_argument("--show-prompt", action="store_true", help=show_help)


def handle_evaluate(options: Namespace) -> None:
    if options.rejudge:
        if options.model:
            raise UserError(f"--rejudge asks no model: leave {options.model} out")
        from pns.commands.rejudge import rejudge

        limits = len(os.sched_getaffinity(0)), RewardConfig().verify_seconds
        rejudge(options.rejudge, *limits, options.overrides, options.new_golds)
        return
    if options.new_golds:
        raise UserError("--new-golds is of --rejudge DIR: an evaluation takes the gold answers of now anyway")
    if not options.model:
        raise UserError("name a MODEL (a directory or a Hub id), or --rejudge DIR for stored completions")
    at_endpoint = options.model.startswith(("http://", "https://"))
    if at_endpoint != bool(options.served):
        raise UserError("pns evaluate: a server's address (http://HOST:PORT/v1) and --model NAME go together")
    model = options.served or options.model
    out = Path("runs") / f"evaluate-{Path(model).name}"
    settings = [f"models.backbone={model}"]
    if at_endpoint:
        settings.append(f"evaluate.endpoint.url={options.model}")
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
    recipe = find_recipe(options.recipe) if options.recipe else None
    config = load(recipe, [*settings, f"runs={out.parent}", f"name={out.name}"], training=False)
    check_problems(config, training=False)
    if not at_endpoint:
        check_model("MODEL", options.model)
        check_backbone(config)
    if not options.show_prompt:
        check_runs(config)
        current_request().way_out = lambda: way_on(Path(config.runs) / config.name)
        print(f"{model}: its evaluation is in {out}; loading libraries", flush=True)
    from pns.commands import evaluate  # takes seconds: what is wrong has been said by now

    # A recipe is asked as it says; so is rollout.max_new_tokens.
    said = options.recipe or any(word.startswith("rollout.max_new_tokens=") for word in options.overrides)
    choose_limit = not (said or at_endpoint) and config.evaluate.max_new_tokens is None
    if options.show_prompt:
        evaluate.show_prompt(config, choose_limit)
    else:
        evaluate.evaluate_model(config, options.against, choose_limit)


def add_export(commands: Commands) -> None:
    def handle(options: Namespace) -> None:
        from pns.commands.export import export

        export(options.directory, options.out, pairs=not options.model_only, model=not options.pairs_only)

    export_help = "write a run's pairs and trained model, each with a card"
    parser = add_command(commands, "export", export_help, handle, "pns export runs/tiny-qwen2 exported")
    run_help = "a run, e.g. runs/tiny-qwen2"
    completed_by(parser.add_argument("directory", type=Path, help=run_help), complete_run)
    parser.add_argument("out", type=Path, help="directory to be made: OUT/pairs and OUT/model")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--pairs-only", action="store_true", help="no model")
    part.add_argument("--model-only", action="store_true", help="no pairs")


def add_verify(commands: Commands) -> None:
    def handle(options: Namespace) -> None:
        limits = options.processes, options.seconds
        verify_file(options.cases, options.out, *limits, options.force, not options.evaluation)

    verify_help = "compare predictions with gold answers, with a reason for each"
    verify_example = "pns verify cases.jsonl --out verdicts.jsonl"
    parser = add_command(commands, "verify", verify_help, handle, verify_example)
    fields = "gold and prediction (a completion or an answer), optional unordered, tolerance, unit"
    parser.add_argument("cases", type=Path, help=f"JSONL with {fields}; - for standard input")
    out_help = "JSONL with verdict, extracted, reason and seconds, one line a case, in order"
    parser.add_argument("--out", type=Path, required=True, help=out_help)
    num_cores = len(os.sched_getaffinity(0))  # those this process may use, which `cpu_count` does not know
    processes_help = "worker processes (default: the cores, %(default)s)"
    parser.add_argument("--processes", type=int, default=num_cores, help=processes_help)
    limit_help = "limit of one case, in processor time (default %(default)g)"
    parser.add_argument("--seconds", type=float, default=5.0, metavar="LIMIT", help=limit_help)
    evaluation_help = "wrong by the exact comparison alone: many times faster, but not for negatives"
    parser.add_argument("--evaluation", action="store_true", help=evaluation_help)
    parser.add_argument("--force", action="store_true", help="replace an existing --out file")


def add_tiny(commands: Commands) -> None:
    tiny = commands.add_parser("tiny", help="make a backbone or the judge of the tiny world")
    actions = tiny.add_subparsers(required=True, metavar="ACTION")
    make_help = "train one from nothing and write it to OUT"
    parser = add_command(
        actions,
        "make",
        make_help,
        lambda options: make_tiny(options.out, options.overrides),
        "pns tiny make models/judge task=judge",
    )
    parser.add_argument("out", type=Path, help="directory to be made")
    add_overrides(parser, "settings of pns.tiny.settings, e.g. task=judge architecture=llama seed=1")


def add_completion(commands: Commands) -> None:
    meaning = "print a shell's code that completes verbs, recipes, keys and runs"
    example = 'eval "$(pns completion bash)", in ~/.bashrc'
    parser = add_command(
        commands, "completion", meaning, lambda options: print_completion(options.shell), example
    )
    parser.add_argument("shell", choices=SHELLS)


if __name__ == "__main__":
    sys.exit(main())
