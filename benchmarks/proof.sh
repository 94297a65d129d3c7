#!/usr/bin/env bash
# Every arm of the comparison, side by side on one GPU (or on a CPU's cores), then one table:
#
#     bash benchmarks/proof.sh OUT --dataset wikitext-2 --tokenizer gpt2-tokenizer \
#         --preset small --max_steps 1500 --seeds 3 --final_eval_tokens 100000
#     WHAT=ablation bash benchmarks/proof.sh OUT --dataset wikitext-2 --preset small --max_steps 600
#
# Each arm is a process of its own, JOBS of them at a time; the fields are given to all. Small
# models leave most of a GPU idle, so several at once take little longer than one. Timings of arms
# that share a machine mean nothing: take tokens/s and "at equal time" from a run of their own.
# arms: OUT/plots has the table, report.md and the pictures of all arms together (`cache` is made
# of the baseline in the end), OUT/dnc_256 the DNC of 256 slots.
# ablation: OUT/NAME/plots/results.json for each switch, off alone.
# Started again, it goes on where it was stopped. The exit code is 1 where any of it failed.
set -uo pipefail
out=$(realpath -m "${1:?usage: proof.sh OUT [fields of dnc_gpt2.py]}")
shift
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3} jobs=${JOBS:-8} what=${WHAT:-arms}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p "$out"
rm -f "$out/failed"

run() {  # run NAME FIELDS...: one process of the main job, in a folder of its own
    local name=$1
    shift
    mkdir -p "$out/$name"
    rm -f "$out/$name/plots/results.json"
    "$python" dnc_gpt2.py "$@" --resume auto --save_dir "$out/$name" --plot_dir "$out/$name/plots" \
        > "$out/$name/log" 2>&1 || {
        echo "$name: exit code $?, see $out/$name/log"
        touch "$out/failed"
    }
}

declare -A switches=(
    [all_on]="" [no_pointing]="--pointing False" [no_empty_slot]="--empty_slot False"
    [row_key_own]="--row_key own" [rows_whole]="--split_rows False" [no_decay]="--usage_decay 1.0"
    [slow_memory]="--memory_lr 0.1" [never_emptied]="--empty_share 0"
    [no_vocabulary_loss]="--lambda_vocabulary 0" [writes_all]="--min_surprisal 0"
    [no_card_losses]="--lambda_routing 0 --lambda_entropy 0"
)
if [[ $what == ablation ]]; then
    names="all_on no_pointing no_empty_slot row_key_own rows_whole no_decay slow_memory
           never_emptied no_vocabulary_loss writes_all no_card_losses baseline"
else
    names=${ARMS:-baseline dnc wide delta gru dnc_reset matched}
fi

if [[ $what == arms ]]; then  # four times the slots, for comparison; not in the table
    run dnc_256 "$@" --arms dnc --mem_slots 256 &
fi
for name in $names; do
    while (($(jobs -rp | wc -l) >= jobs)); do sleep 1; done
    if [[ $what == ablation && $name != baseline ]]; then
        # shellcheck disable=SC2086  # a switch is several words
        run "$name" "$@" --arms dnc ${switches[$name]} &
    else
        run "$name" "$@" --arms "$name" &
    fi
done
wait

if [[ $what == ablation ]]; then
    for name in $names; do
        "$python" - "$name" "$out/$name/plots/results.json" <<'PY'
import json, math, sys
name, path = sys.argv[1:]
try:
    arms = json.load(open(path))["arms"]
except OSError as error:
    sys.exit(f"{name}: {error}")
for runs in arms.values():
    cells = [f"{run['seed']}: {run['valid']['metrics']['ppl']:.2f} / "
             f"{run['test']['metrics']['ppl']:.2f}" for run in runs]
    print(f"{name:<20} " + "   ".join(cells))
PY
    done
    [[ ! -e $out/failed ]]
    exit
fi
# One folder for all arms: the names of checkpoints tell arms and seeds apart.
mkdir -p "$out/all"
for name in $names; do
    ln -f "$out/$name"/*_FINAL_*.pt "$out/all/" || exit 1
done
together=baseline,matched,wide,cache,gru,delta,dnc_reset,dnc
"$python" dnc_gpt2.py "$@" --arms "${TOGETHER:-$together}" --resume auto --save_dir "$out/all" \
    --plot_dir "$out/plots" && [[ ! -e $out/failed ]]
