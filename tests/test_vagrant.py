"""vagrant/: what can be said about boxes without starting one, and the script that they and the guests of CI run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
VAGRANTFILE = ROOT / "vagrant/Vagrantfile"

FAKE_MAKE = """#!/bin/sh
echo "make $*" >>"$SANDBOX/called"
[ ! -e "$SANDBOX/fails-$1" ]
"""
FAKE_USERSPACE = """#!/bin/sh
shift
echo "$*" >>"$SANDBOX/called"
case $* in *doctor) exit "$(cat "$SANDBOX/doctor" 2>/dev/null || echo 0)" ;; *) exec "$@" ;; esac
"""


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


# --- Vagrantfile -----------------------------------------------------------------------------------------------------
def validate(directory: Path, home: Path) -> subprocess.CompletedProcess[str]:
    """`vagrant validate`, which asks no network and, told so, no provider."""
    if not shutil.which("vagrant"):
        pytest.skip("vagrant is not installed: make setup")
    environment = {
        "VAGRANT_HOME": f"{home}/home",
        "VAGRANT_DOTFILE_PATH": f"{home}/dot",
        "VAGRANT_CHECKPOINT_DISABLE": "1",
    }
    return subprocess.run(
        ["vagrant", "validate", "--ignore-provider"],
        cwd=directory,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_vagrantfile_is_ruby() -> None:
    if not shutil.which("ruby"):
        pytest.skip("ruby is not installed: make setup")
    finished = subprocess.run(["ruby", "-wc", VAGRANTFILE], capture_output=True, text=True, check=False)
    assert (finished.stdout, finished.stderr) == ("Syntax OK\n", "")


def test_vagrant_accepts_the_vagrantfile(tmp_path: Path) -> None:
    finished = validate(VAGRANTFILE.parent, tmp_path)
    assert "validated successfully" in finished.stdout, finished.stderr


def test_vagrant_refuses_what_is_no_setting(tmp_path: Path) -> None:
    text = VAGRANTFILE.read_text()
    (tmp_path / "Vagrantfile").write_text(text.replace("config.vm.synced_folder", "config.machine.synced_folder"))
    finished = validate(tmp_path, tmp_path)
    assert finished.returncode == 1
    assert "Unknown configuration section" in finished.stdout + finished.stderr


def boxes() -> list[tuple[str, str, str]]:
    """(name, box, why), as the Vagrantfile has them."""
    return re.findall(r'^  \["(.*)", "(.*)", "(.*)"\],$', VAGRANTFILE.read_text(), re.MULTILINE)


def test_every_box_is_documented_as_it_is() -> None:
    documented = re.findall(
        r"^\| `(.*)` \| `(.*)` \| (.*) \|$", (VAGRANTFILE.parent / "README.md").read_text(), re.MULTILINE
    )
    assert documented == boxes()


def test_boxes_have_the_kernels_that_were_promised() -> None:
    assert {name for name, _, _ in boxes()} >= {"focal", "jammy", "noble", "bookworm", "fedora"}
    assert [kernel for _, _, why in boxes() for kernel in re.findall(r"Linux [\d.]+", why)] == [
        *("Linux 5.4", "Linux 5.15", "Linux 6.8", "Linux 6.1")
    ]


# --- provision.sh ----------------------------------------------------------------------------------------------------
class Machine:
    """A checkout with the script alone, and stand-ins for make and the program."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "vagrant").mkdir()
        shutil.copy(ROOT / "vagrant/provision.sh", path / "vagrant")
        executable(path / "tools/userspace.sh", FAKE_USERSPACE)
        executable(path / "bin/make", FAKE_MAKE)

    def provision(self, *arguments: str) -> tuple[int, str, list[str]]:
        """(exit status, last line, what was called)"""
        environment = os.environ | {
            "PATH": f"{self.path}/bin:{os.environ['PATH']}",
            "SANDBOX": str(self.path),
            "PYTEST_ARGS": "-k dns",
        }
        finished = subprocess.run(
            [self.path / "vagrant/provision.sh", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        called = self.path / "called"
        lines = called.read_text().splitlines() if called.exists() else []
        return finished.returncode, (finished.stdout + finished.stderr).splitlines()[-1], lines


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


DOCTOR = ".venv/bin/registry-enforcer doctor"


@pytest.mark.root
def test_box_is_set_up_then_asked_then_tested_and_the_last_line_says_so(machine: Machine) -> None:
    status, verdict, called = machine.provision("demo", "test")
    assert called == ["make setup", DOCTOR, "make demo PYTEST_ARGS=-k dns", "make test PYTEST_ARGS=-k dns"]
    assert status == 0
    assert re.fullmatch(
        rf"provision: ok on .*, Linux {re.escape(os.uname().release)}: make and git ok in \d+ s, set-up ok in \d+ s, "
        r"doctor ok in \d+ s, demo ok in \d+ s, test ok in \d+ s",
        verdict,
    )


@pytest.mark.root
def test_guest_without_network_is_asked_and_tested_only(machine: Machine) -> None:
    status, _, called = machine.provision("--no-setup", "test", "--", "sh", "-c", "exit 0")
    assert called == [DOCTOR, "make --assume-old=setup test PYTEST_ARGS=-k dns", "sh -c exit 0"]
    assert status == 0


@pytest.mark.root
def test_command_that_asks_doctor_itself_is_all_that_is_run(machine: Machine) -> None:
    status, _, called = machine.provision("--no-setup", "--no-doctor", "--", "sh", "-c", "exit 0")
    assert called == ["sh -c exit 0"]
    assert status == 0


@pytest.mark.root
def test_what_failed_is_named_and_the_rest_still_runs(machine: Machine) -> None:
    (machine.path / "fails-demo").touch()
    (machine.path / "doctor").write_text("1")
    status, verdict, called = machine.provision("demo", "test", "--", "sh", "-c", "exit 7")
    assert status == 1
    assert called[-1] == "sh -c exit 7"
    assert verdict.startswith("provision: FAILED on ")
    for words in (r"doctor FAILED \(1\)", r"demo FAILED \(1\)", r"test ok", r"sh -c exit 7 FAILED \(7\)"):
        assert re.search(words, verdict), verdict


@pytest.mark.root
def test_without_set_up_nothing_else_is_tried(machine: Machine) -> None:
    (machine.path / "fails-setup").touch()
    status, verdict, called = machine.provision("test")
    assert status == 1
    assert called == ["make setup"]
    assert "set-up FAILED" in verdict


@pytest.mark.root
def test_unknown_word_is_a_usage_error(machine: Machine) -> None:
    status, said, called = machine.provision("tests")
    assert status == 2
    assert "usage" in said
    assert called == []
