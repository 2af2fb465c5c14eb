#!/usr/bin/env bash
# run_starter.sh <nproc> <run directory> [key=value …]
set -euo pipefail
usage="usage: run_starter.sh <nproc> <run directory> [key=value …]"
nproc="${1:?$usage}" directory="${2:?$usage}"
shift 2
exec schoolhouse run "$(dirname "$0")/starter.yaml" --nproc "$nproc" directory="$directory" "$@"
