#!/usr/bin/env bash
# Training on one GPU and on two: scaling.sh FOLDER [MEASUREMENT…]. Those whose file is there are left out; each has its own time limit.
# All of them take some eight minutes on two H100s, and nothing is begun that would go far past LIMIT seconds: the next call goes on.
# Sizes and limits can be given as variables of the environment.
set -uo pipefail
out=$(realpath -m "${1:?a folder for the results}"); shift
wanted=${*:-laws small-1 small-2 large-1 large-2 context-1 context-2 losses-1 losses-2 summary}
mkdir -p "$out/logs" && cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export NCCL_NVLS_ENABLE=0 TORCH_NCCL_ASYNC_ERROR_HANDLING=1 PYTORCH_ALLOC_CONF=expandable_segments:True TOKENIZERS_PARALLELISM=false
export PYTORCH_CUDA_ALLOC_CONF=$PYTORCH_ALLOC_CONF PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
large=(--preset "${PRESET:-1.3b}" --length "${LENGTH:-4096}" --batch "${BATCH:-4}" --steps "${STEPS:-10}")
small=(--preset "${SMALL:-small-conv}" --length "${LENGTH:-4096}" --batch "${SMALL_BATCH:-8}" --steps "${STEPS:-20}")
long=(--preset "${PRESET:-1.3b}" --length "${LONG:-131072}" --seconds "${CONTEXT_SECONDS:-110}")
same=(--preset "${SMALL:-small-conv}" --length "${LOSS_LENGTH:-2048}" --batch "${LOSS_BATCH:-8}" --steps 20)

measure() { # NAME SECONDS GPUS DEVICES arguments of scaling.py
    local name=$1 seconds=$2 processes=$3 devices=$4; shift 4
    [[ " $wanted " == *" $name "* && ! -f "$out/$name.json" ]] || return 0
    if ((SECONDS + seconds / 2 > ${LIMIT:-480})); then echo "$(date -u +%T) $name waits for another call"; return; fi
    local launch=(python3)
    [[ $processes == 1 ]] || launch=(python3 -m torch.distributed.run --nproc-per-node "$processes" --standalone)
    echo "$(date -u +%T) $name"
    CUDA_VISIBLE_DEVICES=$devices timeout --kill-after 5 "$seconds" "${launch[@]}" scripts/gpu/scaling.py "$1" "$out/$name.json" "${@:2}" \
        > "$out/logs/$name.txt" 2>&1 || echo "$(date -u +%T) $name failed: $(grep -v '^\s*$' "$out/logs/$name.txt" | grep -m1 'Error' || tail -n 1 "$out/logs/$name.txt")"
}

# What takes one GPU goes beside what takes the other; the most wanted goes first, and what has no time left waits for the next call.
measure context-1 "${CONTEXT_LIMIT:-180}" 1 1 context "${long[@]}" &
{
    measure large-1 110 1 0 throughput "${large[@]}"
    measure small-1 60 1 0 throughput "${small[@]}"
    measure losses-1 60 1 0 losses --eager "${same[@]}"
} &
wait
measure large-2 110 2 0,1 throughput --sharding fsdp "${large[@]}"
measure context-2 "${CONTEXT_LIMIT:-180}" 2 0,1 context "${long[@]}"
measure laws 70 2 0,1 laws --preset "${PRESET:-1.3b}" --length "${LAWS_LENGTH:-4096}"
measure small-2 60 2 0,1 throughput --sharding ddp "${small[@]}"
measure losses-2 60 2 0,1 losses --eager --sharding fsdp "${same[@]}"
[[ " $wanted " == *" summary "* ]] && python3 scripts/gpu/scaling.py summary "$out"
exit 0
