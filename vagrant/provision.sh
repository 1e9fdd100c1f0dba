#!/usr/bin/env bash
# What a machine runs once this checkout is in it: set up, ask doctor, then what it was asked for. The last line is the
# verdict, and the exit code is 0 only if all of it succeeded.
#
#   vagrant/provision.sh [--no-setup] [--no-doctor] [demo] [test] [-- COMMAND ARGUMENT...]
#
#   --no-setup    everything is there already: nothing is installed, compiled or fetched (machines without a network)
#   --no-doctor   COMMAND asks doctor itself
#
# make test has PYTEST_ARGS from the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

system="$(sed -n 's/^PRETTY_NAME="\(.*\)"$/\1/p' /etc/os-release 2>/dev/null || true)"
system="${system:-an unknown system}, Linux $(uname -r)"
steps=()
failed=0

# step NAME COMMAND...: a step that fails is told in the verdict and ends nothing.
step() {
    local name=$1 start=$SECONDS status=0
    shift
    echo "provision: $name"
    "$@" || status=$?
    if ((status == 0)); then
        steps+=("$name ok in $((SECONDS - start)) s")
    else
        steps+=("$name FAILED ($status) after $((SECONDS - start)) s")
        failed=1
    fi
    return "$status"
}

verdict() {
    local all
    printf -v all '%s, ' "${steps[@]}"
    ((failed)) && echo "provision: FAILED on $system: ${all%, }" || echo "provision: ok on $system: ${all%, }"
    exit "$failed"
}

# Boxes may lack even these; the rest is set-up's.
# shellcheck disable=SC2317 # called by step
tools() {
    command -v make >/dev/null && command -v git >/dev/null && return
    if command -v apt-get >/dev/null; then
        apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -q -y install --no-install-recommends make git
    else
        dnf -y install make git
    fi
}

((EUID == 0)) || { echo "provision: needs root" >&2; exit 1; }
run_make=(make)
setup=1
doctor=1
words=()
command=()
while (($#)); do
    case $1 in
        --no-setup) setup=0 run_make+=(--assume-old=setup) ;;
        --no-doctor) doctor=0 ;;
        demo | test) words+=("$1") ;;
        --)
            command=("${@:2}")
            break
            ;;
        *) echo "provision: usage: vagrant/provision.sh [--no-setup] [--no-doctor] [demo] [test] [-- COMMAND ARGUMENT...]" >&2; exit 2 ;;
    esac
    shift
done

if ((setup)); then
    step "make and git" tools || verdict
    step "set-up" make setup || verdict
fi
((doctor == 0)) || step doctor tools/userspace.sh exec .venv/bin/registry-enforcer doctor || true
for word in "${words[@]}"; do
    step "$word" "${run_make[@]}" "$word" PYTEST_ARGS="${PYTEST_ARGS-}" || true
done
((${#command[@]} == 0)) || step "${command[*]}" tools/userspace.sh exec "${command[@]}" || true
verdict
