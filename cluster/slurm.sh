#!/bin/bash
# A run on the nodes of a Slurm allocation, any number of them: sbatch cluster/slurm.sh RECIPE [words of pns run].
# The first node holds Ray's head and the driver. See cluster/README.md.
#
#SBATCH --job-name=pns
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=pns-%j.log
#SBATCH --open-mode=append
# The driver is told five minutes before the time is up.
#SBATCH --signal=B:TERM@300
# After a node's failure or a preemption Slurm starts the job again, and the same command goes on from the last
# checkpoint. --no-requeue: it ends, and you go on by submitting it again.
#SBATCH --requeue

set -euo pipefail

# Seen by every node under the same path: the environment, runs, models.
: "${PNS_HOME:=${SLURM_SUBMIT_DIR:?this is a script for sbatch}}"
: "${PNS_VENV:=${PNS_HOME}/.venv}"
: "${PNS_DRIVER_CPUS:=16}"     # cores of the first node for the driver and placement.verifier_processes
: "${PNS_START_SECONDS:=600}"  # for all nodes to join
export HF_HOME="${HF_HOME:-${PNS_HOME}/hf}"
# Of the node itself.
node_local="${PNS_LOCAL:-/tmp}/pns-${SLURM_JOB_ID}"
export VLLM_CACHE_ROOT="${node_local}/vllm" TRITON_CACHE_DIR="${node_local}/triton"
export NCCL_CUMEM_ENABLE=0 OMP_NUM_THREADS=1
export PATH="${PNS_VENV}/bin:${PATH}"

mapfile -t nodes < <(scontrol show hostnames "${SLURM_JOB_NODELIST}")
cpus="${SLURM_CPUS_PER_TASK:-$(nproc)}"
if ((cpus <= PNS_DRIVER_CPUS)); then
    echo "--cpus-per-task=${cpus} leaves none beside PNS_DRIVER_CPUS=${PNS_DRIVER_CPUS}: raise it" >&2
    exit 2
fi

# Read by Ray's processes, and by the driver below. The token never touches a file or a command line.
RAY_AUTH_TOKEN="$(python -c 'import secrets; print(secrets.token_hex(32))')"
head_address="$(hostname --ip-address | cut -d ' ' -f 1)"
RAY_ADDRESS="${PNS_HEAD_ADDRESS:-${head_address}}:$((20000 + SLURM_JOB_ID % 10000))"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_ADDRESS

steps=()
child="" stopped="" code=0
# shellcheck disable=SC2317,SC2329  # both are called by traps
stop_nodes() {
    code=$?
    trap - EXIT TERM
    if ((${#steps[@]})); then
        kill -TERM "${steps[@]}" 2>/dev/null || true
        wait "${steps[@]}" 2>/dev/null || true
    fi
    exit "${code}"
}
# shellcheck disable=SC2317,SC2329
pass_on() {
    stopped=yes
    if [[ -n "${child}" ]]; then
        kill -TERM "${child}" 2>/dev/null || true
    fi
}
trap stop_nodes EXIT
trap pass_on TERM

# Runs a command, passes SIGTERM on to it, and ends the script with its exit code unless that is 0.
run() {
    "$@" &
    child=$!
    wait "${child}" || code=$?
    if [[ -n "${stopped}" ]]; then  # the signal ended the first wait
        code=0
        wait "${child}" || code=$?
        exit "${code}"
    fi
    if ((code)); then
        exit "${code}"
    fi
}

# A step ends with the script; GPUs are those that Slurm shows it. Without RAY_ADDRESS: a node that joins has
# --address, and the head would look for itself.
on_nodes=(env --unset=RAY_ADDRESS ray start --block --disable-usage-stats --labels="pns-job=${SLURM_JOB_ID}")
srun --overlap --nodes=1 --ntasks=1 --cpus-per-task="${cpus}" --nodelist="${nodes[0]}" \
    "${on_nodes[@]}" --head --node-ip-address="${RAY_ADDRESS%:*}" --port="${RAY_ADDRESS##*:}" \
    --num-cpus="$((cpus - PNS_DRIVER_CPUS))" --temp-dir="${node_local}" --include-dashboard=false &
steps+=("$!")
if ((${#nodes[@]} > 1)); then
    others=$((${#nodes[@]} - 1))
    srun --overlap --nodes="${others}" --ntasks="${others}" --ntasks-per-node=1 --cpus-per-task="${cpus}" \
        --exclude="${nodes[0]}" "${on_nodes[@]}" --address="${RAY_ADDRESS}" --num-cpus="${cpus}" &
    steps+=("$!")
fi

wait_for_nodes="$(
    cat <<'PYTHON'
import sys
import time

import ray

wanted, limit = int(sys.argv[1]), float(sys.argv[2])
end, joined = time.monotonic() + limit, 0
while joined < wanted and time.monotonic() < end:
    try:
        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level="ERROR")
        joined = sum(node["Alive"] for node in ray.nodes())
    except (ConnectionError, RuntimeError, TimeoutError):  # the head is not up yet
        pass
    time.sleep(1)
if joined < wanted:
    sys.exit(f"{joined} of {wanted} nodes have joined after {limit:g} s (PNS_START_SECONDS): see the log above")
print(f"{joined} nodes: {ray.cluster_resources()}", flush=True)
PYTHON
)"
run python -c "${wait_for_nodes}" "${#nodes[@]}" "${PNS_START_SECONDS}"
cd "${PNS_HOME}"
run pns run "$@"
