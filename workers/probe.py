"""Before the first stage on a joined cluster: every node sees the driver's files and has its versions.

One small task a node reads what the driver wrote into the directory of runs, writes back, and looks for the
models. Nodes that join later are not asked.
"""

import hashlib
import importlib.metadata
import platform
import shutil
import socket
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pns.config import Config, services
from pns.errors import UserError

_VERSIONS_OF = ("ray", "torch", "transformers")
_TOKEN = "driver"  # file of the probe's directory; the answers lie beside it, by their node
_ARRIVAL_SECONDS = 10.0  # for a file of another node to be seen, where the storage caches


@dataclass(frozen=True)
class View:
    """What a node sees: the driver's token ("": no such file), why it could not read or write ("": it could),
    the models that are not there, and its versions by name."""

    token: str
    error: str
    missing_models: list[str]
    versions: dict[str, str]


def local_models(config: Config, roles: Collection[str]) -> list[str]:
    """The models of `roles` that are directories here."""
    models = config.models
    named = (
        [models.backbone, models.generator, models.reward_model] if {"rollout", "policy"} & {*roles} else []
    )
    named += [own.model for name, own in services(config).items() if name in roles and not own.url]
    return [model for model in dict.fromkeys(named) if model and Path(model).is_dir()]


def look(probe: Path, answer: str, models: Sequence[str]) -> View:
    """What this process sees of the directory `probe`, into which it writes the file `answer`."""
    token, failure = "", ""
    try:
        if (probe / _TOKEN).is_file():
            token = (probe / _TOKEN).read_text(encoding="utf-8")
            (probe / answer).write_text(token, encoding="utf-8")
    except OSError as error:
        failure = str(error)
    return View(token, failure, [model for model in models if not Path(model).is_dir()], _versions())


def check_nodes(runs: Path, models: Sequence[str], limit_seconds: float) -> None:
    """Raise UserError, which names node and cause, unless every node of the cluster reads and writes `runs`
    (absolute), has the directories `models`, and has the driver's versions."""
    token = uuid4().hex
    probe = runs / f".probe-{token}"
    probe.mkdir(parents=True)
    try:
        (probe / _TOKEN).write_text(token, encoding="utf-8")
        faults = list(_faults(probe, token, models, limit_seconds))
    finally:
        shutil.rmtree(probe, ignore_errors=True)  # what another node wrote may be seen late
    if faults:
        more = f" (and {len(faults) - 1} more such faults)" if len(faults) > 1 else ""
        raise UserError(f"{faults[0]}{more}")


def _faults(probe: Path, token: str, models: Sequence[str], limit_seconds: float) -> Iterator[str]:
    asked: dict[Any, tuple[str, str]] = {}  # an answer -> the node's id and name
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(look).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
            asked[task.remote(probe, node["NodeID"], models)] = (node["NodeID"], node["NodeName"])
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=limit_seconds)
    for answer in done:
        node_id, name = asked[answer]
        try:
            view = ray.get(answer)
        except RayError as error:
            cause = str(error).strip().splitlines()[-1]
            yield f"node {name} cannot run this project's code ({cause}): give it the driver's environment"
        else:
            yield from _faults_of(view, name, probe, node_id, token)
    for answer in late:
        way_out = "look at its logs, remove it, or raise placement.start_timeout_seconds"
        yield f"node {asked[answer][1]} started no process within {limit_seconds:g} s: {way_out}"


def _faults_of(view: View, node: str, probe: Path, answer: str, token: str) -> Iterator[str]:
    runs, driver = probe.parent, f"the driver on {socket.gethostname()}"
    way_out = "put it on storage that all nodes share"
    if view.error:
        yield f"node {node} cannot read and write {runs} ({view.error}): let it, or set runs=DIR"
    elif view.token != token:
        yield f"node {node} does not see {runs} as {driver} does: {way_out}, and set runs=DIR"
    elif not _arrives(probe / answer, token):
        yield f"what node {node} writes to {runs} does not come to {driver}: {way_out}, and set runs=DIR"
    for model in view.missing_models:
        yield f"node {node} has no directory {model}, a model that {driver} has: {way_out}, or name a Hub id"
    for name, version in _versions().items():
        its_own = view.versions.get(name, "none")
        if its_own != version:
            yield f"node {node} has {name} {its_own}, {driver} has {version}: give both one environment"


def _arrives(file: Path, token: str) -> bool:
    end = time.monotonic() + _ARRIVAL_SECONDS
    while not (file.is_file() and file.read_text(encoding="utf-8") == token):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _versions() -> dict[str, str]:
    """Of Python, of libraries, and of this project: a hash of its code."""
    root = Path(__file__).parents[1]
    code = hashlib.sha256()
    for file in sorted([*root.glob("pns/**/*.py"), *root.glob("workers/**/*.py")]):
        code.update(file.read_bytes())
    libraries = {name: importlib.metadata.version(name) for name in _VERSIONS_OF}
    return {"python": platform.python_version(), **libraries, "pns": f"code {code.hexdigest()[:8]}"}
