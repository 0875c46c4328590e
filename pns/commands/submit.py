"""`pns submit` and `pns job`: runs as jobs of a Ray cluster.

What is submitted is the merged, checked configuration with absolute paths, a file of some kilobytes: models,
data and `runs` lie where all nodes see them, and nothing of the working directory is sent.
"""

import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from os import environ
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NoReturn

from omegaconf import OmegaConf

from pns.commands.run import check_stages, readable_age
from pns.config import Config, stages, to_dict
from pns.errors import UserError
from pns.preflight import check_models, check_problems
from pns.recipe import load
from pns.run.place import versions

if TYPE_CHECKING:  # imports Ray
    from workers.jobs import Job, Jobs

STOP_SECONDS = 90  # from SIGTERM to SIGKILL; Ray's own 3 s are short for actors and a checkpoint
_ROOT = Path(__file__).parents[2]
_RECIPE = "recipe.yaml"  # in the job's working directory


@dataclass(frozen=True)
class SubmitOptions:
    """How a recipe is submitted: the stages, and the job's id, environment and node."""

    address: str | None = None
    first: str | None = None
    last: str | None = None
    id: str | None = None
    env: Sequence[str] = ()
    labels: Sequence[str] = ()
    package: bool = False
    follow: bool = False


def submit_recipe(
    recipe: Path, overrides: Sequence[str], options: SubmitOptions, over: Sequence[Path] = ()
) -> None:
    """Submit the recipe's run as a job, and (`follow`) show it until it ends, with its exit code."""
    config = load(recipe, list(overrides), over=over)
    check_stages(config, options.first, options.last)
    check_models(config, stages(config, options.last))
    check_problems(config)
    check_runs_are_shared(config, overrides)
    # Ray reads its own waiting time from the job's environment.
    env = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)} | key_values("--env", options.env)
    labels = key_values("--label", options.labels)
    jobs = cluster_jobs(options.address)
    from workers.jobs import Submission

    page = str(Path(config.runs) / config.name)
    known = jobs.list()
    for job in known:
        if job.metadata["page"] == page and not job.is_over:
            way_out = f"pns job logs {job.id} --follow shows it, pns job stop {job.id} ends it"
            raise UserError(f"{page} is made by job {job.id} ({job.state}): {way_out}")
    job_id = options.id or numbered(config.name, {job.id for job in known})
    with TemporaryDirectory() as directory:
        (Path(directory) / _RECIPE).write_text(OmegaConf.to_yaml(OmegaConf.create(to_dict(config))))
        runtime_env = {"working_dir": directory, "env_vars": env}
        if options.package:
            runtime_env["py_modules"] = [str(_ROOT / "pns"), str(_ROOT / "workers")]
        metadata = job_metadata(recipe, config, page)
        entrypoint = run_command(options.first, options.last)
        jobs.submit(Submission(job_id, entrypoint, runtime_env, metadata, labels))
    print(f"{job_id}: submitted; run {page}")
    if options.follow:
        follow_to_the_end(jobs, job_id)
    else:
        print(f"pns job logs {job_id} --follow shows it, pns job stop {job_id} ends it")


def list_jobs(address: str | None) -> None:
    """Print the cluster's jobs that `pns submit` made: id, state, how long ago, page of the run."""
    jobs = cluster_jobs(address).list()
    width = max([16, *(len(job.id) + 2 for job in jobs)])
    for job in jobs:
        ago = readable_age(time.time() - (job.ended or job.started))
        print(f"{job.id:<{width}}{job.state:<11}{ago:>7} ago  {job.metadata['page']}")
    if not jobs:
        print("no job was submitted by pns submit")


def show_logs(word: str, address: str | None, follow: bool) -> None:
    """Print what the driver of a job prints; `follow`: until it ends, with its exit code."""
    jobs = cluster_jobs(address)
    job = named_job(jobs, word)
    if follow:
        follow_to_the_end(jobs, job.id)
    else:
        print(jobs.logs(job.id), end="")


