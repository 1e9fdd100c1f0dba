"""The program under test on a host of the lab: started, signalled and asked as an operator would."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from enforcer import control
from tests.lab.lab import Agent, Lab, poll

COMMAND = str(Path(sys.prefix) / "bin" / "registry-enforcer")
METRICS_PORT = 9742

_HEAD = """\
organization = "Lab"
contact = "platform@lab.test"
mode = "{mode}"
ports = [443, 5000]

[scope]
containers = "strict"
engines = "strict"
host = "{host}"
"""
_REGISTRY = """
[[registry]]
name = "{name}"
hosts = {hosts}
ports = {ports}
"""
_CORP = (
    "registry.allowed.test", "*.blobs.allowed.test", "cname.allowed.test", "v6.allowed.test", "dual.allowed.test",
    "loopback.allowed.test", "*.fresh.allowed.test", "*.silent.allowed.test",
)  # fmt: skip
_MIRROR = """
[[destination]]
name = "mirror"
hosts = ["mirror.allowed.test"]
"""


def policy(*, mode: str = "enforce", host: str = "off", corp: tuple[str, ...] = _CORP, more: str = "") -> str:
    """The lab's policy; `more` is appended."""
    registries = (
        ("corp", corp, (443,)),
        ("alt", ("alt.allowed.test",), (8443,)),
        ("plain", ("plain.allowed.test",), (5000,)),
    )
    text = _HEAD.format(mode=mode, host=host)
    for name, hosts, ports in registries:
        text += registry(name, *hosts, ports=ports)
    return text + _MIRROR + more


def registry(name: str, *hosts: str, ports: tuple[int, ...] = (443,)) -> str:
    """One [[registry]] of a policy."""
    return _REGISTRY.format(name=name, hosts=json.dumps(hosts), ports=json.dumps(ports))


def trust_refusal_ca(lab: Lab) -> None:
    """Make a CA for refusals by `ca init` and have the lab's host trust it; `refusal_ca` is for policies that use it.

    Before anything runs there: Go's programs, dockerd among them, read the host's CAs once.
    """
    directory = _ca_directory(lab)
    (lab.directory / "ca.toml").write_text(policy())
    made = lab.run("host", [COMMAND, "ca", "init", "--policy", f"{lab.directory}/ca.toml",
                            "--directory", str(directory)])  # fmt: skip
    assert made.returncode == 0, made.stdout
    (directory / "lines").write_text(made.stdout[made.stdout.index("  [refusal]") :])
    trust = f"cat {directory}/refusal-ca.crt >> /etc/ssl/certs/ca-certificates.crt"
    assert lab.run("host", ["sh", "-ec", trust]).returncode == 0


def refusal_ca(lab: Lab) -> tuple[Path, str]:
    """The certificate of that CA, and what it says to add to the policy."""
    return _ca_directory(lab) / "refusal-ca.crt", (_ca_directory(lab) / "lines").read_text()


def _ca_directory(lab: Lab) -> Path:
    return lab.directory / "ca"


_starts = itertools.count(1)


