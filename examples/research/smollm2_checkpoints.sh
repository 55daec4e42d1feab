#!/usr/bin/env bash
# What training changed in SmolLM2: Table 1's overlap and Figure 4's change between the checkpoints of a run of 16 steps.
#
#   make demo MODEL=smollm2
#   make smollm2-checkpoints      writes .demo/smollm2/checkpoints
#
# RUN=FOLDER names another folder of `make demo MODEL=smollm2`, OUT=FOLDER another place for the results.
set -euo pipefail
cd "$(dirname "$0")/../.."
run=${ENTROPY_FORK:-.venv/bin/entropy-fork}
demo=${RUN:-.demo/smollm2}
out=${OUT:-$demo/checkpoints}
of_run="$demo/global-seed1-transformers"
min=(--min-count "${MIN_COUNT:-50}")

mkdir -p "$out"
# the answers of the start; each checkpoint measures its own entropies of them
$run analyze "$demo/world/model" --prompts "$demo/world/test.parquet" --output "$out/start" --answers 4 --max-tokens 48 \
    --engine transformers "${min[@]}"
for step in 8 16; do
    $run analyze "$of_run/checkpoints/global_step_$step" --like "$out/start" --output "$out/step$step" "${min[@]}"
done
$run compare "$out/start" "$out/step8" "$out/step16" --output "$out/comparison"
$run report "$out/report.html" --compare "$out/start" --compare "$out/step8" --compare "$out/step16" \
    --tokens "$of_run/tokens" --run "global=$of_run/tensorboard" "${min[@]}"