def stop_job(word: str, address: str | None, timeout_seconds: float) -> None:
    """End a job, and wait for it."""
    jobs = cluster_jobs(address)
    job = named_job(jobs, word)
    if not job.is_over:
        jobs.stop(job.id)
        job = jobs.wait(job.id, timeout_seconds)
    print(f"{job.id}: {job.state}; pns submit with the same recipe goes on from what is kept")


def check_runs_are_shared(config: Config, overrides: Sequence[str]) -> None:
    """Raises UserError where `runs` is in the working directory and nobody said so: to the cluster's nodes
    that may be a directory of their own."""
    said = any(word.startswith("runs=/") for word in overrides)
    if not said and Path(config.runs).is_relative_to(Path.cwd()):
        way_out = "name a directory that all nodes share by its full path, e.g. runs=/shared/runs"
        raise UserError(f"runs: {config.runs} is in the working directory: {way_out}")


def key_values(option: str, words: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE words as a dict. Raises UserError for one of another form."""
    pairs = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals):
            raise UserError(f"{option} {word!r} is not of the form KEY=VALUE")
        pairs[name] = value
    return pairs


def cluster_jobs(address: str | None) -> "Jobs":
    """The jobs at --address, else at Ray's own variables. Raises UserError."""
    url = address or environ.get("RAY_API_SERVER_ADDRESS") or environ.get("RAY_ADDRESS", "")
    if not re.match("https?://[^/]", url):
        fault = f"{url!r} is not the URL of a dashboard" if url else "the cluster is not named"
        way_out = "give --address http://HEAD:8265, or set RAY_API_SERVER_ADDRESS"
        raise UserError(f"{fault}: {way_out}")
    from workers.jobs import Jobs  # takes seconds: what is wrong has been said by now

    return Jobs(url)


def numbered(name: str, taken: set[str]) -> str:
    """`name` with the first number that makes an id of no job."""
    stem = re.sub(r"[^\w.-]", "-", name)
    number = 1
    while f"{stem}-{number}" in taken:
        number += 1
    return f"{stem}-{number}"


def job_metadata(recipe: Path, config: Config, page: str) -> dict[str, str]:
    """What `pns job` knows a job by, and what it was made of."""
    own = versions()
    made_of = {"pns": own.get("pns") or "unknown", "commit": own.get("commit") or "unknown"}
    return {"run": config.name, "page": page, "recipe": str(recipe.absolute()), **made_of}


def run_command(first: str | None, last: str | None) -> str:
    """The job's shell command. `exec`: signals and exit code are those of the driver itself."""
    words = ["exec", "python", "-m", "pns.cli", "run", _RECIPE]
    for option, stage in (("--from", first), ("--until", last)):
        words += [option, stage] if stage else []
    return shlex.join(words)


def named_job(jobs: "Jobs", word: str) -> "Job":
    """The job of an id, else the last one of a run's name. Raises UserError."""
    known = jobs.list()
    named = [job for job in known if job.id == word] or [
        job for job in known if word in (job.metadata["run"], job.metadata["page"])
    ]
    if not named:
        there = ", ".join(job.id for job in known[-5:]) or "none"
        raise UserError(f"{word} is neither a job nor a run of one; the last jobs are: {there}")
    return named[-1]


def follow_to_the_end(jobs: "Jobs", job_id: str) -> None:
    """Raises SystemExit with the driver's exit code, or 1 where it has none, unless the job succeeds."""
    try:
        job = jobs.follow(job_id, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        again = f"pns job logs {job_id} --follow shows it again, pns job stop {job_id} ends it"
        leave(f"{job_id} goes on; {again}", 130)
    except UserError as error:  # of the connection: the driver knows nothing of it
        leave(f"{error}; {job_id} goes on: pns job logs {job_id} --follow shows it again", 2)
    if job.state != "succeeded":
        code = job.exit_code or 1
        # Where the driver has ended by itself its output has said why.
        cause = (job.message.strip().splitlines() or [""])[-1] if job.exit_code is None else ""
        leave(f"{job_id}: {job.state}, exit code {code}{cause and f': {cause}'}", code)


def leave(message: str, code: int) -> NoReturn:
    print(f"pns: {message}", file=sys.stderr)
    raise SystemExit(code)
