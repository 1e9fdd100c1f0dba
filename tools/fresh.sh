#!/usr/bin/env bash
# Prove that set-up works where nothing was installed before: a bare system with make and git under build/fresh/, this
# checkout (what is not yet committed included) copied into it, make setup in a chroot.
#
#   tools/fresh.sh [bookworm|noble]    noble wants Ubuntu's keyring; KEYRING=file if it is not where Ubuntu puts it
#
# The mounts live and end with a mount namespace, the processes with a PID namespace: nothing is left behind.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
suite=${1:-bookworm}
root=$PWD/build/fresh/$suite

((EUID == 0)) || { echo "fresh: needs root" >&2; exit 1; }
command -v debootstrap >/dev/null || { echo "fresh: apt-get install debootstrap, then again" >&2; exit 1; }

rm -rf --one-file-system "$root"
mkdir -p "$root"
case $suite in
    bookworm) options=() script=() ;;
    noble)
        options=("--components=main,universe" --keyring="${KEYRING:-/usr/share/keyrings/ubuntu-archive-keyring.gpg}")
        script=("" /usr/share/debootstrap/scripts/gutsy) # older debootstraps have no noble; all of Ubuntu's are this one
        ;;
    *) echo "fresh: bookworm or noble, not $suite" >&2; exit 1 ;;
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
cp --dereference /etc/resolv.conf "$root/etc/resolv.conf"
# Whom this machine trusts may be more than whom a bare system trusts.
mkdir -p "$root/etc/ssl"
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/of-the-host.pem"

cat >"$root/prove" <<'PROVE'
set -euo pipefail
cd /checkout
services() { ls /proc | grep -cE '^[0-9]+$'; }
before=$(services)
make setup-run # what make run asks for
.venv/bin/registry-enforcer check
.venv/bin/python -c 'import bcc, nftables'
make setup
start=$(date +%s%N)
make setup
took=$((($(date +%s%N) - start) / 1000000))
echo "fresh: the second make setup took $took ms"
((took < 2000))
[[ ! -e /usr/sbin/policy-rc.d ]]
ls build/enforcer.bpf.o build/enforcer-legacy.bpf.o
.venv/bin/python -m pytest --collect-only --quiet | tail -n 1
(($(services) <= before)) || { echo "fresh: a service was started"; exit 1; }
PROVE

# shellcheck disable=SC2016 # expanded inside
unshare --mount --pid --fork --kill-child bash -c '
    set -euo pipefail
    mount -t proc proc "$0/proc"
    mount --rbind /dev "$0/dev"
    mount -t tmpfs tmpfs "$0/run"
    exec chroot "$0" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \
        PIP_CERT=/etc/ssl/of-the-host.pem bash /prove
' "$root"
rm -rf --one-file-system "$root"
echo "fresh: make setup works on a bare $suite"
