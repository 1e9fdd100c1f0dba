"""Copy installed Python packages into a directory, as pip recorded them: no network, and the versions that were tested.

python tools/bundle.py DIRECTORY NAME ...
"""

from __future__ import annotations

import shutil
import sys
from importlib.metadata import distribution
from pathlib import Path


def bundle(directory: Path, name: str) -> None:
    """The package `name` without its commands and compiled files."""
    for file in distribution(name).files or ():
        if file.parts[0] == ".." or file.suffix == ".pyc" or file.name in ("RECORD", "INSTALLER", "direct_url.json"):
            continue
        copy = directory / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(str(file.locate()), copy)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        bundle(Path(sys.argv[1]), name)
