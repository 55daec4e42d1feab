#!/usr/bin/env bash
# The paper's section 3 on a real model: where SmolLM2's forks are, and two temperatures (Eq. 5).
#
#   make smollm2-forks        writes .demo/smollm2; the same command goes on where it was stopped
#
# LIMIT=2 OUT=.demo/smollm2-try tries it with two questions.
set -euo pipefail
cd "$(dirname "$0")/../.."
run=${ENTROPY_FORK:-.venv/bin/entropy-fork}
out=${OUT:-.demo/smollm2}
limit=${LIMIT:+--limit $LIMIT}
sums="$out/sums-${LIMIT:-32}"

[ -d "$out/model" ] || $run model fetch smollm2 --output "$out/model"
[ -d "$out/questions-200" ] || $run data prepare reasoning_gym --output "$out" --name questions-200 --size 1 --holdout 40 \
    --task gsm_symbolic --task leg_counting --task chain_sum --task calendar_arithmetic --task letter_counting
[ -d "$sums" ] || $run data prepare reasoning_gym --output "$out" --name "$(basename "$sums")" \
    --size 1 --holdout "${LIMIT:-32}" --task chain_sum --set chain_sum.max_terms=2 --set chain_sum.max_digits=1

# 200 questions, 4 answers each, of up to 160 tokens: over 100,000 tokens.
# shellcheck disable=SC2086
$run analyze "$out/model" --prompts "$out/questions-200/test.parquet" --output "$out/forks" --answers 4 --max-tokens 160 \
    --min-count "${MIN_COUNT:-50}" --engine transformers $limit
$run report "$out/report.html" --tokens "$out/forks" --min-count "${MIN_COUNT:-50}" --answers 240

# τ is the 80th percentile of the same kind of answers at T = 1: there a fifth of the tokens is above it.
answers=(--answers 4 --max-tokens 48 --chat-template worked --engine transformers)
$run analyze "$out/model" --prompts "$sums/test.parquet" --output "$out/forks-of-sums" --min-count 1 "${answers[@]}"
two=(temperatures "$out/model" --data "$sums/test.parquet" --like "$out/forks-of-sums" "${answers[@]}")
$run "${two[@]}" --output "$out/temperatures" --high 0.6,1,2 --low 0.6,1,2
$run "${two[@]}" --output "$out/temperatures-cool" --high 0.6,2 --fixed-low 0.6 --low ''
