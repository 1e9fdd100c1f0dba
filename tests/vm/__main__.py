"""Boot every kernel, or those that are named, and print what became of each (`make kernels`)."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.vm.archive import FetchError
from tests.vm.image import ROOT
from tests.vm.kernels import KERNELS, Kernel
from tests.vm.run import layers, run, unable
from tests.vm.verdict import Verdict, judge, steps_of

# On the terminal; all of them are in the report.
_SURPRISES, _SHOWN = 8, 400
_REPORT = ROOT / "build" / "kernels.json"


def _verdict(kernel: Kernel, base: Path, checkout: Path) -> Verdict:
    """What `run` says, told at once with what surprised; a kernel that cannot be had is a verdict too."""
    try:
        verdict, console = run(kernel, base, checkout)
    except FetchError as error:
        verdict, console = judge(kernel, (), ended=True, seconds=0.0), ""
        verdict = dataclasses.replace(verdict, surprises=(f"not fetched: {error}",))
    lines = [
        verdict.row(),
        *(f"    {' '.join(surprise.split())[-_SHOWN:]}" for surprise in verdict.surprises[:_SURPRISES]),
    ]
    lines += [f"    {verdict.note}"] if verdict.note else []
    lines += [f"    | {line}" for line in console.splitlines()[-20:]] if verdict.surprises else []
    print("\n".join(lines), flush=True)
    return verdict


def main(names: list[str]) -> int:
    """Exit code 0 if every kernel is as expected, 1 if not, 2 if none could be tried."""
    if why_not := unable():
        print(f"kernels: {why_not}", file=sys.stderr)
        return 2
    if unknown := set(names) - {kernel.name for kernel in KERNELS}:
        print(f"kernels: no {', '.join(sorted(unknown))}: there are {', '.join(k.name for k in KERNELS)}",
              file=sys.stderr)  # fmt: skip
        return 2
    chosen = [kernel for kernel in KERNELS if not names or kernel.name in names]
    started = time.monotonic()
    with layers() as (base, checkout), ThreadPoolExecutor(max(1, min(4, (os.cpu_count() or 1)))) as pool:
        # What takes longest comes first: at the end no processor is left without a guest.
        order = sorted(chosen, key=lambda kernel: len(steps_of(kernel)), reverse=True)
        running = {kernel.name: pool.submit(_verdict, kernel, base, checkout) for kernel in order}
        verdicts = [running[kernel.name].result() for kernel in chosen]
    _REPORT.parent.mkdir(exist_ok=True)
    _REPORT.write_text(json.dumps([dataclasses.asdict(verdict) for verdict in verdicts], indent=2) + "\n")
    print()
    for verdict in verdicts:
        print(verdict.row())
    # The guests are emulated: on a machine that does something else as well, only the second number is theirs.
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"total {(time.monotonic() - started) / 60:.1f} min for {len(verdicts)} kernels, "
        f"{(used.ru_utime + used.ru_stime) / 60:.1f} min of processor time; all of it in {_REPORT.relative_to(ROOT)}"
    )
    return int(any(verdict.surprises for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
