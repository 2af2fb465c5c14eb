#!/usr/bin/env bash
# run_gemma3_1b.sh <nproc> <run directory> [key=value …]
set -euo pipefail
usage="usage: run_gemma3_1b.sh <nproc> <run directory> [key=value …]"
nproc="${1:?$usage}" directory="${2:?$usage}"
shift 2
exec schoolhouse run "$(dirname "$0")/gemma3_1b.yaml" --nproc "$nproc" directory="$directory" "$@"
