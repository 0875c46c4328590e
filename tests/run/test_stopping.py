"""SIGTERM in a command: at once, or after the step under way."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from pns import cli
from pns.run import stopping
from pns.run.stopping import StopRequest, current_request, finishing_steps, interruptible


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def terminate_and_wait() -> None:
    terminate()
    time.sleep(10)


def test_sigterm_interrupts_and_its_handler_is_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), interruptible(StopRequest()):
        terminate_and_wait()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_command_ends_as_after_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "list_runs", lambda runs: terminate_and_wait())
    assert cli.main(["runs", "--runs", str(tmp_path)]) == 143
    said = capsys.readouterr().err
    assert (said.startswith("pns: interrupted"), said.count("\n")) == (True, 1)


def test_in_a_step_the_first_one_is_noted_and_the_second_interrupts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with interruptible(StopRequest()):
        with finishing_steps() as request:
            assert not request.came
            terminate()
            time.sleep(0.01)
            assert request.came
            assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
            with pytest.raises(KeyboardInterrupt):
                terminate_and_wait()
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert capsys.readouterr().err.startswith("SIGTERM: the run ends with this step")


def test_a_step_that_takes_too_long_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "LOCAL_STEP_SECONDS", 1)
    with interruptible(StopRequest()), finishing_steps(), pytest.raises(KeyboardInterrupt):
        terminate_and_wait()


def test_what_came_in_the_last_step_is_not_forgotten() -> None:
    with interruptible(StopRequest()):
        with finishing_steps():
            terminate()
            time.sleep(0.01)
        assert current_request().came
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert not current_request().came


def test_what_a_library_makes_of_it_is_an_interruption_too() -> None:
    def load() -> None:
        try:
            terminate_and_wait()
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None

    with pytest.raises(KeyboardInterrupt), interruptible(StopRequest()):
        load()
    with pytest.raises(ValueError, match="another"), interruptible(StopRequest()):
        raise ValueError("another")
