#!/usr/bin/env bash
#PBS -N distbp
#PBS -l select=4:ncpus=8:mpiprocs=8:ompthreads=1
#PBS -l walltime=04:00:00
#PBS -j oe
#
# Train under PBS; before the time is up, save and submit the job again.
#
#   qsub launch/pbs.sh
#   launch/pbs.sh --dry-run        # prints the command; needs no PBS
#
# qsub hands no arguments to a script: edit COMMAND and the lines above, or pass them on with
# `qsub -v COMMAND="train DATA --out RUN" launch/pbs.sh`.  COMMAND is split at blanks.
#
# PBS sets OMP_NUM_THREADS to 1 unless ompthreads says otherwise.  Its own end of the time is SIGTERM with a few
# seconds to go, which is short for a large checkpoint, and looks the same as a qdel.  So this script asks for the
# save itself, STOP_AFTER_S seconds after it began: keep that below the walltime.  Only then, and only after exit
# code 75, is the job submitted again; after a qdel it is not.
set -euo pipefail

COMMAND=${COMMAND:-train digits --out runs/digits}
STOP_AFTER_S=${STOP_AFTER_S:-14100} # 3 h 55 min.
cd "${PBS_O_WORKDIR:-.}" # From where qsub was called; PBS starts in the home directory.

say() { echo "pbs.sh: $*" >&2; }

# MPICH and Open MPI from pip may be built without PBS; the list of hosts that PBS gives serves all of them.
read -ra words <<<"$COMMAND"
hosts=()
[ -z "${PBS_NODEFILE-}" ] || hosts=(-n "$(wc -l <"$PBS_NODEFILE")" --hostfile "$PBS_NODEFILE")
command=(launch/mpirun.sh "${hosts[@]}" "${words[@]}")
[ "${1-}" != --dry-run ] || exec "${command[0]}" --dry-run "${command[@]:1}"

child=
time_is_up=no
num_signals=0
# shellcheck disable=SC2317 # Only traps call it.
pass_on() {
    num_signals=$((num_signals + 1))
    if [ -n "$child" ]; then kill -s USR1 "$child" 2>/dev/null || true; fi # It may have ended meanwhile.
}
trap 'time_is_up=yes; pass_on' USR1
trap 'pass_on' TERM
set -m # Process groups of their own: the timer is ended together with its sleep.
"${command[@]}" &
child=$!
[ "$num_signals" = 0 ] || pass_on # What came between the two lines above.
{ sleep "$STOP_AFTER_S" && kill -s USR1 $$; } &
timer=$!
# A trapped signal ends `wait` early; asking again is always answered, since bash keeps the code of a child.
while :; do
    before=$num_signals
    code=0
    wait "$child" || code=$?
    [ "$before" != "$num_signals" ] || break
done
kill -- "-$timer" 2>/dev/null || true

if [ "$code" = 75 ] && [ "$time_is_up" = yes ]; then
    say "saved before the time is up; submitting the job again"
    qsub -v "COMMAND=$COMMAND,STOP_AFTER_S=$STOP_AFTER_S" launch/pbs.sh
fi
exit "$code"
