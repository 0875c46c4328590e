r"""Verdicts on final answers in killable processes: one that never ends costs its own limit, nothing else.

Two verifiers look at every answer: the exact comparison of `pns.answers.compare`, and math-verify. CORRECT
needs a proof of equality by the first, or math-verify's word on a notation the first cannot read. WRONG needs
both to say "different". Anything else is UNVERIFIED.

Sampled answers are untrusted: `9^{9^{9}}` keeps sympy busy for ever, and other input exhausts memory or
crashes the interpreter. One *template* process has math-verify imported and forks workers in milliseconds.
Items go in batches to the workers of the quick lanes, whose patience is a quarter of a second of processor
time; what takes longer is killed there and starts again, with the whole limit, in a slow lane of low
priority. So items that never end delay each other, not the rest. The limit counts from the moment a worker
begins the item. Workers die with the template, and the template with its caller.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
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
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pns.answers.compare import compare_answers
from pns.answers.extract import extract_boxed
from pns.answers.spelling import is_prose
from pns.records import AnswerRule, Verdict

_START_SECONDS = 120.0  # for the template to import math-verify and fork a worker
_SAY_SECONDS = 30.0  # of waiting for verdicts, before it is said what for
# Of a quick lane, in processor time, so that a busy machine sends no ordinary item to the slow lanes.
_PATIENCE_SECONDS = 0.25
_BATCH = 16  # items handed to a worker at once, at most
_MEMORY_GIB = 3  # address space of a worker: beyond it an answer fails, not the machine
# Decimals that math-verify compares, digits that it computes; with 6, 1/2^99 equals 1/2^98.
_ROUNDING, _PRECISION = 60, 80
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
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{4,}")  # not a command, nor a product of a few variables
_EXACT = AnswerRule()  # of an answer that brings no rule of its own
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?![\w.])")


@dataclass(frozen=True)
class VerifierResult:
    """`cause` is None when the verdict is CORRECT or WRONG, else why it could not be decided:

    no_answer     no boxed answer in the prediction
    too_long      the answer has over 2,000 characters
    timeout       over the limit, the worker was killed
    crashed       the worker died
    not_started   no worker could be started
    gold          math-verify cannot read the gold answer
    unparsable    math-verify cannot read the prediction's answer
    comparison    math-verify failed while comparing
    disagreement  one verifier says equal, the other different
    undecided     one verifier says different, the other cannot tell

    `extracted` is the prediction's boxed answer as written, None where there is none; `reason` says in words
    what the verdict rests on; `seconds` is the worker's time for the item, 0 where no worker was needed.
    """

    verdict: Verdict
    cause: str | None
    extracted: str | None
    reason: str = ""
    seconds: float = 0.0


VerifierHandle = list[Future[VerifierResult]]
VerifierItem = tuple[str, str] | tuple[str, str, AnswerRule]
Decision = tuple[Verdict, str | None, str]


class Verifier:
    """Compares predictions with gold answers in `processes` processes, at most `limit_seconds` of work each.

    Needs no main guard in the calling script: workers are started from this module, not from the caller's.
    """

    def __init__(self, processes: int, limit_seconds: float) -> None:
        self._processes, self._limit_seconds = processes, limit_seconds
        self._open: dict[Future[VerifierResult], _Job] = {}  # without a verdict
        self._last_verdict = time.monotonic()
        self._template = _Template()
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

    def submit(self, items: Sequence[VerifierItem]) -> VerifierHandle:
        """Begin verifying (gold answer, prediction text[, rule]) items without waiting, for `collect`."""
        return [self._begin(gold, extract_boxed(text), *rule) for gold, text, *rule in items]

    def submit_extracted(self, items: Sequence[tuple[str, str | None, AnswerRule]]) -> VerifierHandle:
        """Like `submit`, of answers that are already taken out of their texts (None: there is none)."""
        return [self._begin(*item) for item in items]

    def done(self, handle: VerifierHandle) -> bool:
        """Whether `collect` would not wait."""
        return all(future.done() for future in handle)

    def collect(
        self, handle: VerifierHandle, say_seconds: float = _SAY_SECONDS, most_seconds: float | None = None
    ) -> list[VerifierResult]:
        """The results of one `submit`, in order. Says every `say_seconds` what it waits for.

        Raises TimeoutError where no item at all, of any `submit`, got a verdict for `most_seconds`; None: the
        longest that an item can take in a quick and then in a slow lane, a process started in each.
        """
        longest = most_seconds or 2 * (self._limit_seconds + _START_SECONDS)
        began = time.monotonic()
        while late := wait(handle, timeout=min(say_seconds, longest)).not_done:
            silent = time.monotonic() - max(began, self._last_verdict)
            first = next(
                (self._open[future] for future in handle if future in late & self._open.keys()), None
            )
            name = f", the first on {first.extracted[:60]!r}" if first else ""
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
        deadline = time.monotonic() + self._limit_seconds + _START_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                raise TimeoutError(f"verifier: thread {thread.name} did not stop its process")
        self._template.stop()

    def _begin(self, gold: str, extracted: str | None, rule: AnswerRule = _EXACT) -> Future[VerifierResult]:
        future: Future[VerifierResult] = Future()
        if decided := decide_without_process(gold, extracted, rule):
            future.set_result(decided)
        else:
            assert extracted is not None
            self._open[future] = job = _Job(gold, extracted, rule, future)
            future.add_done_callback(self._settled)
            self._quick.put(job)
        return future

    def _settled(self, future: Future[VerifierResult]) -> None:
        self._last_verdict = time.monotonic()
        del self._open[future]

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
                if cause == "timeout" and patience:
                    self._slow.put(jobs.pop(0))
                else:
                    jobs.pop(0).settle(_KILLED[cause], self._limit_seconds if cause == "timeout" else 0.0)
                worker = None if slow else self._template.spawn()
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
    gold: str, extracted: str | None, rule: AnswerRule = _EXACT
) -> VerifierResult | None:
    """The verdict on an answer that needs no parser; None where it takes one."""
    gold = gold.strip()
    if extracted is None:
        return VerifierResult(Verdict.UNVERIFIED, "no_answer", None, "no final answer in the prediction")
    if not gold:
        return VerifierResult(Verdict.UNVERIFIED, "gold", extracted, "the gold answer is empty")
    if gold == extracted:
        return VerifierResult(Verdict.CORRECT, None, extracted, "the same text")
    if max(len(extracted), len(gold)) > _MAX_CHARACTERS:
        reason = f"an answer of over {_MAX_CHARACTERS} characters"
        return VerifierResult(Verdict.UNVERIFIED, "too_long", extracted, reason)
    if rule == _EXACT and _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(extracted):
        if int(gold) == int(extracted):
            return VerifierResult(Verdict.CORRECT, None, extracted, "equal integers")
        return VerifierResult(Verdict.WRONG, None, extracted, "different integers")
    return None


@dataclass(frozen=True)
class _Job:
    gold: str
    extracted: str
    rule: AnswerRule
    future: Future[VerifierResult]

    def settle(self, decision: Decision, seconds: float = 0.0) -> None:
        verdict, cause, reason = decision
        if self.future.set_running_or_notify_cancel():
            self.future.set_result(VerifierResult(verdict, cause, self.extracted, reason, seconds))


_KILLED: dict[str, Decision] = {
    "timeout": (Verdict.UNVERIFIED, "timeout", "over the time limit"),
    "crashed": (Verdict.UNVERIFIED, "crashed", "the worker process died"),
}
_NOT_STARTED: Decision = (Verdict.UNVERIFIED, "not_started", "no worker process could be started")


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
                    if not self._running or self._running[0].poll() is not None:
                        self._start()
                    assert self._running
                    socket.send_fds(self._running[1], [b"n" if nice else b"."], [theirs.fileno()])
                except OSError:  # no memory or no process left, or the template just died
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

    def stop(self) -> None:
        with self._lock:
            self._discard()

    def _start(self) -> None:
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
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )
        self._running = process, ours

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
        Returns how many were settled, and why the next was not: "timeout" (the worker is killed), "crashed",
        or None at the end. After a cause the worker is gone."""
        answered = 0
        try:
            self._connection.send([(job.gold, job.extracted, job.rule) for job in jobs])
            for job in jobs:
                if not self._answers_within(limit_seconds, patience_seconds):
                    self.stop()
                    return answered, "timeout"
                decision, seconds = self._connection.recv()
                job.settle(decision, seconds)
                answered += 1
                if closing.is_set() and answered < len(jobs):
                    self.stop()  # it works on the next one already
                    return answered, None
        except (EOFError, OSError):
            self.stop()
            return answered, "crashed"
        return answered, None

    def _answers_within(self, limit_seconds: float, patience_seconds: float | None) -> bool:
        if patience_seconds is None:
            return self._connection.poll(limit_seconds)
        end = time.monotonic() + limit_seconds
        spent = self._processor_seconds()
        while (left := end - time.monotonic()) > 0:
            patience = patience_seconds - (self._processor_seconds() - spent)
            if patience <= 0:
                break
            if self._connection.poll(min(left, max(patience, 0.01))):
                return True
        return self._connection.poll(0)  # it may have answered since

    def _processor_seconds(self) -> float:
        """Processor time of the worker so far. Raises OSError if it is gone."""
        clock_id = (~self._pid << 3) | 2  # as clock_getcpuclockid(3) makes it
        return time.clock_gettime(clock_id)

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        self._connection.close()


