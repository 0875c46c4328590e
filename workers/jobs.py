"""The jobs of a cluster, by Ray's Job API at its dashboard. Whatever goes wrong there is one UserError."""

import asyncio
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from pns.errors import UserError

_OWN_KEYS = {"run", "page"}  # the metadata of every job of `pns submit`: name and page of its run
# To wait for an address to connect, and then for its answer: a head whose node is busy takes its time.
_ANSWER_SECONDS = 60.0
_LOOK_SECONDS = 0.5  # between looks at the state of a job
_PENDING_SECONDS = 10.0  # after which it is said that a job waits for a node
_ENDED_SECONDS = 30.0  # from the end of a job's log to its outcome
_ADDRESS_QUESTION = "is it the head's dashboard (http://HEAD:8265)"
_DRIVER_CPUS = 1.0  # of a node: a job that takes nothing may land on any


@dataclass(frozen=True)
class Job:
    """A job as the cluster knows it. `metadata` is what it was submitted with."""

    id: str
    state: str  # pending, running, stopped, succeeded, failed
    started: float  # seconds since 1970
    ended: float | None
    exit_code: int | None  # of the driver, where it ended by itself
    message: str
    metadata: Mapping[str, str]

    @property
    def is_over(self) -> bool:
        return JobStatus(self.state.upper()).is_terminal()


@dataclass(frozen=True)
class Submission:
    """What makes a job: a shell command in a runtime environment of Ray, with labels of the driver's node."""

    id: str
    entrypoint: str
    runtime_env: dict[str, Any]
    metadata: dict[str, str]
    labels: dict[str, str] = field(default_factory=dict)


class Jobs:
    """The jobs of the cluster whose dashboard is at `address`, an http or https URL. Raises UserError where
    it does not answer in time or refuses."""

    def __init__(self, address: str) -> None:
        self._address = address
        for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):  # Ray would take them instead
            os.environ.pop(name, None)
        # What they say is said in a line, or by no command.
        for logger in ("ray.dashboard", "ray._private.authentication", "ray._private.runtime_env"):
            logging.getLogger(logger).addHandler(logging.NullHandler())
            logging.getLogger(logger).propagate = False
        with self._in_one_line():
            self._client = _BoundedClient(address)

    def list(self) -> list[Job]:
        """Those that were submitted by `pns submit`, in their order."""
        with self._in_one_line():
            jobs = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted((job for job in jobs if job.metadata.keys() >= _OWN_KEYS), key=lambda job: job.started)

    def get(self, job_id: str) -> Job:
        with self._in_one_line():
            return _job(self._client.get_job_info(job_id))

    def submit(self, submission: Submission) -> None:
        placing = {"entrypoint_label_selector": submission.labels} if submission.labels else {}
        with self._in_one_line():
            self._client.submit_job(
                entrypoint=submission.entrypoint,
                submission_id=submission.id,
                runtime_env=submission.runtime_env,
                metadata=submission.metadata,
                entrypoint_num_cpus=_DRIVER_CPUS,
                **placing,
            )

    def logs(self, job_id: str) -> str:
        """What the driver has printed so far."""
        with self._in_one_line():
            return self._client.get_job_logs(job_id)

    def follow(self, job_id: str, show: Callable[[str], object]) -> Job:
        """Show what the driver prints until it ends, and give its outcome."""
        began, said = time.monotonic(), False
        while (job := self.get(job_id)).state == "pending":
            if not said and time.monotonic() - began > _PENDING_SECONDS:
                show(f"{job_id} is pending: {job.message}\n")
                said = True
            time.sleep(_LOOK_SECONDS)

        async def tail() -> None:
            async for text in self._client.tail_job_logs(job_id):
                show(text)

        with self._in_one_line():
            asyncio.run(tail())
        return self.wait(job_id, _ENDED_SECONDS)

    def stop(self, job_id: str) -> None:
        """Ask the driver to end; Ray kills it where it takes too long."""
        with self._in_one_line():
            self._client.stop_job(job_id)

    def wait(self, job_id: str, timeout_seconds: float) -> Job:
        """The job when it is over. Raises UserError after `timeout_seconds`."""
        deadline = time.monotonic() + timeout_seconds
        while not (job := self.get(job_id)).is_over:
            if time.monotonic() > deadline:
                pending = "Ray ends it when a node has taken it; " if job.state == "pending" else ""
                way_out = f"{pending}pns job list --address {self._address} shows how it ends"
                raise UserError(f"{job_id} is {job.state} after {timeout_seconds:g} s: {way_out}")
            time.sleep(_LOOK_SECONDS)
        return job

    @contextmanager
    def _in_one_line(self) -> Iterator[None]:
        try:
            yield
        except AuthenticationError as error:
            wrong = str(error).startswith("Authentication failed")
            fault = "refuses the token that it was sent" if wrong else "wants a token and was sent none"
            mode = "" if os.environ.get("RAY_AUTH_MODE") == "token" else "set RAY_AUTH_MODE=token, and "
            token = "RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH names, or ~/.ray/auth_token"
            way_out = f"{mode}put the cluster's (`ray get-auth-token` on its head) into {token}"
            raise UserError(f"{self._address} {fault}: {way_out}") from None
        except (OSError, aiohttp.ClientError) as error:  # those of requests are OSErrors
            fault = f"gives no answer ({type(error).__name__})"
            raise UserError(
                f"{self._address} {fault}: {_ADDRESS_QUESTION}, and reachable from here?"
            ) from None
        except (
            RuntimeError,
            ValueError,
        ) as error:  # what Ray refuses: its words, or a traceback of its server
            if "Version check returned 404" in str(error):
                raise UserError(f"{self._address} has no Job API: {_ADDRESS_QUESTION}?") from None
            lines = [line for line in str(error).splitlines() if re.search(r"\w", line)]
            said = lines[-1] if lines else type(error).__name__
            raise UserError(f"{self._address}: {said.strip()}") from None


class _BoundedClient(JobSubmissionClient):
    """Ray's client waits for an answer for ever."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, timeout=_ANSWER_SECONDS, **options)


def _job(details: JobDetails) -> Job:
    return Job(
        id=str(details.submission_id),
        state=details.status.value.lower(),
        started=(details.start_time or 0) / 1000,
        ended=details.end_time / 1000 if details.end_time else None,
        exit_code=details.driver_exit_code,
        message=details.message or "",
        metadata=details.metadata or {},
    )
