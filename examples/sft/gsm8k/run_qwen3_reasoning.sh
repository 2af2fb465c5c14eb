#!/usr/bin/env bash
# run_qwen3_reasoning.sh <nproc> <run directory> [key=value …]
set -euo pipefail
usage="usage: run_qwen3_reasoning.sh <nproc> <run directory> [key=value …]"
nproc="${1:?$usage}" directory="${2:?$usage}"
shift 2
exec schoolhouse run "$(dirname "$0")/qwen3_reasoning.yaml" --nproc "$nproc" directory="$directory" "$@"
