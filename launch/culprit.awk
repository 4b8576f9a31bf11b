# Who failed first in a job under mpirun: a decision, made from what was said.  `mpirun.sh` calls it after a job
# that ended badly, and prints what it answers.
#
#   awk -f launch/culprit.awk LAST_WORDS [LOG...]
#
# LAST_WORDS are lines that ranks, the shells that attend them, and the launcher wrote, in the order in which they
# came.  The LOGs are those of workers that trained in this start, the one that fell silent first first.  Printed
# are two words, the evidence and the exit code that the culprit gave in its own words, or dashes; a line that says
# who it was, empty if that is not known; and what its log says of this start, its middle left out if that is long.
#
# Evidence counts in this order, and is called so:
#
#   1. spoken: a rank that said how it failed.  ended: a shell whose rank ended without a word, before anybody
#      complained.  Whoever came first; but of ranks that ended rather one that was killed than one that left, and
#      rather that one than a rank that MPI itself aborted: when a rank dies, its peers on other hosts may be faster.
#   2. missed: whom the others waited for.  Those who only complain are victims; who is complained of and complains
#      as well waited for somebody else.  A worker is better than a host, which is all that other hosts see.
#   3. named: the rank that the launcher names.  Not the process that Hydra names: it is the first in the order of
#      ranks of those that died, among them those that Hydra killed itself.
#   4. silent: the log that ends first, of those that complain of nobody: perhaps.
#
# The launcher's rank is not the worker's number, which goes host by host; the first line of a log has both.

FILENAME == ARGV[1] {
    # Ranks write at the same time: one line may hold the words of several.
    gsub(/(distbp|mpirun\.sh): rank /, "\n&")
    num_pieces = split($0, pieces, "\n")
    for (piece = 1; piece <= num_pieces; piece++) hear(pieces[piece])
    next
}

# Logs are appended to; the line with which a worker begins starts the part of this start.
/^[^ ]+ worker [0-9]+ of [0-9]+, pid [0-9]+/ {
    if (!(FILENAME in worker)) logs[++num_logs] = FILENAME
    delete code[FILENAME]
    worker[FILENAME] = $3
    num_lines[FILENAME] = 0
    host[FILENAME] = word_after("host")
    process[FILENAME] = word_after("pid")
    rank[FILENAME] = word_after("launcher rank")
}

match($0, /^[^ ]+ failed with [0-9]+: /) {
    split($0, words, /[ :]+/)
    code[FILENAME] = $4 + 0
    message[FILENAME] = substr($0, RSTART + RLENGTH)
}

{ lines[FILENAME, ++num_lines[FILENAME]] = substr($0, 1, 500) }

END {
    for (i = 1; i <= num_logs; i++) {
        log_file = logs[i]
        if (log_file in code) speak(worker[log_file], host[log_file], message[log_file], code[log_file] == 69)
    }
    decide()
    print evidence == "" ? "-" : evidence, spoken_code == "" ? "-" : spoken_code
    print culprit
    if (culprit_log != "") quote(culprit_log)
}

# Return what follows `name` on the first line of a log, nothing if it is not there.
function word_after(name) {
    return match($0, name " [^ ,]+") ? substr($0, RSTART + length(name) + 1, RLENGTH - length(name) - 1) : ""
}

# Print what a log says of this start: the top of a crash, the end of a traceback.
function quote(log_file,    i) {
    print log_file " says:"
    for (i = 1; i <= num_lines[log_file]; i++) {
        if (i == 6 && num_lines[log_file] > 10) { print "  ..."; i = num_lines[log_file] - 3 }
        print "  " lines[log_file, i]
    }
}

# Take one piece of the last words.
function hear(text,    words) {
    if (match(text, /^distbp: rank [0-9]+( on host [^ :]+)?/)) {
        split(substr(text, 1, RLENGTH), words, " ")
        speak(words[3], words[6], substr(text, RLENGTH + 1), text ~ /resuming is safe/)
    } else if (match(text, /^mpirun\.sh: rank [-0-9]+, process [0-9]+, host [^ ]+: /)) {
        if (num_complaints) return # A complaint ends the job; what dies then is a consequence.
        split(substr(text, 1, RLENGTH), words, /[ ,:]+/)
        num_ended++
        ended_rank[num_ended] = words[3]; ended_process[num_ended] = words[5]; ended_host[num_ended] = words[7]
        how[num_ended] = substr(text, RLENGTH + 1)
    } else {
        hear_launcher(text)
    }
}

