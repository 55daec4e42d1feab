#!/usr/bin/env bash
# Submit a recipe to a running Ray cluster (KubeRay, 'ray start' by hand, …) as one Ray job.
#   RAY_ADDRESS=http://HEAD:8265 examples/ray_job_submit.sh qwen3_14b_20k paper_16x8 \
#       data.train_files=/shared/train.parquet data.val_files=/shared/aime24.parquet
# Needs: verl and entropy-fork installed on every node; data, model and checkpoints on a file system that all nodes see.
# WORKDIR is where the job runs on the head node: relative paths and checkpoints/ lie there (default: this directory).
# If the cluster asks for a token (Ray 2.5x and later may, by default), set RAY_AUTH_TOKEN as on its head node.
# The job continues when you close this terminal: 'ray job logs -f ID', 'ray job stop ID'. If it failed, submit it again:
# it resumes from its last checkpoint.
set -euo pipefail

if (($# < 2)); then
    echo "usage: RAY_ADDRESS=http://HEAD:8265 $0 RECIPE CLUSTER [KEY=VALUE …]" >&2
    exit 2
fi
recipe=$1 cluster=$2
shift 2
: "${RAY_ADDRESS:?write the address of the dashboard, such as RAY_ADDRESS=http://HEAD:8265}"

# Uses Ray's API, because 'ray job submit' joins the words without quoting them for a shell.
exec python - "$RAY_ADDRESS" "${WORKDIR:-$PWD}" \
    python -m verl.trainer.main_ppo "+recipe=$recipe" "+cluster=$cluster" "$@" <<'PYTHON'
import shlex
import sys

from ray.job_submission import JobSubmissionClient

address, directory, *command = sys.argv[1:]
job = JobSubmissionClient(address).submit_job(entrypoint=f"cd {shlex.quote(directory)} && exec {shlex.join(command)}")
print(f"{job}\n  ray job logs --address {address} -f {job}\n  ray job stop --address {address} {job}")
PYTHON
