# What the scripts of the build share: how they speak, log, and know that a step has nothing to do.
# Sourced, after ROOT was set to the top of the checkout. (`local` is not in POSIX, but in every shell that is /bin/sh.)

CACHE=$ROOT/.cache
OUT=$ROOT/out
LOGS=$CACHE/log
mkdir -p "$CACHE/keys" "$OUT" "$LOGS"

say() { printf '%s\n' "husk: $*" >&2; }

# die WHAT [WHAT TO DO NEXT]
die() {
    printf '%s\n' "husk: error: $1" >&2
    [ $# -lt 2 ] || printf '%s\n' "husk: next:  $2" >&2
    exit 1
}

# logged NAME COMMAND...: the command's noise goes to .cache/log/NAME.log; a line every few seconds tells how far it is.
# A function given as the command has to join its steps by &&: `set -e` does not reach into it.
# The command stays in the foreground (a shell's background job would not see Ctrl-C) and the ticking is what is in the back.
logged() {
    local step="$1" log="$LOGS/$1.log" status=0 ticker
    shift
    : >"$log"
    ticking "$step" "$log" &
    ticker=$!
    "$@" >"$log" 2>&1 </dev/null || status=$?
    # The ticker may be about to speak for a last time, or gone already.
    kill "$ticker" 2>/dev/null || :
    wait "$ticker" 2>/dev/null || :
    [ "$status" -eq 0 ] && return 0
    tail -n 25 "$log" >&2
    die "step '$step' failed with status $status; the lines above are the end of $log" "${NEXT_STEP:-read that log, then run the same command again}"
}

# A script may replace this by what it knows better: it is given the log, and answers how far the step is.
progress() { tail -n 1 "$1" | tr -d '\r' | cut -c 1-100; }

ticking() {
    local step="$1" log="$2" seconds=0 last= spoke=0 now
    # The sleep must not hold our output open, or whoever reads it through a pipe waits for it.
    while sleep 5 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
        seconds=$((seconds + 5))
        now=$(progress "$log")
        if [ "$now" != "$last" ] || [ $((seconds - spoke)) -ge 30 ]; then
            printf 'husk: %s, %d s: %s\n' "$step" "$seconds" "$now" >&2
            last=$now spoke=$seconds
        fi
    done
}

# key_of WORD... prints one hash of the given words and of every file among them.
key_of() {
    local word
    for word in "$@"; do
        if [ -f "$word" ]; then sha256sum <"$word"; else printf '%s\n' "$word"; fi
    done | sha256sum | cut -d ' ' -f 1
}

# is_done STEP KEY FILE...: the step was done with this very key, and what it made is still there.
is_done() {
    local step="$1" key="$2" file
    shift 2
    [ -f "$CACHE/keys/$step" ] && [ "$(cat "$CACHE/keys/$step")" = "$key" ] || return 1
    for file in "$@"; do [ -e "$file" ] || return 1; done
}

done_with() { printf '%s\n' "$2" >"$CACHE/keys/$1"; }

# Two runs at once (two terminals, or tests beside a build) must not write the same folder: the second waits for the first.
# one_at_a_time STEP "$@" goes first in a script: it starts the script again under a lock.
one_at_a_time() {
    local lock="$1"
    shift
    [ "${HUSK_LOCKED:-}" != "$lock" ] || return 0
    flock --nonblock "$CACHE/keys/$lock.lock" true || say "waiting for another run of $0"
    HUSK_LOCKED=$lock exec flock --close "$CACHE/keys/$lock.lock" "$0" "$@"
}
