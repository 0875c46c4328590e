r"""Verdicts on final answers in killable processes: one that never ends costs its own limit, nothing else.

The exact comparison of `pns.answers.compare` looks at every answer. CORRECT needs its proof of equality, or
math-verify's word on a notation that it cannot read. WRONG needs its proof of difference and, where the
verdict is for negatives, a second reader that also says "different": that of plain numbers, or math-verify.
Anything else is UNVERIFIED. math-verify, which takes nearly all of the time, is asked only where its answer
can change the verdict. Plain numbers are decided in the calling process.

Sampled answers are untrusted: `9^{9^{9}}` keeps sympy busy for ever, and other input exhausts memory or
crashes the interpreter. One *template* process has math-verify imported and forks workers in milliseconds.
Items go in batches to the workers of the quick lanes, whose patience is a quarter of a second; what takes
longer is killed there and starts again, with the whole limit, in a slow lane of low priority. So items that
never end delay each other, not the rest. Both count the worker's processor time for the item, so a busy
machine changes no verdict; nor does what a worker did before. Workers die with the template, and the template
with its caller.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import queue
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pns.answers.compare import compare_answers
from pns.answers.extract import extract_boxed
from pns.answers.plain_numbers import read_plain
from pns.errors import UserError
from pns.records import AnswerRule, Verdict
from workers.rewards.decide import (
    EXACT,
    AnswerComparison,
    Decision,
    decide,
    decide_by_reading,
    what_is_broken,
)

_START_SECONDS = 120.0  # for the template to import math-verify and fork a worker
_SAY_SECONDS = 30.0  # of waiting for verdicts, before it is said what for
_PATIENCE_SECONDS = 0.25  # of a quick lane, in processor time
_STALLED = 20  # limits of wall-clock time after which a worker is taken for stopped
_KEPT = 20_000  # decisions that are remembered
_BATCH = 16  # items handed to a worker at once, at most
_MEMORY_GIB = 3  # address space of a worker: beyond it an answer fails, not the machine
_GROWTH_GIB = 0.25  # of that, since its start, after which a worker has had its day
_NICENESS = 5  # of a slow lane's worker: more would starve it on a busy machine
# Answers of every kind, two spaces apart, read by the template, so that no worker, whose patience is short,
# meets a rule of math-verify's grammar for the first time.
_WARMING = r"""\frac{1}{2}  0.5  -\frac{\sqrt{3}}{2}+2\pi  \left(\frac{1}{3}, -2\right]  [0,\infty)\cup(-3,1)
\{1,2,3\}  1, -2  x=5  y = 2x + 3  x^2+3x-6  5^{n-1}(a+b)  \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}
1\pm\sqrt{19}  \text{east}  6-5i  90^\circ  \sin^2(x)\cos 2t  e^{-2t}  \ln 2+\log_{10} 3  x\ge 2  -1<x\le 7
\binom{n}{2}  n!  \lfloor x\rfloor  \$12,345  50\%  5_8  3\times 10^{8}  \frac{a}{b}-\frac{x^3}{y_1}  |x|
5\text{ cm}  \sqrt[3]{2}"""
_MAX_CHARACTERS = 2000  # of an answer; longer ones are not parsed
_INTEGER = re.compile(r"[+-]?\d{1,100}")  # Python refuses to read integers of over 4,300 digits
_READY = "ready"  # says the template, or what is wrong


@dataclass(frozen=True)
class VerifierResult:
    """`cause` is None when the verdict is CORRECT or WRONG, else why it could not be decided:

    no_answer     no boxed answer in the prediction
    too_long      the answer has over 2,000 characters
    timeout       over the limit in processor time, the worker was killed
    stalled       twice no verdict in 20 limits of wall-clock time
    crashed       the worker died, and so did a fresh one
    not_started   no worker could be started
    gold          math-verify cannot read the gold answer
    unparsable    math-verify cannot read the prediction's answer
    comparison    math-verify failed while comparing
    disagreement  one verifier says equal, the other different
    undecided     no verifier proves either, or one says different and the other cannot tell

    `extracted` is the prediction's boxed answer as written, None where there is none; `reason` says in words
    what the verdict rests on; `seconds` is a worker's processor time for the item, 0 where none was needed.
    """

    verdict: Verdict
    cause: str | None
    extracted: str | None
    reason: str = ""
    seconds: float = 0.0


VerifierHandle = list[Future[VerifierResult]]
VerifierItem = tuple[str, str] | tuple[str, str, AnswerRule]


class Verifier:
    """Compares predictions with gold answers in `processes` processes; an item may take `limit_seconds` of
    processor time. Raises UserError where math-verify is missing or broken.

    Needs no main guard in the calling script: workers are started from this module, not from the caller's.
    """

    def __init__(self, processes: int, limit_seconds: float) -> None:
        self._processes, self._limit_seconds = processes, limit_seconds
        self._open: dict[Future[VerifierResult], _Job] = {}  # without a verdict
        self._last_verdict = time.monotonic()
        self._decided = _Decided()
        self._template = _Template()
        self._template.start()
        self._closing = threading.Event()
        self._quick: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._slow: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        # With a limit below the patience nothing would be left for a slow lane to do.
        patience = _PATIENCE_SECONDS if limit_seconds > _PATIENCE_SECONDS else None
        lanes: list[tuple[Any, ...]] = [(self._quick, patience)] * processes
        if patience:
            lanes += [(self._slow, None)] * max(1, processes // 2)
        # Daemons, so that a caller that forgets `shutdown` can end.
        self._threads = [threading.Thread(target=self._serve, args=lane, daemon=True) for lane in lanes]
        for thread in self._threads:
            thread.start()

    def submit(self, items: Sequence[VerifierItem], for_negatives: bool = True) -> VerifierHandle:
        """Begin verifying (gold answer, prediction text[, rule]) items without waiting, for `collect`.

        `for_negatives`: what is WRONG may become a rejected side or a reward, so that a second reader must
        say so too; False: the exact comparison's proof is enough, which is many times faster.
        """
        return [
            self._begin(gold, extract_boxed(text), rule[0] if rule else EXACT, for_negatives)
            for gold, text, *rule in items
        ]

    def submit_extracted(
        self, items: Sequence[tuple[str, str | None, AnswerRule]], for_negatives: bool = True
    ) -> VerifierHandle:
        """Like `submit`, of answers that are already taken out of their texts (None: there is none)."""
        return [self._begin(*item, for_negatives) for item in items]

    def done(self, handle: VerifierHandle) -> bool:
        """Whether `collect` would not wait."""
        return all(future.done() for future in handle)

    def collect(
        self, handle: VerifierHandle, say_seconds: float = _SAY_SECONDS, most_seconds: float | None = None
    ) -> list[VerifierResult]:
        """The results of one `submit`, in order. Says every `say_seconds` what it waits for.

        Raises TimeoutError where no item at all, of any `submit`, got a verdict for `most_seconds`; None: the
        longest that an item can take in a quick lane, in a slow one and asked again, a process started each.
        """
        longest = most_seconds or 3 * (_STALLED * self._limit_seconds + _START_SECONDS)
        began = time.monotonic()
        while late := wait(handle, timeout=min(say_seconds, longest)).not_done:
            silent = time.monotonic() - max(began, self._last_verdict)
            first = next(
                (self._open[future] for future in handle if future in late & self._open.keys()), None
            )
            name = f", the first on {first.comparison[1][:60]!r}" if first else ""
            awaited = f"verifier: waiting for {len(late)} of {len(handle)} verdicts{name}"
            state = f"{len(self._open)} are open in all, the last verdict came {silent:.0f} s ago"
            if silent >= longest:
                raise TimeoutError(f"{awaited}; {state}, and the longest is {longest:.0f} s")
            print(f"{awaited}; {state}", file=sys.stderr, flush=True)
        return [future.result() for future in handle]

    def shutdown(self) -> None:
        """Stop the processes; what waits is cancelled. Raises TimeoutError if a process does not end."""
        self._closing.set()
        for jobs in (self._quick, self._slow):
            while not jobs.empty():
                with contextlib.suppress(queue.Empty):
                    if job := jobs.get_nowait():
                        job.future.cancel()
            for _ in range(self._processes):
                jobs.put(None)
        deadline = time.monotonic() + _STALLED * self._limit_seconds + _START_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                raise TimeoutError(f"verifier: thread {thread.name} did not stop its process")
        self._template.stop()

    def _begin(
        self, gold: str, extracted: str | None, rule: AnswerRule, for_negatives: bool
    ) -> Future[VerifierResult]:
        future: Future[VerifierResult] = Future()
        comparison = gold, extracted or "", rule, for_negatives
        decided = self._decided.get(comparison) or decide_without_process(
            gold, extracted, rule, for_negatives
        )
        if decided:
            self._decided.put(comparison, decided)
            future.set_result(decided)
        else:
            self._open[future] = job = _Job(comparison, future)
            future.add_done_callback(self._settled)
            self._quick.put(job)
        return future

    def _settled(self, future: Future[VerifierResult]) -> None:
        self._last_verdict = time.monotonic()
        job = self._open.pop(future)
        if not future.cancelled():
            self._decided.put(job.comparison, future.result())

    def _serve(self, waiting: queue.SimpleQueue[_Job | None], patience: float | None) -> None:
        """A lane: answer what waits; what outlasts the patience goes to the slow lanes."""
        slow = waiting is self._slow
        # A quick lane has its worker before it needs it; most runs never need one of a slow lane.
        worker = None if slow else self._template.spawn()
        while jobs := self._next_batch(waiting):
            while jobs and not self._closing.is_set():
                worker = worker or self._template.spawn(nice=slow)
                if worker is None:
                    jobs.pop(0).settle(_NOT_STARTED)
                    continue
                answered, cause = worker.decide(jobs, self._limit_seconds, self._closing, patience)
                jobs = jobs[answered:]
                if cause is None:
                    continue
                worker = None if slow else self._template.spawn()
                if cause != "timeout" and not jobs[0].is_asked_again:
                    jobs[0].is_asked_again = True  # of a fresh worker
                elif cause == "timeout" and patience:
                    self._slow.put(jobs.pop(0))
                else:
                    jobs.pop(0).settle(_KILLED[cause], self._limit_seconds if cause == "timeout" else 0.0)
            for job in jobs:
                job.future.cancel()
        if worker:
            worker.stop()

    def _next_batch(self, waiting: queue.SimpleQueue[_Job | None]) -> list[_Job]:
        """The next item and a fair share of those that wait; [] at the end."""
        jobs: list[_Job] = []
        # A slow lane takes one: those behind an item that never ends would wait for its whole limit.
        most = 1 if waiting is self._slow else _BATCH
        share = min(most, 1 + waiting.qsize() // (2 * self._processes))
        while len(jobs) < share:
            try:
                job = waiting.get(block=not jobs)
            except queue.Empty:
                break
            if job is None:
                if jobs:
                    waiting.put(None)  # this lane's own end, met again after these
                break
            jobs.append(job)
        return jobs


def decide_without_process(
    gold: str, extracted: str | None, rule: AnswerRule = EXACT, for_negatives: bool = True
) -> VerifierResult | None:
    """The verdict on an answer that costs too little for a process; None where it takes one."""
    gold = gold.strip()
    if not extracted:
        return VerifierResult(Verdict.UNVERIFIED, "no_answer", None, "no final answer in the prediction")
    if not gold:
        return VerifierResult(Verdict.UNVERIFIED, "gold", extracted, "the gold answer is empty")
    if gold == extracted:
        return VerifierResult(Verdict.CORRECT, None, extracted, "the same text")
    if max(len(extracted), len(gold)) > _MAX_CHARACTERS:
        reason = f"an answer of over {_MAX_CHARACTERS} characters"
        return VerifierResult(Verdict.UNVERIFIED, "too_long", extracted, reason)
    if rule != EXACT:
        return None
    if _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(extracted):
        if int(gold) == int(extracted):
            return VerifierResult(Verdict.CORRECT, None, extracted, "equal integers")
        return VerifierResult(Verdict.WRONG, None, extracted, "different integers")
    plain = read_plain(gold), read_plain(extracted)
    if all(answer and answer.is_number for answer in plain):
        finding = compare_answers(gold, extracted, rule)
        if decision := decide_by_reading(finding, gold, extracted, rule, for_negatives):
            verdict, cause, reason = decision
            return VerifierResult(verdict, cause, extracted, reason)
    return None


@dataclass
class _Job:
    comparison: AnswerComparison
    future: Future[VerifierResult]
    is_asked_again: bool = False  # after a worker that died or stalled

    def settle(self, decision: Decision, seconds: float = 0.0) -> None:
        verdict, cause, reason = decision
        if self.future.set_running_or_notify_cancel():
            self.future.set_result(VerifierResult(verdict, cause, self.comparison[1], reason, seconds))


class _Decided:
    """The latest decisions, for several threads."""

    def __init__(self) -> None:
        self._lock, self._results = threading.Lock(), OrderedDict[AnswerComparison, VerifierResult]()

    def get(self, comparison: AnswerComparison) -> VerifierResult | None:
        with self._lock:
            if result := self._results.get(comparison):
                self._results.move_to_end(comparison)
            return result

    def put(self, comparison: AnswerComparison, result: VerifierResult) -> None:
        if result.cause in _NOT_KEPT:
            return
        with self._lock:
            self._results[comparison] = replace(result, seconds=0.0)
            if len(self._results) > _KEPT:
                self._results.popitem(last=False)


_KILLED: dict[str, Decision] = {
    "timeout": (Verdict.UNVERIFIED, "timeout", "over the time limit"),
    "stalled": (Verdict.UNVERIFIED, "stalled", f"no verdict in {_STALLED} time limits of wall-clock time"),
    "crashed": (Verdict.UNVERIFIED, "crashed", "the worker process died"),
}
_NOT_STARTED: Decision = (Verdict.UNVERIFIED, "not_started", "no worker process could be started")
# Causes of the moment, not of the answers, and such as need no memory.
_NOT_KEPT = ("stalled", "crashed", "not_started", "no_answer", "too_long")


class _Template:
    """The parent's end of the template process, which is started when first needed and again if it dies."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # of the socket, which the lanes share
        self._running: tuple[subprocess.Popen[bytes], socket.socket] | None = None

    def spawn(self, nice: bool = False) -> _Worker | None:
        """A worker that is ready; None where that fails (the template's own message is on stderr)."""
        for _ in range(2):  # the template may have died since it was last asked
            ours, theirs = socket.socketpair()
            with self._lock, theirs:
                try:
                    self._ensure()
                    assert self._running
                    socket.send_fds(self._running[1], [b"n" if nice else b"."], [theirs.fileno()])
                except (OSError, UserError):  # no memory or process left, or the template just died
                    self._discard()
                    ours.close()
                    continue
            connection = Connection(ours.detach())
            with contextlib.suppress(EOFError, OSError):
                if connection.poll(_START_SECONDS):
                    return _Worker(connection, pid=connection.recv())
            connection.close()
            self.stop()
        return None

    def start(self) -> None:
        """Raises UserError where math-verify is missing or broken."""
        with self._lock, contextlib.suppress(OSError):  # which is tried again, and told, for each item
            self._ensure()

    def stop(self) -> None:
        with self._lock:
            self._discard()

    def _ensure(self) -> None:
        if self._running and self._running[0].poll() is None:
            return
        self._discard()
        ours, theirs = socket.socketpair()
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "workers.rewards.verifier", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # an interrupt of the terminal is the caller's to handle
                # The order of sets, which sympy's results depend on, is the same in every run.
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
            )
        self._running = process, ours
        ours.settimeout(_START_SECONDS)
        said = ours.recv(4096).decode()
        ours.settimeout(None)
        if said != _READY:
            self._discard()
            raise UserError(said) if said else OSError("the template ended")

    def _discard(self) -> None:
        if self._running:
            process, control = self._running
            control.close()
            process.kill()  # its workers die with it
            process.wait()
        self._running = None


