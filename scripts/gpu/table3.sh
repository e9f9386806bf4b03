#!/usr/bin/env bash
# Table 3's substitute on a GPU: table3.sh FOLDER [CELL …] [SECTION.KEY=VALUE …]
exec "$(dirname "${BASH_SOURCE[0]}")/study.sh" table3-gpu "$@"
