# Fetches what setup/pins names, and nothing else. Source this file after common.sh and debian.sh.

# pin NAME FIELD prints a field of a line of setup/pins: 2 is the version, 3 the SHA-256, 4 the path in the archive.
pin() {
    awk -v name="$1" -v field="$2" '$1 == name { print $field; found = 1 } END { exit !found }' "$ROOT/setup/pins" ||
        die "setup/pins has no line for $1" "restore the line from the repository's history"
}

# unpack_pinned FOLDER PACKAGE unpacks a package of Debian into FOLDER. The file comes from the machine's own mirror, or
# from the snapshot of the archive at HUSK_SNAPSHOT; its hash, not its origin, makes it trustworthy.
unpack_pinned() {
    local folder="$1" package="$2" mirror version path hash
    version=$(pin "$package" 2) hash=$(pin "$package" 3) path=$(pin "$package" 4)
    mirror=$(debian_mirror)
    NEXT_STEP="if the archive no longer has $package $version, run ./task update-pins, which pins what it has now, or set HUSK_SNAPSHOT to the URL of a snapshot of the archive that has it" \
        run_logged "download-$package" fetch_pinned "$CACHE/$package.deb" "$hash" "$path" "$mirror" ${HUSK_SNAPSHOT:+"$HUSK_SNAPSHOT"}
    mkdir -p "$folder"
    dpkg-deb -x "$CACHE/$package.deb" "$folder"
    rm -f "$CACHE/$package.deb"
}

# fetch_pinned FILE SHA256 PATH MIRROR... downloads PATH from the first mirror that has it with this hash.
fetch_pinned() {
    local file="$1" hash="$2" path="$3" mirror
    shift 3
    for mirror in "$@"; do
        ! /usr/lib/apt/apt-helper -o APT::Sandbox::User=root -o Acquire::Retries=3 \
            download-file "${mirror%/}/$path" "$file" "SHA256:$hash" || return 0
    done
    return 1
}

# crate_file NAME VERSION prints the path of a crate's archive in cargo's cache, and has cargo download it first.
crate_file() {
    local folder="$CACHE/crate-$1" file
    rm -rf "$folder"
    mkdir -p "$folder/src"
    : >"$folder/src/lib.rs"
    printf '[package]\nname = "fetch"\nversion = "0.0.0"\n[dependencies]\n%s = "=%s"\n[workspace]\n' "$1" "$2" >"$folder/Cargo.toml"
    NEXT_STEP="check that cargo can reach its registry, then run the command again" \
        run_logged "fetch-$1" cargo fetch --manifest-path "$folder/Cargo.toml"
    rm -rf "$folder"
    file=$(find "${CARGO_HOME:-$HOME/.cargo}/registry/cache" -name "$1-$2.crate" | head -n 1)
    [ -n "$file" ] || die "cargo has fetched $1 $2, but its cache has no $1-$2.crate" "read $LOGS/fetch-$1.log"
    printf '%s\n' "$file"
}
