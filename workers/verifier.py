"""math-verify in killable processes: one expression that never ends costs its own time limit and nothing else.

Sampled answers are untrusted: `9^{9^{9}}` keeps sympy busy for ever, and other input exhausts memory or crashes the interpreter. Each of
`processes` threads owns one *keeper* process, which has math-verify imported and forks the worker that does the comparing. A worker over
its limit is killed and the keeper forks the next one in milliseconds. The limit counts from the moment an idle worker is given the item.
Every process dies with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pns.algo.answers import extract_boxed, same_answer
from pns.records import Verdict

_START_SECONDS = 120.0  # for a keeper to import math-verify and fork its worker
_MEMORY_GIB = 4  # address space of a worker
_MAX_CHARACTERS = 2000  # of an answer; longer ones are not parsed
_INTEGER = re.compile(r"[+-]?\d{1,100}")


@dataclass(frozen=True)
class VerifierResult:
    """`cause` is None when the verdict is CORRECT or WRONG, else why it could not be decided:

    no_answer      no boxed answer in the prediction        gold         math-verify cannot read the gold answer
    too_long       the answer has over 2,000 characters     unparsable   math-verify cannot read the prediction's answer
    timeout        over the limit, the worker was killed    comparison   math-verify failed while comparing
    crashed        the worker died                          disagreement math-verify says different, `same_answer` says equal
    not_started    no worker could be started

    `extracted` is the prediction's boxed answer as written, None where there is none.
    """

    verdict: Verdict
    cause: str | None
    extracted: str | None


Handle = list[Future[VerifierResult]]


class Verifier:
    """Compares predictions with gold answers in `processes` worker processes, at most `limit_seconds` of work each.

    Needs no main guard in the calling script: the workers are started from this module, not from the caller's.
    """

    def __init__(self, processes: int, limit_seconds: float) -> None:
        self._limit_seconds = limit_seconds
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._serve, name=f"verifier-{i}", daemon=True) for i in range(processes)]
        for thread in self._threads:
            thread.start()

    def submit(self, items: Sequence[tuple[str, str]]) -> Handle:
        """Begin verifying (gold answer, prediction text) items, without waiting; `collect` gives the results in the same order."""
        return [self._begin(gold, text) for gold, text in items]

    def done(self, handle: Handle) -> bool:
        """Whether `collect` would not wait."""
        return all(future.done() for future in handle)

    def collect(self, handle: Handle) -> list[VerifierResult]:
        """The results of one `submit`. Waits as long as the queued work can take at most; raises TimeoutError after that."""
        longest = (self._limit_seconds + _START_SECONDS) * (self._jobs.qsize() + len(handle) + 1)
        late = wait(handle, timeout=longest).not_done
        if late:
            raise TimeoutError(f"verifier: {len(late)} of {len(handle)} verifications did not end within {longest:.0f} s")
        return [future.result() for future in handle]

    def verify_many(self, items: Sequence[tuple[str, str]]) -> list[VerifierResult]:
        """Verify (gold answer, prediction text) items and wait for them."""
        return self.collect(self.submit(items))

    def shutdown(self) -> None:
        """Stop the processes; items that wait are cancelled. Raises TimeoutError if a process does not end."""
        while not self._jobs.empty():
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job:
                job.future.cancel()
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + self._limit_seconds + _START_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                raise TimeoutError(f"verifier: thread {thread.name} did not stop its process")

    def _begin(self, gold: str, text: str) -> Future[VerifierResult]:
        future: Future[VerifierResult] = Future()
        extracted = extract_boxed(text)
        decided = decide_without_process(gold, extracted)
        if decided:
            future.set_result(decided)
        else:
            assert extracted is not None
            self._jobs.put(_Job(gold, extracted, future))
        return future

    def _serve(self) -> None:
        worker = _Worker.start()
        while (job := self._jobs.get()) is not None:
            if not job.future.set_running_or_notify_cancel():
                continue
            worker = worker or _Worker.start()
            verdict, cause = worker.compare(job.gold, job.extracted, self._limit_seconds) if worker else (Verdict.UNVERIFIED, "not_started")
            if worker and worker.gone:
                worker = None
            job.future.set_result(VerifierResult(verdict, cause, job.extracted))
        if worker:
            worker.stop()


def decide_without_process(gold: str, extracted: str | None) -> VerifierResult | None:
    """The verdict where no parsing is needed: no answer, the same characters, or two plain integers; None otherwise."""
    if extracted is None:
        return VerifierResult(Verdict.UNVERIFIED, "no_answer", None)
    if not gold.strip():
        return VerifierResult(Verdict.UNVERIFIED, "gold", extracted)
    if gold.strip() == extracted:
        return VerifierResult(Verdict.CORRECT, None, extracted)
    if len(extracted) > _MAX_CHARACTERS or len(gold) > _MAX_CHARACTERS:
        return VerifierResult(Verdict.UNVERIFIED, "too_long", extracted)
    if _INTEGER.fullmatch(gold.strip()) and _INTEGER.fullmatch(extracted):
        return VerifierResult(Verdict.CORRECT if int(gold) == int(extracted) else Verdict.WRONG, None, extracted)
    return None


@dataclass(frozen=True)
class _Job:
    gold: str
    extracted: str
    future: Future[VerifierResult]


class _Worker:
    """The parent's end of a keeper process and its current worker."""

    def __init__(self, keeper: subprocess.Popen[bytes], connection: Connection[Any, Any]) -> None:
        self._keeper = keeper
        self._connection = connection
        self._pid = 0  # of the worker
        self._job = 0
        self.gone = False

    @classmethod
    def start(cls) -> _Worker | None:
        """A keeper whose worker is ready; None where that fails (the keeper's own message is on stderr)."""
        ours, theirs = Pipe()
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        try:
            keeper = subprocess.Popen(
                [sys.executable, "-m", "workers.verifier", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )
        except OSError:  # no memory or no process left
            return None
        finally:
            theirs.close()
        worker = cls(keeper, ours)
        worker._await_ready()
        return None if worker.gone else worker

    def compare(self, gold: str, extracted: str, limit_seconds: float) -> tuple[Verdict, str | None]:
        """The worker's verdict and cause; UNVERIFIED when it takes longer than the limit (it is killed) or dies."""
        self._job += 1
        try:
            while self._connection.poll(0):  # a worker that died while idle has a successor
                self._receive()
            self._connection.send((self._job, gold, extracted))
            end = time.monotonic() + limit_seconds
            while self._connection.poll(max(0.0, end - time.monotonic())):
                job, answer = self._receive()
                if job == self._job:
                    return answer
                if job == 0:
                    return Verdict.UNVERIFIED, "crashed"
            _kill(self._pid)
            self._await_ready()
            return Verdict.UNVERIFIED, "timeout"
        except (EOFError, OSError):
            self.stop()
            return Verdict.UNVERIFIED, "crashed"

    def stop(self) -> None:
        """End keeper and worker."""
        self.gone = True
        self._connection.close()  # an idle worker reads the end of file and exits; its keeper follows
        try:
            self._keeper.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self._keeper.kill()  # the worker dies with it
            self._keeper.wait()

    def _receive(self) -> tuple[int, Any]:
        job, answer = self._connection.recv()
        if job == 0:
            self._pid = answer
        return job, answer

    def _await_ready(self) -> None:
        """Wait for a new worker's announcement; without it the keeper is stopped."""
        end = time.monotonic() + _START_SECONDS
        try:
            while self._connection.poll(max(0.0, end - time.monotonic())):
                if self._receive()[0] == 0:
                    return
        except (EOFError, OSError):
            pass
        self.stop()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


# ------------------------------------------------------------------------------------------------ inside the keeper and the worker


def compare(gold: str, extracted: str) -> tuple[Verdict, str | None]:
    """math-verify's verdict on two answers, without a time limit. Meant for a process that can be killed."""
    from math_verify import verify

    gold_parsed = _parse(gold)
    if not gold_parsed:
        return Verdict.UNVERIFIED, "gold"
    parsed = _parse(extracted)
    if not parsed:
        return Verdict.UNVERIFIED, "unparsable"
    try:
        equal = verify(gold_parsed, parsed, timeout_seconds=None, raise_on_error=True)
    except Exception:  # sympy raises anything at all on odd input; whatever it is, nothing was decided
        return Verdict.UNVERIFIED, "comparison"
    if equal:
        return Verdict.CORRECT, None
    if same_answer(gold, extracted):  # a spelling that math-verify reads wrongly must not pass for a wrong answer
        return Verdict.UNVERIFIED, "disagreement"
    return Verdict.WRONG, None


def _parse(answer: str) -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    text = answer.strip().strip("$").strip().replace("\\%", "%")
    # Plain expressions are looked for anywhere in the text, so only where the number is all there is (LaTeX reads no percents).
    config = ExprExtractionConfig() if re.fullmatch(r"[+-]?[\d.,]+\s*%", text) else LatexExtractionConfig()
    try:
        return parse(f"${text}$", [config], fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True)
    except Exception:  # as above
        return []


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent, process `parent`, ends."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _work(connection: Connection[Any, Any]) -> None:
    connection.send((0, os.getpid()))
    while True:
        try:
            job, gold, extracted = connection.recv()
        except EOFError:
            os._exit(0)
        connection.send((job, compare(gold, extracted)))


def _keep(connection: Connection[Any, Any], parent: int) -> None:
    import logging

    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_GIB << 30, _MEMORY_GIB << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time-outs are off
    compare("\\frac{1}{2}", "0.5")  # imports and compiles what the workers need
    keeper = os.getpid()
    while True:
        worker = os.fork()
        if worker == 0:
            _die_with(keeper)
            _work(connection)
        if os.waitpid(worker, 0)[1] == 0:
            return


if __name__ == "__main__":
    _keep(Connection(int(sys.argv[1])), int(sys.argv[2]))
