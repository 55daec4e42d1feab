#!/usr/bin/env bash
# Which tasks suit a small model: SmolLM2's answers to 32 questions of each of twelve reasoning-gym tasks.
#
#   make smollm2-tasks       writes .demo/smollm2/tasks; the same command goes on where it was stopped
#
# LIMIT=2 OUT=.demo/smollm2-try tries it with two questions of each.
set -euo pipefail
cd "$(dirname "$0")/../.."
run=${ENTROPY_FORK:-.venv/bin/entropy-fork}
out=${OUT:-.demo/smollm2}

[ -d "$out/model" ] || $run model fetch smollm2 --output "$out/model"
[ -d "$out/twelve" ] || $run data prepare reasoning_gym --output "$out" --name twelve --size 1 --holdout "${LIMIT:-32}" \
    --task chain_sum --set chain_sum.max_terms=2 --set chain_sum.max_digits=1 \
    --task products --set products.max_digits=1 \
    --task gcd --set gcd.max_value=20 \
    --task simple_equations --set simple_equations.max_value=9 \
    --task number_sequence --set number_sequence.max_value=9 --set number_sequence.max_complexity=1 \
    --task calendar_arithmetic \
    --task letter_counting --set letter_counting.max_words=5 \
    --task leg_counting --set leg_counting.min_animals=1 --set leg_counting.max_animals=2 \
    --task spell_backward --set spell_backward.max_word_len=4 \
    --task word_sorting --set word_sorting.max_words=3 \
    --task needle_haystack --set needle_haystack.min_num_statements=3 --set needle_haystack.max_num_statements=5 \
    --task syllogism
$run evaluate "$out/model" --data "$out/twelve/test.parquet" --output "$out/tasks" --answers 1 --max-tokens 64 \
    --chat-template worked --engine transformers --batch-size 64
