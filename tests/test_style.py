"""The linters, as tests like any other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GENERATED = {"bpf/shared.h"}  # compared byte for byte with what renders it, in test_kernel_abi


def tracked(*patterns: str) -> list[str]:
    """Files of the checkout that match, new ones that git does not ignore included."""
    listing = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return [name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]


def run(*command: str) -> None:
    """Fail with the linter's own words."""
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if finished.returncode:
        pytest.fail(f"{' '.join(command[:6])}:\n{finished.stdout}{finished.stderr}", pytrace=False)


def tool(name: str) -> str:
    """Path of an OS tool, or skip."""
    return shutil.which(name) or pytest.skip(f"{name} is not installed: make setup")


def test_ruff_finds_nothing() -> None:
    run(sys.executable, "-m", "ruff", "check", "--no-cache", ".")


def test_python_is_formatted() -> None:
    run(sys.executable, "-m", "ruff", "format", "--no-cache", "--check", "--diff", ".")


def test_types_are_strict_and_consistent() -> None:
    run(sys.executable, "-m", "mypy", f"--cache-dir={os.devnull}")  # the checkout may not be writable


def test_shell_scripts_pass_shellcheck() -> None:
    run(tool("shellcheck"), *tracked("*.sh", ".ci/run", "packaging/debian/p*"))


def test_bpf_sources_are_formatted() -> None:
    sources = [name for name in tracked("bpf/*.c", "bpf/*.h") if name not in GENERATED]
    run(tool("clang-format"), "--dry-run", "--Werror", *sources)