class Enforcer:
    """The daemon of one host, and the commands that talk to it."""

    def __init__(self, lab: Lab, where: str, scraper: Agent, program: Sequence[str] = (COMMAND,)) -> None:
        """`program`: what runs the daemon, where that is not the command itself."""
        self._program = program
        self._lab = lab
        self._where = where
        self._scraper = scraper
        self._run_dir = lab.directory / "run" / where
        self._policy_file = lab.directory / f"policy-{where}.toml"
        self._places = ["--bpffs", str(lab.bpffs / where), "--cgroup", str(lab.host_cgroup(where))]
        self.state_dir = lab.directory / "state" / where
        self._log_name = ""
        self._daemon: subprocess.Popen[bytes] | None = None
        self.policy = ""

    @property
    def pid(self) -> int:
        """Of the running daemon."""
        assert self._daemon is not None
        return self._daemon.pid

    @property
    def running(self) -> bool:
        """Whether the daemon is alive."""
        return self._daemon is not None and self._daemon.poll() is None

    @property
    def killed(self) -> bool:
        """Whether the last daemon was killed, so that what it told the kernel is still there."""
        return self._daemon is not None and self._daemon.poll() == -signal.SIGKILL

    @property
    def log(self) -> str:
        """What the daemon that runs (or ran last) has said."""
        return self._lab.log(self._log_name) if self._log_name else ""

    def start(self, text: str, *, loader: str = "libbpf") -> str:
        """Start the daemon with a policy; the value is its `ready` line."""
        assert not self.running
        self._write_policy(text)
        self._log_name = f"enforcer-{self._where}-{next(_starts)}"
        daemon = self._daemon = self._lab.spawn(
            self._where,
            [*self._program, "run", "--policy", str(self._policy_file), "--run-dir", str(self._run_dir),
             "--state-dir", str(self.state_dir), *self._places,
             "--metrics", f"127.0.0.1:{METRICS_PORT}", "--loader", loader],
            self._log_name,
        )  # fmt: skip
        poll("the enforcer's ready line", lambda: self._ready_line() or daemon.poll() is not None)
        if not self._ready_line():
            raise RuntimeError(f"the enforcer ended with {daemon.returncode}:\n{self.log[-3000:]}")
        return self._ready_line()

    def _ready_line(self) -> str:
        return next((line for line in self.log.splitlines() if line.startswith("ready ")), "")

    def ensure(self, text: str) -> None:
        """Running, with this policy in force."""
        if not self.running:
            self.start(text)
        elif text != self.policy:
            assert self.reload(text) == "ok", self.log[-3000:]

    def reload(self, text: str) -> str:
        """SIGHUP with a new policy file; the value is the result that the daemon counted."""
        self._write_policy(text)
        before = self._reloads()
        self.send(signal.SIGHUP)
        poll("a reload", lambda: self._reloads() != before)
        after = self._reloads()
        return next(result for result in after if after[result] != before[result])

    def reload_and_wait(self, text: str, deadline_seconds: float = 60) -> str | None:
        """The same over the control socket; the value is what was wrong, None: the new policy is in force."""
        self._write_policy(text)
        problem: str | None = control.request(self._run_dir, {"command": "reload"}, deadline_seconds)["problem"]
        return problem

    def _reloads(self) -> dict[str, float]:
        return {
            dict(labels)["result"]: value
            for (name, labels), value in self.samples().items()
            if name == "enforcer_policy_reloads_total"
        }

    def _write_policy(self, text: str) -> None:
        self._policy_file.write_text(text)
        self.policy = text

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the daemon."""
        assert self._daemon is not None
        self._daemon.send_signal(number)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End the daemon; the value is its exit code."""
        assert self._daemon is not None
        self.send(number)
        return self._daemon.wait(20)

    def lay_baseline(self, text: str) -> str:
        """`registry-enforcer baseline` with a policy, as early boot does."""
        self._write_policy(text)
        return self.command("baseline", "--policy", str(self._policy_file))

    def remove(self) -> str:
        """`registry-enforcer remove`; the value is what it printed."""
        return self.command("remove", *self._places)

    def leave(self) -> None:
        """Neither running, nor anything of it in the kernel."""
        if self.running:
            self.stop()
        self.remove()

    def status(self) -> dict[str, Any]:
        """`registry-enforcer status --json`."""
        facts: dict[str, Any] = json.loads(self.command("status", "--json"))
        return facts

    def argv(self, name: str, *arguments: str) -> list[str]:
        """What runs a command that asks this daemon."""
        return [COMMAND, name, "--run-dir", str(self._run_dir), *arguments]

    def command(self, name: str, *arguments: str, exit_code: int = 0) -> str:
        """Any command; AssertionError if it ends with another exit code."""
        done = self._lab.run(self._where, self.argv(name, *arguments))
        assert done.returncode == exit_code, f"{name}: exit code {done.returncode}\n{done.stdout}"
        return done.stdout

    def metrics_text(self) -> str:
        """What Prometheus would scrape; RuntimeError with the log if the daemon has ended."""
        if not self.running:
            raise RuntimeError(f"the enforcer has ended:\n{self.log[-3000:]}")
        reply = self._scraper.call("http_get", address="127.0.0.1", port=METRICS_PORT, path="/metrics")
        assert reply["status"] == 200
        return str(reply["body"])

    def samples(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Every sample of the metrics, by name and sorted labels."""
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(self.metrics_text())
            for sample in family.samples
        }

    def total(self, name: str, **labels: str) -> float:
        """The sum over all samples of a metric that have these labels."""
        return sum(
            value
            for (sample, its_labels), value in self.samples().items()
            if sample == name and labels.items() <= dict(its_labels).items()
        )

    def permitted(self) -> set[tuple[str, int]]:
        """The (address, port) pairs that are learned now."""
        learned: Any = control.request(self._run_dir, {"command": "status"})["learned"]
        return {(entry["address"], entry["port"]) for entry in learned}
