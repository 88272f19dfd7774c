# Builds programs that Debian does not have from their Go modules, with the machine's Go if that is new enough,
# otherwise with Debian 13's, which is unpacked without being installed.
# Source this file after setup/common.sh and setup/debian.sh.

# use_go MINIMUM FOLDER sets $go to a Go of at least this version. FOLDER gets the unpacked Go, if it is needed, and
# Go's modules and objects, until drop_go.
use_go() {
    local minimum="$1" folder="$2" goroot part have
    go=go
    have=$(go env GOVERSION 2>/dev/null | sed 's/^go//' || :)
    if [ -z "$have" ] || [ "$(printf '%s\n%s\n' "$minimum" "$have" | sort -V | head -n 1)" != "$minimum" ]; then
        info "tests: unpacking Go from Debian 13"
        unpack_from trixie "$folder/go" golang-1.24-go golang-1.24-src
        # Debian's GOROOT contains absolute links into /usr; point them at the unpacked files.
        goroot=$folder/go/usr/lib/go-1.24
        for part in src api misc test; do
            [ ! -e "$folder/go/usr/share/go-1.24/$part" ] || ln -sfn "$folder/go/usr/share/go-1.24/$part" "$goroot/$part"
        done
        export GOROOT="$goroot"
        go=$goroot/bin/go
    fi
    export GOTOOLCHAIN=local GOFLAGS=-modcacherw GOMODCACHE="$folder/modules" GOCACHE="$folder/objects" CGO_ENABLED=0
}

# drop_go FOLDER removes what use_go and its builds left: about 1 GB.
drop_go() { rm -rf "$1/modules" "$1/objects" "$1/go"; }

# fetch_module STEP FOLDER MODULE VERSION SUM sets $source to the module's source. SUM is the hash of the reviewed
# source, in go.sum's format. If the module cannot be downloaded, fails and leaves the reason in FOLDER/missing.
fetch_module() {
    local step="$1" folder="$2" module="$3" version="$4" sum="$5" why
    download() { (cd "$folder" && timeout 300 "$go" mod download -json "$module@$version"); }
    if ! download >"$folder/module.json" 2>"$LOGS/$step-module.log"; then
        why=$(tail -n 1 "$LOGS/$step-module.log" | cut -c 1-200)
        [ -n "$why" ] || why=$(sed -n 's/.*"Error": "\(.*\)".*/\1/p' "$folder/module.json" | cut -c 1-200)
        printf 'cannot download the module %s %s: %s\n' "$module" "$version" "$why" >"$folder/missing"
        return 1
    fi
    source=$(sed -n 's/^\t"Dir": "\(.*\)",*$/\1/p' "$folder/module.json")
    grep -q "\"Sum\": \"$sum\"" "$folder/module.json" ||
        die "the module $module $version has an unexpected hash: $(sed -n 's/^\t"Sum": //p' "$folder/module.json")" \
            "review what changed in the module, then update SUM in $0"
}
