#!/usr/bin/env bash
# A run on a slice of TPUs, asked for as a queued resource.
#
#   tpu/queued.sh ACTION [key=value ...] [--settings FILE] [--dry-run]
#
#   create   ask for the machines
#   install  install the package and mount the bucket, on all machines
#   run      start the run on all machines; it goes on where it stopped
#   watch    create, install and run, again after each preemption, until the run is complete
#   status   state of the request
#   logs     copy the logs of all machines to logs/NAME
#   delete   give the machines back
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=tpu/common.sh
source "$here/common.sh"

usage() { sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

place() { printf '%s\n' "--project=$PROJECT" "--zone=$ZONE"; }

everywhere() {
    local where
    mapfile -t where < <(place)
    do_it gcloud compute tpus tpu-vm ssh "$NAME" --worker=all "${where[@]}" --command="$1"
}

create() {
    need NAME PROJECT ZONE ACCELERATOR RUNTIME
    local where spot=()
    mapfile -t where < <(place)
    [ "${SPOT:-0}" = 0 ] || spot=(--spot)
    do_it gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" "${where[@]}" \
        --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" "${spot[@]}"
}

state() {
    need NAME PROJECT ZONE
    local where
    mapfile -t where < <(place)
    do_it gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" \
        --format='value(state.state)'
}

install() {
    need NAME PROJECT ZONE BUCKET SOURCE CONFIG
    local where
    mapfile -t where < <(place)
    do_it gcloud compute tpus tpu-vm scp --recurse "$here" "$(dirname "$CONFIG")" "$NAME:~/" \
        --worker=all "${where[@]}"
    everywhere "set -e
command -v gcsfuse >/dev/null || bash ~/$(basename "$here")/install_gcsfuse.sh
mkdir -p ~/runs && { mountpoint -q ~/runs || gcsfuse --implicit-dirs $(quoted "$BUCKET") ~/runs; }
python3 -m venv ~/venv && ~/venv/bin/pip install --quiet $(quoted "$SOURCE")"
}

run() {
    need NAME PROJECT ZONE CONFIG
    local config
    config="$(basename "$(dirname "$CONFIG")")/$(basename "$CONFIG")"
    everywhere "set -o pipefail
JAXRL_REASON=\$HOME/venv/bin/jaxrl-reason bash ~/$(basename "$here")/entry.sh \
$(quoted "$config" "name=$NAME" "${OVERRIDES[@]}") output_dir=\$HOME/runs 2>&1 | tee -a ~/run.log"
}

watch() {
    need NAME PROJECT ZONE ACCELERATOR RUNTIME BUCKET SOURCE CONFIG
    local now code
    if [ "$DRY_RUN" = 1 ]; then
        create && state && install && run && delete
        return
    fi
    while true; do
        now="$(state 2>/dev/null || true)"
        case "$now" in
            "") create ;;
            ACTIVE)
                install
                code=0
                run || code=$?
                [ "$code" != 0 ] || break
                [ "$code" != 2 ] || fail "the run was refused; see the message above"
                say "the run ended with $code; looking at the machines again"
                ;;
            SUSPENDED | SUSPENDING | FAILED)
                say "the machines are gone ($now); asking for others"
                delete
                ;;
            *) say "waiting: $now" ;;
        esac
        sleep "${SECONDS_BETWEEN_LOOKS:-60}"
    done
    delete
}

logs() {
    need NAME PROJECT ZONE
    local where
    mapfile -t where < <(place)
    do_it mkdir -p "logs/$NAME"
    do_it gcloud compute tpus tpu-vm ssh "$NAME" --worker=all "${where[@]}" \
        --command='cat ~/run.log' --output-directory="logs/$NAME"
}

delete() {
    need NAME PROJECT ZONE
    local where
    mapfile -t where < <(place)
    do_it gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
}

read_arguments "create install run watch status logs delete" "$@"
case "$ACTION" in
    status) state ;;
    *) "$ACTION" ;;
esac
