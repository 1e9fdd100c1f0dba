"""One kernel in qemu, without KVM: booted, asked, ended within a deadline."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.vm.image import Boot

_MEMORY = "1536M"
_BOOT_SECONDS = 90
_CONSOLE_SHOWN = 6_000  # characters of its end


@dataclass(frozen=True, slots=True)
class Ran:
    """What became of one boot."""

    records: tuple[dict[str, Any], ...]  # what the guest has reported, in order
    console: str
    seconds: float
    ended: bool  # False: the deadline ended it


def boot(kernel: Boot, base: Path, checkout: Path, *, parameters: Sequence[str], deadline_seconds: float) -> Ran:
    """Boot, wait for the guest to end, and read its report.

    One that reports nothing in its first 90 s, of which it needs ten, is ended then.
    """
    with tempfile.TemporaryDirectory(prefix="registry-enforcer-vm-") as directory:
        console, report = Path(directory, "console"), Path(directory, "report")
        for file in console, report:
            file.touch()
        drives = [
            word
            for image in (base, kernel.modules, checkout)
            for word in ("-drive", f"file={image},if=virtio,format=raw,readonly=on")
        ]
        command_line = [
            # None of the mitigations is what is tested.
            "console=ttyS0", "loglevel=4", "panic=-1", "reboot=t", "random.trust_cpu=on", "mitigations=off",
            *parameters,
        ]  # fmt: skip
        started = time.monotonic()
        qemu = subprocess.Popen(
            [
                "setpriv", "--pdeathsig", "KILL", # no guest outlives who started it
                "qemu-system-x86_64", "-nodefaults", "-display", "none", "-no-reboot", "-net", "none",
                "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", _MEMORY,
                "-kernel", str(kernel.vmlinuz), "-initrd", str(kernel.initramfs), "-append", " ".join(command_line),
                # 5.4-kvm has no other source of random numbers: getrandom(2) waits for minutes, at times for ever.
                "-object", "rng-builtin,id=random", "-device", "virtio-rng-pci,rng=random",
                "-serial", f"file:{console}", "-serial", f"file:{report}", *drives,
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        ended = True
        try:
            try:
                said, _ = qemu.communicate(timeout=_BOOT_SECONDS)
            except subprocess.TimeoutExpired:
                if not report.stat().st_size:
                    raise
                said, _ = qemu.communicate(timeout=deadline_seconds - _BOOT_SECONDS)
        except subprocess.TimeoutExpired:
            ended = False
        finally:
            if qemu.poll() is None:
                qemu.kill()
                said, _ = qemu.communicate()
        seconds = time.monotonic() - started
        text = said + console.read_text(errors="replace")
        return Ran(tuple(_records(report.read_text(errors="replace"))), text[-_CONSOLE_SHOWN:], seconds, ended)


def _records(report: str) -> list[dict[str, Any]]:
    """Every whole line: the last one may be cut off where the guest was ended."""
    lines = report.split("\n")[:-1]
    return [json.loads(line) for line in lines if line.strip()]
