#!/usr/bin/env bash
# Table 2 on a GPU: table2.sh FOLDER [CELL …] [SECTION.KEY=VALUE …]
set -euo pipefail
out=${1:?a folder for the results}; shift
arguments=()
for argument in "$@"; do
    if [[ $argument == *=* || $argument == -* ]]; then arguments+=("$argument"); else arguments+=(--only "$argument"); fi
done
python3 -m transxssm study table2-paper grid.output_dir="$out/table2" grid.seeds=[0] \
    data.corpus=python-environment data.corpus_config=null data.streaming=false data.tokenizer=bpe data.vocab_size=16384 \
    training.per_device_train_batch_size=2 training.gradient_accumulation_steps=1 "${arguments[@]}"
