"""The verifier: poison costs only itself, nothing undecided becomes a verdict, no process is left."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import psutil
import pytest

from pns.answers.extract import extract_answer
from pns.records import AnswerRule, Verdict
from workers.rewards.verifier import Verifier, VerifierItem, VerifierResult, decide_without_process

POISON = r"\int_0^1 9^{9^{9^{9}}} dx"  # which the exact comparison does not read, and math-verify computes
CORRECT, WRONG, UNVERIFIED = Verdict.CORRECT, Verdict.WRONG, Verdict.UNVERIFIED


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    verifier = Verifier(processes=2, limit_seconds=60)  # which no case here takes, however busy the machine
    yield verifier
    verifier.shutdown()


def verify(verifier: Verifier, items: Sequence[VerifierItem]) -> list[VerifierResult]:
    return verifier.collect(verifier.submit(items))


_numbers = itertools.count(2)


def right() -> tuple[str, str]:
    """An item that is correct, takes a worker, and was not asked before."""
    number = next(_numbers)
    return rf"{number}\sqrt{{2}}", box(rf"\sqrt{{{2 * number**2}}}")


def box(answer: str) -> str:
    return rf"<think>It is so.</think>\boxed{{{answer}}}"


def verifier_processes(of: int | None = None) -> set[psutil.Process]:
    """The template and the workers below process `of`, by default this one."""
    found = set()
    for process in psutil.Process(of).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "workers.rewards.verifier" in process.cmdline():
                found.add(process)
    return found


def assert_gone(others: set[psutil.Process]) -> None:
    """Killed processes take a while to go."""
    _, alive = psutil.wait_procs(verifier_processes() - others, timeout=600)
    assert alive == []


@pytest.fixture
def others() -> set[psutil.Process]:
    """The processes of other verifiers."""
    return verifier_processes()


@pytest.mark.parametrize(
    ("gold", "answer", "verdict", "cause"),
    [
        ("57", "57", CORRECT, None),
        ("57", "+57", CORRECT, None),
        ("57", "58", WRONG, None),
        ("1/2", "0.5", CORRECT, None),
        (r"\frac{1}{2}", r"\frac{2}{4}", CORRECT, None),
        ("x^2+2x+1", "(x+1)^2", CORRECT, None),
        ("(3,4)", "(3,5)", WRONG, None),
        ("(1,2)", "(2,1)", WRONG, None),
        (r"5\sqrt{2}", r"\sqrt{50}", CORRECT, None),
        (r"\text{Evelyn}", "Evelyn", CORRECT, None),
        ("10,000", "10000", CORRECT, None),
        (r"50\%", "50%", CORRECT, None),
        ("50%", "0.5", CORRECT, None),
        ("50%", "51%", WRONG, None),
        ("3", "???", UNVERIFIED, "unparsable"),
        ("???", "3", UNVERIFIED, "gold"),
        ("", "3", UNVERIFIED, "gold"),
        ("3.5", "3 1/2", CORRECT, None),  # math-verify reads a product
        ("120000", "1.2e5", CORRECT, None),
        ("1/2^{99}", "1/2^{98}", WRONG, None),  # equal to six decimals
        (r"\frac{1}{2004!}", r"\frac{1}{2006!}", WRONG, None),
        ("52_8", "52_9", UNVERIFIED, "disagreement"),  # math-verify drops the base
        (r"5\text{ m}", r"5\text{ cm}", UNVERIFIED, "disagreement"),  # and the unit
        ("1/3", "0.33", UNVERIFIED, "undecided"),
        ("3", "1+" * 1000 + "1", UNVERIFIED, "too_long"),
    ],
)
def test_verdicts(verifier: Verifier, gold: str, answer: str, verdict: Verdict, cause: str | None) -> None:
    (result,) = verify(verifier, [(gold, box(answer))])
    assert (result.verdict, result.cause, result.extracted) == (verdict, cause, answer)


@pytest.mark.parametrize("text", ["", "the answer is 57", r"\boxed{}", r"\boxed{57", r"<think>so \boxed{57}"])
def test_a_prediction_without_an_answer_is_not_wrong(verifier: Verifier, text: str) -> None:
    (result,) = verify(verifier, [("57", text)])
    assert (result.verdict, result.cause, result.extracted) == (UNVERIFIED, "no_answer", None)


def test_integers_are_decided_without_a_process() -> None:
    decided = decide_without_process("57", "-57")
    assert decided is not None
    assert decided.verdict is WRONG
    decided = decide_without_process("57", "57.0")
    assert decided is not None
    assert decided.verdict is CORRECT
    assert decide_without_process("57", "57.0", AnswerRule(tolerance=0.1)) is None
    assert decide_without_process("9" * 5000, "1") is not None  # beyond Python's limit on integer strings


def test_poison_does_not_delay_or_fail_others_and_leaves_no_process(others: set[psutil.Process]) -> None:
    verifier = Verifier(processes=4, limit_seconds=1)
    begin = time.monotonic()
    poison = verifier.submit([("5", box(POISON))] * 4)
    handle = verifier.submit([right() for _ in range(16)])
    assert [result.verdict for result in verifier.collect(handle)] == [CORRECT] * 16
    timed_out = {(result.verdict, result.cause, result.seconds) for result in verifier.collect(poison)}
    assert timed_out == {(UNVERIFIED, "timeout", 1)}
    assert time.monotonic() - begin >= 2 * 1  # each the whole limit, two in each of the two slow lanes
    verifier.shutdown()
    assert_gone(others)


def test_killed_processes_cost_one_item_at_most(others: set[psutil.Process]) -> None:
    """It is asked again of a fresh worker once."""
    verifier = Verifier(processes=1, limit_seconds=20)
    try:
        assert verify(verifier, [right()])[0].verdict is CORRECT
        for victim in ("worker", "template"):
            template, (worker, *_) = _template_and_workers(others)
            worker.suspend()  # so that it holds an item when it dies, and loses no patience before
            busy = verifier.submit([right(), right()])
            (worker if victim == "worker" else template).send_signal(signal.SIGKILL)
            assert [result.verdict for result in verifier.collect(busy)] == [CORRECT, CORRECT]
            idle = _template_and_workers(others)[1][0]
            idle.send_signal(signal.SIGKILL)
            psutil.wait_procs([idle], timeout=600)
            assert verify(verifier, [right()])[0].verdict is CORRECT
    finally:
        verifier.shutdown()
    assert_gone(others)


def test_an_item_over_the_patience_delays_no_other(others: set[psutil.Process]) -> None:
    verifier = Verifier(processes=1, limit_seconds=600)
    try:
        verify(verifier, [right()])
        poison = verifier.submit([("5", box(POISON))])
        handle = verifier.submit([right() for _ in range(100)])
        assert {result.verdict for result in verifier.collect(handle)} == {CORRECT}
        assert not verifier.done(poison)  # the hundred took the patience and their own time, not the limit
        for _ in range(2):  # so that nobody waits for the limit
            while not (slow := list(filter(is_slow_and_at_work, verifier_processes() - others))):
                time.sleep(0.02)
            slow[0].kill()
            psutil.wait_procs(slow, timeout=600)
        (result,) = verifier.collect(poison)
        assert (result.verdict, result.cause) == (UNVERIFIED, "crashed")
    finally:
        verifier.shutdown()
    assert_gone(others)


def is_slow_and_at_work(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.nice() > 0 and process.cpu_times().user > 0.1)
    return False


def test_a_stopped_worker_is_not_at_its_limit(others: set[psutil.Process]) -> None:
    """Neither patience nor limit count while it does not run; 20 limits later it is asked again once."""
    verifier = Verifier(processes=1, limit_seconds=0.1)
    try:
        verify(verifier, [right()])
        _, (worker, *_) = _template_and_workers(others)
        worker.suspend()
        (result,) = verify(verifier, [right()])
        assert result.verdict is CORRECT
        assert worker not in verifier_processes()
    finally:
        verifier.shutdown()
    assert_gone(others)


def test_an_item_that_finds_too_little_memory_is_asked_again_of_a_fresh_worker(
    others: set[psutil.Process],
) -> None:
    verifier = Verifier(processes=1, limit_seconds=60)
    try:
        verify(verifier, [right()])
        _, (worker, *_) = _template_and_workers(others)
        used = psutil.Process(worker.pid).memory_info().vms
        worker.rlimit(psutil.RLIMIT_AS, (used, used))  # as if earlier items held all the rest
        gold, answer = r"\sum_{k=1}^{40} x^k y^k", box(r"\sum_{j=1}^{40} x^j y^j")
        (result,) = verify(verifier, [(gold, answer)])
        assert result.cause != "crashed"
    finally:
        verifier.shutdown()
    assert_gone(others)


def cases(number: int) -> list[VerifierItem]:
    """Golds of the answer cases with their own predictions and with their neighbours' golds."""
    file = Path(__file__).parents[2] / "cases/answers.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    pairs = list(zip(rows, rows[1:] + rows[:1], strict=True))
    answers = [extract_answer(row["prediction"]) or "" for row in rows]
    own: list[VerifierItem] = [(row["gold"], box(answer)) for row, answer in zip(rows, answers, strict=True)]
    others: list[VerifierItem] = [(row["gold"], box(other["gold"])) for row, other in pairs]
    items = [item for pair in zip(own, others, strict=True) for item in pair]
    return items[:: max(1, len(items) // number)][:number]


def test_verdicts_do_not_depend_on_load() -> None:
    """`tests/bench/verdicts_under_load.py` asks a thousand."""
    items = [*cases(150), ("5", box(POISON))]
    quiet = decided(items)
    with busy(20):
        assert decided(items) == quiet


def decided(items: Sequence[VerifierItem]) -> list[tuple[Verdict, str | None]]:
    verifier = Verifier(processes=2, limit_seconds=1)
    try:
        return [(result.verdict, result.cause) for result in verify(verifier, items)]
    finally:
        verifier.shutdown()


@contextlib.contextmanager
def busy(number: int) -> Iterator[None]:
    """Processes that leave the others little of the processor."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize("command", ["verify", "driver"])
def test_a_missing_math_verify_is_one_error(tmp_path: Path, command: str) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('no such library')")
    (tmp_path / "cases.jsonl").write_text('{"gold": "x+1", "prediction": "1+x"}')
    root = str(Path(__file__).resolve().parents[3])
    arguments = ["-m", "pns.cli", "verify", "cases.jsonl", "--out", "verdicts.jsonl"]
    if command == "driver":
        arguments = ["-c", "from workers.rewards.verifier import Verifier\nVerifier(1, 5)"]
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), root])},
        cwd=tmp_path,
    )
    assert done.returncode == (2 if command == "verify" else 1)
    *earlier, line = done.stderr.splitlines()
    assert "cannot use math-verify (ImportError: no such library)" in line
    assert "pip install math-verify==" in line
    assert (earlier == []) == (command == "verify")
    assert not (tmp_path / "verdicts.jsonl").exists()


def test_what_is_no_negative_needs_no_second_reader(verifier: Verifier) -> None:
    item = ("52_8", box("52_9"))  # math-verify drops the base
    assert [
        verifier.collect(verifier.submit([item], for_negatives=for_negatives))[0].verdict
        for for_negatives in (True, False, True)
    ] == [UNVERIFIED, WRONG, UNVERIFIED]


def test_a_decision_is_remembered_with_its_rule(verifier: Verifier) -> None:
    gold, text = right()
    assert verify(verifier, [(gold, text)])[0].seconds > 0
    assert verify(verifier, [(gold, text)])[0].seconds == 0
    assert verify(verifier, [(gold, text, AnswerRule(tolerance=0.1))])[0].seconds > 0


def test_results_keep_their_order_and_say_why(verifier: Verifier) -> None:
    answers = [rf"\frac{{{n}}}{{16}}\sqrt{{3}}" for n in range(1, 17)]
    results = verify(verifier, [(r"\frac{1}{2}\sqrt{3}", box(answer)) for answer in answers])
    assert [result.extracted for result in results] == answers
    assert [result.verdict is CORRECT for result in results] == [n == 8 for n in range(1, 17)]
    assert {result.reason for result in results} == {"equal", "different numbers"}
    assert all(result.seconds > 0 for result in results)


def test_a_rule_goes_with_its_item(verifier: Verifier) -> None:
    items = [
        ("4.2", box("4.3")),
        ("4.2", box("4.3"), AnswerRule(tolerance=0.1)),
        ("(1, 2)", box("2, 1"), AnswerRule(unordered=True)),
    ]
    assert [result.verdict for result in verify(verifier, items)] == [WRONG, CORRECT, CORRECT]


def test_processes_end_with_a_killed_caller_whose_script_has_no_main_guard(tmp_path: Path) -> None:
    script = tmp_path / "caller.py"
    script.write_text(
        textwrap.dedent(
            r"""
            import sys, time
            from workers.rewards.verifier import Verifier
            verifier = Verifier(2, 600)
            print(verifier.collect(verifier.submit([(r"\sqrt{4}", r"\boxed{2}")]))[0].verdict.value, flush=True)
            verifier.submit([("5", r"\boxed{\int_0^1 9^{9^{9^{9}}} dx}")] * 2)
            time.sleep(600)
            """
        )
    )
    root = str(Path(__file__).resolve().parents[3])
    caller = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
        cwd=tmp_path,
    )
    try:
        assert caller.stdout is not None
        assert caller.stdout.readline().strip() == "correct"
        end = time.monotonic() + 1800
        while len(processes := verifier_processes(caller.pid)) != 4 and time.monotonic() < end:
            time.sleep(0.05)  # killed ones take a while to go
        assert len(processes) == 4  # the template, two quick lanes' workers, one slow lane's
    finally:
        caller.kill()
        caller.wait(timeout=600)
    _, alive = psutil.wait_procs(processes, timeout=600)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def test_shutdown_cancels_what_waits(others: set[psutil.Process]) -> None:
    verifier = Verifier(processes=1, limit_seconds=2)
    handle = verifier.submit([("5", box(POISON))] * 50)
    verifier.shutdown()
    assert sum(future.cancelled() for future in handle) >= 47
    assert_gone(others)


def test_a_wait_says_what_for_and_ends_without_any_verdict(
    others: set[psutil.Process], capsys: pytest.CaptureFixture[str]
) -> None:
    """What takes long is waited for as long as verdicts come; a verdict that never comes ends the wait."""
    verifier = Verifier(processes=1, limit_seconds=1)
    poison = verifier.submit([("5", box(POISON))] * 3)  # a second each, one after the other
    results = verifier.collect(poison, say_seconds=0.2)
    assert {result.cause for result in results} == {"timeout"}
    lines = capsys.readouterr().err.splitlines()
    assert any(
        f"waiting for 3 of 3 verdicts, the first on {POISON!r}; 3 are open in all" in line for line in lines
    )
    never: Future[VerifierResult] = Future()
    with pytest.raises(
        TimeoutError, match=r"verifier: waiting for 1 of 4 verdicts; 0 are open in all, .* 1 s"
    ):
        verifier.collect([*poison, never], say_seconds=0.2, most_seconds=1)
    assert len(capsys.readouterr().err.splitlines()) >= 3
    verifier.shutdown()
    assert_gone(others)


def _template_and_workers(others: set[psutil.Process]) -> tuple[psutil.Process, list[psutil.Process]]:
    end = time.monotonic() + 1800
    while len(processes := verifier_processes() - others) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    template, *workers = sorted(processes, key=lambda process: process.ppid() != os.getpid())
    return template, sorted(workers, key=lambda process: process.nice())


def test_the_processes_outlive_a_sigterm_that_the_run_obeys_later() -> None:
    """Ray's job stop sends it to all of them."""
    earlier = verifier_processes()
    verifier = Verifier(processes=1, limit_seconds=60)
    assert verify(verifier, [right()])[0].verdict is CORRECT
    own = verifier_processes() - earlier
    assert own
    for process in own:
        process.terminate()
    assert verify(verifier, [right()])[0].verdict is CORRECT
    assert own <= verifier_processes()
    verifier.shutdown()
    assert_gone(earlier)
