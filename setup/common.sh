# Functions shared by the build scripts: messages, logs, and the keys by which a step knows that it is up to date.
# Source this file after setting ROOT to the top of the checkout. (`local` is not in POSIX, but every shell that serves
# as /bin/sh supports it.)

CACHE=$ROOT/.cache
OUT=$ROOT/out
LOGS=$CACHE/log
mkdir -p "$CACHE/keys" "$OUT" "$LOGS"

info() { printf '%s\n' "husk: $*" >&2; }

# die PROBLEM [NEXT_STEP]
die() {
    printf '%s\n' "husk: error: $1" >&2
    [ $# -lt 2 ] || printf '%s\n' "husk: next:  $2" >&2
    exit 1
}

# run_logged STEP COMMAND...: writes the command's output to .cache/log/STEP.log and reports progress every few seconds.
# A function passed as the command must join its steps with &&: `set -e` has no effect inside it.
# The command runs in the foreground, because Ctrl-C does not reach a shell's background jobs; the reporter runs in the
# background.
run_logged() {
    local step="$1" log="$LOGS/$1.log" status=0 reporter
    shift
    : >"$log"
    report_progress "$step" "$log" &
    reporter=$!
    "$@" >"$log" 2>&1 </dev/null || status=$?
    # The reporter may have exited already.
    kill "$reporter" 2>/dev/null || :
    wait "$reporter" 2>/dev/null || :
    [ "$status" -eq 0 ] && return 0
    tail -n 25 "$log" >&2
    die "step '$step' failed with status $status; the lines above are the end of $log" "${NEXT_STEP:-read that log, fix the cause and run the command again}"
}

# progress LOG prints how far a step is. A script may override this function if it knows more than the log's last line.
progress() { tail -n 1 "$1" | tr -d '\r' | cut -c 1-100; }

report_progress() {
    local step="$1" log="$2" seconds=0 last= reported=0 now
    # Without the redirection, sleep would keep the script's output open, and a reader at the end of a pipe would wait
    # for it.
    while sleep 5 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
        seconds=$((seconds + 5))
        now=$(progress "$log")
        if [ "$now" != "$last" ] || [ $((seconds - reported)) -ge 30 ]; then
            printf 'husk: %s, %d s: %s\n' "$step" "$seconds" "$now" >&2
            last=$now reported=$seconds
        fi
    done
}

# key_of VALUE... prints one hash over the values; a value that is the path of a file stands for the file's content.
key_of() {
    local value
    for value in "$@"; do
        if [ -f "$value" ]; then sha256sum <"$value"; else printf '%s\n' "$value"; fi
    done | sha256sum | cut -d ' ' -f 1
}

# is_done STEP KEY FILE... succeeds if the step has run with this key and its results still exist.
is_done() {
    local step="$1" key="$2" file
    shift 2
    [ -f "$CACHE/keys/$step" ] && [ "$(cat "$CACHE/keys/$step")" = "$key" ] || return 1
    for file in "$@"; do [ -e "$file" ] || return 1; done
}

# mark_done STEP KEY
mark_done() { printf '%s\n' "$2" >"$CACHE/keys/$1"; }

# run_locked STEP "$@" restarts the calling script under the step's lock. Call it first: two runs at once (two
# terminals, or tests during a build) must not write to the same folder, so the second one waits.
run_locked() {
    local lock="$1"
    shift
    [ "${HUSK_LOCKED:-}" != "$lock" ] || return 0
    flock --nonblock "$CACHE/keys/$lock.lock" true || info "waiting for another run of $0"
    HUSK_LOCKED=$lock exec flock --close "$CACHE/keys/$lock.lock" "$0" "$@"
}
