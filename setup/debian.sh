# Fetches packages of any Debian suite and unpacks them into .cache, without touching the machine's own package sources.
# Source this file after common.sh. The mirror is the machine's own, so no host name appears here.

# Prints the URL of the archive that the machine's own release comes from.
debian_mirror() {
    local codename mirror
    codename=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
    mirror=$(apt-get indextargets --format '$(CREATED_BY) $(RELEASE) $(COMPONENT) $(REPO_URI)' 2>/dev/null |
        awk -v codename="$codename" '$1 == "Packages" && $3 == "main" && ($2 == codename || $2 == "stable") { print $4; exit }')
    [ -n "$mirror" ] || die "apt has no archive configured for Debian ${codename:-(unknown release)}" \
        "husk builds on Debian 12 and 13: build there, or add your release to /etc/apt/sources.list"
    printf '%s' "$mirror"
}

# apt_in_suite SUITE TOOL ARGUMENTS... runs apt-get or apt-cache with the suite as the only source.
apt_in_suite() {
    local suite="$1"
    shift
    # Steps that run in parallel share the lists.
    (flock 9 && refresh_lists "$suite") 9>"$CACHE/keys/apt.lock" || return 1
    APT_CONFIG=$CACHE/apt/$suite/apt.conf "$@"
}

# The lists are refreshed after 12 hours.
refresh_lists() {
    local folder="$CACHE/apt/$1" mirror
    mirror=$(debian_mirror)
    if [ "$(cat "$folder/apt.conf" 2>/dev/null)" = "$(apt_conf "$folder" "$mirror")" ] &&
        [ -n "$(find "$folder/lists" -name '*_Packages*' -mmin -720 2>/dev/null | head -n 1)" ]; then
        return
    fi
    rm -rf "$folder"
    mkdir -p "$folder/lists/partial" "$folder/archives/partial" "$folder/parts"
    printf 'deb [target=Packages] %s %s main\ndeb-src [target=Sources] %s %s main\n' "$mirror" "$1" "$mirror" "$1" >"$folder/sources.list"
    apt_conf "$folder" "$mirror" >"$folder/apt.conf"
    info "fetching the package lists of Debian $1"
    NEXT_STEP="check that the mirror $mirror is reachable and has the suite $1, then run the command again" \
        run_logged "apt-$1" env APT_CONFIG="$folder/apt.conf" apt-get update
    # apt keeps the archive's timestamps; the test above needs the time of this download.
    find "$folder/lists" -type f -exec touch {} +
}

# A snapshot of the archive, which has its time in its URL, remains usable after its Valid-Until. A mirror with expired
# lists is stale or malicious, and apt rejects it.
apt_conf() {
    local check=true
    case $2 in */[0-9]*T[0-9]*Z*) check=false ;; esac
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
	Acquire::Check-Valid-Until "$check";
	END
}

# unpack_from SUITE FOLDER PACKAGE... unpacks the packages into FOLDER: the newest version in the suite, or
# PACKAGE=VERSION.
unpack_from() {
    local suite="$1" folder="$2"
    shift 2
    apt_in_suite "$suite" true
    download_and_unpack "$folder" env APT_CONFIG="$CACHE/apt/$suite/apt.conf" apt-get download "$@"
}

# unpack_local FOLDER PACKAGE... does the same from the machine's own sources.
unpack_local() {
    local folder="$1"
    shift
    download_and_unpack "$folder" apt-get -o APT::Sandbox::User=root download "$@"
}

download_and_unpack() {
    local folder="$1"
    shift
    local package debs
    for package in "$@"; do :; done
    debs=$(mktemp -d "$CACHE/debs.XXXXXX")
    mkdir -p "$folder"
    (
        cd "$debs"
        NEXT_STEP="check that the archive still has these packages, then run the command again" run_logged "download-${package%%=*}" "$@"
        for deb in *.deb; do dpkg-deb -x "$deb" "$folder"; done
    )
    rm -rf "$debs"
}

# version_in SUITE PACKAGE prints the newest version in the suite, or nothing.
version_in() { apt_in_suite "$1" apt-cache madison "$2" | awk -F ' *[|] *' '$3 ~ / Packages$/ { print $2; exit }'; }
