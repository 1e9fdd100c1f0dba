"""What set-up, make targets and CI promise: the scripts run with stand-ins for apt, the daemon and make."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DEADLINE_SECONDS = 20

FAKE_DPKG_QUERY = """#!/bin/sh
sed 's/^/installed /' "$SANDBOX/installed"
"""
# Records what it is asked and whether services could start meanwhile; installing fails, so that the script ends there.
FAKE_APT_GET = """#!/bin/bash
echo "$*" >>"$SANDBOX/asked"
[[ $1 != -s ]] || { sed 's/^/Remv /' "$SANDBOX/would_remove"; exit 0; }
[[ -x $POLICY_RC_D ]] && "$POLICY_RC_D"; echo $? >>"$SANDBOX/policy_said"
case " $* " in *" install "*) [[ ! -e $SANDBOX/hang ]] || sleep 60; exit 100 ;; esac
"""


def tracked(*patterns: str) -> list[Path]:
    """Files that git knows or would add."""
    listing = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return [ROOT / name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Sandbox:
    """A checkout with nothing but the scripts, and stand-ins first in PATH."""

    def __init__(self, path: Path) -> None:
        self._started: list[subprocess.Popen[str]] = []
        self.path = path
        self.policy = path / "policy-rc.d"
        shutil.copytree(ROOT / "tools", path / "tools")
        shutil.copy(ROOT / "pyproject.toml", path)
        executable(path / "bin/dpkg-query", FAKE_DPKG_QUERY)
        executable(path / "bin/apt-get", FAKE_APT_GET)
        executable(path / "bin/sleep", "#!/bin/sh\n")  # between attempts
        (path / "installed").write_text("")
        (path / "would_remove").write_text("")
        self.environment = {
            "PATH": f"{path}/bin:{os.environ['PATH']}",
            "SANDBOX": str(path),
            "POLICY_RC_D": str(self.policy),
            "USERSPACE": str(path / "userspace"),
        }

    def start(self, *command: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            ["/usr/bin/env", "--default-signal=INT", *command],  # where the tests run in the background it is ignored
            cwd=self.path,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def end(self) -> None:
        """Whatever is left of what was started."""
        for process in self._started:
            with process, contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def run(self, *command: str) -> tuple[int, str]:
        """(exit status, all that it said)"""
        process = self.start(*command)
        output, _ = process.communicate(timeout=DEADLINE_SECONDS)
        return process.returncode, output

    def asked_to_install(self) -> list[str]:
        """Arguments of the one apt-get install."""
        asked = (self.path / "asked").read_text().splitlines()
        (install,) = [line.split() for line in asked if " install " in line and not line.startswith("-s")]
        return install


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Sandbox]:
    sandbox = Sandbox(tmp_path)
    yield sandbox
    sandbox.end()


# --- tools/setup.sh --------------------------------------------------------------------------------------------------
@pytest.mark.root
def test_only_missing_packages_are_installed(sandbox: Sandbox) -> None:
    (sandbox.path / "installed").write_text("clang\nnftables\n")
    status, output = sandbox.run("tools/setup.sh", "run")
    install = sandbox.asked_to_install()
    assert status == 1
    assert {"--no-install-recommends", "libbpf1", "python3-bpfcc"} <= set(install)
    assert not {"clang", "nftables", "docker.io"} & set(install)
    assert "could not install" in output


@pytest.mark.root
@pytest.mark.parametrize(("installed", "asked"), [("docker-ce", False), ("docker-ce-cli", True)])
def test_engine_of_the_vendor_serves_as_well(sandbox: Sandbox, installed: str, asked: bool) -> None:
    (sandbox.path / "installed").write_text(f"{installed}\n")
    sandbox.run("tools/setup.sh", "all")
    assert ("docker.io" in sandbox.asked_to_install()) == asked


@pytest.mark.root
@pytest.mark.parametrize(("removed", "installs"), [("busybox", True), ("containerd.io", False)])
def test_nothing_is_removed_for_a_package_but_what_it_replaces(sandbox: Sandbox, removed: str, installs: bool) -> None:
    (sandbox.path / "would_remove").write_text(f"{removed} [1.0]\n")
    _, output = sandbox.run("tools/setup.sh", "all")
    assert (f"would remove: {removed}" in output) != installs
    asked = (sandbox.path / "asked").read_text().splitlines()
    assert any(line.startswith("-q") and " install " in line for line in asked) == installs
    assert not sandbox.policy.exists()


@pytest.mark.root
def test_no_service_may_start_while_packages_are_installed_and_may_again_after_a_failure(sandbox: Sandbox) -> None:
    sandbox.run("tools/setup.sh", "run")
    assert set((sandbox.path / "policy_said").read_text().split()) == {"101"}
    assert not sandbox.policy.exists()


@pytest.mark.root
def test_services_may_start_again_after_set_up_was_interrupted(sandbox: Sandbox) -> None:
    (sandbox.path / "hang").touch()
    (sandbox.path / "bin/sleep").unlink()
    process = sandbox.start("tools/setup.sh", "run")
    wait_for(lambda: (sandbox.path / "asked").exists() and " install " in (sandbox.path / "asked").read_text())
    assert sandbox.policy.exists()
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 143
    assert not sandbox.policy.exists()


@pytest.mark.root
def test_policy_of_the_machine_stays_as_it_is(sandbox: Sandbox) -> None:
    theirs = "#!/bin/sh\nexit 104\n"
    executable(sandbox.policy, theirs)
    _, output = sandbox.run("tools/setup.sh", "run")
    assert sandbox.policy.read_text() == theirs
    assert "exists and stays" in output


@pytest.mark.root
@pytest.mark.parametrize(("mode", "asked"), [("all", False), ("booted", True)])
def test_only_what_boots_systems_wants_systemds_container_tools(sandbox: Sandbox, mode: str, asked: bool) -> None:
    sandbox.run("tools/setup.sh", mode)
    assert ("systemd-container" in sandbox.asked_to_install()) == asked


@pytest.mark.parametrize("directory", ["tests/booted", "tests/faults"])
@pytest.mark.parametrize("named", [False, True])
def test_what_takes_minutes_runs_only_where_it_is_named(directory: str, named: bool) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--collect-only",
        "-p",
        "no:cacheprovider",
        *([directory] if named else []),
    ]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (f"{directory}/test_" in done.stdout) == named


@pytest.mark.root
def test_without_root_set_up_names_what_is_missing_and_installs_nothing() -> None:
    with tempfile.TemporaryDirectory() as directory:
        sandbox = Sandbox(Path(directory))
        sandbox.path.chmod(0o777)  # unlike pytest's own directories, open to the user below
        status, output = sandbox.run(
            "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "tools/setup.sh", "run"
        )
        assert status == 1
        assert "as root" in output
        assert "python3-bpfcc" in output
        assert not (sandbox.path / "asked").exists()
        sandbox.end()


def test_without_apt_set_up_names_what_is_needed(sandbox: Sandbox) -> None:
    only(sandbox)
    status, output = sandbox.run("tools/setup.sh", "run")
    assert status == 1
    assert "python3-nftables" in output


def test_unknown_mode_is_a_usage_error(sandbox: Sandbox) -> None:
    status, output = sandbox.run("tools/setup.sh", "everything")
    assert status == 1
    assert "usage" in output


# --- tools/userspace.sh ----------------------------------------------------------------------------------------------
def host_of(sandbox: Sandbox, system: str, python: str | None) -> None:
    """The host is what an os-release of "ID VERSION_ID" and /usr/bin/python3 -V say; None: it has no Python."""
    id, _, version = system.partition(" ")
    (sandbox.path / "os-release").write_text(f'ID={id}\nVERSION_ID="{version}"\nPRETTY_NAME="{system.title()}"\n')
    sandbox.environment["OS_RELEASE"] = str(sandbox.path / "os-release")
    sandbox.environment["SYSTEM_PYTHON"] = str(sandbox.path / "python3")
    if python:
        executable(sandbox.path / "python3", f"#!/bin/sh\necho Python {python}\n")


def only(sandbox: Sandbox, *stand_ins: str) -> None:
    """No programs but these stand-ins and what the scripts themselves are written with."""
    for path in (sandbox.path / "bin").iterdir():
        if path.name not in stand_ins:
            path.unlink()
    written_with = "base64 bash chmod cp dirname flock grep mkdir mktemp mv rm sed sleep tail"
    for name in {*written_with.split()} - {path.name for path in (sandbox.path / "bin").iterdir()}:
        (sandbox.path / "bin" / name).symlink_to(str(shutil.which(name)))
    sandbox.environment["PATH"] = str(sandbox.path / "bin")


@pytest.mark.parametrize(
    ("system", "python", "reason"),
    [
        ("ubuntu 20.04", "3.8.10", "Ubuntu 20.04 has Python 3.8.10, and 3.11 and libbpf 1.0 are needed"),
        ("ubuntu 22.04", "3.10.12", "Ubuntu 22.04 has Python 3.10.12, and 3.11 and libbpf 1.0 are needed"),
        ("linuxmint 21.3", "3.10.12", "Linuxmint 21.3 has Python 3.10.12, and 3.11 and libbpf 1.0 are needed"),
        ("ubuntu 20.04", None, "Ubuntu 20.04 has neither Python 3.11 nor libbpf 1.0"),
        ("debian 11", None, "Debian 11 has neither Python 3.11 nor libbpf 1.0"),
        ("ubuntu 24.04", "3.12.3", ""),
        ("ubuntu 24.04", None, ""),
        ("debian 12", "3.11.2", ""),
        ("debian 12", None, ""),
        ("debian", None, ""),  # testing
        ("debian 13", "3.13.5", ""),
    ],
)
def test_old_python_is_why_another_user_space_is_needed(
    sandbox: Sandbox, system: str, python: str | None, reason: str
) -> None:
    host_of(sandbox, system, python)
    status, output = sandbox.run("tools/userspace.sh", "why")
    assert output.strip() == reason
    assert (status == 0) == bool(reason)


def test_host_without_apt_needs_another_user_space_whatever_its_python(sandbox: Sandbox) -> None:
    host_of(sandbox, "fedora 42", "3.13.3")
    only(sandbox, "dpkg-query")
    status, output = sandbox.run("tools/userspace.sh", "why")
    assert (status, output) == (0, "Fedora 42 has no apt, and what to install is known by Debian's names only\n")


FAKE_DEBOOTSTRAP = """#!/bin/bash
echo "$*" >>"$SANDBOX/debootstrapped"
for word; do case $word in --keyring=*) cp "${word#*=}" "$SANDBOX/keyring.gpg" ;; esac; done
[[ -e $SANDBOX/works ]] || { echo "E: no such luck"; exit 1; }
mkdir -p "${@: -1}"/{etc/apt/apt.conf.d,usr/lib,var/cache/apt/archives}
echo 12.0 >"${@: -1}/etc/debian_version"
echo "deb http://mirror.test/debian bookworm main" >"${@: -1}/etc/apt/sources.list"
"""


@pytest.mark.root
def test_only_debootstrap_is_installed_on_an_old_host_and_its_services_may_start_again(sandbox: Sandbox) -> None:
    host_of(sandbox, "ubuntu 20.04", "3.8.10")
    only(sandbox, "dpkg-query", "apt-get")
    status, output = sandbox.run("tools/setup.sh", "run")
    assert status == 1
    assert "Ubuntu 20.04 has Python 3.8.10" in output
    assert sandbox.asked_to_install()[-2:] == ["--no-install-recommends", "debootstrap"]
    assert not sandbox.policy.exists()


@pytest.mark.root
def test_debootstrap_comes_from_dnf_where_that_is_what_there_is(sandbox: Sandbox) -> None:
    host_of(sandbox, "fedora 42", "3.13.3")
    executable(sandbox.path / "bin/dnf", '#!/bin/sh\necho "$*" >>"$SANDBOX/asked"; exit 1\n')
    only(sandbox, "dnf")
    status, output = sandbox.run("tools/setup.sh", "run")
    assert status == 1
    assert "dnf could not install debootstrap" in output
    assert "install -y" in (sandbox.path / "asked").read_text()


@pytest.mark.root
def test_user_space_is_made_once_and_a_failed_attempt_is_made_again(sandbox: Sandbox) -> None:
    host_of(sandbox, "ubuntu 22.04", "3.10.12")
    executable(sandbox.path / "bin/debootstrap", FAKE_DEBOOTSTRAP)
    status, output = sandbox.run("tools/userspace.sh", "make")
    assert status == 1
    assert "E: no such luck" in output
    (sandbox.path / "works").touch()
    for _ in range(2):
        status, _ = sandbox.run("tools/userspace.sh", "make")
        assert status == 0
    root = sandbox.path / "userspace"
    first, second = (sandbox.path / "debootstrapped").read_text().splitlines()
    assert first == second or first.split("--keyring")[0] == second.split("--keyring")[0]
    assert first.endswith(f"bookworm {root}.new")
    assert (root / "etc/apt/sources.list").read_text().splitlines() == [
        "deb http://mirror.test/debian bookworm main",
        "deb http://mirror.test/debian-security bookworm-security main",
    ]


@pytest.mark.root
def test_user_space_is_believed_with_debians_own_key_only(sandbox: Sandbox) -> None:
    executable(sandbox.path / "bin/debootstrap", FAKE_DEBOOTSTRAP)
    host_of(sandbox, "ubuntu 20.04", "3.8.10")
    sandbox.run("tools/userspace.sh", "make")
    packet = (sandbox.path / "keyring.gpg").read_bytes()
    assert packet[0] == 0x98  # a public-key packet with one byte of length, RFC 4880 4.2
    key = packet[2 : 2 + packet[1]]
    fingerprint = hashlib.sha1(b"\x99" + len(key).to_bytes(2, "big") + key).hexdigest()  # noqa: S324 - as in 12.2
    assert fingerprint.upper() == "4D64FEC119C2029067D6E791F8D2585B8783D481"


@pytest.mark.root
def test_without_the_user_space_a_command_on_an_old_host_says_what_makes_it(sandbox: Sandbox) -> None:
    host_of(sandbox, "ubuntu 20.04", "3.8.10")
    status, output = sandbox.run("tools/userspace.sh", "exec", "true")
    assert status == 1
    assert "make setup" in output


def test_command_runs_as_it_is_where_the_host_serves(sandbox: Sandbox) -> None:
    host_of(sandbox, "debian 12", "3.11.2")
    assert sandbox.run("tools/userspace.sh", "exec", "sh", "-c", "pwd; exit 3") == (3, f"{sandbox.path}\n")


@pytest.fixture
def old_host(sandbox: Sandbox) -> Sandbox:
    """A host with a user space of busybox alone."""
    busybox = Path("/bin/busybox")
    if not busybox.exists():
        pytest.skip("busybox-static is not installed: make setup")
    host_of(sandbox, "ubuntu 20.04", "3.8.10")
    root = sandbox.path / "userspace"
    for directory in ("bin", "etc", "host", "var/lib", "var/log", "usr"):
        (root / directory).mkdir(parents=True)
    shutil.copy(busybox, root / "bin")
    for name in ("cat", "env", "mount", "readlink", "sh", "sleep", "touch", "unshare"):
        (root / "bin" / name).symlink_to("busybox")
    (root / "etc/debian_version").write_text("12.0\n")
    (root / "etc/resolv.conf").symlink_to("/host/etc/resolv.conf")
    return sandbox


NAMESPACES = "net", "pid", "ipc", "uts", "cgroup"


@pytest.mark.root
def test_user_space_has_the_hosts_process_network_and_checkout(old_host: Sandbox) -> None:
    ask = "; ".join(f"readlink /proc/self/ns/{name}" for name in NAMESPACES)
    process = old_host.start(
        "tools/userspace.sh", "exec", "sh", "-c", f"{ask}; echo $$; pwd; cat pyproject.toml; exit 3"
    )
    output, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 3
    expected = [str(Path("/proc/self/ns", name).readlink()) for name in NAMESPACES]
    expected += [str(process.pid), str(old_host.path), *(ROOT / "pyproject.toml").read_text().splitlines()]
    assert output.splitlines() == expected


@pytest.mark.root
def test_nothing_that_is_mounted_in_the_user_space_appears_on_the_host(old_host: Sandbox) -> None:
    before = Path("/proc/self/mounts").read_text()
    status, output = old_host.run(
        "tools/userspace.sh", "exec", "sh", "-c", "mount -t tmpfs tmpfs /run && cat /proc/mounts"
    )
    assert status == 0
    assert output != before
    assert Path("/proc/self/mounts").read_text() == before


@pytest.mark.root
def test_user_namespaces_can_be_made_in_the_user_space(old_host: Sandbox) -> None:
    assert old_host.run("tools/userspace.sh", "exec", "unshare", "-U", "true")[0] == 0


@pytest.mark.root
def test_user_space_sees_a_resolv_conf_that_was_replaced(old_host: Sandbox) -> None:
    etc = old_host.path / "etc"
    etc.mkdir()
    (etc / "resolv.conf").write_text("before\n")
    inside = "cat /etc/resolv.conf; touch asked; while ! test -e replaced; do sleep 0.02; done; cat /etc/resolv.conf"
    script = f"mount --bind {etc} /etc && exec tools/userspace.sh exec sh -c '{inside}'"
    process = old_host.start("unshare", "--mount", "sh", "-c", script)
    wait_for((old_host.path / "asked").exists)
    (etc / "resolv.conf.new").write_text("after\n")
    (etc / "resolv.conf.new").rename(etc / "resolv.conf")
    (old_host.path / "replaced").touch()
    output, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert output == "before\nafter\n"


# --- tools/run.sh ----------------------------------------------------------------------------------------------------
def fake_enforcer(sandbox: Sandbox, run: str) -> None:
    executable(
        sandbox.path / ".venv/bin/registry-enforcer",
        f'#!/bin/bash\necho "$*" >>"$SANDBOX/called"\n[[ $1 == run ]] || exit 0\n{run}\n',
    )


def called(sandbox: Sandbox) -> list[str]:
    calls = sandbox.path / "called"
    return calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.root
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_enforcement_is_removed_after_the_daemon_stopped_on_request(sandbox: Sandbox, sent: signal.Signals) -> None:
    fake_enforcer(
        sandbox, "trap 'echo stopped >>\"$SANDBOX/called\"; exit 0' TERM\nwhile :; do read -rt 0.1 <> <(:); done"
    )
    process = sandbox.start("tools/run.sh", "--policy", "a b.toml")
    wait_for(lambda: called(sandbox) == ["run --policy a b.toml"])
    process.send_signal(sent)
    process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0
    assert called(sandbox)[1:] == ["stopped", "remove"]


@pytest.mark.root
def test_request_to_stop_that_comes_before_the_daemon_is_known_stops_it(sandbox: Sandbox) -> None:
    script = sandbox.path / "tools/run.sh"
    before, line, after = script.read_text().partition("daemon=$!\n")
    script.write_text(f"{before}/bin/sleep 1\n{line}{after}")
    fake_enforcer(sandbox, 'kill -TERM "$PPID"\nwhile :; do read -rt 0.1 <> <(:); done')
    status, _ = sandbox.run("tools/run.sh")
    assert status == 0
    assert called(sandbox) == ["run", "remove"]


@pytest.mark.root
@pytest.mark.parametrize("daemon_status", [1, 2])
def test_enforcement_stays_when_the_daemon_ends_by_itself(sandbox: Sandbox, daemon_status: int) -> None:
    fake_enforcer(sandbox, f"exit {daemon_status}")
    status, _ = sandbox.run("tools/run.sh")
    assert status == daemon_status
    assert called(sandbox) == ["run"]


# --- make and CI -----------------------------------------------------------------------------------------------------
def make_targets() -> list[str]:
    return re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_make_alone_lists_every_target() -> None:
    listed = subprocess.run(["make", "-s"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert re.findall(r"^make ([a-z-]+) ", listed, re.MULTILINE) == make_targets()
    assert {"setup", "run", "test", "demo", "bench", "lint", "bpf", "wheel", "clean"} <= set(make_targets())


def test_documented_make_commands_exist() -> None:
    documented = {
        (path.name, target)
        for path in tracked("*.md")
        for target in re.findall(r"(?:`|^(?:sudo |\$ )*|sudo )make ([a-z][a-z-]*)", path.read_text(), re.MULTILINE)
    }
    assert documented
    assert {(name, target) for name, target in documented if target not in make_targets()} == set()


@pytest.mark.parametrize(("make_status", "expected"), [(0, 0), (2, 2)])
def test_ci_ends_with_the_summary_and_the_status_of_make(tmp_path: Path, make_status: int, expected: int) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    executable(
        tmp_path / "bin/make",
        f'#!/bin/sh\necho "=== no skips: $CI_NO_SKIP ==="\necho "make: *** [test] Error" >&2\nexit {make_status}\n',
    )
    finished = subprocess.run(
        [tmp_path / ".ci/run"],
        env={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == expected
    assert finished.stdout == "=== no skips: 1 ===\n"


@pytest.mark.parametrize(
    "source",
    [
        "import pytest\ndef test_it(): pytest.skip('no kernel')",
        "import pytest\npytest.skip('no kernel', allow_module_level=True)",
        "import pytest\n@pytest.mark.skipif(True, reason='no kernel')\ndef test_it(): pass",
    ],
    ids=["in the test", "whole module", "by mark"],
)
@pytest.mark.parametrize("in_ci", [True, False])
def test_skip_is_a_failure_in_ci_only(tmp_path: Path, source: str, in_ci: bool) -> None:
    shutil.copy(ROOT / "tests/conftest.py", tmp_path)
    (tmp_path / "test_skipping.py").write_text(f"{source}\ndef test_other(): pass\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CI_", "PYTEST_"))}
    environment["PYTHONPATH"] = str(ROOT)  # where conftest.py imports from
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path],
        env=environment | ({"CI_NO_SKIP": "1"} if in_ci else {}),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ("accepts no skip for this reason: no kernel" in finished.stdout) == in_ci
    assert (finished.returncode in {1, 2}) == in_ci


# --- what is shipped -------------------------------------------------------------------------------------------------
def test_no_file_names_a_package_index_or_a_path_of_one_machine() -> None:
    # Written with a blank where the dot or slash is: this file is searched too.
    package_indexes = (
        *("pypi org", "pythonhosted org", "registry npmjs org", "crates io"),
        *("proxy golang org", "deb debian org", "archive ubuntu com"),
    )
    machine_paths = (" work main", " work shared", " opt wheels", " library search")
    spelled = [words.replace(" ", "[./]") for words in package_indexes + machine_paths]
    wrong = re.compile("|".join((*spelled, re.escape(f"{ROOT}/"))))
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in tracked()
        if (match := wrong.search(path.read_text(errors="replace")))
    ]
    assert found == []


def test_wheel_carries_what_the_daemon_loads(tmp_path: Path) -> None:
    for path in tracked():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    (tmp_path / "build").mkdir()
    for path in (ROOT / "build").glob("*.bpf.o"):
        shutil.copy2(path, tmp_path / "build")
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    # What is set up is this checkout; of the copy only the wheel is wanted.
    subprocess.run(["make", "wheel", "--assume-old=setup"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = tmp_path.glob("dist/*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"enforcer/cli.py", "enforcer/objects/enforcer.bpf.o", "enforcer/objects/enforcer-legacy.bpf.o"} <= names
    assert {f"enforcer/objects/bpf/{path.name}" for path in tracked("bpf/*.c", "bpf/*.h")} <= names
    assert {f"enforcer/presets/{path.name}" for path in tracked("enforcer/presets/*.toml")} <= names
    assert {"enforcer/presets/docker-hub.toml", "enforcer/catalogue.toml"} <= names
    assert not (tmp_path / "enforcer/objects").exists()