def decide(gold: str, extracted: str, rule: AnswerRule = _EXACT) -> Decision:
    """Verdict, cause and reason of both verifiers together. Without a limit: for a killable process."""
    finding = compare_answers(gold, extracted, rule)
    if finding.same:
        return Verdict.CORRECT, None, finding.reason
    equal, cause = math_verify_says(gold, extracted)
    if equal is None:
        reason = f"math-verify cannot decide ({cause}); exact comparison: {finding.reason}"
        return Verdict.UNVERIFIED, cause, reason
    if finding.same is False and not equal:
        return Verdict.WRONG, None, finding.reason
    undecided = finding.same is None and not finding.doubtful
    # math-verify leaves out the words beside a number: to it five apples are five pears.
    if equal and undecided and not _WORD.search(gold + " " + extracted):
        return Verdict.CORRECT, None, "math-verify says equal"
    said, cause = ("equal", "disagreement") if equal else ("different", "undecided")
    return Verdict.UNVERIFIED, cause, f"math-verify says {said}, exact comparison: {finding.reason}"


def math_verify_says(gold: str, extracted: str) -> tuple[bool | None, str | None]:
    """Whether math-verify calls them equal; None where it cannot tell: gold, unparsable or comparison."""
    from math_verify import verify

    gold_parsed = _parse(gold)
    if not gold_parsed:
        return None, "gold"
    parsed = _parse(extracted)
    if not parsed:
        return None, "unparsable"
    try:
        if _differ(gold_parsed, parsed) is True:
            return False, None
        same = verify(
            list(gold_parsed),
            list(parsed),
            float_rounding=_ROUNDING,
            numeric_precision=_PRECISION,
            timeout_seconds=None,  # its own limit is a signal, which C code can outlast: the parent kills
            raise_on_error=True,
        )
        return bool(same), None
    except Exception:  # sympy raises anything at all on odd input; whatever it is, nothing was decided
        return None, "comparison"


