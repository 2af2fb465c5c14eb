#!/usr/bin/env bash
# run_deepseek_6b7.sh <nproc> <run directory> [key=value …]
set -euo pipefail
usage="usage: run_deepseek_6b7.sh <nproc> <run directory> [key=value …]"
nproc="${1:?$usage}" directory="${2:?$usage}"
shift 2
exec schoolhouse run "$(dirname "$0")/deepseek_6b7.yaml" --nproc "$nproc" directory="$directory" "$@"
