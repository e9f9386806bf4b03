#!/usr/bin/env bash
# Table 3's substitute on a GPU: table3.sh FOLDER [CELL …] [SECTION.KEY=VALUE …]
set -euo pipefail
out=${1:?a folder for the results}; shift
arguments=()
for argument in "$@"; do
    if [[ $argument == *=* || $argument == -* ]]; then arguments+=("$argument"); else arguments+=(--only "$argument"); fi
done
python3 -m transxssm study table3-gpu grid.output_dir="$out/table3" "${arguments[@]}"
