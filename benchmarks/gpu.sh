#!/usr/bin/env bash
# What is to be measured on a GPU, in one call under 8 minutes: `bash benchmarks/gpu.sh OUT`, or
# parts of it by name: `bash benchmarks/gpu.sh OUT check step`. In OUT: gpu.log and a JSON each.
#   check      the fused recurrence against the eager loop, values and gradients, many shapes, of
#              the pointing memory (dnc_gpt2's default) and of the plain DNC, up to N 256, W 128
#   step       a whole training step of both arms, bf16 and float32, up to B 32, T 1024
#   scan       the recurrence alone at the card's shape, both memories: back ends, floors
#   sanitize   compute-sanitizer's memcheck and racecheck (shared memory) on three tiny cases
#   edm        a generated token of GPT-2 + EDM beside GPT-2's on the same schedule
#   decoder    a generated token with kNN-LM and with the memory decoders, beside the base's
#   epoch      the main job's default run, one epoch of both arms; continues where it stopped
#   sweep      the recurrence over T, N and B, where time is left
#   proof      all arms, three seeds, 1,500 steps of `small` (benchmarks/proof.sh)
#   ablation   each part of the pointing memory off alone, two seeds, 600 steps
# The last two run where they are named, the others always.
# A part that fails or runs out of its time does not stop the next, but the exit code is then 1 in
# the end, and the summary says how to run it alone: `BUDGET=560 bash benchmarks/gpu.sh OUT epoch`.
# Needs a CUDA device. DATASET and TOKENIZER name local folders where there is no hub, PYTHON the
# interpreter, BUDGET the seconds of all parts, CHECKPOINTS the folder of the epoch's checkpoints.
set -uo pipefail
out=$(realpath -m "${1:-benchmarks/results}")  # as the caller means it
cd "$(dirname "$0")/.." || exit 2
usual="check step scan sanitize edm decoder epoch sweep"
all="$usual proof ablation"
python=${PYTHON:-python3} budget=${BUDGET:-460} failed=0
shift || true
parts=${*:-$usual}
checkpoints=${CHECKPOINTS:-checkpoints/gpu_epoch}
source_args=(--dataset "${DATASET:-Salesforce/wikitext:wikitext-2-raw-v1}" --tokenizer "${TOKENIZER:-gpt2}")
summary=()
export PYTHONUNBUFFERED=1
for name in $parts; do
    [[ " $all " == *" $name "* ]] || { echo "error: no part $name; there are $all" >&2; exit 2; }
done
if ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "error: $python sees no CUDA device; set PYTHON to one whose torch does" >&2
    exit 2
fi
mkdir -p "$out" "$checkpoints"
echo "gpu.sh $parts, $(date -u +%FT%TZ)" >> "$out/gpu.log"  # a later call may add a part

# part NAME SECONDS COMMAND...: run a chosen part in its time and what is left of all, and note how
# it went. dnc_gpt2.py saves at the first SIGTERM and dies at a second: only with --foreground does
# timeout send one. The others need its signal to the whole group, to leave no process behind.
part() {
    local name=$1 limit=$2 left=$((budget - SECONDS)) start=$SECONDS code how=()
    shift 2
    [[ $* == *" dnc_gpt2.py "* ]] && how=(--foreground)
    [[ " $parts " == *" $name "* ]] || return 0
    ((limit < left)) || limit=$left
    if ((limit < 5)); then
        summary+=("$name: NOT RUN, no time left; run it alone: bash benchmarks/gpu.sh OUT $name")
        failed=1
        return 0
    fi
    printf '\n── %s, at most %s s ──\n' "$name" "$limit" | tee -a "$out/gpu.log"
    timeout "${how[@]}" --kill-after=20 "$limit" "$@" 2>&1 | tee -a "$out/gpu.log"
    code=${PIPESTATUS[0]}
    case $code in
        0) summary+=("$name: ok, $((SECONDS - start)) s"); return 0 ;;
        124 | 137 | 143) summary+=("$name: OUT OF TIME after $limit s") ;;
        *) summary+=("$name: FAILED, exit code $code") ;;
    esac
    failed=1
}

# Without torch's caching allocator every tensor is an allocation of its own: an access beyond its
# end is found, instead of hitting its neighbour.
sanitize() {
    local sanitizer tool
    sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
    [[ -x $sanitizer ]] || { echo "compute-sanitizer: not installed (CUDA toolkit)"; return 3; }
    for tool in memcheck racecheck; do
        echo "compute-sanitizer --tool $tool"
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 99 \
            "$1" benchmarks/scan.py --check --tiny --device cuda || return
    done
}
export -f sanitize

part check 150 "$python" benchmarks/scan.py --check --device cuda --threads 4 \
    --json "$out/check.json"
part step 80 "$python" benchmarks/step.py --sizes card,small,long --scan fused \
    --precision bf16,float32 --device cuda --json "$out/step.json"
for memory in pointing plain; do
    part scan 40 "$python" benchmarks/scan.py --memory "$memory" --backends eager,fused \
        --repeats 5 --device cuda --json "$out/scan_$memory.json"
done
part sanitize 60 bash -c 'sanitize "$1"' sanitize "$python"
part edm 60 "$python" benchmarks/edm.py --tokens 512 --device cuda --json "$out/edm.json"
part decoder 60 "$python" benchmarks/decoder.py --device cuda --json "$out/decoder.json"
# One epoch of WikiText-2, both arms, all of validation and test. --resume auto starts at step 0
# where there is no checkpoint, and has no more to do than print where the run is finished.
part epoch 520 "$python" dnc_gpt2.py --preset full --precision bf16 --num_gpus 1 \
    --save_every_steps 1000 --resume auto --save_dir "$checkpoints" --plot_dir "$out" \
    "${source_args[@]}"
part sweep 120 "$python" benchmarks/scan.py --backends eager,fused --sweep all --repeats 5 \
    --limit-seconds 2 --device cuda --json "$out/sweep.json"
small=(--preset small --precision bf16 --num_gpus 1 --final_eval_tokens 100000
       --save_every_steps 500 "${source_args[@]}")
part proof 540 env PYTHON="$python" bash benchmarks/proof.sh "$out/proof" "${small[@]}" \
    --max_steps 1500 --seeds 3
part ablation 400 env PYTHON="$python" WHAT=ablation JOBS=11 bash benchmarks/proof.sh \
    "$out/ablation" "${small[@]}" --max_steps 600 --seeds 2

printf '\n── summary ──\n' | tee -a "$out/gpu.log"
printf '%s\n' "${summary[@]}" | tee -a "$out/gpu.log"
if [[ "${summary[*]}" == *"epoch: OUT OF TIME"* ]]; then
    echo "the epoch's checkpoints are in $checkpoints; it goes on from them with:" \
        "BUDGET=560 bash benchmarks/gpu.sh OUT epoch" | tee -a "$out/gpu.log"
fi
exit "$failed"
