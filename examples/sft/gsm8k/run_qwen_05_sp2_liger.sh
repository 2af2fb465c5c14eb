#!/usr/bin/env bash
# run_qwen_05_sp2_liger.sh <nproc> <run directory> [key=value …]
set -euo pipefail
usage="usage: run_qwen_05_sp2_liger.sh <nproc> <run directory> [key=value …]"
nproc="${1:?$usage}" directory="${2:?$usage}"
shift 2
exec schoolhouse run "$(dirname "$0")/qwen_05_sp2_liger.yaml" --nproc "$nproc" directory="$directory" "$@"
