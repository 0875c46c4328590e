"""`pns plan`: roles, memory, time, cost and what does not fit, without starting anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pns import cli

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/tiny-qwen2.yaml"
JUDGE = "reward.terms.coherence"

TURNS = ("rollout", "policy")


@pytest.fixture
def seven(tmp_path: Path) -> list[str]:
    """A run of 7B on 16 GPUs: 8 policy, 4 rollout, 2 + 2 reward."""
    train = tmp_path / "train.jsonl"
    train.write_text('{"problem": "1 + 1", "answer": "2"}\n' * 1000)
    model = "Qwen/Qwen2.5-7B-Instruct"
    settings = {
        "models": f"{{backbone: {model}}}",
        "data": f"{{source: jsonl, prompt: auto, benchmarks: [gsm8k, math500], jsonl: {{train: {train}}}}}",
        "placement": "{device: cuda, rollout: {replicas: 4}, policy: {replicas: 8}, verifier_processes: 16}",
        "reward": "{terms: {plausibility: {pool: {replicas: 2}}, "
        f"coherence: {{model: {model}, pool: {{replicas: 2}}}}}}}}",
        "rl": "{problems_per_step: 512}",
        "reverse_rl": "{problems_per_step: 512}",
    }
    recipe = tmp_path / "seven.yaml"
    recipe.write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    return [str(recipe)]


@pytest.fixture
def bcpg(tmp_path: Path) -> list[str]:
    """BCPG-NSA of 7B on 16 GPUs: 8 policy, 4 rollout, 2 step judge, 2 process reward."""
    train = tmp_path / "train.jsonl"
    train.write_text('{"problem": "1 + 1", "answer": "2"}\n' * 1000)
    model = "Qwen/Qwen2.5-7B-Instruct"
    settings = {
        "method": "bcpg",
        "models": f"{{backbone: {model}}}",
        "data": f"{{source: jsonl, prompt: auto, benchmarks: [gsm8k], jsonl: {{train: {train}}}}}",
        "placement": "{device: cuda, rollout: {replicas: 4}, policy: {replicas: 8}}",
        "bcpg": f"{{step_judge: {{model: {model}, pool: {{replicas: 2}}}}, "
        "process_reward: {model: Qwen/Qwen2.5-Math-PRM-7B, pool: {replicas: 2}}}",
    }
    recipe = tmp_path / "bcpg.yaml"
    recipe.write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    return [str(recipe)]


def cluster(tmp_path: Path, **node: Any) -> Path:
    file = tmp_path / "cluster.yaml"
    file.write_text(json.dumps({"nodes": {"box": {"count": 2, "gpus": 8, "gpu": "H100", **node}}}))
    return file


def planned(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert cli.main(["plan", *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_stages_have_their_roles_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = planned(capsys, str(RECIPE), f"runs={tmp_path / 'runs'}")
    stages = ["rl", "reward_model", "reverse_rl", "synthesize", "pair", "preference", "evaluate"]
    assert list(made["stages"]) == stages
    assert made["stages"]["reverse_rl"] == ["rollout", "verifier", "policy", "plausibility", "coherence"]
    assert made["stages"]["preference"] == ["policy"]
    assert not (tmp_path / "runs").exists()


def test_only_the_roles_that_are_used_are_placed(capsys: pytest.CaptureFixture[str]) -> None:
    def placed(*overrides: str) -> list[str]:
        return [role["role"] for role in planned(capsys, str(RECIPE), *overrides)["roles"]]

    assert placed() == ["rollout", "policy", "plausibility", "coherence"]
    assert placed("reward.terms.coherence.weight=0") == ["rollout", "policy", "plausibility"]
    assert placed("negatives=rs") == ["rollout", "policy", "plausibility"]
    assert placed(f"{JUDGE}.endpoint.url=http://host/v1") == ["rollout", "policy", "plausibility"]


def test_the_tiny_recipe_runs_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(RECIPE), "placement.device=cpu"]) == 0
    shown = capsys.readouterr().out
    assert "cpu of this machine" in shown
    assert "  policy: HF_HUB_DISABLE_PROGRESS_BARS=1 " in shown
    assert "times are told for GPUs alone" in shown
    made = planned(capsys, str(RECIPE), "placement.device=cpu")
    assert made["num_gpus"] == 0
    assert list(made["environment"]) == ["rollout", "policy", "plausibility", "coherence"]
    assert made["environment"]["policy"]["VERL_PLATFORM"] == "cpu"
    # Measured: 7.6 GiB for all processes together.
    assert sum(made["host_gb"]["this machine"].values()) == pytest.approx(7.6 * 1.074, rel=0.25)


def test_seven_billion_parameters_on_sixteen_gpus(
    seven: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    made = planned(capsys, *seven, "--price", "2.5", "--completion-tokens", "700")
    assert made["faults"] == []
    peaks = {own["role"]: own["gb"] for own in reversed(made["memory_gb"])}
    assert peaks["policy"] == pytest.approx(31, rel=0.1)
    assert peaks["coherence"] == pytest.approx(15.2 + 0.9 + 2.7 + 1, rel=0.02)
    step = made["times"][0]
    assert step["stage"] == "rl"
    # Estimated by hand: rollout 58, reference and update 14 + 56, sync 15.2 GB at 100 and 8.
    assert step["seconds"]["rollout"] == pytest.approx(58, rel=0.1)
    assert step["seconds"]["other log-probs"] == pytest.approx(14, rel=0.1)
    assert step["seconds"]["update"] == pytest.approx(56, rel=0.1)
    assert step["seconds"]["sync"] == pytest.approx(2.05, abs=0.05)
    assert step["once"] == pytest.approx(sum(step["seconds"].values()) - step["seconds"]["verifier"])
    assert (made["costs"][0]["stage"], made["costs"][0]["bound"]) == ("rl", "rollout")
    hours = 100 * step["once"] / 3600
    assert made["costs"][0]["gpu_hours"] == pytest.approx(16 * hours)
    assert made["costs"][0]["price"] == pytest.approx(16 * hours * 2.5)


def test_a_judge_on_vllm_is_spread_over_its_gpus(
    seven: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pool = "reward.terms.coherence.pool"
    made = planned(capsys, *seven, f"{pool}.engine=vllm", f"{pool}.gpus=2", f"{pool}.replicas=1")
    assert made["faults"] == []
    [judge] = [own["parts"] for own in made["memory_gb"] if own["role"] == "coherence"]
    assert judge["weights (bfloat16)"] == pytest.approx(7.6, abs=0.1)
    # 0.85 of a GPU of 80 GB, and beside it CUDA graphs and a context.
    assert sum(judge.values()) == pytest.approx(0.85 * 80 + 2, rel=0.02)


def test_steps_are_labelled_by_two_services(bcpg: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    made = planned(capsys, *bcpg, "--completion-tokens", "700")
    assert made["faults"] == []
    services = ["step_judge", "process_reward"]
    assert made["stages"]["label_steps_nsa_1"] == services
    assert [role["role"] for role in made["roles"]] == ["rollout", "policy", *services]
    peaks = {own["role"]: own["gb"] for own in made["memory_gb"]}
    # 7.6 and 7.1 G weights of 2 bytes, the activations of 16,384 tokens, a context; the judge's cache.
    assert peaks["step_judge"] == pytest.approx(15.2 + 2.7 + 1 + 0.9, rel=0.02)
    assert peaks["process_reward"] == pytest.approx(14.1 + 2.7 + 1, rel=0.02)
    [labels] = [time for time in made["times"] if time["phase"] == "labels"]
    assert labels["scored"] == 2 * 4000
    # Of each replica 2,000 wrong completions, 850 tokens of 6.8 G weights x 2 operations at 0.4 of the peak.
    assert labels["seconds"]["process_reward"] == pytest.approx(2000 * 850 * 14.1e9 / (0.4 * 989e12), rel=0.1)
    # The judge reads 330 of instructions more, and 14 lines of 15 tokens, at 0.3; and its weights once for
    # each of the 14 steps of ten completions.
    reading = 2000 * (850 + 330 + 14 * 15) * 14.1e9 / (0.3 * 989e12)
    writing = 200 * 14 * (15.2 / (0.8 * 3350) + 0.001)
    assert labels["seconds"]["step_judge"] == pytest.approx(reading + writing, rel=0.1)


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["bcpg.step_judge.model=Qwen/Qwen2.5-72B"], "bcpg.step_judge.endpoint.url"),
        (
            ["bcpg.step_judge.model=Qwen/Qwen2.5-32B", "bcpg.step_judge.pool.batch_tokens=65536"],
            "set bcpg.step_judge.pool.batch_tokens=16384",
        ),
        (
            ["bcpg.process_reward.pool.batch_tokens=500000"],
            "set bcpg.process_reward.pool.batch_tokens=250000",
        ),
        (["bcpg.process_reward.pool.gpus=0.5", "bcpg.step_judge.pool.replicas=1"], ""),
        (["bcpg.rule=judge", "bcpg.process_reward.model=''"], ""),
    ],
)
def test_services_of_steps_that_do_not_fit(
    bcpg: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], fault: str
) -> None:
    file = str(cluster(tmp_path))
    made = planned(capsys, *bcpg, *overrides, "--cluster", file, code=2 if fault else 0)
    assert bool(made["faults"]) == bool(fault)
    assert fault in "\n".join(made["faults"])


def test_a_process_reward_model_reads_so_many_tokens(
    bcpg: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Qwen2.5-Math's models have 4,096 positions."""
    file, words = str(cluster(tmp_path)), ["rollout.max_new_tokens=8192"]
    [fault] = planned(capsys, *bcpg, *words, "--cluster", file, code=2)["faults"]
    assert "process_reward: a prompt and completion of the longest are 9380 tokens" in fault
    assert "4096 positions" in fault
    assert fault.endswith("(bcpg.rule=judge)")
    assert planned(capsys, *bcpg, *words, "bcpg.rule=judge", "--cluster", file)["faults"] == []


