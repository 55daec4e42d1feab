#!/usr/bin/env bash
#SBATCH --job-name=entropy-fork
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=7-00:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --output=%x-%j.log
# A recipe on Slurm: a Ray head on the first node, a Ray worker on each other one, and the run as a Ray job.
#   sbatch examples/slurm.sh qwen3_14b_20k paper_16x8 data.train_files=… data.val_files=…
#   sbatch --nodes=1 examples/slurm.sh qwen3_8b_20k node_8 data.train_files=… data.val_files=…
# Needs: an environment with verl and entropy-fork that is active where sbatch is called, or VENV=/path/of/it; data, model,
# and the directory of the call on a file system that all nodes see. Submitted again, it resumes from its last checkpoint.
# --nodes and --gpus-per-node must equal trainer.nnodes and trainer.n_gpus_per_node of the cluster file.
set -euo pipefail

if (($# < 2)); then
    echo "usage: sbatch examples/slurm.sh RECIPE CLUSTER [KEY=VALUE …]" >&2
    exit 2
fi
recipe=$1 cluster=$2
shift 2
if [[ -n ${VENV:-} ]]; then
    # shellcheck disable=SC1091  # the user's
    source "$VENV/bin/activate"
fi

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1; exit}')
# A token for this job's Ray; srun gives it to every node. Without this, a recent Ray decides by the files in a home
# directory whether it asks for a token, but head, workers and run must agree.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN
port=$((20000 + SLURM_JOB_ID % 20000)) # another job's Ray may run on the same network
gpus=${SLURM_GPUS_ON_NODE:-8}

on_node() { # NODE COMMAND…: a step that lives as long as the job
    local node=$1
    shift
    srun --nodes=1 --ntasks=1 --nodelist="$node" --overlap "$@" &
    steps+=("$!")
}

steps=()
trap '((${#steps[@]})) && kill "${steps[@]}" 2>/dev/null || true' EXIT
trap 'exit 143' TERM INT

on_node "$head" ray start --head --block --node-ip-address="$address" --port="$port" --num-gpus="$gpus"
for node in "${nodes[@]:1}"; do
    on_node "$node" ray start --block --address="$address:$port" --num-gpus="$gpus"
done

# Wait for all nodes: verl stops at once if it counts too few GPUs.
RAY_ADDRESS="$address:$port" timeout 600 python - "${#nodes[@]}" <<'PYTHON' &
import sys, time
import ray

wanted = int(sys.argv[1])
while True:
    try:
        ray.init(log_to_driver=False, ignore_reinit_error=True)
        alive = sum(node["Alive"] for node in ray.nodes())
        print(f"{alive} of {wanted} nodes", flush=True)
        if alive >= wanted:
            break
    except ConnectionError:
        pass  # the head is not up yet
    time.sleep(5)
PYTHON
wait "$!" # a trap is only run between commands, and 'wait' can be interrupted

# On the head node and in the foreground, so that the job ends, with its status, when the run does.
RAY_ADDRESS="$address:$port" srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap --export=ALL \
    python -m verl.trainer.main_ppo "+recipe=$recipe" "+cluster=$cluster" "$@" &
steps+=("$!")
wait "$!"
