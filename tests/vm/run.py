"""One kernel from its packages to its verdict."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.vm import archive, image, machine
from tests.vm.kernels import Kernel
from tests.vm.verdict import Verdict, judge, steps_of

_TOOLS = ("cpio", "debootstrap", "depmod", "mksquashfs", "qemu-system-x86_64", "unsquashfs", "zstd")
_DEADLINE_SECONDS = 540
_ATTEMPTS = 3


def unable() -> str:
    """Why no kernel can be booted here; empty if they can."""
    if os.geteuid() != 0:
        return "needs root"
    if os.uname().machine != "x86_64":
        return f"the kernels are for x86_64, not {os.uname().machine}"
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"booting kernels needs {', '.join(missing)}: make setup"
    return ""


@contextlib.contextmanager
def layers() -> Iterator[tuple[Path, Path]]:
    """The base and the checkout, as the layers of any number of guests."""
    with tempfile.TemporaryDirectory(prefix="registry-enforcer-vm-") as directory:
        checkout = Path(directory, "checkout.squashfs")
        base = image.base()
        image.checkout(checkout, base)
        yield base, checkout


def run(kernel: Kernel, base: Path, checkout: Path) -> tuple[Verdict, str]:
    """The verdict, and the end of the console. Raises FetchError if the kernel cannot be had."""
    fetched = archive.fetch(kernel)
    notes = [fetched.note] if fetched.note else []
    # Once in sixty times an emulated machine stood still before its kernel had said a word.
    for attempt in range(1, _ATTEMPTS + 1):
        ran = machine.boot(
            image.boot_files(fetched), base, checkout,
            parameters=(*kernel.parameters, f"vm.steps={','.join(steps_of(kernel))}"),
            deadline_seconds=_DEADLINE_SECONDS,
        )  # fmt: skip
        if ran.records or ran.ended or ran.console:
            break
        notes.append(f"attempt {attempt} of {_ATTEMPTS} did not boot")
    return judge(kernel, ran.records, ended=ran.ended, seconds=ran.seconds, note="; ".join(notes)), ran.console
