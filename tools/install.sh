#!/usr/bin/env bash
# Put the program where an operating system has programs, or take it away again; `make install`, `make deb` use it.
#
#   tools/install.sh install      into $DESTDIR$PREFIX (PREFIX: /usr/local unless told); the policy only if there is none
#   tools/install.sh uninstall    everything but the policy and what was learned
#
# The program is a directory of its own that /usr/bin/python3 reads. Beside it are the Python packages that Debian 12 and
# Ubuntu 24.04 have in older versions, as they were tested; the others are the system's. Not a virtual environment: that
# belongs to one minor version of Python, and would end with the next release of the system, and enforcement with it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

prefix=${PREFIX:-/usr/local}
destination=${DESTDIR-}
library=$prefix/lib/registry-enforcer
command=$prefix/sbin/registry-enforcer
units=$prefix/lib/systemd/system
policy=/etc/registry-enforcer/policy.toml
bundled=(dnspython prometheus-client pyroute2)
required=(cryptography idna nftables)
if [[ $prefix == /usr ]]; then
    zsh=share/zsh/vendor-completions
else
    zsh=share/zsh/site-functions
fi
files=(
    "$command"
    "$units/registry-enforcer.service"
    "$units/registry-enforcer-baseline.service"
    "$prefix/share/man/man8/registry-enforcer.8"
    "$prefix/share/man/man5/registry-enforcer-policy.5"
    "$prefix/share/bash-completion/completions/registry-enforcer"
    "$prefix/$zsh/_registry-enforcer"
    "$prefix/share/fish/vendor_completions.d/registry-enforcer.fish"
)

fail() {
    printf 'install: %s\n' "$@" >&2
    exit 2
}

# $1: mode, $2: where, without DESTDIR; the content comes from standard input, its @names@ filled in.
place() {
    mkdir -p "$destination${2%/*}"
    sed -e "s|@sbindir@|$prefix/sbin|g" -e "s|@libdir@|$library|g" >"$destination$2"
    chmod "$1" "$destination$2"
}

check() {
    local reason missing
    if reason=$(tools/userspace.sh why); then
        fail "$reason" "make run works here all the same, in a user space of its own"
    fi
    [[ -n $destination ]] && return
    ((EUID == 0)) || fail "run make install as root, or with DESTDIR=directory"
    missing=$(/usr/bin/python3 -I -c '
import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))' "${required[@]}")
    [[ -z $missing ]] || fail "/usr/bin/python3 lacks $missing:" \
        "apt install python3-cryptography python3-idna python3-nftables"
}

install_all() {
    check
    rm -rf "${destination}${library:?}"
    mkdir -p "$destination$library/enforcer/objects/bpf" "$destination$library/enforcer/presets"
    install -m 644 enforcer/*.py enforcer/*.toml "$destination$library/enforcer/"
    install -m 644 enforcer/presets/*.toml "$destination$library/enforcer/presets/"
    install -m 644 build/enforcer.bpf.o build/enforcer-legacy.bpf.o "$destination$library/enforcer/objects/"
    install -m 644 bpf/*.[ch] bpf/LICENSE "$destination$library/enforcer/objects/bpf/"
    .venv/bin/python tools/bundle.py "$destination$library" "${bundled[@]}"
    # -I: neither a variable nor a directory of the caller's decides what root runs. -B: no file comes but by this script.
    place 755 "$command" <<'PY'
#!/usr/bin/python3 -IB
import sys

sys.path.insert(0, "@libdir@")

from enforcer.cli import main

sys.exit(main())
PY
    place 644 "$units/registry-enforcer.service" <systemd/registry-enforcer.service
    place 644 "$units/registry-enforcer-baseline.service" <systemd/registry-enforcer-baseline.service
    place 644 "$prefix/share/man/man8/registry-enforcer.8" <man/registry-enforcer.8
    place 644 "$prefix/share/man/man5/registry-enforcer-policy.5" <man/registry-enforcer-policy.5
    local shell
    for shell in bash zsh fish; do
        .venv/bin/registry-enforcer completion "$shell" >"build/completion.$shell"
    done
    place 644 "$prefix/share/bash-completion/completions/registry-enforcer" <build/completion.bash
    place 644 "$prefix/$zsh/_registry-enforcer" <build/completion.zsh
    place 644 "$prefix/share/fish/vendor_completions.d/registry-enforcer.fish" <build/completion.fish
    [[ -e $destination$policy ]] || place 644 "$policy" <packaging/policy.toml
    if [[ -z $destination ]]; then
        /usr/bin/python3 -m compileall -q "$library"
        ! command -v systemctl >/dev/null || systemctl daemon-reload 2>/dev/null || true
        echo "installed; to enforce $policy now and at every boot:"
        echo "  systemctl enable --now registry-enforcer-baseline registry-enforcer"
    fi
}

uninstall_all() {
    local file
    if [[ -z $destination ]]; then
        ((EUID == 0)) || fail "run make uninstall as root"
        # Nothing would be left that could take the table out.
        [[ ! -d /run/registry-enforcer ]] || fail "it enforces; first:" \
            "  systemctl disable --now registry-enforcer registry-enforcer-baseline; registry-enforcer remove"
    fi
    rm -rf "${destination}${library:?}"
    for file in "${files[@]}"; do
        rm -f -- "$destination$file"
    done
    [[ -n $destination ]] || ! command -v systemctl >/dev/null || systemctl daemon-reload 2>/dev/null || true
    echo "uninstalled; /etc/registry-enforcer and /var/lib/registry-enforcer stay"
}

case ${1-} in
    install) install_all ;;
    uninstall) uninstall_all ;;
    *) fail "usage: tools/install.sh install|uninstall" ;;
esac
