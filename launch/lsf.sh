#!/usr/bin/env bash
#BSUB -J distbp
#BSUB -n 32
#BSUB -R "span[ptile=8]"
#BSUB -W 4:00
#BSUB -Q "75"
#BSUB -o distbp.%J.out
#
# Train under LSF; when the time is up, save and go back into the queue.
#
#   bsub < launch/lsf.sh
#   launch/lsf.sh --dry-run        # prints the command; needs no LSF
#
# bsub reads the script from its standard input and hands it no arguments: edit COMMAND and the lines above, or
# set it, as in: COMMAND="train DATA --out RUN" bsub < launch/lsf.sh.  COMMAND is split at blanks.
#
# LSF announces the end of -W by SIGUSR2 and kills the job ten minutes later.  mpirun.sh takes it for a request to
# save and ends with 75, and -Q "75" makes LSF put a job that ended so back into its queue: no loop is needed here.
set -euo pipefail

COMMAND=${COMMAND:-train digits --out runs/digits}
cd "${LS_SUBCWD:-.}" # From where bsub was called.

# $LSB_DJOB_HOSTFILE names a host once for each of its slots, a form that every launcher reads.
read -ra words <<<"$COMMAND"
hosts=()
[ -z "${LSB_DJOB_HOSTFILE-}" ] || hosts=(-n "$(wc -l <"$LSB_DJOB_HOSTFILE")" --hostfile "$LSB_DJOB_HOSTFILE")
[ "${1-}" != --dry-run ] || hosts+=(--dry-run)
exec launch/mpirun.sh "${hosts[@]}" "${words[@]}"
