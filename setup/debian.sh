# Packages of any Debian suite, fetched and unpacked into .cache without the machine's own sources being touched.
# Sourced after common.sh. The mirror is the machine's own, so nothing here names a host.

# The address of the archive that this machine's own release comes from.
debian_mirror() {
    codename=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
    mirror=$(apt-get indextargets --format '$(CREATED_BY) $(RELEASE) $(COMPONENT) $(REPO_URI)' 2>/dev/null |
        awk -v codename="$codename" '$1 == "Packages" && $3 == "main" && ($2 == codename || $2 == "stable") { print $4; exit }')
    [ -n "$mirror" ] || die "apt's configuration names no archive for Debian ${codename:-(unknown release)}" \
        "husk builds on Debian 12 and 13: run it there, or add the line of your release to /etc/apt/sources.list"
    printf '%s' "$mirror"
}

# in_suite SUITE APT-TOOL ARGUMENTS...: runs apt-get or apt-cache with that suite as the only source.
in_suite() {
    suite=$1
    shift
    private=$CACHE/apt/$suite
    if [ ! -f "$private/fetched" ] || [ -n "$(find "$private/fetched" -mmin +720)" ]; then
        mirror=$(debian_mirror)
        mkdir -p "$private/lists/partial" "$private/archives/partial" "$private/parts"
        cat >"$private/sources.list" <<-END
		deb [target=Packages] $mirror $suite main
		deb-src [target=Sources] $mirror $suite main
		END
        cat >"$private/apt.conf" <<-END
		Dir::Etc::SourceList "$private/sources.list";
		Dir::Etc::SourceParts "$private/parts";
		Dir::Etc::Preferences "$private/none";
		Dir::Etc::PreferencesParts "$private/parts";
		Dir::State::Lists "$private/lists";
		Dir::Cache "$private";
		APT::Sandbox::User "root";
		Acquire::Languages "none";
		Acquire::Retries "3";
		END
        say "reading the package lists of Debian $suite"
        NEXT_STEP="see that the mirror $mirror can be reached, and has $suite" \
            logged "apt-$suite" env APT_CONFIG="$private/apt.conf" apt-get update
        touch "$private/fetched"
    fi
    APT_CONFIG=$private/apt.conf "$@"
}

# unpacked SUITE FOLDER PACKAGE...: the packages' files (newest version of the suite; PACKAGE=VERSION pins) under FOLDER.
unpacked() {
    suite=$1 folder=$2
    shift 2
    in_suite "$suite" true
    fetch_and_unpack "$folder" env APT_CONFIG="$CACHE/apt/$suite/apt.conf" apt-get download "$@"
}

# unpacked_own FOLDER PACKAGE...: the same, from the machine's own sources.
unpacked_own() {
    folder=$1
    shift
    fetch_and_unpack "$folder" apt-get -o APT::Sandbox::User=root download "$@"
}

fetch_and_unpack() {
    folder=$1
    shift
    debs=$(mktemp -d "$CACHE/debs.XXXXXX")
    mkdir -p "$folder"
    (
        cd "$debs"
        NEXT_STEP="see that the archive still has these packages, and run it again" logged download "$@"
        for deb in *.deb; do dpkg-deb -x "$deb" "$folder"; done
    )
    rm -rf "$debs"
}

# version_in SUITE PACKAGE prints the newest version there, or nothing.
version_in() { in_suite "$1" apt-cache madison "$2" | awk -F ' *[|] *' '$3 ~ / Packages$/ { print $2; exit }'; }
