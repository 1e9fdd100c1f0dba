#!/usr/bin/env bash
# Prove that set-up works where nothing was installed before: a bare system with make and git under build/fresh/, this
# checkout (what is not yet committed included) copied into it, make setup in there.
#
#   tools/fresh.sh [bookworm|noble|jammy|focal [COMMAND]]    then COMMAND in its checkout
#
# Ubuntu's want its keyring: KEYRING=file if it is not where Ubuntu puts it (Debian 13 has it as ubuntu-keyring).
# focal and jammy prove the Debian 12 user space too (tools/userspace.sh).
# The mounts live and end with a mount namespace, the processes with a PID namespace: nothing is left behind.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
suite=${1:-bookworm}
command=${2:-true}
root=$PWD/build/fresh/$suite

((EUID == 0)) || { echo "fresh: needs root" >&2; exit 1; }
command -v debootstrap >/dev/null || { echo "fresh: apt-get install debootstrap, then again" >&2; exit 1; }

rm -rf --one-file-system "$root"
mkdir -p "$root"
case $suite in
    bookworm) options=() script=() ;;
    noble | jammy | focal)
        options=("--components=main,universe" --keyring="${KEYRING:-/usr/share/keyrings/ubuntu-archive-keyring.gpg}")
        script=("" /usr/share/debootstrap/scripts/gutsy) # all of Ubuntu's are this one, and old debootstraps lack new names
        ;;
    *) echo "fresh: bookworm, noble, jammy or focal, not $suite" >&2; exit 1 ;;
esac
echo "fresh: making a bare $suite"
debootstrap --variant=minbase --include=make,git "${options[@]}" "$suite" "$root" \
    "${script[@]}" >build/fresh/"$suite".log 2>&1 || {
    tail -n 5 build/fresh/"$suite".log >&2
    exit 1
}
mkdir "$root/checkout"
git -c safe.directory='*' ls-files -z --cached --others --exclude-standard |
    tar --create --null --files-from=- --ignore-failed-read | tar --extract --directory "$root/checkout"
git -c init.defaultBranch=main init --quiet "$root/checkout" # the tests ask git what belongs to it
cp --dereference /etc/resolv.conf "$root/etc/resolv.conf"
# Whom this machine trusts may be more than whom a bare system trusts.
cp /etc/ssl/certs/ca-certificates.crt "$root/root/trusted.pem"

cat >"$root/prove" <<'PROVE'
set -euo pipefail
cd /checkout
services() { ls /proc | grep -cE '^[0-9]+$'; }
before=$(services)
make setup-run # what make run asks for
here="tools/userspace.sh exec"
$here .venv/bin/registry-enforcer check
$here .venv/bin/python -c 'import bcc, nftables'
make setup
start=$(date +%s%N)
make setup
took=$((($(date +%s%N) - start) / 1000000))
echo "fresh: the second make setup took $took ms; all of it takes $(du -smx / | cut -f 1) MB"
((took < 2000))
[[ ! -e /usr/sbin/policy-rc.d ]] || { echo "fresh: services are still forbidden to start"; exit 1; }
ls build/enforcer.bpf.o build/enforcer-legacy.bpf.o
$here .venv/bin/python -m pytest --collect-only --quiet | tail -n 1
(($(services) <= before)) || { echo "fresh: a service was started"; exit 1; }
PROVE

status=0
# Not chroot: a process that is in one may make no user namespaces.
# shellcheck disable=SC2016 # expanded inside
unshare --mount --pid --fork --kill-child bash -c '
    set -euo pipefail
    mount --bind "$0" "$0"
    cd "$0"
    mount -t proc proc proc
    mount --rbind /dev dev
    mount --rbind /sys sys
    mount -t tmpfs tmpfs run
    mkdir old
    pivot_root . old
    umount -l old
    cd /checkout
    exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 PIP_CERT=/root/trusted.pem \
        bash -c "bash /prove && $1"
' "$root" "$command" || status=$?
rm -rf --one-file-system "$root"
((status == 0)) || exit "$status"
echo "fresh: make setup works on a bare $suite"
