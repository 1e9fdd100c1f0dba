"""Runs libFuzzer (atheris) over the targets: `make fuzz`, or python -m tests.fuzz --minutes 5 --target dns_message.

Each target in a process of its own. What leads deeper is kept in build/fuzz/TARGET/ for the next run; a finding is
named with how to see it again, and belongs into tests/fuzz/corpus/TARGET together with what mends it.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent.parent
WORK = ROOT / "build" / "fuzz"
MAX_BYTES = 4_096
INPUT_SECONDS = 10  # for one input, under instrumentation
MEMORY_MIB = 1_024
_FOUND = re.compile(r"Test unit written to (\S+)")
_WORD = re.compile(rb"[A-Za-z0-9._*-]{3,40}")  # of the seeds, for libFuzzer to put together anew
_RUNS = re.compile(r"stat::number_of_executed_units:\s*(\d+)")


def fuzz(atheris: ModuleType, name: str, target: Callable[[bytes], None], seconds: int, work: Path) -> bool:
    """Run one target and say what came of it; whether nothing did."""
    from tests.fuzz.targets import seeds

    grown, seeded, log = work / name / "corpus", work / name / "seeds", work / name / "log"
    for directory in grown, seeded:
        directory.mkdir(parents=True, exist_ok=True)
    for source, data in seeds(name):
        (seeded / source).write_bytes(data)
    limits = f"-max_total_time={seconds}", f"-max_len={MAX_BYTES}", f"-timeout={INPUT_SECONDS}"
    memory = f"-rss_limit_mb={MEMORY_MIB}", "-print_final_stats=1", f"-artifact_prefix={work / name}/"
    words = sorted({word for _, data in seeds(name) for word in _WORD.findall(data)})
    (work / name / "words").write_text("".join(f'"{word.decode()}"\n' for word in words))
    sys.stdout.flush()
    child = os.fork()  # what is instrumented already need not be so again
    if child == 0:
        with log.open("wb") as file:
            for descriptor in 1, 2:
                os.dup2(file.fileno(), descriptor)
        atheris.Setup([sys.argv[0], *limits, *memory, f"-dict={work / name}/words", str(grown), str(seeded)], target)
        atheris.Fuzz()
        os._exit(1)  # it never returns
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = log.read_text(errors="replace")
    runs = int(found[1]) if (found := _RUNS.search(said)) else 0
    print(f"{name}: {runs} runs in {seconds} s, {len(list(grown.iterdir()))} inputs kept", end="")
    if status == 0 and runs:
        print(", nothing found")
        return True
    artifact = _FOUND.search(said)
    print(f", FOUND; see it again: .venv/bin/python -m tests.fuzz --replay {name} {artifact[1] if artifact else ''}")
    print("\n".join(said.splitlines()[-40:]))
    return False


def main() -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(prog="make fuzz", description="Fuzz the parsers of the daemon.")
    parser.add_argument("--minutes", type=float, default=0.25, help="for each target; default 0.25")
    parser.add_argument("--target", help="one of them; default: all, one after the other")
    parser.add_argument("--work", type=Path, default=WORK, metavar="DIR", help="where inputs are kept for the next run")
    parser.add_argument("--replay", nargs=2, metavar=("TARGET", "FILE"), help="run one input, with its traceback")
    arguments = parser.parse_args()
    if arguments.replay:
        from tests.fuzz.targets import TARGETS

        target, path = arguments.replay
        TARGETS[target](Path(path).read_bytes())
        return 0
    try:
        import atheris
    except ImportError:
        print("fuzz: there is no atheris for this Python and machine; the tests run hypothesis over the targets still")
        return 2
    with atheris.instrument_imports(include=["enforcer", "dns", "json", "tomllib", "tests.fuzz.targets"]):
        from tests.fuzz.targets import TARGETS
    names = [arguments.target] if arguments.target else list(TARGETS)
    if not TARGETS.keys() >= set(names):
        print(f"fuzz: no target {arguments.target}; write one of {', '.join(TARGETS)}")
        return 2
    seconds = max(1, round(arguments.minutes * 60))
    passed = [fuzz(atheris, name, TARGETS[name], seconds, arguments.work.absolute()) for name in names]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
