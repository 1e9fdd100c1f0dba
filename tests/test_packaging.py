"""What is installed, and that the package's metadata cannot drift from the program's."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from enforcer import authority, policy
from enforcer.kernel_abi import BPFFS
from tests.test_layers import OWNED_IMPORTS

ROOT = Path(__file__).parent.parent
PACKAGING = ROOT / "packaging"
INSTALL = (ROOT / "tools/install.sh").read_text()
CONTROL = (PACKAGING / "debian/control").read_text()


def tool(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "tools" / name, *arguments], env={**os.environ, **environment},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def everything(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree of `make install DESTDIR=...`."""
    if not (ROOT / "build/enforcer.bpf.o").exists():
        pytest.skip("nothing is compiled: make bpf")
    directory = tmp_path_factory.mktemp("destination")
    done = tool("install.sh", "install", DESTDIR=str(directory), PREFIX="")
    assert (done.returncode, done.stderr) == (0, "")
    return directory


def test_everything_is_below_the_prefix_but_the_policy(installed: Path) -> None:
    files = everything(installed)
    assert {file for file in files if not file.startswith("usr/local/")} == {"etc/registry-enforcer/policy.toml"}
    assert {
        "usr/local/sbin/registry-enforcer",
        "usr/local/lib/systemd/system/registry-enforcer.service",
        "usr/local/lib/systemd/system/registry-enforcer-baseline.service",
        "usr/local/lib/registry-enforcer/enforcer/objects/enforcer.bpf.o",
        "usr/local/lib/registry-enforcer/enforcer/objects/enforcer-legacy.bpf.o",
        "usr/local/lib/registry-enforcer/enforcer/objects/bpf/enforcer.bpf.c",
        "usr/local/lib/registry-enforcer/enforcer/objects/bpf/guard.h",
        "usr/local/lib/registry-enforcer/enforcer/presets/docker-hub.toml",
        "usr/local/lib/registry-enforcer/enforcer/catalogue.toml",
        "usr/local/lib/registry-enforcer/pyroute2/__init__.py",
        "usr/local/share/man/man8/registry-enforcer.8",
        "usr/local/share/bash-completion/completions/registry-enforcer",
    } <= files
    for file in files:
        assert "@" not in Path(installed, file).name
        if file.endswith((".service", "sbin/registry-enforcer")):
            assert not re.search(r"@\w+@", Path(installed, file).read_text()), file


def test_installed_program_runs_by_itself(installed: Path, tmp_path: Path) -> None:
    """With the tree in its place: bound there in a mount namespace, and the checkout hidden."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    (tmp_path / "empty").mkdir()
    script = (
        f"mount --bind {installed}/usr/local /usr/local && mount --bind {tmp_path}/empty {ROOT} && cd / && "
        "registry-enforcer --version && registry-enforcer check /dev/stdin <<< 'presets = [\"ghcr\"]'"
    )
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", script],
        env={"PATH": "/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": "/nonsense"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "/dev/stdin: ok: 1 registries" in done.stdout


def test_policy_of_the_operator_survives_a_second_install_and_uninstall(installed: Path) -> None:
    own = installed / "etc/registry-enforcer/policy.toml"
    own.write_text("# my own\n")
    before = everything(installed)
    assert tool("install.sh", "install", DESTDIR=str(installed), PREFIX="").returncode == 0
    assert (own.read_text(), everything(installed)) == ("# my own\n", before)
    assert tool("install.sh", "uninstall", DESTDIR=str(installed), PREFIX="").returncode == 0
    assert everything(installed) == {"etc/registry-enforcer/policy.toml"}


def test_package_of_one_checkout_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    made = []
    for _ in range(2):
        done = tool("deb.sh", VERSION="0.0.0-test")
        assert done.returncode == 0, done.stderr
        package = ROOT / "dist/registry-enforcer_0.0.0-test_all.deb"
        made.append(package.read_bytes())
        package.unlink()
    assert made[0] == made[1]


def test_dependencies_are_those_of_the_program_and_no_older() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (bundled,) = re.findall(r"^bundled=\((.*)\)$", INSTALL, re.MULTILINE)
    for dependency in project["dependencies"]:
        name, least = re.fullmatch(r"([a-z0-9-]+)>=([0-9.]+).*", dependency).groups()  # type: ignore[union-attr]
        if name not in bundled.split():
            assert f"python3-{name} (>= {least})" in CONTROL
    assert f"python3 ({project['requires-python'].replace('>=', '>= ')})" in CONTROL


def test_what_install_looks_for_is_what_the_program_imports() -> None:
    (required,) = re.findall(r"^required=\((.*)\)$", INSTALL, re.MULTILINE)
    assert set(required.split()) == {"cryptography", "idna", "nftables"} <= set(OWNED_IMPORTS)


def test_policy_that_comes_with_it_is_the_one_that_holds_without_a_file() -> None:
    text = (PACKAGING / "policy.toml").read_text()
    shipped, default = policy.parse(text, "shipped"), policy.default_policy()
    assert replace(shipped, source=default.source, digest=default.digest) == default
    assert all(f" {name}" in text or f'"{name}"' in text for name in policy.preset_names())


def test_every_line_that_the_policy_comments_out_is_right() -> None:
    text = re.sub(r"^# (?=[a-z]+ = |\[)", "", (PACKAGING / "policy.toml").read_text(), flags=re.MULTILINE)
    uncommented = policy.parse(text, "uncommented")
    assert (uncommented.organization, uncommented.mode.value) == ("Example Corp", "observe")
    assert [rule.name for rule in uncommented.rules] == ["docker-hub", "corp", "mirror"]


def test_purge_knows_the_files_that_the_program_makes() -> None:
    postrm = (PACKAGING / "debian/postrm").read_text()
    assert f"/etc/registry-enforcer/{authority.CERTIFICATE_NAME}" in postrm
    assert f"/etc/registry-enforcer/{authority.KEY_NAME}" in postrm


def test_unit_leaves_the_pins_writable() -> None:
    unit = (ROOT / "systemd/registry-enforcer.service").read_text()
    assert f"ReadWritePaths=-{BPFFS}\n" in unit
    assert re.search(rf"^ExecStartPre=-\+/usr/bin/mkdir -p -m 0700 {BPFFS}$", unit, re.MULTILINE)


def test_both_units_come_before_the_same_and_after_whoever_flushes() -> None:
    orders = []
    for name in ("registry-enforcer", "registry-enforcer-baseline"):
        text = (ROOT / f"systemd/{name}.service").read_text()
        orders.append({word for line in re.findall(r"^Before=(.*)$", text, re.MULTILINE) for word in line.split()})
    assert orders[0] == orders[1] >= {"network-pre.target", "docker.service", "containerd.service", "podman.service"}
    assert re.search(r"^After=.*\bnftables\.service\b", text, re.MULTILINE)
