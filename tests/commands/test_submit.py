"""`pns submit` and `pns job` against a real head with its dashboard and token authentication, and two nodes."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import IO, Any

import psutil
import pytest
from omegaconf import OmegaConf

from pns import cli
from pns.commands.submit import follow_to_the_end, numbered, run_command
from pns.config import to_dict
from pns.errors import UserError
from pns.recipe import load
from pns.run.place import Place
from workers import jobs
from workers.jobs import Job

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/tiny-qwen2.yaml"
SMALL = [
    "data.tiny.num_train=40",
    "data.tiny.num_reward=60",
    "data.tiny.num_preference=40",
    "data.tiny.num_test_per_suite=4",
    "placement.rollout.replicas=1",
    "placement.policy.replicas=1",
    "rollout.engine=transformers",
    "rl.steps=2",
    "rl.problems_per_step=4",
    "rl.completions_per_problem=2",
]
ZONES = ("sampling", "training")  # labels of two nodes beside the head
LIMIT_SECONDS = 600  # of one command; seconds where nothing else runs


def free_port() -> int:
    """Above those that Ray gives its workers, 10002 to 19999."""
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class Head:
    """A head of Ray with a token of its own, and `pns` as its user."""

    def __init__(self, directory: Path, runs: Path) -> None:
        self.directory, self.runs = directory, runs
        self.address = f"http://127.0.0.1:{free_port()}"
        token = directory / "token"
        token.write_text(secrets.token_hex(32))
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = inherited | {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
        }

    @contextmanager
    def running(self) -> Iterator[None]:
        port = free_port()
        dashboard = f"--dashboard-port={self.address.rpartition(':')[2]}"
        of_head = ["--head", f"--port={port}", dashboard, "--include-dashboard=true"]
        with open(self.directory / "log", "w") as log, ExitStack() as stack:
            head = stack.enter_context(self.node(log, *of_head, f"--temp-dir={self.directory}"))
            self.wait_until_it_answers(head)
            # One after the other: two raylets of one machine that start together may disturb each other.
            for number, zone in enumerate(ZONES, start=2):
                stack.enter_context(self.node(log, f"--address=127.0.0.1:{port}", f"--labels=zone={zone}"))
                deadline = time.monotonic() + 120
                while (self.directory / "log").read_text().count("Ray runtime started") < number:
                    assert time.monotonic() < deadline, (self.directory / "log").read_text()
                    time.sleep(0.2)
            yield

    @contextmanager
    def node(self, log: IO[str], *options: str) -> Iterator[subprocess.Popen[bytes]]:
        own = [f"--dashboard-agent-listen-port={free_port()}", "--num-cpus=16", "--disable-usage-stats"]
        node = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *own, *options],
            cwd=self.directory,
            env=self.environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield node
        finally:
            started = psutil.Process(node.pid).children(recursive=True)
            node.terminate()
            psutil.wait_procs(started, timeout=20)
            for process in started:
                if process.is_running():
                    process.kill()
            node.kill()
            node.wait()

    def wait_until_it_answers(self, head: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while self.pns("job", "list")[0] != 0:
            assert head.poll() is None, (self.directory / "log").read_text()
            assert time.monotonic() < deadline

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        """A `pns` command of this head."""
        address = ["--address", self.address] if words[0] in ("submit", "job") else []
        return subprocess.Popen(
            [sys.executable, "-m", "pns.cli", *words, *address],
            cwd=ROOT,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def pns(self, *words: str, **environment: str) -> tuple[int, str, str]:
        """Exit code, output and errors of a command."""
        command = self.start(*words, **environment)
        out, err = command.communicate(timeout=LIMIT_SECONDS)
        return command.returncode, out, err

    def recipe(self, name: str, *overrides: str) -> list[str]:
        run = [f"name={name}", f"runs={self.runs}", "--until", "rl"]
        return ["submit", RECIPE, *SMALL, *overrides, *run]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    directory = Path(tempfile.mkdtemp(prefix="pns-"))  # Ray's sockets have short paths
    head = Head(directory, tmp_path_factory.mktemp("runs"))
    try:
        with head.running():
            yield head
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def test_a_run_as_a_job_with_this_installation(head: Head) -> None:
    """Its roles on nodes of their own."""
    placed = ["placement.rollout.labels={zone: sampling}", "placement.policy.labels={zone: training}"]
    first = head.recipe("first", *placed)
    code, out, err = head.pns(*first, "--package", "--follow", "--env", "PNS_WORD=a b")
    assert (code, err) == (0, ""), out
    assert out.startswith(f"first-1: submitted; run {head.runs / 'first'}\n")
    assert f"{head.runs / 'first' / 'report.html'}" in out
    manifest = Place(head.runs / "first" / "rl").manifest()
    assert manifest
    assert "commit" not in manifest["versions"]  # of the package, which is no checkout
    # The same recipe again: there is nothing to do.
    code, out, err = head.pns(*first, "--follow")
    assert (code, err) == (0, "")
    assert out.startswith("first-2: ")
    assert "every stage is done" in out
    code, out, err = head.pns(*first, "--id", "first-1")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "first-1 already exists" in err


def test_a_label_that_no_node_has_is_one_line(head: Head) -> None:
    nowhere = head.recipe("nowhere", "placement.policy.labels={zone: moon}", "seed=3")
    code, out, err = head.pns(*nowhere, "--follow")
    assert (code, err) == (2, "pns: nowhere-1: failed, exit code 2\n")
    assert "pns: placement.policy.labels: no node of the cluster has zone=moon" in out


def test_a_job_that_fails_gives_its_exit_code(head: Head) -> None:
    """What only the cluster knows: it has no GPU."""
    code, out, err = head.pns(*head.recipe("failing", "placement.device=cuda", "seed=1"), "--follow")
    assert code == 2
    assert "pns: placement.device is cuda and the cluster offers no GPU" in out
    assert err == "pns: failing-1: failed, exit code 2\n"


def test_a_job_that_is_stopped_goes_on_from_its_last_step(head: Head) -> None:
    long = head.recipe("long", "rl.steps=2000", "seed=2")
    following = head.start(*long, "--follow")
    metrics = head.runs / "long" / "rl" / "metrics.jsonl"
    deadline = time.monotonic() + LIMIT_SECONDS
    while not metrics.exists() or metrics.read_text().count("\n") < 2:
        assert following.poll() is None, following.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    code, out, err = head.pns(*long)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{head.runs / 'long'} is made by job long-1 (running): pns job logs long-1 --follow" in err
    following.send_signal(signal.SIGINT)
    out, err = following.communicate(timeout=LIMIT_SECONDS)
    assert following.returncode == 130
    assert err.startswith("pns: long-1 goes on; pns job logs long-1 --follow shows it again")
    code, out, err = head.pns("job", "list")
    assert (code, err) == (0, "")
    assert ["long-1", "running"] in [line.split()[:2] for line in out.splitlines()]
    code, out, err = head.pns("job", "stop", "long")
    assert (code, err) == (0, "")
    assert out.startswith("long-1: stopped; ")
    num_steps = metrics.read_text().count("\n")
    checkpoint = Place(metrics.parent.resolve()).latest_checkpoint()
    assert checkpoint
    assert checkpoint.step == num_steps  # it ended its step, and nothing of it is made again
    code, out, err = head.pns("job", "logs", "long", "--follow")
    assert "pns: interrupted; the same command goes on with rl after its step" in out
    assert (code, err) == (1, "pns: long-1: stopped, exit code 1: Job was intentionally stopped.\n")


def test_a_wrong_token_and_none_are_one_line(head: Head, tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text(secrets.token_hex(32))
    code, out, err = head.pns("job", "list", RAY_AUTH_TOKEN_PATH=str(wrong))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{head.address} refuses the token that it was sent: put the cluster's" in err
    code, out, err = head.pns("job", "list", RAY_AUTH_MODE="disabled")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{head.address} wants a token and was sent none: set RAY_AUTH_MODE=token, and put" in err


def test_what_is_no_job_is_said(head: Head) -> None:
    code, out, err = head.pns("job", "stop", "absent")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "absent is neither a job nor a run of one" in err


def fail(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line of a command that exits with 2."""
    assert cli.main(list(words)) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