def _differ(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether two expressions, as math-verify reads them, take different values: sympy's evaluation at two
    points decides in a millisecond where its simplification may take for ever."""
    import sympy

    if not (len(a) == len(b) == 1 and isinstance(a[0], sympy.Expr) and isinstance(b[0], sympy.Expr)):
        return False
    names = sorted(a[0].free_symbols | b[0].free_symbols, key=str)
    for first in (17, 41):
        point = {name: sympy.Rational(first + 12 * index, 13) for index, name in enumerate(names)}
        x, y = a[0].evalf(30, subs=point), b[0].evalf(30, subs=point)
        for value in (x, y):
            if not (value.is_number and value.is_finite and value.is_comparable is not None):
                return False
        if not abs(x - y) > sympy.Float("1e-12") * max(abs(x), abs(y)):
            return False
    return True


@functools.lru_cache(maxsize=64)  # the completions of one problem share its gold answer
def _parse(answer: str) -> tuple[Any, ...]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    text = answer.strip().strip("$").strip().replace("\\%", "%").replace("**", "^")
    if is_prose(text):  # else every letter would be a variable
        text = rf"\text{{{text}}}"
    # What models write and LaTeX has no word for: 1.2e5, np.sqrt, 5. and \mathrm{x}.
    text = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", re.sub(r"\b(?:np|math)\.(?=[a-z])", r"\\", text))
    text = re.sub(r"\\mathrm\s*\{\s*([A-Za-z])\s*\}", r"\1", re.sub(r"(?<=\d)\.(?!\d)", "", text))
    # Plain expressions are looked for anywhere in the text, so only where the number is all there is (LaTeX
    # reads no percents).
    config = ExprExtractionConfig() if re.fullmatch(r"[+-]?[\d.,]+\s*%", text) else LatexExtractionConfig()
    options = {"fallback_mode": "no_fallback", "parsing_timeout": None, "raise_on_error": True}
    try:
        return tuple(parse(f"${text}$", [config], **options))
    except Exception:  # as above
        return ()


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent, process `parent`, ends."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _work(connection: Connection) -> None:
    connection.send(os.getpid())
    while True:
        try:
            jobs = connection.recv()
            for job in jobs:
                begin = time.perf_counter()
                decision = decide(*job)
                connection.send((decision, time.perf_counter() - begin))
        except (EOFError, OSError):  # the caller is gone, or has no more use for this worker
            os._exit(0)


def _serve_forks(control: socket.socket, parent: int) -> None:
    """The template: fork a worker for every connection received, until the caller is gone."""
    import logging

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Ray's job stop sends it to every process of the driver, which still ends its step.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_GIB << 30, _MEMORY_GIB << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time-outs are off
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