def test_a_page_is_a_hundred_columns_wide(seven: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *seven, "--assumptions"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    shown = "\n".join(lines)
    assert "16 x H100 (80 GB, 3350 GB/s, 989 TFLOPS); assumed" in " ".join(shown.split())
    assert "total: 16 GPUs" in shown
    assert "decode_bandwidth" in shown


@pytest.mark.parametrize(
    ("overrides", "faults"),
    [
        (
            ["models.backbone=Qwen/Qwen2.5-14B", "placement.policy.replicas=2"],
            ["set placement.policy.replicas=8"],
        ),
        (["policy.gradient_checkpointing=false"], ["set policy.gradient_checkpointing=true"]),
        (["policy.max_tokens_per_micro_batch=131072"], ["set policy.max_tokens_per_micro_batch=65536"]),
        ([f"{JUDGE}.model=Qwen/Qwen2.5-72B"], ["its weights alone are 145 GB", "endpoint.url"]),
        ([f"{JUDGE}.model=Qwen/Qwen2.5-32B"], []),  # it just fits
        (
            ["models.backbone=Qwen/Qwen2.5-32B", "policy.lora.rank=16", "rollout.memory_fraction=0.8"],
            ["rollout: 66 GB of weights", "set placement.rollout.gpus=2"],
        ),
        (
            ["models.backbone=Qwen/Qwen2.5-32B", "placement.rollout.gpus=2", "placement.rollout.replicas=1"],
            [
                "policy: 98 GB do not fit one H100 with 80 GB: set placement.policy.replicas=16, or policy.lora"
            ],
        ),
        (
            [
                "models.backbone=Qwen/Qwen2.5-32B",
                "placement.rollout.gpus=2",
                "placement.rollout.replicas=1",
                "policy.offload=true",
            ],
            [],
        ),
        (
            ["placement.rollout.replicas=8"],
            ["placement needs 20 GPUs (rollout 8 + policy 8", "the cluster offers 16: lower placement"],
        ),
        (["placement.rollout.replicas=1", "placement.rollout.gpus=4", "placement.policy.replicas=4"], []),
        (["rollout.max_new_tokens=20000"], ["set policy.max_tokens_per_micro_batch=32768"]),
    ],
)
def test_what_does_not_fit_and_the_way_out(
    seven: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    faults: list[str],
) -> None:
    file = cluster(tmp_path)
    made = planned(capsys, *seven, *overrides, "--cluster", str(file), code=2 if faults else 0)
    said = "\n".join(made["faults"])
    assert bool(said) == bool(faults)
    for part in faults:
        assert part in said


def test_the_way_out_is_one(seven: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(cluster(tmp_path))
    words = ["models.backbone=Qwen/Qwen2.5-14B", "placement.policy.replicas=2"]
    assert planned(capsys, *seven, *words, "--cluster", file, code=2)["faults"]
    assert planned(capsys, *seven, words[0], "placement.policy.replicas=8", "--cluster", file)["faults"] == []


def test_a_process_that_no_machine_holds_is_named(
    seven: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """16 GPUs would do, but none of the machines has four left for a replica."""
    file = str(cluster(tmp_path, count=8, gpus=2))
    words = ["placement.rollout.replicas=1", "placement.rollout.gpus=4", "placement.policy.replicas=8"]
    [fault] = planned(capsys, *seven, *words, "--cluster", file, code=2)["faults"]
    assert "rollout process 1 of 1 needs 4 GPU on one node, and the best node, box-5, has 2 GPU left" in fault


def test_host_memory_is_checked_where_it_is_known(
    seven: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = cluster(tmp_path, memory_gb=40)
    by_store = (*seven, "rollout.weight_transport=store")
    faults = planned(capsys, *by_store, "--cluster", str(file), code=2)["faults"]
    # Most of it while a checkpoint is written: 91 GB of weights and Adam beside eight processes of 3.
    assert any("box-1: 137 GB of host memory (most: policy 116)" in fault for fault in faults)
    assert any("do not fit Ray's store of 12 GB" in fault for fault in faults)
    # Without a file nothing is said of machines that nobody described.
    assert planned(capsys, *seven)["faults"] == []


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--gpu", "H20"], "--gpu: 'H20' is no known GPU; did you mean H200?"),
        (["--gpu", "H100", "--cluster", "CLUSTER"], "both say which GPUs there are"),
        (["placement.device=cpu", "--gpu", "H100"], "placement.device is cpu"),
        (["--cluster", "missing.yaml"], "--cluster missing.yaml: no such file"),
        (["negatives=pnss"], "did you mean pns"),
    ],
)
def test_wrong_use_is_said(
    seven: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], fault: str
) -> None:
    file = str(cluster(tmp_path))
    assert cli.main(["plan", *seven, *(file if word == "CLUSTER" else word for word in words)]) == 2
    assert fault in capsys.readouterr().err


def test_without_a_cluster_file_the_exit_code_is_0(
    seven: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert planned(capsys, *seven, "--gpu", "RTX4090")["faults"]


def test_a_model_without_a_known_shape_leaves_the_rest(
    seven: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    made = planned(capsys, *seven, f"{JUDGE}.model=someone/other")
    assert any("someone/other: its shape is not known here" in note for note in made["notes"])
    assert made["models"]["coherence"] is None
    hours = {cost["stage"]: cost["hours"] for cost in made["costs"]}
    assert hours["reverse_rl"] is None
    assert hours["rl"] > 0
    assert cli.main(["plan", *seven, f"{JUDGE}.model=someone/other"]) == 0


@pytest.mark.parametrize(
    ("node", "fault"),
    [
        ({"gpu": "H1000"}, "nodes.box.gpu: 'H1000' is no known GPU; did you mean H100"),
        ({"gpus": -1}, "nodes.box.gpus: -1 must be 0 or more"),
        ({"gpu": "", "gpu_memory_gb": 48}, "give gpu, or gpu_memory_gb, bandwidth_gb_s and tflops"),
        ({"memory": 3}, "nodes.box.memory: unknown key"),
        ({"gpus": 0}, "has no GPU"),
    ],
)
def test_a_wrong_cluster_file_is_said(
    seven: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], node: dict[str, Any], fault: str
) -> None:
    assert cli.main(["plan", *seven, "--cluster", str(cluster(tmp_path, **node))]) == 2
    assert fault in capsys.readouterr().err


def test_gpus_that_are_described_instead_of_named_and_prices(
    seven: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node = {"gpu": "", "gpu_memory_gb": 96, "bandwidth_gb_s": 4000, "tflops": 900, "price": 2}
    made = planned(capsys, *seven, "--cluster", str(cluster(tmp_path, **node)))
    assert made["costs"][0]["price"] == pytest.approx(2 * made["costs"][0]["gpu_hours"])


def test_a_replica_takes_its_share_of_the_gpu_that_it_is_on(
    seven: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight H100 hold the policy, eight L40S the rest: 0.85 x 48 GB of weights and cache, and 2.8 beside."""
    file = tmp_path / "cluster.yaml"
    nodes = {"train": {"gpus": 8, "gpu": "H100", "price": 3}, "small": {"gpus": 8, "gpu": "L40S", "price": 1}}
    file.write_text(json.dumps({"nodes": nodes}))
    made = planned(capsys, *seven, "--cluster", str(file))
    [rollout] = [own for own in made["memory_gb"] if own["role"] == "rollout"]
    assert rollout["gb"] == pytest.approx(0.85 * 48 + 2.8, abs=0.1)
    assert made["costs"][0]["price"] == pytest.approx(2 * made["costs"][0]["gpu_hours"])


def test_gpus_that_two_roles_share_count_once(
    seven: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(cluster(tmp_path, count=1, gpus=10, gpu="H100"))
    shared = ["placement.colocate=[rollout,policy]", *(f"placement.{role}.replicas=6" for role in TURNS)]
    plan = planned(capsys, *seven, *shared, "--cluster", file)
    assert plan["num_gpus"] == 6 + 2 + 2
    assert plan["nodes"][0]["processes"].endswith("rollout 6")
    peaks = {role: max(own["gb"] for own in plan["memory_gb"] if own["role"] == role) for role in TURNS}
    assert peaks["rollout"] < 80 < sum(peaks.values())  # which would not fit at once
    [step] = [time for time in plan["times"] if (time["stage"], time["phase"]) == ("rl", "step")]
    assert step["seconds"]["turns"] > 1
    # What does not fit is a matter of the fuller phase.
    planned(capsys, *seven, *shared, "rollout.memory_fraction=0.99", "--cluster", file, code=2)


def test_it_answers_without_ray_and_torch(seven: list[str]) -> None:
    code = f"""
import sys
from pns import cli
cli.main(["plan", {seven[0]!r}])
print([name for name in ("ray", "torch", "transformers", "verl", "vllm") if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
