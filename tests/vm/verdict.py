"""What a guest reported, against what is expected of its kernel; pure, so that it is tested without a kernel."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests import dns_vectors
from tests.vm.kernels import Kernel

# The verifier stops at 1,000,000; what a program takes differs from kernel to kernel, so half is left free.
MOST_VERIFIED = 500_000
_LOADERS = ("libbpf", "bcc")
_VECTOR_TEST = "kernel/test_learn.py::test_vector_teaches_what_it_says["


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one kernel."""

    kernel: str
    release: str
    programs: dict[str, int]  # what loaded by libbpf -> how many instructions the verifier walked
    missing: tuple[str, ...]  # programs, nft features and steps that are known to be missing, and are
    refusals: dict[str, str]  # C function -> the verifier's last lines, of those that did not load by libbpf
    tests_ok: int
    tests_failing: int  # as expected
    steps: dict[str, float]  # name -> seconds
    surprises: tuple[str, ...]  # none: as expected
    note: str
    seconds: float

    def row(self) -> str:
        """One line of the table."""
        outcome = "FAIL" if self.surprises else "pass"
        loaded = f"{len(self.programs)} programs, most verified {max(self.programs.values())}" if self.programs else "-"
        return (
            f"{self.kernel:<10}{outcome:<6}{self.seconds:>5.0f} s  {self.tests_ok:>4} ok {self.tests_failing:>3} known"
            f"  {loaded:<40}{'without ' + ', '.join(self.missing) if self.missing else ''}"
        )


def steps_of(kernel: Kernel) -> tuple[str, ...]:
    """What the guest is to do."""
    wanted = {
        "doctor": True,
        "memlock": kernel.expected.memlock,
        "libbpf": True,
        "bcc": kernel.in_ci,  # compiling takes long; what it compiles is the same everywhere
        "vectors": True,
        "lab": True,
        "refused": kernel.expected.refused is not None,
    }
    return tuple(name for name, is_wanted in wanted.items() if is_wanted and name not in kernel.expected.skipped)


def judge(kernel: Kernel, records: Sequence[dict[str, Any]], *, ended: bool, seconds: float, note: str = "") -> Verdict:
    """Every way in which the report differs from the expectation is a surprise."""
    expected = kernel.expected
    steps = {record["step"]: record for record in records if "step" in record}
    tests = {record["test"]: record for record in records if "test" in record}
    surprises = []
    if "boot" not in steps:
        surprises.append("it did not boot into the guest")
    if not ended:
        surprises.append("it did not end before the deadline")
    surprises += [f"{name}: no result" for name in steps_of(kernel) if "boot" in steps and name not in steps]
    surprises += _unexpected(expected.failing, steps | tests)
    for loader in _LOADERS:
        if steps.get(loader, {}).get("result") == "ok":
            facts = steps[loader]["facts"]
            refused = {symbol.removesuffix("_pidns").removesuffix("_netns") for symbol in facts["refused"]} - facts[
                "programs"
            ].keys()
            surprises += _difference(f"program not loaded by {loader}", refused, set(expected.programs_missing))
            surprises += [
                f"{name} by {loader}: {count} instructions verified"
                for name, count in facts["programs"].items()
                if count > MOST_VERIFIED
            ]
    lacking = _lacking(steps.get("doctor", {}))
    if lacking is not None:
        surprises += _difference("nftables feature missing", lacking, set(expected.nft_missing))
    said = steps.get("refused", {}).get("facts", {}).get("said", "")
    if expected.refused is not None and not re.search(expected.refused, said):
        surprises.append(f"run says {said!r}, and not {expected.refused!r}")
    if "vectors" in steps:
        through = sum(name.startswith(_VECTOR_TEST) for name in tests)
        wanted = 2 * len(dns_vectors.load())
        if through != wanted:
            surprises.append(f"{through} DNS vectors went through BPF, not {wanted}")
    failing = sum(test["result"] != "ok" for test in tests.values())
    libbpf = steps.get("libbpf", {}).get("facts", {})
    return Verdict(
        kernel=kernel.name,
        release=steps.get("boot", {}).get("facts", {}).get("release", ""),
        programs=dict(libbpf.get("programs", {})),
        missing=(
            *expected.programs_missing,
            *expected.nft_missing,
            *(f"{step}: {why}" for step, why in expected.skipped.items()),
        ),
        refusals=dict(libbpf.get("refused", {})),
        tests_ok=len(tests) - failing,
        tests_failing=failing,
        steps={name: record["seconds"] for name, record in steps.items()},
        surprises=tuple(surprises),
        note=note,
        seconds=round(seconds, 1),
    )


def _unexpected(failing: Any, results: dict[str, dict[str, Any]]) -> list[str]:
    """Steps and tests that fail without being expected to, and expectations that nothing bears out any more."""
    surprises = []
    for name, record in results.items():
        known = any(fnmatch.fnmatchcase(name, _literal(pattern)) for pattern in failing)
        if record["result"] != "ok" and not known:
            surprises.append(f"{name} {record['result']}: {record['detail'].strip()}")
        if record["result"] == "ok" and known:
            surprises.append(f"{name} is expected to fail, and does not: take it out of tests/vm/kernels.py")
    unmet = (p for p in failing if not any(fnmatch.fnmatchcase(name, _literal(p)) for name in results))
    return [*surprises, *(f"{pattern} is expected to fail, and was not run" for pattern in unmet)]


def _literal(pattern: str) -> str:
    """Only * is special: the brackets of a test's name are its own."""
    return pattern.replace("[", "[[]")


def _difference(what: str, found: set[str], expected: set[str]) -> list[str]:
    return [
        *(f"{what}: {name}" for name in sorted(found - expected)),
        *(f"not so any more: {what}: {name}" for name in sorted(expected - found)),
    ]


def _lacking(doctor: dict[str, Any]) -> set[str] | None:
    """nftables features that doctor does not find; None if doctor was not heard."""
    if doctor.get("result") != "ok":
        return None
    findings = doctor["facts"]["findings"]
    return {
        finding["subject"].removeprefix("nftables ")
        for finding in findings
        if finding["subject"].startswith("nftables ") and finding["state"] != "ok"
    }
