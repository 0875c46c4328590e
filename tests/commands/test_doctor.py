"""`pns doctor`: a fault has exit code 2 and a way out, and looking takes no heavy import."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pns import cli
from pns.commands import doctor
from pns.commands.doctor import Severity

HEAVY = ("torch", "ray", "verl", "vllm", "transformers")
VARIABLES = (
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
)


@pytest.fixture(autouse=True)
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty directory, and none of Ray's variables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def examine(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    code = cli.main(["doctor", "--json", *arguments])
    return code, {row["what"]: row for row in json.loads(capsys.readouterr().out)}


def test_nothing_heavy_is_imported() -> None:
    script = f"""
import sys
from pns.cli import main
main(["doctor", "tiny-qwen2"])
print("heavy:", *(name for name in {HEAVY} if name in sys.modules))
"""
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root}
    command = [sys.executable, "-c", script]
    asked = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=True)
    assert asked.stdout.splitlines()[-1] == "heavy:"
    assert "way out" in asked.stdout


def test_a_recipe_is_checked_against_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    _, rows = examine(capsys, "tiny-qwen2")
    assert [row["severity"] for what, row in rows.items() if what.endswith("tiny-qwen2.yaml")] == ["ok"]
    code, rows = examine(capsys, "tiny-qwen2", "models.backbone=nowhere")
    [row] = [row for what, row in rows.items() if what.endswith("tiny-qwen2.yaml")]
    assert code == 2
    assert "models.backbone: " in row["way_out"]


def test_runs_that_cannot_be_written_and_a_head_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as head:
        answering = f"127.0.0.1:{head.getsockname()[1]}"
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://{answering}")
        with socket.create_server(("127.0.0.1", 0)) as other:
            free = other.getsockname()[1]
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free}")
        code, rows = examine(capsys)
    assert code == 2
    assert rows["runs"]["severity"] == rows["RAY_ADDRESS"]["severity"] == Severity.fault
    assert "runs=DIR" in rows["runs"]["way_out"]
    assert "unset RAY_ADDRESS" in rows["RAY_ADDRESS"]["way_out"]
    assert rows["RAY_API_SERVER_ADDRESS"]["severity"] == Severity.ok


def test_where_the_token_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.token_row().severity is Severity.note
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert doctor.token_row().severity is Severity.fault
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    assert doctor.token_row().severity is Severity.ok
    assert "secret" not in doctor.token_row().found
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
    assert doctor.token_row().severity is Severity.fault


def test_packages_against_the_tested_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"verl": "0.8.0", "numpy": "2.9.9", "vllm": None, "torch": "2.11.0+cpu", "rich": "15.0.0"}
    lines = ["# comment", "numpy==2.3.5", "ray[default]==2.60.0", "six==1.17.0"]
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker" / "requirements-gpu.txt").write_text("\n".join(lines))
    monkeypatch.setattr(doctor, "_ROOT", tmp_path)
    monkeypatch.setattr(doctor, "installed", lambda name: found.get(name, "0"))
    rows = {(row.what, row.severity): row for row in doctor.package_rows(with_gpu=True)}
    assert "works with ==0.9.1 alone" in rows["verl", Severity.fault].found
    assert "2.9.9; tested: 2.3.5" in rows["numpy", Severity.note].found
    assert "rollout.engine=transformers" in rows["vllm", Severity.note].way_out
    assert "built without CUDA" in rows["torch", Severity.fault].found
    assert "rich 15.0.0" in rows["packages (gpu)", Severity.ok].found
    assert "six 0 (tested: 1.17.0)" in rows["what they need", Severity.note].found


def test_variables_that_hurt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = [row.found.split("=")[0] for row in doctor.environment_rows(num_gpus=2)]
    assert found[:2] == ["OMP_NUM_THREADS", "HF_HUB_OFFLINE"]
    assert "CUDA_VISIBLE_DEVICES" in found


def test_gpus_of_one_kind_are_one_entry() -> None:
    gpus = ["NVIDIA H100 80GB HBM3, 81559, 580.65.06"] * 2
    assert next(doctor.gpu_rows(gpus)).found == "2 × NVIDIA H100 80GB HBM3, 80 GiB, driver 580.65.06"
    assert next(doctor.gpu_rows([""])).severity is Severity.fault
