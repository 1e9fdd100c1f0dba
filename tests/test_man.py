"""The manual pages say all that can be typed, and read well in both formatters."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from enforcer import cli, completion, policy

MAN = Path(__file__).parent.parent / "man"
PROGRAM, POLICY = MAN / "registry-enforcer.8", MAN / "registry-enforcer-policy.5"
PAGES = pytest.mark.parametrize("page", [PROGRAM, POLICY], ids=lambda page: page.name)


@pytest.mark.parametrize("command", cli._completable(), ids=lambda command: command.name)
def test_every_command_and_option_is_in_the_manual(command: completion.Command) -> None:
    text = PROGRAM.read_text()
    (entry,) = re.findall(rf"^\.It Ic {command.name}\b(.*?)(?=^\.It Ic|^\.Sh )", text, re.MULTILINE | re.DOTALL)
    for argument in command.options:
        option = max(argument.options, key=len).removeprefix("--")
        if option not in ("help", "run-dir"):  # said once, of every command
            assert f"Fl Fl {option}" in entry
    for argument in command.places:
        for choice in argument.choices:
            assert re.search(rf"\b{choice}\b", entry)
    assert len(re.findall(r"Fl Fl run-dir", text)) == 1


def test_every_key_of_the_policy_is_in_the_manual() -> None:
    text = POLICY.read_text()
    source = inspect.getsource(policy)
    nested = re.findall(r'_table\(value, ((?:"\w+"(?:, )?)+)', source)
    keys = {*policy._TOP_KEYS, *re.findall(r'"(\w+)"', " ".join(nested))}
    assert {"message", "ca", "certificate", "trusted", "hosts", "engines", "file"} <= keys  # that it reads them still
    tables = {"scope", "resolvers", "refusal", "audit", "mark", "limits"}
    for key in keys - {"registry", "destination", "preset", "proxy"} - tables:
        assert f"Ic {key}" in text, key
    arrays = "[[registry]]", "[[destination]]", "[[proxy]]", "[[preset]]"
    for table in (*(f"[{table}]" for table in tables), *arrays):
        assert f".Ss {table}" in text
    for values in (policy.Mode, policy.Level, policy.Verify, policy.DnsOverTls):
        for value in values:
            assert re.search(rf"Cm (?:\w+ \| )?{value.value}\b", text), value
    for name in policy.preset_names():
        assert f".It Cm {name}" in text
        for parameter in policy.load_preset(name).parameters:
            assert f".Ic {parameter.name}" in text
    for placeholder in policy.REFUSAL_PLACEHOLDERS:
        assert f"{{{placeholder}}}" in text


def test_example_of_the_manual_is_a_right_policy() -> None:
    (example,) = re.findall(r"^\.Bd -literal\n(.*?)^\.Ed", POLICY.read_text(), re.MULTILINE | re.DOTALL)
    assert len(policy.parse(example, "manual").rules) == 6


@PAGES
def test_groff_has_no_warning(page: Path) -> None:
    if shutil.which("man") is None:
        pytest.skip("man is not installed: make setup")
    done = subprocess.run(
        ["man", "--warnings", "--encoding=UTF-8", "--local-file", str(page)],
        env={"PATH": "/usr/bin:/bin", "MANWIDTH": "80", "LC_ALL": "C.UTF-8"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "registry-enforcer" in done.stdout


@PAGES
def test_mandoc_finds_nothing(page: Path) -> None:
    if shutil.which("mandoc") is None:
        pytest.skip("mandoc is not installed: make setup")
    done = subprocess.run(["mandoc", "-T", "lint", str(page)], capture_output=True, text=True, check=False)
    # Whether the other page is installed is not the matter.
    lines = [line for line in done.stdout.splitlines() if "referenced manual not found" not in line]
    assert lines == []
