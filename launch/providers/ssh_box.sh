#!/bin/sh
# What Ferry asks of the machine that trains: its text goes over ssh to `sh -s -- VERB FOLDER ...`, nothing of it stays
# there. FOLDER is one job's: the committed tree, and beside it job/ with
#   config.yaml commit listing files/    what was sent
#   lock    held by the job and by all that it started: while it is held, the job runs
#   pid     of its make        group    of all its processes
#   log     what it says       goal     of its make        exit    its exit code, written last
set -eu

# look FOLDER: what this machine has, a fact a line.
look() {
    echo "system $(uname -s) $(uname -m)"
    for tool in make python3 tar flock setsid sha256sum tail; do
        command -v "$tool" >/dev/null 2>&1 || echo "missing $tool"
    done
    there=$1
    while [ ! -d "$there" ]; do there=$(dirname "$there"); done
    [ -w "$there" ] || echo "unwritable $there"
    echo "free $(df -Pk "$there" | awk 'NR == 2 { print $4 }')"
    if gpus=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null); then
        echo "$gpus" | sed 's/^/gpu /'
    fi
}

# state FOLDER: of its job.
state() {
    cd "$1/job" 2>/dev/null || return 0
    for fact in commit goal; do
        if [ -f "$fact" ]; then echo "$fact $(cat "$fact")"; fi
    done
    if [ -f config.yaml ]; then echo "config $(sha256sum <config.yaml | cut -d ' ' -f 1)"; fi
    if [ -f log ]; then echo "log $(wc -c <log)"; fi
    if [ ! -f lock ]; then
        return 0
    elif ! flock -n -s lock true; then
        echo running
    elif [ -f exit ]; then
        echo "ended $(cat exit)"
    else
        echo died
    fi
}

# claim FOLDER: make it a job's, by job/commit and job/listing, before anything is sent; the tree that was sent before
# goes. Where it is something else's: say what lies there, a name a line, and leave it.
claim() {
    if [ ! -f "$1/job/commit" ] || [ ! -f "$1/job/listing" ]; then
        names=
        if [ -e "$1" ] || [ -L "$1" ]; then names=$(ls -A -- "$1"); fi
        # a claim that was interrupted
        if [ "$names" = job ] && [ -d "$1/job" ]; then
            names=$(ls -A -- "$1/job")
            if [ "$names" = listing ] && [ ! -s "$1/job/listing" ]; then names=; fi
        fi
        if [ -n "$names" ]; then
            echo "$names"
            return 0
        fi
        mkdir -p "$1/job"
        : >>"$1/job/listing"
        : >>"$1/job/commit"
    fi
    forget "$1"
}

# forget FOLDER: the files of the tree that was sent before; what the job made stays. No tree has a file outside of it.
forget() {
    cd "$1" 2>/dev/null && [ -f job/listing ] || return 0
    while IFS= read -r name; do
        case $name in /* | *..*) continue ;; esac
        rm -f -- "$name"
    done <job/listing
}

# have FOLDER NAME...: number and sha256 of each of these files that is there.
have() {
    cd "$1"
    shift
    number=0
    for name in "$@"; do
        if [ -f "$name" ]; then echo "$number $(sha256sum <"$name" | cut -d ' ' -f 1)"; fi
        number=$((number + 1))
    done
}

# start FOLDER GOAL SETTING...: make, in a session of its own that no hang-up reaches. A job that runs is not started again.
start() {
    cd "$1"
    shift
    rm -f job/exit
    # shellcheck disable=SC2016  # the inner shell's variables
    setsid flock -w 5 job/lock sh -c '
        rm -f job/exit
        echo "$PPID" >job/group
        echo "$1" >job/goal
        make "$@" &
        echo "$!" >job/pid
        code=0
        wait "$!" || code=$?
        echo "$code" >job/exit.new
        mv job/exit.new job/exit
    ' job "$@" </dev/null >>job/log 2>&1 &
    tries=0
    while [ ! -f job/exit ] && flock -n -s job/lock true; do
        tries=$((tries + 1))
        [ "$tries" -lt 100 ] || exit 1
        sleep 0.1
    done
}

# began PID: when that process was started; another one of that number began at another time.
began() {
    cut -d ' ' -f 22 "/proc/$1/stat" 2>/dev/null || true
}

# follow FOLDER SEEN: the log from there on, until the job ends. (Not tail --pid: where nothing reaps orphans, as in many
# containers, a process that ended is still there.) When the connection is lost tail ends, and with it the watch.
follow() {
    cd "$1/job"
    began=$(began "$$")
    (
        until flock -n -s lock true; do
            [ "$(began "$$")" = "$began" ] || exit 0
            sleep 0.5
        done
        sleep 1
        [ "$(began "$$")" != "$began" ] || kill "$$"
    ) </dev/null >/dev/null 2>&1 &
    exec tail -c "+$(($2 + 1))" -s 0.5 -f log
}

# rest FOLDER NAME SEEN: a file from there on.
rest() {
    cd "$1"
    exec tail -c "+$(($3 + 1))" -- "$2"
}

# pack FOLDER RUN: what the run made, without the 16-bit weights.
pack() {
    cd "$1/runs/$2"
    exec tar -cf - --exclude=merged --exclude=*.f16.gguf --exclude=*.bf16.gguf .
}

# stop FOLDER: make tells the stage, which writes its state; without a make, whatever is left of the job is told.
stop() {
    cd "$1/job"
    flock -n -s lock true && return 0
    if grep -qs '^State:.[^Z]' "/proc/$(cat pid)/status"; then kill -TERM "$(cat pid)"; else kill -TERM "-$(cat group)"; fi
}

"$@"