# Take what the launcher says: a rank, or the code of an Abort.  Processes are the attending shells to it.
function hear_launcher(text,    words) {
    if (match(text, /Errorcode: [0-9]+/)) {
        if (abort_code == "") abort_code = substr(text, RSTART + 11, RLENGTH - 11)
    } else if (match(text, /Abort\([0-9]+\) on node [0-9]+ \(rank/)) {
        split(substr(text, RSTART, RLENGTH), words, /[() ]+/)
        if (abort_code == "") abort_code = words[2]
        if (launchers_rank == "") launchers_rank = words[5]
        is_aborted[words[5]] = 1
    } else if (match(text, /process rank [0-9]+ with PID/)) {
        split(substr(text, RSTART, RLENGTH), words, " ")
        if (launchers_rank == "") launchers_rank = words[3]
        if (text ~ /with PID 0 /) is_aborted[words[3]] = 1
    } else if (match(text, /Process name: \[[^]]*,[0-9]+\]/)) {
        sub(/\].*/, "", text); sub(/.*,/, "", text)
        if (launchers_rank == "") launchers_rank = text
    }
}

# Take the words of a worker: a failure of its own, or a complaint that somebody else is lost.
function speak(its_worker, its_host, its_message, is_complaint,    words) {
    if (!is_complaint) {
        if (spoken_worker == "") { spoken_worker = its_worker; spoken_host = its_host; ended_before_spoken = num_ended }
        return
    }
    complained[its_worker] = 1
    num_complaints++
    if (match(its_message, /waited [0-9.]+ s for worker [0-9]+/)) {
        split(substr(its_message, RSTART, RLENGTH), words, " ")
        missed_workers[++num_missed_workers] = words[6]
    } else if (match(its_message, /waited [0-9.]+ s for host [^ ,;]+/)) {
        split(substr(its_message, RSTART, RLENGTH), words, " ")
        if (missed_host == "") missed_host = words[6]
    }
}

function decide(    i) {
    if (spoken_worker != "" && !ended_before_spoken) {
        evidence = "spoken"
        culprit_log = log_of_worker(spoken_worker)
        spoken_code = culprit_log in code ? code[culprit_log] : abort_code
        culprit = describe("worker " spoken_worker (spoken_host == "" ? "" : " on host " spoken_host))
        return
    }
    if (num_ended) {
        evidence = "ended"
        i = first_ended()
        culprit_log = log_of_process(ended_rank[i], ended_process[i], ended_host[i])
        culprit = describe("rank " ended_rank[i] " of the launcher, process " ended_process[i] " on host " ended_host[i]) ", " how[i]
        return
    }
    for (i = 1; i <= num_missed_workers; i++) {
        if (missed_workers[i] in complained) continue
        evidence = "missed"
        culprit_log = log_of_worker(missed_workers[i])
        culprit = describe("worker " missed_workers[i]) ", for which the others waited in vain"
        return
    }
    if (missed_host != "") {
        evidence = "missed"
        culprit = "host " missed_host " or the link to it, for which the others waited in vain"
    } else if (launchers_rank != "") {
        evidence = "named"
        culprit_log = log_of_process(launchers_rank)
        culprit = describe("rank " launchers_rank " of the launcher, which names it; no log of it was found")
    } else {
        suspect()
    }
}

# Return which of the shells' words count.
function first_ended(    i) {
    for (i = 1; i <= num_ended; i++) if (how[i] ~ /^killed/) return i
    for (i = 1; i <= num_ended; i++) if (!(ended_rank[i] in is_aborted)) return i
    return 1
}

# Take the log that fell silent first for a hint, if nothing better is known.
function suspect(    i) {
    for (i = 1; i <= num_logs && culprit_log == ""; i++)
        if (!(worker[logs[i]] in complained)) culprit_log = logs[i]
    if (culprit_log == "") return
    evidence = "silent"
    culprit = "perhaps " describe("") "; nobody says who failed, and it fell silent first"
}

# Return who wrote the culprit's log; `otherwise`, if there is none.
function describe(otherwise,    who, launched) {
    if (culprit_log == "") return otherwise
    who = "worker " worker[culprit_log] (host[culprit_log] == "" ? "" : " on host " host[culprit_log])
    launched = rank[culprit_log] == "" ? "" : "rank " rank[culprit_log] " of the launcher, "
    return who " (" launched "process " process[culprit_log] ")"
}

function log_of_worker(number,    i) {
    for (i = 1; i <= num_logs; i++) if (worker[logs[i]] == number) return logs[i]
    return ""
}

# Return the log of the launcher's rank, or else of the process, whose number counts on its own host alone.
function log_of_process(its_rank, its_process, its_host,    i) {
    for (i = 1; i <= num_logs; i++) if (rank[logs[i]] == its_rank) return logs[i]
    for (i = 1; i <= num_logs; i++)
        if (process[logs[i]] == its_process && host[logs[i]] == its_host) return logs[i]
    return ""
}
