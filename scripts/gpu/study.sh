#!/usr/bin/env bash
# One study, for table2.sh and table3.sh: study.sh STUDY FOLDER [CELL …] [SECTION.KEY=VALUE …]
set -euo pipefail
if (($# < 2)); then
    echo "error: no folder for the results was given; usage: table2.sh FOLDER [CELL …] [SECTION.KEY=VALUE …]" >&2
    exit 2
fi
study=$1 out=$2
shift 2
arguments=()
for argument in "$@"; do
    if [[ $argument == *=* || $argument == -* ]]; then arguments+=("$argument"); else arguments+=(--only "$argument"); fi
done
exec python3 -m transxssm study "$study" grid.output_dir="$out/${study%%-*}" "${arguments[@]}"