class _Worker:
    """The parent's end of a worker process."""

    def __init__(self, connection: Connection, pid: int) -> None:
        self._connection, self._pid = connection, pid

    def decide(
        self,
        jobs: Sequence[_Job],
        limit_seconds: float,
        closing: threading.Event,
        patience_seconds: float | None = None,
    ) -> tuple[int, str | None]:
        """Settle the jobs in order, each within the limit and the patience (seconds of processor time).
        Returns how many were settled, and why the next was not: "timeout" or "stalled" (the worker is
        killed), "crashed", or None at the end. After a cause the worker is gone."""
        answered = 0
        try:
            began = self._processor_seconds()
            self._connection.send([job.comparison for job in jobs])
            for job in jobs:
                if cause := self._waits_in_vain(began + (patience_seconds or limit_seconds), limit_seconds):
                    self.stop()
                    return answered, cause
                decision, ended = self._connection.recv()
                seconds, began = ended - began, ended
                # A caller that did not get the processor sees what was over the limit only now.
                job.settle(decision if seconds <= limit_seconds else _KILLED["timeout"], seconds)
                answered += 1
                if closing.is_set() and answered < len(jobs):
                    self.stop()  # it works on the next one already
                    return answered, None
        except (EOFError, OSError):
            self.stop()
            return answered, "crashed"
        return answered, None

    def _waits_in_vain(self, until: float, limit_seconds: float) -> str | None:
        """Wait for an answer until the worker's processor time is `until`; why there is none."""
        end = time.monotonic() + _STALLED * limit_seconds
        while (left := end - time.monotonic()) > 0:
            budget = until - self._processor_seconds()
            if self._connection.poll(min(left, max(budget, 0.01)) if budget > 0 else 0):
                return None
            if budget <= 0:
                return "timeout"
        return "stalled"

    def _processor_seconds(self) -> float:
        """Processor time of the worker so far. Raises OSError if it is gone."""
        clock_id = (~self._pid << 3) | 2  # as clock_getcpuclockid(3) makes it
        return time.clock_gettime(clock_id)

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        self._connection.close()


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent, process `parent`, ends."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _work(connection: Connection) -> None:
    """Answer until the caller is gone or has no more use for this worker. Too little memory ends it: the item
    is asked again of a fresh one."""
    connection.send(os.getpid())
    most = _address_space() + int(_GROWTH_GIB * 2**30)
    with contextlib.suppress(EOFError, OSError, MemoryError):
        while True:
            for comparison in connection.recv():
                connection.send((decide(*comparison), time.process_time()))
                if _address_space() > most:
                    os._exit(0)
    os._exit(0)


def _address_space() -> int:
    """Bytes, of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _serve_forks(control: socket.socket, parent: int) -> None:
    """The template: fork a worker for every connection received, until the caller is gone."""
    import logging

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Ray's job stop sends it to every process of the driver, which still ends its step.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_GIB << 30, _MEMORY_GIB << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time-outs are off
    problem = what_is_broken()
    control.send((problem or _READY).encode())
    if problem:
        return
    for gold, extracted in itertools.pairwise(re.split("  |\n", _WARMING)):
        decide(gold, extracted)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # dead workers leave no zombie
    template = os.getpid()
    control.settimeout(1.0)  # so that it sees when its parent is another
    while os.getppid() == parent:
        try:
            kind, files, _, _ = socket.recv_fds(control, 1, 1)
        except TimeoutError:
            continue
        if not kind:
            return
        if os.fork() == 0:
            _die_with(template)
            control.close()
            if kind == b"n":
                os.nice(_NICENESS)
            _work(Connection(files[0]))
        os.close(files[0])


if __name__ == "__main__":
    _serve_forks(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
