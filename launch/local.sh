#!/usr/bin/env bash
# Run distbp on this machine, and start it again when a worker or host was lost.
#
#   launch/local.sh [--restarts N] [--requeue] [--dry-run] [--] COMMAND...
#
#   launch/local.sh train digits --out runs/digits
#   launch/local.sh --restarts 10 -- run --nproc 4 train.py
#
#   --restarts N   start again at most N times (default 3)
#   --requeue      start again after exit code 75 too
#   --dry-run      print the command and leave; `train --dry-run` checks the training itself
#
# COMMAND is what would follow `distbp`.  distbp already replaces lost workers by itself; this loop is for the
# day on which distbp as a whole had to give up.  Two exit codes mean "run me again":
#
#   69  a worker or host was lost.  The next start resumes from the last checkpoint and gives the same bits as
#       a run that was never disturbed.
#   75  somebody asked for a stop, and the checkpoint is safe.  On one machine that somebody is a person or a
#       shutdown, and starting again would defy them.  Only --requeue does, for whoever sends SIGUSR1 to
#       distbp itself to have it saved and started afresh.
#
# Every other code would come back unchanged and ends the loop at once.  There is no pause between starts: N is
# small, and a run that makes no progress ends itself with 70.
set -euo pipefail

say() { echo "local.sh: $*" >&2; }
refuse() { say "$*"; exit 2; }

# ----- what is asked for

restarts=3
requeue=no
dry_run=no
while [ $# -gt 0 ]; do
    case $1 in
        --restarts) [ $# -ge 2 ] || refuse "--restarts: expected a number, got nothing"; restarts=$2; shift 2 ;;
        --restarts=*) restarts=${1#*=}; shift ;;
        --requeue) requeue=yes; shift ;;
        --dry-run) dry_run=yes; shift ;;
        -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
        --) shift; break ;;
        -*) refuse "expected --restarts, --requeue or --dry-run before the command, got '$1'; options of distbp follow its command" ;;
        *) break ;;
    esac
done
[[ $restarts =~ ^[0-9]{1,6}$ ]] || refuse "--restarts: expected a whole number of at most six digits, got '$restarts'"
restarts=$((10#$restarts)) # A leading zero would otherwise mean octal.
[ $# -gt 0 ] || refuse "expected a command of distbp, as in: launch/local.sh train digits --out runs/digits"

# Without --out every start would choose a new directory by its date, and nothing would be resumed.  A script
# under `distbp run` names its directory in fit(out=...), where only the script can see it.
if [ "$restarts" -gt 0 ] && [ "$1" = train ]; then
    case " $* " in
        *" --out "* | *" --out="* | *" run.out="* | *" --set=run.out="* | *" -orun.out="*) ;;
        *) refuse "starting again needs a fixed run directory: add --out DIR, or --restarts 0 to run once" ;;
    esac
fi

# A distbp on PATH is the one that was chosen; else the one that `make install` put beside this script.
distbp=$(command -v distbp) || distbp=$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/distbp
[ -x "$distbp" ] || { say "expected distbp on PATH or in .venv, found neither; run: make install"; exit 78; }

if [ "$dry_run" = yes ]; then
    printf '%q' "$distbp"
    printf ' %q' "$@"
    echo
    exit 0
fi

# ----- signals: one that comes here goes to distbp, once, and means that nothing is started again

child=
pending=
num_signals=0

deliver() {
    [ -n "$child" ] && [ -n "$pending" ] || return 0
    local signal=$pending
    pending=
    kill -s "$signal" "$child" 2>/dev/null || true # It may have ended by itself meanwhile.
}
pass_on() { pending=$1; num_signals=$((num_signals + 1)); deliver; }
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM
trap 'pass_on USR1' USR1
trap 'pass_on TERM' HUP # The terminal is gone: save and stop rather than train on unseen.

# Job control gives distbp a process group of its own.  Otherwise a Ctrl-C would reach it twice, from the
# terminal and from here, and a second one means "at once"; and bash would start it with SIGINT ignored.
set -m

# Wait until distbp has ended and leave its exit code in `code`.  Two things end `wait` early: a signal that is
# handled here, and a distbp that was stopped with SIGSTOP or Ctrl-Z and may go on later.  Asking again is
# always answered: bash keeps the code of a child that has ended.
wait_for_child() {
    local before
    while :; do
        before=$num_signals
        code=0
        wait "$child" || code=$?
        [ "$before" = "$num_signals" ] || continue
        [ -n "$(jobs -s)" ] || return 0
        sleep 1
    done
}

# ----- the loop

starts=0
while :; do
    starts=$((starts + 1))
    "$distbp" "$@" </dev/null & # Reading the terminal from another process group would stop it for ever.
    child=$!
    deliver # What came between the two lines above.
    wait_for_child
    child=

    case $code in
        69) reason="a worker or host was lost" ;;
        75) [ "$requeue" = yes ] || exit 75; reason="stopped on request" ;;
        *) exit "$code" ;;
    esac
    [ "$num_signals" -eq 0 ] || exit "$code"
    if [ "$starts" -gt "$restarts" ]; then
        say "distbp ended with $code ($reason) at start $starts, and --restarts $restarts are used up; the same command resumes"
        exit "$code"
    fi
    say "distbp ended with $code ($reason); starting again ($starts of $restarts)"
done
