#!/usr/bin/env bash
# An archive of a results folder without weights, optimizers and tokenizers: pack.sh FOLDER ARCHIVE.tar.gz
set -euo pipefail
tar --exclude='*.safetensors' --exclude='checkpoint-*' --exclude='tokenizer*' --exclude='events.*' -czf "${2:?the archive}" -C "${1:?the folder}" .
