"""The command line: one table of subcommands; the only module that prints.

Exit codes: 0 yes or ok, 1 refused or no, 2 bad input, 3 not running.

What only some commands need is imported by them: the daemon's libraries take three quarters of the start of a program
that merely asks a running one.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import logging
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enforcer import __version__, completion, control, kernel_abi, policy, trusted_files

EXIT_OK = 0
EXIT_NO = 1
EXIT_BAD_INPUT = 2
EXIT_NOT_RUNNING = 3

DEFAULT_POLICY = Path("/etc/registry-enforcer/policy.toml")
DEFAULT_RUN_DIR = Path("/run/registry-enforcer")
DEFAULT_STATE_DIR = Path("/var/lib/registry-enforcer")
DEFAULT_METRICS = "127.0.0.1:9742"
LOADERS = ("libbpf", "bcc")  # the values of bpf.Loader
FOLLOW_SECONDS = 0.5
RELOAD_DEADLINE_SECONDS = 60.0  # ten thousand names take two
DESCRIPTORS = 4_096


class UsageError(Exception):
    """Bad input; the message says what to write instead."""


# --- arguments -------------------------------------------------------------------------------------------------------
def _metrics_address(text: str) -> tuple[str, int]:
    host, separator, port = text.rpartition(":")
    if not separator or not host or not port.isascii() or not port.isdigit() or not 0 <= int(port) <= 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not ADDRESS:PORT; write for example {DEFAULT_METRICS}")
    return host.strip("[]"), int(port)


def _add_policy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--policy", type=Path, metavar="FILE", help=f"default: {DEFAULT_POLICY}, or Docker Hub alone without that file"
    )


def _add_places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bpffs", type=Path, metavar="DIR", help=f"where BPF state is pinned; default {kernel_abi.BPFFS}"
    )
    parser.add_argument("--cgroup", type=Path, metavar="DIR", help="whose sockets are judged; default: all")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print facts as JSON")


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE", help=f"default: {DEFAULT_POLICY}")
    _add_json(parser)


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    _add_policy(parser)
    _add_places(parser)
    parser.add_argument("--state-dir", type=Path, default=DEFAULT_STATE_DIR, metavar="DIR")
    parser.add_argument("--metrics", type=_metrics_address, default=DEFAULT_METRICS, metavar="ADDRESS:PORT")
    parser.add_argument("--loader", choices=LOADERS, default="libbpf")


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("subject", metavar="NAME-or-ADDRESS[:PORT]")
    _add_policy(parser)
    _add_json(parser)


def _log_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--number", "-n", type=int, default=20, metavar="N", help="how many; default 20, at most 200")
    parser.add_argument("--follow", "-f", action="store_true", help="show what comes, too, until interrupted")
    parser.add_argument("--json", action="store_true", help="print the lines of the audit log themselves")


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    _add_policy(parser)
    _add_places(parser)
    _add_json(parser)


@dataclass(frozen=True, slots=True)
class Command:
    """One row of the table."""

    name: str
    summary: str
    example: str
    arguments: Callable[[argparse.ArgumentParser], None]
    main: Callable[[argparse.Namespace], int]


# --- output ----------------------------------------------------------------------------------------------------------
def _print_json(facts: Mapping[str, Any]) -> None:
    print(json.dumps(facts, indent=2))


def _complain(text: str) -> None:
    print(f"registry-enforcer: {text}", file=sys.stderr)


def _await_random_numbers() -> None:
    """Says what is waited for where the kernel has none yet: libraries ask for some while they are imported."""
    try:
        os.getrandom(1, os.GRND_NONBLOCK)
    except BlockingIOError:
        _complain(
            "waiting for the kernel's first random numbers; if it never has any, as on a virtual machine without "
            "virtio-rng, give it a source"
        )
        os.getrandom(1)


# --- commands --------------------------------------------------------------------------------------------------------
def _read_policy(path: Path | None, *, trusting: bool = False) -> policy.Policy:
    """The policy of `path`; without one the default file's, and without that the built-in default.

    PolicyError if it is wrong, or if others could have written it, unless `trusting`.
    """
    from enforcer import procfs

    wsl = procfs.is_wsl()
    if path is None:
        if not (DEFAULT_POLICY.exists() or DEFAULT_POLICY.is_symlink()):
            return policy.default_policy(wsl=wsl)
        path = DEFAULT_POLICY
    return policy.read_policy(path, wsl=wsl, trusting=trusting)


def _check(arguments: argparse.Namespace) -> int:
    from enforcer import advice, enforcement

    # A file that is named may be in somebody's checkout, on its way to a host; the default one is in force here.
    checked = _read_policy(arguments.file, trusting=arguments.file is not None)
    enforcement.open_authority(checked)  # a PolicyError if its files are no CA
    facts = enforcement.policy_facts(checked)
    if arguments.json:
        _print_json(facts)
    else:
        print(
            f"{checked.source}: ok: {facts['registries']} registries, {facts['destinations']} other destinations and "
            f"{facts['proxies']} proxies, {facts['names']} names, mode {facts['mode']}"
        )
        for warning in (*advice.warnings(checked), *_refused_here(arguments.file)):
            print(f"{checked.source}: note: {warning}")
    return EXIT_OK


def _refused_here(path: Path | None) -> Iterator[str]:
    """Why root may not enforce by a file, however right its words are."""
    if path is None or os.geteuid() != 0:
        return
    try:
        trusted_files.read(path, 0)
    except trusted_files.UntrustedError as error:
        yield f"run and reload refuse this file: {error}"
    except OSError as error:  # a pipe, which has no name there
        yield f"run and reload cannot read this file: {error.strerror}"


def _run(arguments: argparse.Namespace) -> int:
    if os.geteuid() != 0:
        raise UsageError("run changes the kernel's rules and needs root; start it with sudo")
    _await_random_numbers()
    import asyncio

    from enforcer import bpf, daemon, enforcement

    os.umask(0o027)  # whatever root's shell has: what is made here is never others' to write
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # More than all bounds on clients add up to, so that no crowd of them takes what the daemon itself needs.
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, DESCRIPTORS)), hard))
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    faulthandler.enable(2)  # a watchdog ends a daemon that hangs by SIGABRT: then the log says where it hung
    try:
        with trusted_files.directory(Path(__file__).parent):
            pass
    except trusted_files.UntrustedError as error:
        logging.getLogger("registry-enforcer").warning("whoever may change this program enforces: %s", error)
    started = time.monotonic()

    def announce(enforced: policy.Policy, details: str) -> None:
        took = time.monotonic() - started
        print(f"ready after {took:.1f} s: mode {enforced.mode.value}, policy {enforced.source}, {details}", flush=True)

    options = enforcement.Options(
        run_dir=arguments.run_dir,
        state_dir=arguments.state_dir,
        bpffs=arguments.bpffs or Path(kernel_abi.BPFFS),
        cgroup=arguments.cgroup,
        metrics=arguments.metrics,
        loader=bpf.Loader(arguments.loader),
    )
    asyncio.run(daemon.run(options, lambda: _read_policy(arguments.policy), announce))
    return EXIT_OK


def _baseline(arguments: argparse.Namespace) -> int:
    if os.geteuid() != 0:
        raise UsageError("baseline changes the kernel's rules and needs root; start it with sudo")
    _await_random_numbers()
    from enforcer import baseline

    try:
        print(baseline.lay(arguments.run_dir, lambda: _read_policy(arguments.policy)))
    except policy.PolicyError:
        _complain("the policy cannot be used, so every connection to a registry port is refused until it can be:")
        raise
    return EXIT_OK


def _reload(arguments: argparse.Namespace) -> int:
    problem = control.request(arguments.run_dir, {"command": "reload"}, RELOAD_DEADLINE_SECONDS)["problem"]
    if problem is None:
        return EXIT_OK
    print(problem, file=sys.stderr)  # FILE:LINE: first
    _complain("the policy in force stays")
    return EXIT_BAD_INPUT


def _status(arguments: argparse.Namespace) -> int:
    status = control.request(arguments.run_dir, {"command": "status"})
    if arguments.json:
        _print_json(status)
        return EXIT_OK
    facts = status["policy"]
    print(f"{status['state']}: mode {facts['mode']}, policy {facts['source']} ({facts['digest'][:12]})")
    print(
        f"  {facts['registries']} registries, {facts['destinations']} other destinations, {facts['proxies']} proxies, "
        f"{facts['names']} names"
    )
    print(f"  scopes: {', '.join(f'{scope} {level}' for scope, level in facts['scope'].items())}")
    print(f"resolvers: {', '.join(status['resolvers']) or 'none: nothing can be learned'}")
    if status["metrics"] and status["metrics"]["problem"]:
        print(f"metrics are not served: {status['metrics']['problem']}")
    answers = status["responder"]["answers"] if status["responder"] else []
    print(f"told why they are refused: {' and '.join(answers) or 'no'} clients")
    for interface in status["interfaces"]:
        print(f"interface {interface['name']}: {interface['role']} ({interface['why']})")
    for kind in ("refused", "observed"):
        counts = [f"{entry['scope']}/{entry['protocol']} {entry['count']}" for entry in status[kind] if entry["count"]]
        print(f"{kind}: {', '.join(counts) or 'none'}")
    print(f"learned: {len(status['learned'])}")
    for entry in status["learned"]:
        left = entry["expires_at"] - time.time()
        print(f"  {entry['address']} port {entry['port']}: {entry['name']} (rule {entry['rule']}, {left:.0f} s left)")
    return EXIT_OK


def _explain(arguments: argparse.Namespace) -> int:
    from enforcer import advice

    try:
        subject, _ = advice.parse_subject(arguments.subject)
    except ValueError as error:
        raise UsageError(str(error)) from None
    try:
        explanation = control.request(arguments.run_dir, {"command": "explain", "subject": arguments.subject})
    except control.NotRunningError:
        # A name is judged by the policy alone; what an address was learned for only the daemon knows.
        if not isinstance(subject, str):
            raise
        from enforcer import enforcement

        explanation = enforcement.explain_by_policy(_read_policy(arguments.policy, trusting=True), arguments.subject)
        _complain("no daemon is running; this is what the policy file says")
    if arguments.json:
        _print_json(explanation)
    else:
        print(explanation["sentence"])
        for step in explanation["next_steps"]:
            print(f"  {step}")
        if refusals := explanation.get("last_refusals"):
            from enforcer import audit_record

            for record in refusals:
                print(audit_record.as_sentence(record))
    return EXIT_OK if explanation["allowed"] else EXIT_NO


def _log(arguments: argparse.Namespace) -> int:
    from enforcer import audit_record

    request = {"command": "log", "after": 0, "limit": arguments.number}
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            reply = control.request(arguments.run_dir, request)
            if reply["last"] < request["after"]:
                request["after"] = 0  # another daemon, which counts from the beginning
                continue
            for record in reply["records"]:
                line = json.dumps(record, separators=(",", ":")) if arguments.json else audit_record.as_sentence(record)
                print(line, flush=True)
            if not arguments.follow:
                break
            request |= {"after": reply["last"], "limit": audit_record.RECORDS_A_REPLY}
            time.sleep(FOLLOW_SECONDS)
    return EXIT_OK


def _doctor(arguments: argparse.Namespace) -> int:
    _await_random_numbers()
    from enforcer import doctor

    marks = _read_policy(arguments.policy, trusting=True).marks
    findings = doctor.examine(arguments.bpffs or Path(kernel_abi.BPFFS), arguments.cgroup, marks)
    if arguments.json:
        _print_json({"findings": [finding.as_json() for finding in findings]})
    else:
        for finding in findings:
            print(f"{finding.state.value:8}{finding.subject}: {finding.fact}")
            if finding.cost:
                print(f"{'':8}costs: {finding.cost}")
            if finding.remedy:
                print(f"{'':8}do: {finding.remedy}")
    return EXIT_OK if all(finding.state is not doctor.State.MISSING for finding in findings) else EXIT_NO


def _remove(arguments: argparse.Namespace) -> int:
    if os.geteuid() != 0:
        raise UsageError("remove changes the kernel's rules and needs root; start it with sudo")
    _await_random_numbers()
    from enforcer import daemon

    removed = daemon.remove(arguments.run_dir, arguments.bpffs, arguments.cgroup)
    if arguments.json:
        _print_json({"removed": removed})
        return EXIT_OK
    for what in removed:
        print(f"removed {what}")
    if not removed:
        print("nothing to remove: nothing of registry-enforcer is in the kernel here")
    return EXIT_OK


def _ca_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["init"], help="make one; nothing is overwritten")
    parser.add_argument(
        "--directory", type=Path, default=DEFAULT_POLICY.parent, metavar="DIR", help=f"default: {DEFAULT_POLICY.parent}"
    )
    parser.add_argument(
        "--only", type=_host_pattern, action="append", default=[], metavar="NAME",
        help="sign for NAME and what is below it, and for no other name; may be repeated",
    )  # fmt: skip
    parser.add_argument("--days", type=_days, metavar="N", help="how long it is valid; default 365, at most 825")
    _add_policy(parser)


def _host_pattern(text: str) -> policy.HostPattern:
    try:
        return policy.host_pattern(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _days(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 825:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of days from 1 to 825")
    return int(text)


_TRUST = """\
made {certificate}
 and {key}, which its owner alone can read. Keep it on this host: make one on every other.
