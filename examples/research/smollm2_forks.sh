#!/usr/bin/env bash
# The paper's section 3 on a real model: where SmolLM2's forks are, and two temperatures (Eq. 5).
#
#   examples/research/smollm2_forks.sh                       all of it; writes .demo/smollm2
#   examples/research/smollm2_forks.sh CHECKPOINT [LATER…]   then Table 1 and Figure 4 between checkpoints of a run
#
# The same command goes on where it was stopped. LIMIT=2 OUT=.demo/smollm2-try tries it with two questions.
set -euo pipefail
cd "$(dirname "$0")/../.."
run=${ENTROPY_FORK:-.venv/bin/entropy-fork}
out=${OUT:-.demo/smollm2}
limit=${LIMIT:+--limit $LIMIT}

[ -d "$out/model" ] || $run model fetch smollm2 --output "$out/model"
[ -d "$out/questions" ] || $run data prepare reasoning_gym --output "$out" --name questions --size 1 --holdout 36 \
    --task gsm_symbolic --task leg_counting --task chain_sum --task calendar_arithmetic --task letter_counting
[ -d "$out/sums" ] || $run data prepare reasoning_gym --output "$out" --name sums --size 1 --holdout "${LIMIT:-32}" \
    --task chain_sum --set chain_sum.max_terms=2 --set chain_sum.max_digits=1

# 180 questions, 4 answers each, of up to 160 tokens: over 100,000 tokens.
# shellcheck disable=SC2086
$run analyze "$out/model" --prompts "$out/questions/test.parquet" --output "$out/forks" --answers 4 --max-tokens 160 \
    --min-count "${MIN_COUNT:-50}" --engine transformers $limit
$run temperatures "$out/model" --data "$out/sums/test.parquet" --output "$out/temperatures" --like "$out/forks" \
    --high 0.6,1,2 --low 0.6,1,2 --answers 4 --max-tokens 48 --chat-template worked --engine transformers
tokens=(--tokens "$out/forks")

before="$out/forks"
number=0
for checkpoint in "$@"; do
    number=$((number + 1))
    $run analyze "$checkpoint" --like "$out/forks" --output "$out/after$number"
    $run compare "$before" "$out/after$number" --output "$out/comparison$number"
    tokens+=(--tokens "$out/after$number")
    before="$out/after$number"
done
$run report "$out/report.html" "${tokens[@]}" --min-count "${MIN_COUNT:-50}" --answers 240
