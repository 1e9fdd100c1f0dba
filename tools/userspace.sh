#!/usr/bin/env bash
# A Debian 12 user space for hosts whose own has too old a Python or libbpf (Ubuntu 20.04 and 22.04), or other packages
# than Debian's (Fedora). Only programs and libraries are Debian's; what runs in it runs on the host's kernel, in its
# network, cgroups, /run, /dev and checkout.
#
#   tools/userspace.sh why            say why the host's own does not serve; fails, silently, where it does
#   tools/userspace.sh make           make it, with debootstrap; does nothing twice
#   tools/userspace.sh exec COMMAND   COMMAND in it, as the same process; just COMMAND where the host's own serves
#
# To be rid of it: rm -r --one-file-system /var/lib/registry-enforcer/userspace
set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
os_release=${OS_RELEASE:-/etc/os-release}
python=${SYSTEM_PYTHON:-/usr/bin/python3}
root=${USERSPACE:-/var/lib/registry-enforcer/userspace}

# The Debian Stable Release Key (12/bookworm), 4D64 FEC1 19C2 0290 67D6 E791 F8D2 585B 8783 D481, which signs this
# release. Ubuntu 20.04's own debian-archive-keyring ends with Debian 10.
release_key='
mDMEY865UxYJKwYBBAHaRw8BAQdAd7Z0srwuhlB6JKFkcf4HU4SSS/xcRfwEQWzrcrf6AEq0SURl
YmlhbiBTdGFibGUgUmVsZWFzZSBLZXkgKDEyL2Jvb2t3b3JtKSA8ZGViaWFuLXJlbGVhc2VAbGlz
dHMuZGViaWFuLm9yZz6IlgQTFggAPhYhBE1k/sEZwgKQZ9bnkfjSWFuHg9SBBQJjzrlTAhsDBQkP
CZwABQsJCAcCBhUKCQgLAgQWAgMBAh4BAheAAAoJEPjSWFuHg9SBSgwBAP9qpeO5z1s5m4D4z3Tc
qDo1wez6DNya27QWWoG/4oBsAQCEN8Z00DXagPHbwrvsY2t9BCsT+PgnSn9biobwX7bDDg==
'

fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

# shellcheck disable=SC1090 # /etc/os-release
of_release() { (. "$os_release" && printf '%s' "${!1-}"); }

# In Debian and Ubuntu whoever has Python 3.11 has libbpf 1.0, and the other way round.
why() {
    local host id version minor
    host=$(of_release PRETTY_NAME)
    if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
        echo "${host:-this host} has no apt, and what to install is known by Debian's names only"
    elif [[ -x $python ]]; then
        version=$("$python" -V)
        minor=${version#Python 3.}
        ((${minor%%.*} < 11)) || return
        echo "${host:-this host} has $version, and 3.11 and libbpf 1.0 are needed"
    else
        id=$(of_release ID) version=$(of_release VERSION_ID)
        version=${version%%.*} # Debian testing has none
        [[ $id == debian && ${version:-12} -lt 12 || $id == ubuntu && ${version:-24} -lt 24 ]] || return
        echo "${host:-this host} has neither Python 3.11 nor libbpf 1.0"
    fi
}

make_root() {
    local key new=$root.new line
    [[ ! -e $root/etc/debian_version ]] || return 0
    command -v debootstrap >/dev/null || fail "debootstrap is missing"
    echo "setup: making a Debian 12 user space in $root"
    mkdir -p "$checkout/build"
    key=$(mktemp)
    # shellcheck disable=SC2064 # the name of now
    trap "rm -f -- '$key'" EXIT
    base64 --decode <<<"$release_key" >"$key"
    rm -rf --one-file-system "$new" # of an interrupted run
    mkdir -p "$new"
    # Here make, git and the like are there, as on any host with a checkout.
    LC_ALL=C.UTF-8 debootstrap --variant=minbase --include=ca-certificates,git,make,netbase,procps --keyring="$key" \
        bookworm "$new" </dev/null >>"$checkout/build/setup.log" 2>&1 || {
        tail -n 5 "$checkout/build/setup.log" >&2
        fail "debootstrap could not make it: no network? The whole story is in build/setup.log"
    }
    line=$(sed -n 's|^\(deb .*/debian\) bookworm main$|\1-security bookworm-security main|p' "$new/etc/apt/sources.list")
    [[ -z $line ]] || echo "$line" >>"$new/etc/apt/sources.list"
    echo 'Binary::apt-get::APT::Keep-Downloaded-Packages "false";' >"$new/etc/apt/apt.conf.d/00no-archives"
    rm -rf "$new"/var/cache/apt/archives/*.deb
    cp /etc/hosts "$new/etc/hosts" 2>/dev/null || true
    mkdir -p "$new/host"
    # Resolvers change by a new file under the old name, which no bind mount of the file would follow.
    ln -sfn /host/etc/resolv.conf "$new/etc/resolv.conf"
    mv "$new" "$root"
}

enter() {
    [[ -e $root/etc/debian_version ]] || fail "there is no $root yet: make setup"
    ((EUID == 0)) || fail "only root can enter the Debian 12 user space in $root: sudo make ..."
    # Of the mount namespace that stays: mounts of the one below, and the pins in them, end with their last process.
    if [[ -d /sys/fs/bpf && $(stat --file-system --format=%T /sys/fs/bpf) != bpf_fs ]]; then
        mount -t bpf -o nosuid,nodev,noexec,mode=700 bpf /sys/fs/bpf 2>/dev/null || true # whoever needs it says so
    fi
    # What the host mounts later appears inside, and nothing that is mounted inside appears on the host.
    exec unshare --mount --propagation slave "${BASH_SOURCE[0]}" inside "$PWD" "$@"
}

bind() { mkdir -p "$root$1" && mount "${2---rbind}" "$1" "$root$1"; }

# Not chroot: a process that is in one may not make user namespaces, which podman without root does.
inside() {
    local directory cwd=$1
    shift
    mount --bind "$root" "$root"
    for directory in /*/; do
        directory=${directory%/}
        case $directory in
            /bin | /sbin | /lib* | /usr | /etc | /var | /boot | /host | /lost+found) ;;
            *) [[ -L $directory ]] || bind "$directory" ;;
        esac
    done
    # Without what is mounted below it by now.
    [[ ! -d /var/lib/registry-enforcer ]] || bind /var/lib/registry-enforcer --bind
    for directory in /etc/registry-enforcer /var/log/registry-enforcer /usr/lib/modules \
        /usr/src /boot /var/lib/containers "$checkout"; do
        [[ ! -d $directory || $root$directory -ef $directory ]] || bind "$directory"
    done
    cd "$root"
    pivot_root . host # stays there, for /etc/resolv.conf
    cd "$cwd" 2>/dev/null || cd "$checkout"
    exec env -u OS_RELEASE -u SYSTEM_PYTHON -u USERSPACE IN_USERSPACE=1 LC_ALL=C.UTF-8 \
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@"
}

mode=${1-}
shift || true
case $mode in
    why) why ;;
    make) make_root ;;
    exec)
        why >/dev/null || exec "$@"
        enter "$@"
        ;;
    inside) inside "$@" ;;
    *) fail "usage: tools/userspace.sh why|make|exec COMMAND" ;;
esac
