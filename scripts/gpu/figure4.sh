#!/usr/bin/env bash
# Figure 4 on a GPU: figure4.sh FOLDER. Sizes and limits can be given as variables of the environment.
set -euo pipefail
out=${1:?a folder for the results}
benchmark=(python3 -m transxssm benchmark)
size=(--preset "${PRESET:-1.3b}" --device "${DEVICE:-cuda}" --dtype "${DTYPE:-bfloat16}" --budget-minutes "${MINUTES:-9}")
"${benchmark[@]}" throughput "${size[@]}" --modes train,prefill,decode --lengths "${LENGTHS:-4K,16K}" --repeats 10 \
    --contenders transxssm-compiled,transxssm-graph,llama,llama-compiled,llama-graph,mamba2,jamba --output "$out/figure4"
"${benchmark[@]}" decode "${size[@]}" --length "${PROMPT:-4K}" --batches "${BATCHES:-1,16,64,256,384,768,1280}" --repeats 3 \
    --contenders transxssm,transxssm-compiled,llama,llama-static,mamba2,jamba --output "$out/decode"
"${benchmark[@]}" throughput "${size[@]}" --modes train,prefill,decode --lengths "${EDGES:-1K,64K}" --repeats 10 \
    --contenders transxssm-compiled,transxssm,transxssm-graph,llama,llama-compiled,llama-eager,llama-graph,mamba2,jamba --output "$out/figure4-edges"
"${benchmark[@]}" throughput "${size[@]}" --modes train-checkpointed --lengths "${LONG:-64K}" --repeats 3 \
    --contenders transxssm-compiled,llama,mamba2,jamba --output "$out/figure4-long"
