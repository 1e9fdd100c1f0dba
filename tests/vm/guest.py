"""Inside the guest: what this kernel takes and does, one JSON line for each step.

python -m tests.vm.guest REPORT    steps come from vm.steps= on the kernel's command line
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.lab.enforcer import COMMAND

Facts = dict[str, Any]


def doctor() -> Facts:
    """What `doctor` finds."""
    done = subprocess.run([COMMAND, "doctor", "--json"], check=False, capture_output=True, text=True)
    assert done.stderr == "", done.stderr
    return {"exit_code": done.returncode, **json.loads(done.stdout)}


STEPS: dict[str, Callable[[], Facts]] = {"doctor": doctor}


def main() -> None:
    """Do the steps; a step that fails does not keep the others from being done."""
    (parameter,) = (word for word in Path("/proc/cmdline").read_text().split() if word.startswith("vm.steps="))
    with Path(sys.argv[1]).open("w") as report:

        def tell(record: Facts) -> None:
            report.write(json.dumps(record) + "\n")
            report.flush()

        tell({"step": "boot", "result": "ok", "seconds": time.clock_gettime(time.CLOCK_BOOTTIME),
              "facts": {"release": platform.release()}})  # fmt: skip
        for name in parameter.removeprefix("vm.steps=").split(","):
            started = time.monotonic()
            record: Facts = {"step": name, "result": "ok", "detail": "", "facts": {}}
            try:
                record["facts"] = STEPS[name]()
            except Exception as error:  # noqa: BLE001 - whatever it is, it is the step's result
                traceback.print_exc()
                record |= {"result": "failed", "detail": f"{type(error).__name__}: {error}"[:2000]}
            tell(record | {"seconds": round(time.monotonic() - started, 1)})


if __name__ == "__main__":
    main()
