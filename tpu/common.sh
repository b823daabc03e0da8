# shellcheck shell=bash
# What the launch scripts share; sourced by them.
#
# `do_it` executes a command, or prints it with --dry-run. Settings come from the environment or from
# the file that --settings names (tpu/settings.example); what is missing is said before anything is
# asked of a cloud.

set -euo pipefail

DRY_RUN=0
SETTINGS=""
ACTION=""
OVERRIDES=()

say() { printf '%s\n' "$*" >&2; }

fail() {
    say "error: $*"
    exit 2
}

# do_it COMMAND...: execute it, or print it so that it can be pasted into a shell.
do_it() {
    if [ "$DRY_RUN" = 1 ]; then
        printf '%q ' "$@"
        printf '\n'
    else
        "$@"
    fi
}

# read_arguments "ACTIONS" "$@": an action, key=value of the run, --dry-run, --settings FILE.
read_arguments() {
    local actions="$1"
    shift
    while [ $# -gt 0 ]; do
        case "$1" in
            --dry-run) DRY_RUN=1 ;;
            --settings)
                [ $# -gt 1 ] || fail "--settings needs a file; copy tpu/settings.example"
                SETTINGS="$2"
                shift
                ;;
            -h | --help)
                usage
                exit 0
                ;;
            -*) fail "unknown option $1; there are --dry-run, --settings FILE and --help" ;;
            *=*) OVERRIDES+=("$1") ;;
            *)
                [ -z "$ACTION" ] || fail "one action at a time, got $ACTION and $1"
                case " $actions " in
                    *" $1 "*) ACTION="$1" ;;
                    *) fail "unknown action $1; there are: $actions" ;;
                esac
                ;;
        esac
        shift
    done
    [ -n "$ACTION" ] || fail "say what to do: $actions"
    if [ -n "$SETTINGS" ]; then
        [ -f "$SETTINGS" ] || fail "there is no file $SETTINGS; copy tpu/settings.example"
        # shellcheck disable=SC1090
        source "$SETTINGS"
    fi
}

# need NAME...: settings without which an action cannot work.
need() {
    local missing=() name
    for name in "$@"; do
        [ -n "${!name:-}" ] || missing+=("$name")
    done
    [ ${#missing[@]} = 0 ] ||
        fail "set ${missing[*]} in the environment or in a file (--settings; see tpu/settings.example)"
}

# quoted WORD...: one line for a shell on another machine.
quoted() {
    local line
    printf -v line '%q ' "$@"
    printf '%s' "${line% }"
}
