# Packages of any Debian suite, fetched and unpacked into .cache without the machine's own sources being touched.
# Sourced after common.sh. The mirror is the machine's own, so nothing here names a host.

# The address of the archive that this machine's own release comes from.
debian_mirror() {
    local codename mirror
    codename=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
    mirror=$(apt-get indextargets --format '$(CREATED_BY) $(RELEASE) $(COMPONENT) $(REPO_URI)' 2>/dev/null |
        awk -v codename="$codename" '$1 == "Packages" && $3 == "main" && ($2 == codename || $2 == "stable") { print $4; exit }')
    [ -n "$mirror" ] || die "apt's configuration names no archive for Debian ${codename:-(unknown release)}" \
        "husk builds on Debian 12 and 13: run it there, or add the line of your release to /etc/apt/sources.list"
    printf '%s' "$mirror"
}

# in_suite SUITE APT-TOOL ARGUMENTS...: runs apt-get or apt-cache with that suite as the only source.
in_suite() {
    local suite="$1"
    shift
    # Steps that run at the same time share the lists.
    (flock 9 && private_lists "$suite") 9>"$CACHE/keys/apt.lock" || return 1
    APT_CONFIG=$CACHE/apt/$suite/apt.conf "$@"
}

private_lists() {
    local private="$CACHE/apt/$1" mirror
    if [ "$(cat "$private/apt.conf" 2>/dev/null)" = "$(private_conf "$private")" ] &&
        [ -n "$(find "$private/lists" -name '*_Packages*' -mmin -720 2>/dev/null | head -n 1)" ]; then
        return
    fi
    mirror=$(debian_mirror)
    rm -rf "$private"
    mkdir -p "$private/lists/partial" "$private/archives/partial" "$private/parts"
    printf 'deb [target=Packages] %s %s main\ndeb-src [target=Sources] %s %s main\n' "$mirror" "$1" "$mirror" "$1" >"$private/sources.list"
    private_conf "$private" >"$private/apt.conf"
    say "reading the package lists of Debian $1"
    NEXT_STEP="see that the mirror $mirror can be reached, and has $1" logged "apt-$1" env APT_CONFIG="$private/apt.conf" apt-get update
    # apt keeps the archive's dates; these say when the lists were read.
    find "$private/lists" -type f -exec touch {} +
}

# A mirror may be a snapshot, whose date of expiry is over; the signatures are checked all the same.
private_conf() {
    cat <<-END
	Dir::Etc::SourceList "$1/sources.list";
	Dir::Etc::SourceParts "$1/parts";
	Dir::Etc::Preferences "$1/none";
	Dir::Etc::PreferencesParts "$1/parts";
	Dir::State::Lists "$1/lists";
	Dir::Cache "$1";
	APT::Sandbox::User "root";
	Acquire::Languages "none";
	Acquire::Retries "3";
	Acquire::Check-Valid-Until "false";
	END
}

# unpacked SUITE FOLDER PACKAGE...: the packages' files (newest version of the suite; PACKAGE=VERSION pins) under FOLDER.
unpacked() {
    local suite="$1" folder="$2"
    shift 2
    in_suite "$suite" true
    fetch_and_unpack "$folder" env APT_CONFIG="$CACHE/apt/$suite/apt.conf" apt-get download "$@"
}

# unpacked_own FOLDER PACKAGE...: the same, from the machine's own sources.
unpacked_own() {
    local folder="$1"
    shift
    fetch_and_unpack "$folder" apt-get -o APT::Sandbox::User=root download "$@"
}

fetch_and_unpack() {
    local folder="$1"
    shift
    local package debs
    for package in "$@"; do :; done
    debs=$(mktemp -d "$CACHE/debs.XXXXXX")
    mkdir -p "$folder"
    (
        cd "$debs"
        NEXT_STEP="see that the archive still has these packages, and run it again" logged "download-${package%%=*}" "$@"
        for deb in *.deb; do dpkg-deb -x "$deb" "$folder"; done
    )
    rm -rf "$debs"
}

# version_in SUITE PACKAGE prints the newest version there, or nothing.
version_in() { in_suite "$1" apt-cache madison "$2" | awk -F ' *[|] *' '$3 ~ / Packages$/ { print $2; exit }'; }
