#!/usr/bin/env bash
# Set this checkout up: missing OS packages, .venv/ with the registry-enforcer command in it. Does nothing twice.
#
#   tools/setup.sh run       what enforcing on this host needs
#   tools/setup.sh install   and what the installed program finds in the system instead of .venv/
#   tools/setup.sh all       what the tests, the lab and the demo need besides
#   tools/setup.sh booted    and what tests/booted need, which boot a system
#
# Packages are only added, but for busybox, which makes place for busybox-static: the same commands, for containers too.
# No service is started or restarted by what is installed. Where the host's own Python and libbpf are too old, or its
# packages have other names, all of this happens in a Debian 12 user space (tools/userspace.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Packages of Debian and Ubuntu; a|b where b serves as well when it is there already.
run_packages=(
    ca-certificates
    clang
    iproute2
    libbpf-dev
    libbpf1
    linux-libc-dev
    nftables
    python3
    python3-bpfcc
    python3-nftables
    python3-venv
)
installed_packages=(
    "${run_packages[@]}"
    python3-cryptography
    python3-idna
)
test_packages=(
    "${installed_packages[@]}"
    buildah
    busybox-static
    clang-format
    cpio
    curl
    dbus-daemon
    debootstrap
    dnsmasq-base
    docker-registry
    "docker.io|docker-ce"
    fish
    kmod
    knot
    man-db
    mandoc
    openssl
    passt
    podman
    prometheus
    python3-dbus
    python3-gi
    qemu-system-x86
    "rootlesskit|docker-ce-rootless-extras"
    ruby
    shellcheck
    skopeo
    slirp4netns
    squashfs-tools
    tinyproxy-bin
    uidmap
    unbound
    zsh
    zstd
)
# systemd-container is of the running systemd's version, and where that is not the newest it would bring it along.
booted_packages=(systemd-container)
# Ubuntu 24.04 has none, and there the test of vagrant/ that wants it skips.
grep -qsx 'ID=ubuntu' /etc/os-release || test_packages+=(vagrant)
imports_of_run=(cryptography dns enforcer idna prometheus_client pyroute2)
imports_of_all=("${imports_of_run[@]}" hypothesis mypy pytest pytest_timeout setuptools)

log=build/setup.log
policy=${POLICY_RC_D:-/usr/sbin/policy-rc.d}
policy_marker="# Written by registry-enforcer's tools/setup.sh while it installs packages; removed at its end."

say() { printf 'setup: %s\n' "$*"; }

fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

# What is not installed of the given requirements, as package names.
missing_packages() {
    local requirement installed
    # shellcheck disable=SC2016 # the format is dpkg-query's
    installed=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' | sed -n 's/^installed //p')
    for requirement in "$@"; do
        grep -qxF -e "${requirement//|/$'\n'}" <<<"$installed" || printf '%s\n' "${requirement%%|*}"
    done
}

# Nothing that dpkg unpacks may start a service. A policy-rc.d that is not ours stays as it is and decides itself.
forbid_service_starts() {
    if [[ -e $policy || -L $policy ]]; then
        grep -qsxF -e "$policy_marker" "$policy" || {
            say "$policy exists and stays: it decides whether new packages start their services"
            return
        }
    else
        (set -o noclobber && printf '#!/bin/sh\n%s\nexit 101\n' "$policy_marker" >"$policy")
    fi
    trap 'rm -f -- "$policy"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    chmod 755 "$policy"
}

# apt-get's own words go to the log; what takes long is told.
apt() {
    local line unpacked=0
    DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 LC_ALL=C apt-get -q -o DPkg::Lock::Timeout=300 \
        -o Dpkg::Use-Pty=0 "$@" </dev/null 2>&1 | while IFS= read -r line; do
        printf '%s\n' "$line" >>"$log"
        case $line in
            "Need to get "*) say "$line" ;;
            "Unpacking "*) ((++unpacked % 25)) || say "$unpacked packages unpacked" ;;
        esac
    done
}

# Only when there is something to do: who may not write here may use what root has set up.
open_log() {
    mkdir -p build
    : >>"$log"
}

# Sharing a machine with other software comes before setting up.
refuse_removals() {
    local removed
    removed=$(apt-get -s install --no-install-recommends "$@" 2>/dev/null | sed -n 's/^Remv \([^ ]*\).*/\1/p')
    [[ -z $removed || $removed == busybox ]] ||
        fail "installing $* would remove: ${removed//$'\n'/ }" "settle that by hand, then make setup"
}

install_packages() {
    local attempt
    ((EUID == 0)) || fail "missing packages: $*" "run make setup as root, or have them installed first"
    open_log
    exec 9>/run/registry-enforcer-setup.lock
    flock -n 9 || {
        say "another set-up is installing packages: waiting for it"
        flock 9
    }
    say "installing $# packages: $*"
    say "this can take some minutes; details in $log"
    forbid_service_starts
    for attempt in 1 2 3; do
        apt update && break
        ((attempt == 3)) || sleep 5 # another apt may hold the lists
    done
    refuse_removals "$@"
    apt install -y --no-install-recommends "$@" || {
        tail -n 15 "$log" >&2
        fail "apt-get could not install: $*" \
            "no network, or a package source is missing (Ubuntu: universe)? The whole story is in $log"
    }
    exec 9>&-
}

