"""The catalogue of attacks itself: nothing is in between "refused" and "out of scope"."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.attacks import OUT_OF_SCOPE, THREAT_MODEL, sections

TESTS = Path(__file__).parent

A_REFUSED_ONE = """
import pytest

@pytest.mark.attack("what is refused")
def test_refused() -> None:
    assert True

@pytest.mark.attack("what gets through")
def test_gets_through() -> None:
    assert {holds}
"""


def markers() -> Iterator[tuple[Path, ast.Call]]:
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.attack":
                yield path, node


def test_attack_is_named_in_words() -> None:
    found = list(markers())
    assert found
    for path, call in found:
        assert len(call.args) == 1, f"{path}:{call.lineno}"
        if isinstance(call.args[0], ast.Constant):
            words = str(call.args[0].value)
            assert words == words.strip(), f"{path}:{call.lineno}: {words!r}"
            assert 3 <= len(words) <= 120, f"{path}:{call.lineno}: {words!r}"


def test_what_is_out_of_scope_has_its_section() -> None:
    missing = {section for section in OUT_OF_SCOPE.values() if section not in sections()}
    assert not missing, f"{THREAT_MODEL.name} has no section {missing}"


def run_catalogue(directory: Path, holds: bool) -> subprocess.CompletedProcess[str]:
    (directory / "test_two.py").write_text(A_REFUSED_ONE.format(holds=holds))
    program = (
        "import pytest, sys; from tests import attacks; main = pytest.main\n"
        f"pytest.main = lambda arguments, plugins: main(['-q', '-p', 'no:cacheprovider', {str(directory)!r}, "
        "'-o', 'markers=attack(words)'], plugins)\n"
        "sys.exit(attacks.main([]))"
    )
    return subprocess.run(
        [sys.executable, "-c", program], cwd=TESTS.parent, capture_output=True, text=True, check=False, timeout=60
    )


def test_catalogue_says_what_was_not_refused(tmp_path: Path) -> None:
    refused = run_catalogue(tmp_path, holds=True)
    assert refused.returncode == 0, refused.stdout
    assert "refused       what gets through" in refused.stdout
    through = run_catalogue(tmp_path, holds=False)
    assert through.returncode == 1
    assert "NOT REFUSED   what gets through: test_gets_through" in through.stdout
    assert "refused       what is refused" in through.stdout
