#!/usr/bin/env bash
# The same entry point as on a pod, as processes of this machine: to see that a run starts, and that
# it starts again, before a pod is asked for.
#
#   tpu/local.sh run [key=value ...] [--settings FILE] [--dry-run]
#
# PROCESSES (2 unless set) with DEVICES each (4 unless set). Where there are GPUs they are
# shared among the processes.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=tpu/common.sh
source "$here/common.sh"

usage() { sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

run() {
    need NAME CONFIG
    local code restarts="${RESTARTS:-20}"
    local command=(env "JAX_NUM_CPU_DEVICES=${DEVICES:-4}" bash "$here/entry.sh" "$CONFIG"
        "name=$NAME" "${OVERRIDES[@]}" --local-processes "${PROCESSES:-2}")
    while true; do
        code=0
        do_it "${command[@]}" || code=$?
        if [ "$code" = 0 ] || [ "$code" = 2 ] || [ "$code" = 130 ] || [ "$restarts" = 0 ]; then
            return "$code"
        fi
        restarts=$((restarts - 1))
        say "the run ended with $code; starting it again"
    done
}

read_arguments "run" "$@"
"$ACTION"