It can sign for {signs}.
It never can for what the policy allows now; make it anew when the policy allows more.

Have the programs of this host trust it:
  Debian, Ubuntu    cp {certificate} /usr/local/share/ca-certificates/ && update-ca-certificates
  Fedora, RHEL      cp {certificate} /etc/pki/ca-trust/source/anchors/ && update-ca-trust
  then              systemctl restart docker containerd   (podman, buildah, skopeo and ctr read it at every start)
or an engine alone, for one registry each:
  docker            /etc/docker/certs.d/REGISTRY/refusal-ca.crt
  podman, skopeo    /etc/containers/certs.d/REGISTRY/refusal-ca.crt
  containerd        ca = "{certificate}" in /etc/containerd/certs.d/REGISTRY/hosts.toml

Then add to the policy, and reload it:
  [refusal]
  ca = {{ certificate = "{certificate}", key = "{key}" }}"""


def _ca(arguments: argparse.Namespace) -> int:
    from enforcer import authority

    constrained = _read_policy(arguments.policy)
    try:
        files = authority.create(
            arguments.directory,
            constrained.organization,
            (host for rule in constrained.rules for host in rule.hosts),
            only=arguments.only,
            days=arguments.days or authority.CA_DAYS,
        )
    except authority.AuthorityError as error:
        raise UsageError(str(error)) from None
    signs = ", ".join(sorted({pattern.name for pattern in arguments.only})) or "every other name, but for no address"
    print(_TRUST.format(certificate=files.certificate, key=files.key, signs=signs))
    return EXIT_OK


def _remove_arguments(parser: argparse.ArgumentParser) -> None:
    _add_places(parser)
    _add_json(parser)


def _completion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=completion.SHELLS, help="for whom")


def _completion(arguments: argparse.Namespace) -> int:
    print(completion.render(arguments.shell, _completable()), end="")
    return EXIT_OK


def _completable() -> list[completion.Command]:
    """What can be typed, read from the parsers themselves."""
    found = []
    for command in COMMANDS:
        parser = _fill(argparse.ArgumentParser(prog=command.name), command)
        arguments = [
            completion.Argument(
                str(action.metavar or action.dest),
                tuple(action.option_strings),
                (action.help or "").partition(";")[0],
                choices=tuple(map(str, action.choices or ())),
                takes_value=action.nargs != 0,
                is_file=action.type is Path,
            )
            for action in parser._actions
        ]
        found.append(completion.Command(command.name, command.summary, tuple(arguments)))
    return found


COMMANDS = (
    Command(
        "check",
        "say whether a policy file is right",
        "registry-enforcer check ./policy.toml",
        _check_arguments,
        _check,
    ),
    Command(
        "run",
        "enforce a policy until stopped; SIGHUP reads it again; enforcement stays when the program ends",
        "registry-enforcer run --policy ./policy.toml",
        _run_arguments,
        _run,
    ),
    Command(
        "reload",
        "have the running daemon read its policy again, and wait until it is in force",
        "registry-enforcer reload",
        lambda _: None,
        _reload,
    ),
    Command(
        "baseline",
        "refuse what the policy does not list by address, until a daemon takes over; for early boot",
        "registry-enforcer baseline",
        _add_policy,
        _baseline,
    ),
    Command(
        "status",
        "show what is enforced, learned and refused",
        "registry-enforcer status --json",
        _add_json,
        _status,
    ),
    Command(
        "explain",
        "say why a registry is allowed or refused, and what to do",
        "registry-enforcer explain ghcr.io:443",
        _explain_arguments,
        _explain,
    ),
    Command(
        "log",
        "show who was refused what, the last ones or what comes",
        "registry-enforcer log --follow",
        _log_arguments,
        _log,
    ),
    Command(
        "doctor",
        "say what this host's kernel offers, what is missing, what that costs and what to do",
        "registry-enforcer doctor",
        _doctor_arguments,
        _doctor,
    ),
    Command(
        "ca",
        "make a CA that lets TLS clients read why they are refused, and say how to trust it",
        "registry-enforcer ca init",
        _ca_arguments,
        _ca,
    ),
    Command(
        "remove",
        "take all enforcement out of the kernel",
        "registry-enforcer remove",
        _remove_arguments,
        _remove,
    ),
    Command(
        "completion",
        "print what completes these commands in a shell",
        "registry-enforcer completion bash",
        _completion_arguments,
        _completion,
    ),
)


def _fill(parser: argparse.ArgumentParser, command: Command) -> argparse.ArgumentParser:
    parser.add_argument(
        "--run-dir", type=Path, default=DEFAULT_RUN_DIR, metavar="DIR", help=f"default: {DEFAULT_RUN_DIR}"
    )
    command.arguments(parser)
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="registry-enforcer",
        description="Says which container registries this host's engines and containers may reach.",
        epilog="Exit codes: 0 yes or ok, 1 refused or no, 2 bad input, 3 not running.",
    )
    parser.add_argument("--version", action="version", version=f"registry-enforcer {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.name, help=command.summary, description=command.summary, epilog=f"Example: {command.example}"
        )
        _fill(subparser, command)
        subparser.set_defaults(main=command.main)
    return parser


def _open_standard_streams() -> None:
    """What is opened next would be standard output where that is closed, and audit lines would be written into it."""
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC), descriptor)
            setattr(sys, name, os.fdopen(descriptor, mode, closefd=False))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the value is the exit code."""
    _open_standard_streams()
    arguments = _parser().parse_args(argv)
    try:
        status = int(arguments.main(arguments))
        sys.stdout.flush()  # here, where a reader that has gone is caught, not at exit
        return status
    except policy.PolicyError as error:
        # FILE:LINE: first, as compilers do, so that editors can jump there.
        print(error, file=sys.stderr)
    except (
        UsageError,
        control.AlreadyRunningError,
        control.RunDirectoryError,
        control.RequestError,
    ) as error:
        _complain(str(error))
    except control.NotRunningError as error:
        _complain(f"{error}; start it with: registry-enforcer run")
        return EXIT_NOT_RUNNING
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except _refusals_to_start() as error:
        _complain(str(error))
    return EXIT_BAD_INPUT


def _refusals_to_start() -> tuple[type[Exception], ...]:
    """What commands raise that the kernel or the host hinders; Python asks only when something was raised."""
    from enforcer import bpf, daemon, metrics

    return daemon.UnsupportedHostError, bpf.BpfError, metrics.MetricsError


if __name__ == "__main__":
    sys.exit(main())
