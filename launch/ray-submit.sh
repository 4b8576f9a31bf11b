#!/usr/bin/env bash
# Submit distbp to a Ray cluster as a job, show what it prints, and end with its exit code.
#
#   launch/ray-submit.sh [--address URL] [--working-dir DIR] [--exclude PATTERN]... [--max-mib N]
#                        [--restarts N] [--requeue] [--insecure] [--dry-run] [--] COMMAND...
#
#   launch/ray-submit.sh --address http://127.0.0.1:8265 train DATA --nproc 8 --out /shared/runs/x
#
#   --address URL      the cluster's dashboard (default: $RAY_ADDRESS); it listens on the head's loopback, so from
#                      elsewhere: ssh -L 8265:127.0.0.1:8265 HEAD, or kubectl port-forward service/NAME 8265
#   --working-dir DIR  what is sent along, and where distbp starts (default: here; '' sends nothing)
#   --exclude PATTERN  what is not sent, in the words of .gitignore, besides the usual; may be repeated
#   --max-mib N        refuse to send more than that (default 100, where Ray itself refuses the packed files)
#   --restarts N       submit again at most N times after a loss (default 3)
#   --requeue          submit again after exit code 75 too
#   --insecure         the cluster asks for no token, and its network is trusted
#   --dry-run          print the command and leave
#
# COMMAND is what would follow `distbp`; train and run get --backend ray.  $DISTBP_COMMAND, split at blanks, is
# started on the cluster in place of distbp, as in DISTBP_COMMAND="python -m distbp.cli.main".  Variables that
# configure distbp or choose kernels (DISTBP_*, OPENBLAS_*, NPY_*) are handed to the job.
#
# What a plain `ray job submit` leaves undone, and this script does:
#
#   upload     Ray would send environments and data too, and refuse only after it has packed them.  Left out
#              are .git, .venv*, caches, and runs/ and data/ at the top; what .gitignore and .rayignore name is
#              left out by Ray.  Data in data/ are sent if a word of COMMAND names them.
#   stopping   SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 become `ray job stop`, which sends SIGTERM: distbp
#              saves and ends with 75.  Ray would kill it after 3 s; here it gets $RAY_JOB_STOP_WAIT_TIME_S, by
#              default 300.  A second signal ends this script at once, and the job goes on stopping.
#   exit code  `ray job submit` answers 1 for any failure and 0 for a job that was stopped.  A shell around distbp
#              writes its code into the job's log as the last line, and this script ends with that.  Without such
#              a line Ray has killed the job or lost its node, which is 69.
#   a loss     after 69 the same command is submitted again and resumes, which needs an --out that all nodes see:
#              a job starts in a folder of its own on some node, and Ray removes that folder.
#
# The token is read by Ray itself from $RAY_AUTH_TOKEN, the file $RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.
set -euo pipefail

say() { echo "ray-submit.sh: $*" >&2; }
refuse() { say "$*"; exit 2; }

# ----- what is asked for

address=
dir=.
excludes=(.git '.venv*' __pycache__ '.*_cache' .hypothesis /runs)
max_mib=100
restarts=3
requeue=no
insecure=no
dry_run=no
while [ $# -gt 0 ]; do
    case $1 in
        --address | --working-dir | --exclude | --max-mib | --restarts) [ $# -ge 2 ] || refuse "$1: expected a value, got nothing" ;;&
        --address) address=$2; shift 2 ;;
        --working-dir) dir=$2; shift 2 ;;
        --exclude) excludes+=("$2"); shift 2 ;;
        --max-mib) max_mib=$2; shift 2 ;;
        --restarts) restarts=$2; shift 2 ;;
        --requeue) requeue=yes; shift ;;
        --insecure) insecure=yes; shift ;;
        --dry-run) dry_run=yes; shift ;;
        -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
        --) shift; break ;;
        --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
        -*) refuse "expected --address, --working-dir, --exclude, --max-mib, --restarts, --requeue, --insecure or --dry-run before the command, got '$1'; options of distbp follow its command" ;;
        *) break ;;
    esac