@pytest.fixture(autouse=True)
def _no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def test_an_address_that_nobody_listens_at(capsys: pytest.CaptureFixture[str]) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    assert f"{address} gives no answer (ConnectionError)" in fail(capsys, "job", "list", "--address", address)


def test_an_address_that_does_not_answer_is_given_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_ANSWER_SECONDS", 0.2)
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", address)
        assert f"{address} gives no answer (ReadTimeout)" in fail(capsys, "job", "list")


def test_another_server_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *words: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        serving = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        serving.start()
        address = f"http://127.0.0.1:{server.server_port}"
        said = fail(capsys, "job", "list", "--address", address)
        server.shutdown()
    assert f"{address} has no Job API: is it the head's dashboard" in said


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--address", "head:8265"], "'head:8265' is not the URL of a dashboard: give --address http://HEAD"),
        ([], "the cluster is not named: give --address"),
        (["--env", "TOKEN"], "--env 'TOKEN' is not of the form KEY=VALUE"),
        (["--label", "=a"], "--label '=a' is not of the form KEY=VALUE"),
        (["rl.stepz=1"], "did you mean rl.steps?"),
        (["models.backbone=/absent"], "models.backbone: /absent is neither a directory that exists"),
        (["--from", "pair", "--until", "rl"], "--until"),
    ],
)
def test_wrong_use_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], fault: str
) -> None:
    assert fault in fail(capsys, "submit", str(ROOT / RECIPE), f"runs={tmp_path}", *words)


