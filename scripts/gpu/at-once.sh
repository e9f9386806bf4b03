#!/usr/bin/env bash
# Several cells of a study at once, a process each, spread over the GPUs: at-once.sh STUDY.sh FOLDER CELL … [SECTION.KEY=VALUE …]
# Small models leave a GPU waiting for launches most of the time. The first cell prepares the data; the others start at its first
# step. What each says is in FOLDER/logs. Once all have ended, names those that failed, and ends with the last one's status.
set -uo pipefail
if (($# < 3)); then
    echo "error: got $# arguments; usage: at-once.sh STUDY.sh FOLDER CELL … [SECTION.KEY=VALUE …]" >&2
    exit 2
fi
study=$(dirname "${BASH_SOURCE[0]}")/$1 out=$2
if [[ ! -x $study ]]; then
    echo "error: there is no $study; expected table2.sh or table3.sh" >&2
    exit 2
fi
shift 2
cells=() settings=()
for argument in "$@"; do
    if [[ $argument == *=* ]]; then settings+=("$argument"); else cells+=("$argument"); fi
done
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
mkdir -p "$out/logs"
started=() number=0 status=0
trap 'kill "${started[@]}" 2>/dev/null; exit 130' INT TERM # what runs in the background does not hear Ctrl-C
for cell in "${cells[@]}"; do
    CUDA_VISIBLE_DEVICES=$((number % (gpus > 0 ? gpus : 1))) "$study" "$out" "$cell" "${settings[@]}" >"$out/logs/$cell.txt" 2>&1 &
    started+=($!)
    if ((number == 0)); then
        until find "$out" -name metrics.jsonl -size +0 | grep -q . || ! kill -0 "$!" 2>/dev/null; do sleep 1; done
    fi
    number=$((number + 1))
done
for number in "${!started[@]}"; do
    wait "${started[number]}" && continue
    status=$? log=$out/logs/${cells[number]}.txt
    echo "error: ${cells[number]}: $(tail -n 1 "$log") (all of it: $log)" >&2
done
exit "$status"
