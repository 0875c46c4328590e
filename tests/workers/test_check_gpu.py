"""The check of a machine: on a CPU all that needs no GPU, and one line where there is no GPU."""

from __future__ import annotations

import re

import pytest
import torch

from workers import check_gpu
from workers.training import attention


def test_what_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_gpu.main(["--device", "cpu"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["device", "imports", "attention", "engine"]
    for line in lines:
        assert re.match(r"\w+ +ok +\d+\.\d s  \S", line)
    assert "TransformersEngine: 4 completions" in lines[-1]
    assert last == "all 4 passed on cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_gpu.main([]) == 1
    assert re.fullmatch(r"no GPU: torch \S+ sees none; .*\n", capsys.readouterr().out)


def test_wrong_attention_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention._by_row
    monkeypatch.setattr(attention, "_by_row", lambda *given: 1.01 * right(*given))
    assert not check_gpu.passes("attention", check_gpu.attend, "cpu")
    assert "FAILED" in capsys.readouterr().out


def test_an_error_is_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(device: str) -> str:
        raise RuntimeError("no kernel\nimage")

    assert not check_gpu.passes("engine", broken, "cuda")
    assert re.match(r"engine +FAILED +\d+\.\d s  RuntimeError: no kernel image\n", capsys.readouterr().out)
