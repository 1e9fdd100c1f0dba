#!/usr/bin/env bash
# Enforce on this host until Ctrl-C, then take everything out of the kernel again.
# The daemon alone leaves enforcement in place when it stops; whoever tries it out on a terminal wants it gone.
set -euo pipefail
# Nothing here is looked up in PATH, which is whatever the shell of whoever became root had.
enforcer=${BASH_SOURCE[0]%/*}/../.venv/bin/registry-enforcer

if ((EUID != 0)); then
    echo "run: enforcing needs root: sudo make run" >&2
    exit 1
fi
stopping=
daemon=
trap 'stopping=1; [[ -z $daemon ]] || kill -TERM "$daemon" 2>/dev/null || true' INT TERM HUP
echo "run: enforcing on this host; Ctrl-C stops and takes every rule out again"
"$enforcer" run "$@" </dev/null &
daemon=$!
[[ -z $stopping ]] || kill -TERM "$daemon" 2>/dev/null || true # asked to stop before there was anybody to tell
status=0
wait "$daemon" || status=$?
if [[ -z $stopping ]]; then
    ((status == 2)) || echo "run: the daemon ended by itself ($status): what it enforced stays in place" \
        "until ${IN_USERSPACE:+tools/userspace.sh exec }.venv/bin/registry-enforcer remove" >&2
    exit "$status"
fi
# The wait above ended with the signal, not with the daemon, and so may the next ones.
while kill -0 "$daemon" 2>/dev/null; do wait "$daemon" || true; done
trap '' INT TERM HUP # half removed is worse than a second Ctrl-C ignored
echo
echo "run: taking enforcement out of the kernel"
"$enforcer" remove
