#!/usr/bin/env bash
# run_seed_oss_36b.sh <nproc> <run directory> [key=value …]
set -euo pipefail
usage="usage: run_seed_oss_36b.sh <nproc> <run directory> [key=value …]"
nproc="${1:?$usage}" directory="${2:?$usage}"
shift 2
exec schoolhouse run "$(dirname "$0")/seed_oss_36b.yaml" --nproc "$nproc" directory="$directory" "$@"
