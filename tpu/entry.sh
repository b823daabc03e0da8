#!/usr/bin/env bash
# What every machine of a pod executes: the run, with its exit code made fit for a launcher.
#
#   entry.sh CONFIG [key=value ...]
#
# `jaxrl-reason run` saves and exits with 0 after a notice (SIGTERM), since nothing is lost. A launcher
# would take that for the end of the run, so that it is turned into 143 here, which is restarted.
# A mistake of the user's (2) stays 2, which a restart would not mend. Ctrl-C (SIGINT) saves too, and
# is 130 here: who presses it wants the run to end.
set -uo pipefail

noticed=0
interrupted=0
passed_on=0
child=""
# A second notice ends the run without saving, so that the first is passed on once, and it is whenever
# it comes: before the run begins, or before its number is known here.
take() {
    noticed=1
    child="${!:-}"
    [ -z "$child" ] || { passed_on=1; kill -TERM "$child" 2>/dev/null; }
}
trap take TERM HUP
trap 'interrupted=1; take' INT

"${JAXRL_REASON:-jaxrl-reason}" run "$@" &
child=$!
[ "$noticed" = "$passed_on" ] || take
# A signal ends `wait`, not the child.
while true; do
    wait "$child"
    code=$?
    kill -0 "$child" 2>/dev/null || break
done
if [ "$interrupted" = 1 ]; then
    code=130
elif [ "$noticed" = 1 ] && [ "$code" = 0 ]; then
    code=143
fi
exit "$code"
