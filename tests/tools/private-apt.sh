# To be sourced: apt with a state of its own, on the mirror of the machine's own sources. Needs no root, changes nothing
# of the machine.

# The mirror of the first source whose suites begin with the machine's own release name.
mirror() {
    . /etc/os-release
    apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' |
        awk -v suite="$VERSION_CODENAME" '$2 == suite { print $1; exit }'
}

# private_apt STATE TYPE SUITE...: an empty state with sources of that type (deb, deb-src); fails without a mirror.
private_apt() {
    state=$1
    type=$2
    shift 2
    from=$(mirror)
    [ -n "$from" ] || { echo "the machine's apt sources name no mirror of its own release" >&2; return 1; }
    rm -rf "$state"
    mkdir -p "$state/lists/partial" "$state/cache/archives/partial" "$state/etc"
    : >"$state/status"
    for suite in "$@"; do
        echo "$type $from $suite main" >>"$state/sources.list"
    done
}

# apt COMMAND...: apt-get on the state made last.
apt() {
    apt-get -q -o Dir::Etc="$state/etc" -o Dir::Etc::SourceList="$state/sources.list" -o Dir::State="$state" \
        -o Dir::State::Lists="$state/lists" -o Dir::State::status="$state/status" -o Dir::Cache="$state/cache" \
        -o Dir::Etc::TrustedParts=/etc/apt/trusted.gpg.d -o APT::Architecture=amd64 -o APT::Sandbox::User=root \
        -o APT::Get::AllowUnauthenticated=false -o Debug::NoLocking=true "$@"
}
