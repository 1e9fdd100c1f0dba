#!/bin/sh
# Keeps the daemon running in a WSL 2 distribution, with systemd or without. It is what [boot] command in /etc/wsl.conf
# runs, as root, whenever the distribution starts; docs/wsl2.md says how.
#
#   registry-enforcer-boot.sh [ARGUMENT ...]   start it in the background and return; ARGUMENTs go to
#                                              `registry-enforcer run`. Does nothing if it is running already.
#   registry-enforcer-boot.sh stop             end it and the daemon; what is enforced stays in the kernel
#
# A daemon that ends is started again, after a second, then two, up to a minute: also one that is refused because another
# distribution's daemon is in charge. So a second distribution stands by, and takes over when the first one is stopped.
set -eu
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PATH
umask 077

enforcer=${REGISTRY_ENFORCER:-registry-enforcer}
state=${REGISTRY_ENFORCER_BOOT:-/run/registry-enforcer-boot}
log=${REGISTRY_ENFORCER_LOG:-/var/log/registry-enforcer.log}
log_bytes=1000000 # once more is in it, it becomes $log.1
longest_pause=60
# Parts of WSL's 6.18, where they are modules. Whatever is built in or unknown is no error, the daemon says what it lacks.
modules="sch_ingress cls_bpf nf_tables nft_ct nft_limit nft_log nfnetlink_log nft_reject_inet nft_chain_nat nft_nat
    nft_redir nft_fib_inet nft_counter nft_objref"

# With O_APPEND, as the daemon writes, a truncated file goes on from its beginning.
bound_log() {
    if [ "$(wc -c <"$log")" -gt "$log_bytes" ]; then
        cp "$log" "$log.1" && : >"$log"
    fi
}

# $1: the keeper's process; ends with it, however that ends, and does not hold its lock meanwhile.
bound_log_while() {
    exec 9>&-
    while kill -0 "$1" 2>/dev/null; do
        bound_log || true # a full disk is nothing to end for
        sleep 10
    done
}

keep() {
    exec 9>>"$state.lock"
    flock -n 9 || exit 0
    echo $$ >"$state.pid"
    : >>"$log"
    bound_log_while $$ >/dev/null 2>&1 &
    daemon=
    trap 'trap "" INT TERM; [ -z "$daemon" ] || { kill "$daemon" && wait "$daemon"; } || true; exit 0' INT TERM
    pause=1
    while :; do
        # shellcheck disable=SC2086 # a list of words
        modprobe -aq $modules 2>/dev/null || true
        started=$(date +%s)
        "$enforcer" run "$@" </dev/null >>"$log" 2>&1 9>&- &
        daemon=$!
        status=0
        wait "$daemon" || status=$?
        daemon=
        [ $(($(date +%s) - started)) -lt "$longest_pause" ] || pause=1
        echo "$(date -u +%FT%TZ) registry-enforcer-boot: the daemon ended ($status); again in $pause s" >>"$log" || true
        sleep "$pause" 9>&- &
        wait $! || true # a signal ends this at once
        pause=$((pause * 2))
        [ "$pause" -le "$longest_pause" ] || pause=$longest_pause
    done
}

stop() {
    if (flock -n 9) 9>>"$state.lock"; then
        echo "registry-enforcer-boot: not running"
        exit 0
    fi
    kill "$(cat "$state.pid")"
    flock -w 30 9 9>>"$state.lock" # until it has let go
}

if [ "$(id -u)" -ne 0 ]; then
    echo "registry-enforcer-boot: enforcing needs root" >&2
    exit 2
fi
case ${1-} in
keep)
    shift
    keep "$@"
    ;;
stop) stop ;;
*)
    # A session of its own: the boot command's ends.
    setsid sh "$0" keep "$@" </dev/null >/dev/null 2>&1 &
    ;;
esac
