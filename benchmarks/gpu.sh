#!/usr/bin/env bash
# What is to be measured on a GPU, in one call under 10 minutes: `bash benchmarks/gpu.sh OUT`.
# Needs a CUDA device; DATASET and TOKENIZER name local folders where there is no hub.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
mkdir -p "$out"
source_args=(--dataset "${DATASET:-Salesforce/wikitext}" --tokenizer "${TOKENIZER:-gpt2}")

# 300 steps of both arms at the card's size, bf16: step times and peak memory are in the table.
python dnc_gpt2.py --preset full --max_steps 300 --precision bf16 --num_gpus 1 \
    --save_every_steps 150 --save_dir "$out/checkpoints" --plot_dir "$out" "${source_args[@]}" \
    2>&1 | tee "$out/gpu_300_steps.log"
rm -rf "$out/checkpoints"
