#!/usr/bin/env bash
# Training on one GPU and on two: scaling.sh FOLDER [MEASUREMENT…]. Writes MEASUREMENT.json for each, what they say together into
# summary.json, and what was printed into logs/.
#
#   large-1, large-2      1.3b, rows of 4K tokens, four a GPU, alone and under FSDP2, compiled: tokens a second, utilisation, memory
#   memory-1, memory-2    the same with gradient checkpointing, so that weights and moments are most of the memory
#   small-1, small-2      small-conv, alone and under DDP: tokens a second
#   context-1, context-2  one row of 128K tokens, alone and in parts (context parallelism under FSDP2): seconds of a step, the longest row
#   laws                  parts against whole rows, loss and gradients, float32 and bfloat16, one document and packed ones
#   run-1, run-2          `transxssm train`: undisturbed on one GPU; under FSDP2 on two, of which one process is killed (kill -9), on one,
#                         and on two again: logged losses, tokens, the line and the seconds until all have ended
#
# All of them take some eight minutes on two H100s. Those whose file is there are left out, each has its own time limit, and none goes on
# past LIMIT seconds: the next call goes on where this one ended. Sizes can be given as variables of the environment, and
# PATIENCE, by which time limits are multiplied.
set -uo pipefail
out=$(realpath -m "${1:?a folder for the results}"); shift
wanted=${*:-large-1 large-2 memory-1 memory-2 small-1 small-2 context-1 context-2 laws run-1 run-2 summary}
mkdir -p "$out/logs" && cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export NCCL_NVLS_ENABLE=0 TORCH_NCCL_ASYNC_ERROR_HANDLING=1 PYTORCH_ALLOC_CONF=expandable_segments:True TOKENIZERS_PARALLELISM=false
export PYTORCH_CUDA_ALLOC_CONF=$PYTORCH_ALLOC_CONF PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
large=(--preset "${PRESET:-1.3b}" --length "${LENGTH:-4096}" --batch "${BATCH:-4}" --steps "${STEPS:-10}")
small=(--preset "${SMALL:-small-conv}" --length "${LENGTH:-4096}" --batch "${SMALL_BATCH:-8}" --steps "${STEPS:-20}")
long=(--preset "${PRESET:-1.3b}" --length "${LONG:-131072}" --seconds "${CONTEXT_SECONDS:-110}")
runs=(--preset "${SMALL:-small-conv}" --length "${RUN_LENGTH:-2048}" --batch "${RUN_BATCH:-8}" --steps "${RUN_STEPS:-60}")

measure() { # NAME SECONDS GPUS DEVICES arguments of scaling.py
    local name=$1 seconds=$(($2 * ${PATIENCE:-1})) processes=$3 devices=$4; shift 4
    [[ " $wanted " == *" $name "* && ! -f "$out/$name.json" ]] || return 0
    local left=$((${LIMIT:-530} - SECONDS))
    if ((seconds / 2 > left)); then echo "$(date -u +%T) $name waits for another call"; return; fi
    ((seconds <= left)) || seconds=$left
    local launch=(python3)
    [[ $processes == 1 ]] || launch=(python3 -m torch.distributed.run --nproc-per-node "$processes" --standalone)
    echo "$(date -u +%T) $name"
    CUDA_VISIBLE_DEVICES=$devices timeout --kill-after 5 "$seconds" "${launch[@]}" scripts/gpu/scaling.py "$1" "$out/$name.json" "${@:2}" \
        > "$out/logs/$name.txt" 2>&1 || echo "$(date -u +%T) $name failed: $(grep -v '^\s*$' "$out/logs/$name.txt" | grep -m1 'Error' || tail -n 1 "$out/logs/$name.txt")"
}

# What takes one GPU goes beside what takes the other, and what is not timed beside its like; the most wanted goes first.
measure context-1 180 1 1 context "${long[@]}" &
{
    measure large-1 110 1 0 throughput "${large[@]}"
    measure small-1 60 1 0 throughput "${small[@]}"
    measure memory-1 60 1 0 throughput "${large[@]}" --checkpointing --steps 3
    measure run-1 90 1 0 whole-run "${runs[@]}"
} &
wait
measure large-2 110 2 0,1 throughput --sharding fsdp "${large[@]}"
measure context-2 180 2 0,1 context "${long[@]}"
measure small-2 60 2 0,1 throughput --sharding ddp "${small[@]}"
measure run-2 170 1 0,1 broken-run "${runs[@]}" &
{
    measure laws 100 2 0,1 laws --preset "${PRESET:-1.3b}" --length "${LAWS_LENGTH:-4096}"
    measure memory-2 60 2 0,1 throughput --sharding fsdp "${large[@]}" --checkpointing --steps 3
} &
wait
[[ " $wanted " == *" summary "* ]] && python3 scripts/gpu/scaling.py summary "$out"
exit 0