def test_runs_in_the_working_directory_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in ([], ["runs=out"], ["runs=./runs"]):
        said = fail(capsys, "submit", str(ROOT / RECIPE), *words)
        assert "is in the working directory: name a directory that all nodes share" in said
    assert "the cluster is not named" in fail(
        capsys, "submit", str(ROOT / RECIPE), f"runs={tmp_path / 'runs'}"
    )


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_what_is_submitted_is_the_configuration(recipe: Path, tmp_path: Path) -> None:
    config = load(recipe, ["rl.steps=7", "reward.terms.coherence.pool.replicas=2", "runs=there"])
    submitted = tmp_path / "elsewhere" / "recipe.yaml"
    submitted.parent.mkdir()
    submitted.write_text(OmegaConf.to_yaml(OmegaConf.create(to_dict(config))))
    assert load(submitted) == config


class Following:
    """A cluster whose job prints a word and then ends in some way, or its connection does."""

    def __init__(self, end: Job | BaseException) -> None:
        self.end = end

    def follow(self, job_id: str, show: Callable[[str], object]) -> Job:
        show("word\n")
        if isinstance(self.end, BaseException):
            raise self.end
        return self.end


def ended(state: str, exit_code: int | None, message: str = "") -> Job:
    return Job("a-1", state, 1.0, 2.0, exit_code, message, {})


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        (ended("failed", 3, "failed with exit code 3, last logs:\nlog"), 3, "a-1: failed, exit code 3\n"),
        (ended("failed", None, "Traceback:\nno pip\n"), 1, "a-1: failed, exit code 1: no pip\n"),
        (UserError("http://h: lost"), 2, "http://h: lost; a-1 goes on: pns job logs a-1 --follow"),
        (KeyboardInterrupt(), 130, "a-1 goes on; pns job logs a-1 --follow"),
    ],
)
def test_the_exit_code_is_the_job_s(
    capsys: pytest.CaptureFixture[str], end: Job | BaseException, code: int, said: str
) -> None:
    jobs: Any = Following(end)
    with pytest.raises(SystemExit) as stopped:
        follow_to_the_end(jobs, "a-1")
    out, err = capsys.readouterr()
    assert (stopped.value.code, out, err.count("\n")) == (code, "word\n", 1)
    assert err.startswith(f"pns: {said}")


def test_a_job_that_succeeds_is_no_exit(capsys: pytest.CaptureFixture[str]) -> None:
    jobs: Any = Following(ended("succeeded", 0))
    follow_to_the_end(jobs, "a-1")
    assert capsys.readouterr().err == ""


def test_ids_and_command() -> None:
    assert numbered("a b/c", {"a-b-c-1", "a-b-c-2", "a-b-c-4"}) == "a-b-c-3"
    assert run_command(None, "rl") == "exec python -m pns.cli run recipe.yaml --until rl"