# debootstrap comes from the host's own packages; all else is Debian's.
bring_userspace() {
    local needed=("${requirements[@]%%|*}")
    [[ ! -e ${USERSPACE:-/var/lib/registry-enforcer/userspace}/etc/debian_version ]] || return 0
    say "$1:" "a Debian 12 user space serves instead (some 300 MB, with all that the tests want 2 GB);" \
        "kernel, network and settings stay this host's"
    if ! command -v debootstrap >/dev/null; then
        command -v apt-get >/dev/null || command -v dnf >/dev/null ||
            fail "install debootstrap, then make setup; or what these Debian packages contain: ${needed[*]}"
    fi
    ((EUID == 0)) || fail "run make setup as root"
    open_log
    if command -v debootstrap >/dev/null; then
        : # there already
    elif command -v apt-get >/dev/null; then
        install_packages debootstrap
    else
        say "installing debootstrap"
        dnf install -y --setopt=install_weak_deps=False debootstrap /usr/bin/gpgv </dev/null >>"$log" 2>&1 || {
            tail -n 15 "$log" >&2
            fail "dnf could not install debootstrap: no network? The whole story is in $log"
        }
    fi
    # The host's, which are seen from there.
    [[ -d /var/lib/registry-enforcer ]] || mkdir -m 700 /var/lib/registry-enforcer
    mkdir -p /etc/registry-enforcer /var/log/registry-enforcer
    tools/userspace.sh make
}

check_python() {
    /usr/bin/python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$(/usr/bin/python3 -V 2>&1) in /usr/bin/python3, and 3.11 or later is needed: Debian 12, Ubuntu 24.04 or later"
}

# What the environment was made from; a change of any makes it anew. pip's lists of files know the checkout's path.
venv_key() {
    {
        printf '%s\n' "$PWD"
        /usr/bin/python3 -V
        sha256sum pyproject.toml tools/setup.sh
    } | sha256sum
}

# A stamp alone says nothing about what was deleted since.
venv_works() {
    [[ -x .venv/bin/registry-enforcer ]] && .venv/bin/python -I - "$@" <<'PY' 2>/dev/null
import importlib.util, sys
sys.exit(not all(importlib.util.find_spec(name) for name in sys.argv[1:]))
PY
}

make_venv() {
    local stamp=.venv/.setup-$mode key project=.
    key=$(venv_key)
    if [[ -f $stamp && $(<"$stamp") == "$key" ]] && venv_works "$@"; then
        return
    fi
    [[ $mode != all && $mode != booted ]] || project=".[dev]"
    open_log
    say "making .venv and installing the Python packages of $project into it"
    # Not any other Python's: only the system's sees python3-nftables and python3-bpfcc. --clear would take away what a
    # running daemon executes; only an environment of another Python or that was moved is made from nothing.
    if [[ ! -x .venv/bin/python ]] || ! .venv/bin/python -m pip --version >/dev/null 2>&1 ||
        [[ $(.venv/bin/python -V) != "$(/usr/bin/python3 -V)" ]]; then
        /usr/bin/python3 -m venv --clear --system-site-packages .venv >>"$log" 2>&1 || {
            tail -n 5 "$log" >&2
            fail "could not make .venv"
        }
    fi
    .venv/bin/python -m pip install --disable-pip-version-check --editable "$project" >>"$log" 2>&1 </dev/null || {
        tail -n 15 "$log" >&2
        fail "pip could not install the Python packages: no network? The whole story is in $log"
    }
    venv_works "$@" || fail "pip installed the Python packages and .venv does not work: rm -r .venv, then make setup"
    printf '%s' "$key" >.venv/.setup-run
    printf '%s' "$key" >"$stamp"
}

mode=${1:-all}
case $mode in
    run)
        requirements=("${run_packages[@]}")
        imports=("${imports_of_run[@]}")
        ;;
    install)
        requirements=("${installed_packages[@]}")
        imports=("${imports_of_run[@]}")
        ;;
    all)
        requirements=("${test_packages[@]}")
        imports=("${imports_of_all[@]}")
        ;;
    booted)
        requirements=("${test_packages[@]}" "${booted_packages[@]}")
        imports=("${imports_of_all[@]}")
        ;;
    *) fail "usage: tools/setup.sh [run|install|all|booted]" ;;
esac
if reason=$(tools/userspace.sh why); then
    (bring_userspace "$reason") # its traps end with it
    exec tools/userspace.sh exec tools/setup.sh "$mode"
fi
mapfile -t missing < <(missing_packages "${requirements[@]}")
if ((${#missing[@]})); then
    install_packages "${missing[@]}"
fi
check_python
make_venv "${imports[@]}"
