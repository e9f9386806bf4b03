#!/usr/bin/env bash
# The laws on a GPU: laws.sh FOLDER [pytest's arguments]
set -uo pipefail
out=$(realpath -m "${1:?a folder for the results}"); shift
mkdir -p "$out" && cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python3 -m pytest tests/ops tests/models/test_real_layers.py tests/models/test_gpu_kernels.py --device cuda -q -p no:cacheprovider --durations=20 "$@" 2>&1 | tee "$out/laws.txt"
