#!/usr/bin/env bash
# run_qwen3_8b_peft_sp2.sh <nproc> <run directory> [key=value …]
set -euo pipefail
usage="usage: run_qwen3_8b_peft_sp2.sh <nproc> <run directory> [key=value …]"
nproc="${1:?$usage}" directory="${2:?$usage}"
shift 2
exec schoolhouse run "$(dirname "$0")/qwen3_8b_peft_sp2.yaml" --nproc "$nproc" directory="$directory" "$@"