done
for number in restarts max_mib; do
    [[ ${!number} =~ ^[0-9]{1,6}$ ]] || refuse "--${number/_/-}: expected a whole number of at most six digits, got '${!number}'"
    printf -v "$number" %d "$((10#${!number}))" # A leading zero would otherwise mean octal.
done
[ $# -gt 0 ] || refuse "expected a command of distbp, as in: launch/ray-submit.sh train digits --nproc 2 --out /shared/runs/digits"

# The run directory, from whichever of its spellings comes last; empty when the command does not name one.
out=
previous=
for word; do
    case $previous in
        --out) out=$word ;;
        -o | --set) case $word in run.out=*) out=${word#*=} ;; esac ;;
    esac
    case $word in
        --out=*) out=${word#*=} ;;
        -orun.out=* | --set=run.out=*) out=${word#*run.out=} ;;
    esac
    previous=$word
done
[ "$1" != train ] || [[ $out = /* ]] ||
    refuse "expected an --out that begins with / and that all nodes of the cluster share, got '$out'; the folder in which a job starts is removed when it ends"
case " $* " in *" data/"* | *" ./data/"* | *" data "*) ;; *) excludes+=(/data) ;; esac

address=${address:-${RAY_ADDRESS-}}
[ -n "$address" ] || refuse "expected the address of a Ray cluster, as in --address http://127.0.0.1:8265 or RAY_ADDRESS; none is started here"
unset RAY_API_SERVER_ADDRESS # It would win over what was asked for.
export RAY_ADDRESS=$address PYTHONUNBUFFERED=1

# ----- Ray, and the right to use the cluster

ray=$(command -v ray) || ray=$(dirname "${BASH_SOURCE[0]}")/../.venv-ray/bin/ray
[ -x "$ray" ] || { say "expected ray on PATH or in .venv-ray, found neither; run: pip install 'ray[default]>=2.54'"; exit 78; }

if [ "$insecure" = no ]; then
    export RAY_AUTH_MODE=token
    token=${RAY_AUTH_TOKEN_PATH:-${HOME-}/.ray/auth_token}
    if [ -z "${RAY_AUTH_TOKEN-}" ]; then
        [ -s "$token" ] || { say "expected the cluster's token in $token, found none; copy it from the head, or say --insecure if the cluster asks for none"; exit 77; }
        [[ $(stat -Lc %a "$token") = *00 ]] || { say "expected that nobody else may read $token; run: chmod 600 $token"; exit 77; }
    fi
fi

# ----- the command

json() { # A text as JSON.
    [[ $1 != *[[:cntrl:]]* ]] || refuse "expected a text without control characters, got '$1'"
    local text=${1//\\/\\\\}
    printf '"%s"' "${text//\"/\\\"}"
}

runtime_env='{"excludes": ['
for pattern in "${excludes[@]}"; do runtime_env+="$(json "$pattern"), "; done
runtime_env="${runtime_env%, }], \"env_vars\": {\"RAY_JOB_STOP_WAIT_TIME_S\": $(json "${RAY_JOB_STOP_WAIT_TIME_S:-300}")"
for name in "${!DISTBP_@}" "${!OPENBLAS_@}" "${!NPY_@}"; do
    [ "$name" = DISTBP_COMMAND ] || runtime_env+=", \"$name\": $(json "${!name}")"
done
runtime_env+="}}"

read -ra words <<<"${DISTBP_COMMAND:-distbp}"
words+=("$1")
case $1.$insecure in
    train.no | run.no) words+=(--backend ray) ;;
    train.yes) words+=(--backend ray -o run.ray_insecure=true) ;;
    run.yes) words+=(--backend ray --ray-insecure) ;;
esac
words+=("${@:2}")

# Ray sends SIGTERM to every process of the job, so this shell only has to outlive it: it waits until a wait was not
# ended early by a signal.  One line, because Ray prints it into the log.
# shellcheck disable=SC2016 # It is for that shell to expand.
attend='signals=0 before=-1; trap "signals=\$((signals + 1))" HUP INT TERM USR1 USR2; "$@" & '\
'until [ $before = $signals ]; do before=$signals code=0; wait $! || code=$?; done; '\
'echo "ray-submit.sh: $0: distbp ended with $code"; exit $code'

compose() { # The command of one submission, with a name that no other job has.
    job=distbp-$(date +%Y%m%d-%H%M%S)-$$-$starts
    command=("$ray" job submit --submission-id "$job" --no-wait --runtime-env-json "$runtime_env")
    [ -z "$dir" ] || command+=(--working-dir "$dir")
    command+=(-- bash -c "$attend" "$job" "${words[@]}")
}

starts=1
compose
if [ "$dry_run" = yes ]; then
    printf '%q' "${command[0]}"
    printf ' %q' "${command[@]:1}"
    echo
    exit 0
fi

# ----- what may be sent

version=$("$ray" --version | grep -oE '[0-9]+\.[0-9]+' | head -n 1) || true
[ "$(printf '%s\n' 2.54 "$version" | sort -V | head -n 1)" = 2.54 ] ||
    { say "expected Ray 2.54 or newer, because older ones can be taken over (CVE-2026-27482), got '$version'; run: pip install 'ray[default]>=2.54'"; exit 78; }

# Print size and name of each file that would be sent, the largest first.  git reads the patterns as Ray does; it
# is given a repository of its own, since DIR may be in none.
list_files() {
    local own ignored=()
    own=$(mktemp -d)
    [ ! -f "$dir/.rayignore" ] || ignored=("--exclude-from=$dir/.rayignore")
    git init --quiet "$own"
    git --git-dir="$own/.git" --work-tree="$dir" -C "$dir" ls-files -z --others --exclude-per-directory=.gitignore \
        "${ignored[@]}" "${excludes[@]/#/--exclude=}" | (cd "$dir" && du -bL --files0-from=- 2>/dev/null) | sort -rn || true
    rm -rf -- "$own"
}

if [[ -n $dir && $dir != *://* ]]; then
    [ -d "$dir" ] || { say "--working-dir: expected a directory, got '$dir'"; exit 66; }
    dir=$(cd "$dir" && pwd)
    if command -v git >/dev/null; then
        files=$(list_files)
        mib=$(awk '{ sum += $1 } END { print int(sum / 1048576) }' <<<"$files")
        [ "$mib" -lt "$max_mib" ] || refuse "expected less than $max_mib MiB in $dir, got $mib, the largest:
$(head -n 5 <<<"$files")
leave files out with --exclude PATTERN or a .rayignore, keep data where all nodes see them, or send nothing: --working-dir ''"
    else
        say "git is not installed, so nobody looks how much $dir holds; Ray refuses more than 100 MiB after packing it"
    fi
fi

ask() { timeout 60 "$ray" job "$@" 2>/dev/null || true; } # Ray's client has no deadline of its own.

# ----- signals: the first stops the job, the second ends this script

child=
submitted=no
num_signals=0
first_signal=

stop_job() {
    [ "$submitted" = yes ] && [ "$num_signals" -gt 0 ] || return 0
    say "stopping job $job; distbp saves first"
    timeout 60 "$ray" job stop --no-wait "$job" >/dev/null 2>&1 || say "Ray did not take it; ask again: ray job stop $job"
}
pass_on() {
    num_signals=$((num_signals + 1))
    first_signal=${first_signal:-$1}
    [ "$num_signals" = 1 ] || { say "leaving; job $job goes on stopping: ray job status $job"; exit $((128 + $(kill -l "$1"))); }
    stop_job
}
for signal in INT TERM HUP USR1 USR2; do
    # shellcheck disable=SC2064 # Each trap is to remember the name it is set for.
    trap "pass_on $signal" "$signal"
done
trap 'for child in $(jobs -p); do kill -- "-$child" 2>/dev/null || true; done' EXIT

# Start a command.  It has a process group of its own, where Ctrl-C does not reach it.
start() {
    set -m
    "$@" </dev/null &
    child=$!
    set +m
}

# Wait for it and leave its exit code in `code`.  A signal that is handled here ends `wait` early.
finish() {
    local before
    while :; do
        before=$num_signals
        code=0
        wait "$child" || code=$?
        [ "$before" != "$num_signals" ] || return 0
    done
}

# ----- how a job ended

# Print the code that distbp ended with, or nothing.
last_word() {
    ask logs "$job" | sed -n "s/.*ray-submit\.sh: $job: distbp ended with \([0-9]*\)$/\1/p" | tail -n 1
}

# Print what Ray says of the job: succeeded, failed, stopped, something else while it runs, or nothing.
ask_state() {
    ask status "$job" | grep -oE "Job '$job' (succeeded|failed|was stopped)|Status for job '$job': [A-Z]+" |
        head -n 1 | grep -oE '[A-Za-z]+$' || true
}

# Ask every $1 seconds until the job has ended, and leave Ray's word for that in `state`; it is empty when Ray did not
# answer five times in a row.
await_end() {
    local unanswered=0
    while [ "$unanswered" -lt 5 ]; do
        state=$(ask_state)
        case $state in
            succeeded | failed | stopped) return ;;
            "") unanswered=$((unanswered + 1)) ;;
            *) unanswered=0 ;;
        esac
        sleep "$1"
    done
}

# Show the log while the job runs.  Its connection may break without a word, so somebody looks at the job itself.
follow() {
    local watcher
    start "$ray" job logs --follow "$job"
    set -m
    { await_end 60; sleep 10; kill "$child"; } &
    watcher=$!
    set +m
    finish
    kill -- "-$watcher" 2>/dev/null || true
}

# Leave distbp's exit code in `code`.
find_code() {
    code=$(last_word)
    if [ -z "$code" ]; then
        await_end 5
        code=$(last_word)
    fi
    if [ -z "$code" ]; then
        case $state in
            succeeded) code=0 ;;
            "") say "Ray at $address does not answer, and job $job may still run: ray job status $job"; exit 69 ;;
            *) say "Ray calls job $job $state, but distbp left no exit code in its log: Ray killed it, or lost its node"; code=69 ;;
        esac
    elif [ "$code" -ge 128 ] && [ "$code" != 130 ]; then
        say "distbp was killed by signal $((code - 128))"
        code=69
    fi
    if [ "$code" = 75 ] && [ "$first_signal" = INT ]; then code=130; fi
}

# ----- the loop

while :; do
    submitted=no
    compose
    start "${command[@]}"
    finish
    if [ "$code" != 0 ]; then
        say "Ray at $address did not take the job; its message stands above"
        [[ $(timeout 60 "$ray" job status "$job" 2>&1 || true) != *AuthenticationError* ]] || exit 77
        say "is the dashboard there, and is it of the same version as $ray?"
        exit 78
    fi
    submitted=yes
    stop_job # What came meanwhile.
    follow
    find_code
    case $code in
        69) reason="a worker or host was lost" ;;
        75) [ "$requeue" = yes ] || exit 75; reason="stopped on request" ;;
        *) exit "$code" ;;
    esac
    [ "$num_signals" = 0 ] || exit "$code"
    if [ "$starts" -gt "$restarts" ]; then
        say "distbp ended with $code ($reason) at start $starts, and --restarts $restarts are used up; the same command resumes"
        exit "$code"
    fi
    say "distbp ended with $code ($reason); submitting it again ($starts of $restarts)"
    starts=$((starts + 1))
done
