# Builds programs that Debian does not have from their Go modules, with the machine's Go if that is new enough,
# otherwise with one of Debian's, which is unpacked without being installed.
# Source this file after setup/common.sh and setup/debian.sh.

# use_go MINIMUM FOLDER sets $go to a Go of at least this version. FOLDER gets the unpacked Go, if it is needed, and
# Go's modules and objects, until drop_go.
use_go() {
    local minimum="$1" folder="$2" goroot line part have suite
    go=go
    have=$(go env GOVERSION 2>/dev/null | sed 's/^go//' || :)
    if ! at_least "$minimum" "$have"; then
        # Debian 13 has the first; the next Debian's runs on Debian 12 and 13 too.
        line=1.24 suite=trixie
        at_least "$minimum" "$line.0" || line=1.26 suite=forky
        info "tests: unpacking Go $line from Debian $suite"
        unpack_from "$suite" "$folder/go" "golang-$line-go" "golang-$line-src"
        # Debian's GOROOT contains absolute links into /usr; point them at the unpacked files.
        goroot=$folder/go/usr/lib/go-$line
        for part in src api misc test; do
            [ ! -e "$folder/go/usr/share/go-$line/$part" ] || ln -sfn "$folder/go/usr/share/go-$line/$part" "$goroot/$part"
        done
        export GOROOT="$goroot"
        go=$goroot/bin/go
        have=$("$go" env GOVERSION | sed 's/^go//')
        at_least "$minimum" "$have" ||
            die "Go $minimum or newer is needed; this machine's and Debian $suite's are older (${have:-it does not run})" "install a newer Go"
    fi
    export GOTOOLCHAIN=local GOFLAGS=-modcacherw GOMODCACHE="$folder/modules" GOCACHE="$folder/objects" CGO_ENABLED=0
}

# at_least MINIMUM VERSION
at_least() { [ -n "$2" ] && [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]; }

# drop_go FOLDER removes what use_go and its builds left: about 1 GB.
drop_go() { rm -rf "$1/modules" "$1/objects" "$1/go"; }

# fetch_module STEP FOLDER MODULE VERSION SUM sets $source to the module's source. SUM is the hash of the reviewed
# source, in go.sum's format.
fetch_module() {
    local step="$1" folder="$2" module="$3" version="$4" sum="$5" why
    download() { (cd "$folder" && timeout 300 "$go" mod download -json "$module@$version"); }
    if ! download >"$folder/module.json" 2>"$LOGS/$step-module.log"; then
        why=$(tail -n 1 "$LOGS/$step-module.log" | cut -c 1-200)
        [ -n "$why" ] || why=$(sed -n 's/.*"Error": "\(.*\)".*/\1/p' "$folder/module.json" | cut -c 1-200)
        die "cannot download the module $module $version: $why" \
            "check that Go can download modules (go env GOPROXY), then run the command again"
    fi
    source=$(sed -n 's/^\t"Dir": "\(.*\)",*$/\1/p' "$folder/module.json")
    grep -q "\"Sum\": \"$sum\"" "$folder/module.json" ||
        die "the module $module $version has an unexpected hash: $(sed -n 's/^\t"Sum": //p' "$folder/module.json")" \
            "review what changed in the module, then update SUM in $0"
}
