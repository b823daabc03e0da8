#!/usr/bin/env bash
# A run on GPUs of a Slurm cluster.
#
#   scripts/slurm/submit.sh ACTION [key=value ...] [--settings FILE] [--dry-run]
#
#   submit  put it into the queue; it goes on where it stopped
#   status  where it is
#   logs    what it says, followed
#   delete  cancel it
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=tpu/common.sh
source "$here/../../tpu/common.sh"

usage() { sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

submit() {
    need NAME CONFIG NODES GPUS
    local where=()
    [ -z "${PARTITION:-}" ] || where=(--partition="$PARTITION")
    do_it mkdir -p logs
    do_it env "JAXRL_HOME=$(cd "$here/../.." && pwd)" sbatch --job-name="$NAME" --nodes="$NODES" \
        --ntasks-per-node="$GPUS" --gpus-per-node="$GPUS" --time="${HOURS:-24}:00:00" "${where[@]}" \
        --output="logs/$NAME.log" "$here/run.sbatch" "$CONFIG" "name=$NAME" "${OVERRIDES[@]}"
}

status() {
    need NAME
    do_it squeue --name="$NAME"
}

logs() {
    need NAME
    do_it tail --follow=name --lines=200 "logs/$NAME.log"
}

delete() {
    need NAME
    do_it scancel --name="$NAME"
}

read_arguments "submit status logs delete" "$@"
"$ACTION"
