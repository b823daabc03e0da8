#!/usr/bin/env bash
# A run on a slice of TPUs, asked for as a queued resource.
#
#   tpu/queued.sh ACTION [key=value ...] [--settings FILE] [--dry-run]
#
#   create   ask for the machines
#   install  install the package and mount the bucket, on all machines
#   run      start the run on all machines; it goes on where it stopped
#   watch    create, install and run, again after each preemption and failure, until the run is complete
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
    # Chained, since `set -e` does not hold where a caller looks at the outcome, as `watch` does.
    do_it gcloud compute tpus tpu-vm scp --recurse "$here" "$(dirname "$CONFIG")" "$NAME:~/" \
        --worker=all "${where[@]}" &&
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

# What `watch` knows: the state of the request, NONE where there is none, "" where nobody says; and
# how many times in a row something has not worked.
now=""
failures=0

look() {
    local said code=0
    said="$(mktemp)"
    now="$(state 2>"$said")" || code=$?
    if [ "$code" = 0 ]; then
        [ -n "$now" ] || say "gcloud does not say what state the machines are in"
    elif grep -q NOT_FOUND "$said"; then
        now=NONE
    else
        now=""
        cat "$said" >&2
    fi
    rm -f "$said"
}

failed() {
    failures=$((failures + 1))
    say "$1; that was failure $failures of ${FAILURES:-10} in a row"
    [ "$failures" -lt "${FAILURES:-10}" ] || exit 1
}

pause() { sleep "${SECONDS_BETWEEN_LOOKS:-60}"; }

# Said however `watch` ends, unless it has given the machines back.
held() {
    say "The machines may still be there, and cost. The same command goes on with them;" \
        "this gives them back:"
    DRY_RUN=1
    delete >&2
}

watch() {
    need NAME PROJECT ZONE ACCELERATOR RUNTIME BUCKET SOURCE CONFIG
    local code began
    if [ "$DRY_RUN" = 1 ]; then
        create && state && install && run && delete
        return
    fi
    trap held EXIT
    # gcloud ends well after Ctrl-C, upon which this would go on.
    trap 'exit 130' INT
    while true; do
        look
        case "$now" in
            "") failed "nobody says how the machines are" ;;
            NONE) if create; then failures=0; else failed "no machines could be asked for"; fi ;;
            ACTIVE)
                began=$SECONDS
                code=0
                if install; then
                    run || code=$?
                    [ "$code" != 0 ] || break
                    [ "$code" != 2 ] || fail "the run was refused; see the message above"
                    # What worked for an hour was not one of many failures.
                    [ $((SECONDS - began)) -lt 3600 ] || failures=0
                    failed "the run ended with $code"
                else
                    failed "the machines could not be made ready"
                fi
                ;;
            SUSPENDED | SUSPENDING | FAILED)
                say "the machines are gone ($now); asking for others"
                if delete; then failures=0; else failed "what is left could not be deleted"; fi
                ;;
            *)
                say "waiting: $now"
                failures=0
                ;;
        esac
        pause
    done
    say "the run is complete"
    failures=0
    until delete; do
        look
        [ "$now" != NONE ] || break
        failed "the machines could not be given back"
        pause
    done
    trap - EXIT
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
