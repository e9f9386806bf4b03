#!/usr/bin/env bash
# Table 2 on a GPU: table2.sh FOLDER [CELL …] [SECTION.KEY=VALUE …]
if (($# < 1)); then exec "$(dirname "${BASH_SOURCE[0]}")/study.sh" table2-paper; fi
exec "$(dirname "${BASH_SOURCE[0]}")/study.sh" table2-paper "$1" grid.seeds=[0] \
    data.corpus=python-environment data.corpus_config=null data.streaming=false data.tokenizer=bpe data.vocab_size=16384 \
    data.held_out_fraction=0.02 tuning.learning_rates=[1.0e-3,2.0e-3,4.0e-3] tuning.max_steps=250 \
    training.per_device_train_batch_size=2 training.per_device_eval_batch_size=2 training.gradient_accumulation_steps=1 \
    training.warmup_steps=0.2 training.eval_steps=0.5 training.save_steps=0.25 training.torch_compile=true "${@:2}"
