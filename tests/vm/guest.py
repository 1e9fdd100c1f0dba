"""Inside the guest: what this kernel takes and does, told as JSON lines while it happens.

    python -m tests.vm.guest REPORT    the steps come from vm.steps= on the kernel's command line

Records: {"step", "result": "ok" or "failed", "detail", "seconds", "facts"} at the end of each step, and
{"test", "result": "ok", "failed" or "skipped", "detail", "seconds"} for each test of one.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from enforcer import bpf, bpf_loader
from tests.lab.enforcer import COMMAND, policy

Facts = dict[str, Any]

_COMMAND_SECONDS = 120
_LOG_STATS = 4  # BPF_LOG_STATS, include/linux/bpf_verifier.h, 5.2
_LONGEST_DETAIL = 1_500

VECTORS = (
    "tests/kernel/test_learn.py", "tests/kernel/test_gate.py", "tests/kernel/test_connect.py",
    "tests/kernel/test_noted_connects.py", "tests/kernel/test_loopback.py",
)  # fmt: skip
_END_TO_END = (
    "test_engines_are_judged_on_every_tcp_port_and_containers_on_registry_ports",
    "test_address_of_the_policy_needs_no_answer",
    "test_udp_is_refused_so_that_quic_falls_back",
    "test_mark_that_a_client_sets_itself_is_no_permission",
    "test_what_bpf_learns_beyond_the_policy_is_withdrawn",
    "test_forged_answer_teaches_nothing",
    "test_the_awaited_answer_teaches_once",
    "test_unsolicited_answer_teaches_nothing",
    "test_revoking_a_registry_ends_its_connections",
)
LAB = ("tests/lab/test_core.py", *(f"tests/lab/test_end_to_end.py::{name}" for name in _END_TO_END))


class Report:
    """Where records go; whoever waits for one outside sees it at once."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w")

    def tell(self, record: Facts) -> None:
        """One line."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()


# --- steps -----------------------------------------------------------------------------------------------------------
def doctor(_report: Report) -> Facts:
    """What `doctor` finds, within two minutes and without a word on standard error."""
    done = _registry_enforcer("doctor", "--json")
    assert done.stderr == "", done.stderr
    return {"exit_code": done.returncode, **json.loads(done.stdout)}


def refused(_report: Report) -> Facts:
    """What `run` says where it cannot run: one sentence, exit code 2."""
    path = Path("/tmp/policy.toml")  # noqa: S108 - nobody else is in this guest
    path.write_text(policy())
    done = _registry_enforcer("run", "--policy", str(path))
    assert done.returncode == 2, f"exit code {done.returncode}: {done.stdout}{done.stderr}"
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return {"said": done.stderr.strip()}


def memlock(_report: Report) -> Facts:
    """What `run` says where maps count as locked memory, and the limit on it cannot be raised."""
    limited = [
        "prlimit",
        "--memlock=65536:65536",
        "setpriv",
        "--bounding-set=-sys_resource",
        "--inh-caps=-sys_resource",
    ]
    done = _registry_enforcer("run", before=limited)
    assert done.returncode == 2, f"exit code {done.returncode}: {done.stdout}{done.stderr}"
    assert "LimitMEMLOCK=infinity" in done.stderr, done.stderr
    return {"said": done.stderr.strip()}


def _registry_enforcer(*arguments: str, before: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Ended by SIGABRT at the deadline, so that Python says where it stood."""
    with subprocess.Popen(
        [*before, COMMAND, *arguments], env=os.environ | {"PYTHONFAULTHANDLER": "1"},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            output, errors = process.communicate(timeout=_COMMAND_SECONDS)
        except subprocess.TimeoutExpired:
            process.send_signal(6)
            output, errors = process.communicate()
            errors = f"still running after {_COMMAND_SECONDS} s\n{errors}"
    return subprocess.CompletedProcess([], process.returncode, output, errors)


def libbpf(_report: Report) -> Facts:
    """Every program by libbpf; how many instructions the verifier walked, from the kernel or from its log."""
    facts = _load(bpf.Loader.LIBBPF)
    if not any(facts["programs"].values()):
        legacy = not bpf.has_ring_buffer()
        unit = _StatisticsUnit(bpf.build_inputs(bpf.Loader.LIBBPF)[legacy])
        facts["programs"] = {name: unit.instructions(facts["symbols"][name]) for name in facts["programs"]}
    return facts


def bcc(_report: Report) -> Facts:
    """Every program by bcc, compiled here; emulated, that takes longer than the loader's own deadline allows."""
    bpf._LOAD_DEADLINE_SECONDS = 240
    return _load(bpf.Loader.BCC)


def _load(loader: bpf.Loader) -> Facts:
    bpffs = Path(f"/sys/fs/bpf/trial-{loader.value}")
    bpf.ensure_bpffs(bpffs)
    try:
        report = bpf.load(bpffs, loader=loader)
        with bpf.KernelState(report) as state:
            programs = {name: program.verified_instructions for name, program in state.programs.items()}
    finally:
        bpf.remove(bpffs, None)
    return {
        "programs": programs,
        "symbols": dict(report.programs),
        "refused": dict(report.refused),
        "seconds": report.seconds,
        "peak_kib": report.peak_kib,
    }


class _StatisticsUnit(bpf_loader.LibbpfUnit):
    """Has the verifier write its statistics about what it accepts, too."""

    def _open(self) -> int:
        opened = super()._open()
        set_level = self._libbpf.bpf_program__set_log_level
        set_level.argtypes = (ctypes.c_void_p, ctypes.c_uint)
        for program in self._each("program", opened):
            set_level(program, _LOG_STATS)
        return opened

    def instructions(self, symbol: str) -> int:
        """How many it walked for this program."""
        os.close(self.load(symbol))
        found = re.findall(rb"processed ([0-9]+) insns", self._log[: self._log.find(b"\0")])
        return int(found[-1])


def vectors(report: Report) -> Facts:
    """The tests of the programs by BPF_PROG_TEST_RUN and on lo, but for the fuzzing."""
    return _pytest(report, *VECTORS, "-k", "libbpf")


def lab(report: Report) -> Facts:
    """The main job in namespaces, with the small internet."""
    os.environ |= {"LAB_INTERNET": "small", "LAB_HOST": "initial"}
    return _pytest(report, *LAB)


# hypothesis takes seconds to import and has nothing to do here.
_PYTEST = ("-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "--tb=short", "-W", "default")


def collect() -> None:
    """Have pytest keep what it makes of the tests, where the image is made: to do that emulated takes long."""
    assert pytest.main([*_PYTEST, "--collect-only", *VECTORS, *LAB]) == pytest.ExitCode.OK


def _pytest(report: Report, *arguments: str) -> Facts:
    """Tests that fail are told one by one, and are no failure of the step; to run none of them is."""
    teller = _Teller(report)
    code = pytest.main([*_PYTEST, *arguments], plugins=[teller])
    assert code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED), f"pytest ended with {code!r}"
    return {"tests": teller.count}


class _Teller:
    """Of pytest: one record for each test, when it is over."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self.count = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
        sections = "".join(f"\n[{title}]\n{text[-_LONGEST_DETAIL:]}" for title, text in report.sections)
        record = {
            "test": report.nodeid.removeprefix("tests/"),
            "result": {"passed": "ok"}.get(report.outcome, report.outcome),
            "detail": (reason + sections if report.failed else reason)[-2 * _LONGEST_DETAIL :],
            "seconds": round(report.duration, 2),
        }
        self.count += 1
        self._report.tell(record)


STEPS: dict[str, Callable[[Report], Facts]] = {
    step.__name__: step for step in (doctor, refused, memlock, libbpf, bcc, vectors, lab)
}


def main() -> None:
    """Do the steps; one that fails does not keep the others from being done."""
    (parameter,) = (word for word in Path("/proc/cmdline").read_text().split() if word.startswith("vm.steps="))
    report = Report(Path(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))  # maps, before 5.11
    booted = round(time.clock_gettime(time.CLOCK_BOOTTIME), 1)
    report.tell({"step": "boot", "result": "ok", "detail": "", "seconds": booted,
                 "facts": {"release": platform.release()}})  # fmt: skip
    for name in parameter.removeprefix("vm.steps=").split(","):
        started = time.monotonic()
        record: Facts = {"step": name, "result": "ok", "detail": "", "facts": {}}
        try:
            record["facts"] = STEPS[name](report)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the step's result
            traceback.print_exc()
            record |= {"result": "failed", "detail": f"{type(error).__name__}: {error}"[-_LONGEST_DETAIL:]}
        report.tell(record | {"seconds": round(time.monotonic() - started, 1)})


if __name__ == "__main__":
    main()
