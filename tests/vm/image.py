"""What a kernel boots into: three read-only layers and an initramfs that puts them under one root.

    base      Debian by debootstrap, and the Python packages of pyproject.toml; kept under a key of what goes into it
    modules   of one kernel; kept, and with it vmlinuz and the initramfs
    checkout  this checkout, what is not committed included, and its BPF objects; made for every run

All run on bookworm's Python, nftables, libbpf and bcc, whatever this machine has: only the kernels differ.
"""

from __future__ import annotations

import gzip
import hashlib
import inspect
import lzma
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

from tests.vm.archive import CACHE, Fetched, debian_mirror, made_once

ROOT = Path(__file__).parents[2]
CHECKOUT = "/checkout"  # where the guest has it
_SITE_PACKAGES = f"{CHECKOUT[1:]}/.venv/lib/python3.11/site-packages"
_IMPORT_CHECKOUT = "checkout.pth"

_SUITE, _PYTHON = "bookworm", "3.11"
_PACKAGES = (
    "busybox", "iproute2", "kmod", "libbpf1", "linux-libc-dev", "nftables", "python3", "python3-bpfcc",
    "python3-nftables",
)  # fmt: skip
_PYTEST = ("hypothesis", "pytest", "pytest-timeout")  # of the dev dependencies
_LEFT_OUT = ("usr/share/doc", "usr/share/man", "usr/share/locale", "var/cache", "var/lib/apt/lists")
# What mounting the layers takes; the rest is loaded when it is asked for, as on any host.
_BOOT_MODULES = ("virtio_pci", "virtio_blk", "squashfs", "overlay")
_UNUSED_SECONDS = 7 * 86_400
# Every squashfs of every kernel here reads lz4, and it is the fastest to make and to read.
_SQUASHFS = ("-comp", "lz4", "-noappend", "-quiet", "-no-progress", "-all-root")


@dataclass(frozen=True, slots=True)
class Boot:
    """What qemu is given of one kernel."""

    vmlinuz: Path
    initramfs: Path
    modules: Path


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout[-2000:]}")
    return done.stdout


# --- base ------------------------------------------------------------------------------------------------------------
def base() -> Path:
    """The squashfs of the distribution, made if it is not there yet (a minute, root)."""
    requirements = _requirements()
    made_of = (_SUITE, _PACKAGES, _LEFT_OUT, _SQUASHFS, requirements, inspect.getsource(_make_base))
    key = hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]
    path = CACHE / "images" / f"base-{key}.squashfs"
    with made_once(path) as place:
        if place is not None:
            with tempfile.TemporaryDirectory(dir=place.parent) as directory:
                _make_base(Path(directory, "root"), requirements)
                left_out = [word for name in _LEFT_OUT for word in ("-e", name)]
                _run("mksquashfs", Path(directory, "root"), place, *_SQUASHFS, *left_out)
            for other in path.parent.glob("base-*.squashfs"):
                if time.time() - other.stat().st_mtime > _UNUSED_SECONDS:  # other checkouts may want another one
                    other.unlink()
    path.touch()
    return path


def _requirements() -> tuple[str, ...]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    of_tests = [text for text in project["optional-dependencies"]["dev"] if text.split(">")[0] in _PYTEST]
    return (*project["dependencies"], *of_tests)


def _make_base(root: Path, requirements: tuple[str, ...]) -> None:
    # In a mount namespace: what debootstrap mounts ends with it, however it ends.
    _run(
        *("unshare", "--mount", "debootstrap", "--variant=minbase", f"--include={','.join(_PACKAGES)}"),
        *(_SUITE, root, debian_mirror()),
    )
    _run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"),
        *("--target", str(root / _SITE_PACKAGES), "--python-version", _PYTHON, "--only-binary=:all:", *requirements),
    )
    # Compiled here: emulated it would take half a minute. Not by the machine's Python, which may be another.
    _run("chroot", root, "python3", "-m", "compileall", "-q", f"/{_SITE_PACKAGES}")
    (root / "etc/resolv.conf").unlink(missing_ok=True)  # debootstrap leaves the machine's


# --- kernel ----------------------------------------------------------------------------------------------------------
def boot_files(fetched: Fetched) -> Boot:
    """vmlinuz, initramfs and modules of a kernel, unpacked if they are not there yet."""
    key = hashlib.sha256((Path(__file__).with_name("init").read_text() + fetched.key).encode()).hexdigest()[:16]
    directory = CACHE / "kernels" / f"{fetched.release}-{key}"
    with made_once(directory) as place:
        if place is not None:
            place.mkdir()
            with tempfile.TemporaryDirectory(dir=place.parent) as unpacked:
                _unpack_kernel(fetched, Path(unpacked), place)
    return Boot(directory / "vmlinuz", directory / "initramfs", directory / "modules.squashfs")


def _unpack_kernel(fetched: Fetched, root: Path, place: Path) -> None:
    for package in fetched.packages:
        _run("dpkg-deb", "--extract", package, root)
    (vmlinuz,) = (path for path in root.rglob("vmlinuz*") if path.is_file())
    shutil.move(vmlinuz, place / "vmlinuz")
    # Merged /usr, as in the base; depmod looks in /lib.
    if (root / "lib").is_dir():
        shutil.copytree(root / "lib", root / "usr/lib", symlinks=True, dirs_exist_ok=True, copy_function=shutil.move)
        shutil.rmtree(root / "lib")
    (root / "lib").symlink_to("usr/lib")
    _run("depmod", "--basedir", root, fetched.release)
    _make_initramfs(root, fetched.release, place / "initramfs")
    shutil.rmtree(root / "boot", ignore_errors=True)
    _run("mksquashfs", root, place / "modules.squashfs", *_SQUASHFS)


def _make_initramfs(root: Path, release: str, path: Path) -> None:
    """Busybox, init, and the modules that it loads, uncompressed and in order."""
    modprobe = ("modprobe", "--dirname", root, "--set-version", release, "--show-depends")
    # It fails for what is neither a module nor listed as built in, which is what some built-in ones look like.
    shown = [subprocess.run([*modprobe, name], check=False, capture_output=True, text=True) for name in _BOOT_MODULES]
    lines = [line.split() for done in shown for line in done.stdout.splitlines()]
    modules = dict.fromkeys(words[1] for words in lines if words[0] == "insmod")
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory)
        for name in ("bin", "dev", "proc", "modules"):
            (tree / name).mkdir()
        shutil.copy2("/bin/busybox", tree / "bin/busybox")
        shutil.copy2(Path(__file__).with_name("init"), tree / "init")
        (tree / "init").chmod(0o755)
        for number, module in enumerate(modules):
            (tree / f"modules/{number:02}.ko").write_bytes(_decompressed(Path(module)))
        with path.open("wb") as archive:
            subprocess.run(
                ["cpio", "--create", "--format=newc", "--quiet", "--reproducible", "--owner=0:0"],
                cwd=tree, input="\n".join(str(found.relative_to(tree)) for found in sorted(tree.rglob("*"))).encode(),
                stdout=archive, check=True,
            )  # fmt: skip


def _decompressed(module: Path) -> bytes:
    match module.suffix:
        case ".xz":
            return lzma.decompress(module.read_bytes())
        case ".gz":
            return gzip.decompress(module.read_bytes())
        case ".zst":
            return subprocess.run(["zstd", "-dc", module], check=True, stdout=subprocess.PIPE).stdout
    return module.read_bytes()


# --- checkout --------------------------------------------------------------------------------------------------------
def checkout(path: Path, base: Path) -> None:
    """Make the squashfs of this checkout at `path`, compiled by the Python of `base`."""
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True,
    ).stdout  # fmt: skip
    names = [name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    names += [str(found.relative_to(ROOT)) for found in (ROOT / "build").glob("*.bpf.o")]
    with tempfile.TemporaryDirectory(dir=base.parent) as directory:
        top = Path(directory, "root")
        _run("unsquashfs", "-quiet", "-no-progress", "-dest", top, base)
        for name in names:
            copy = top / CHECKOUT[1:] / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy)
        _make_venv(top)
        _compile(top)
        (top / "vm").mkdir()  # where the guest's init is
        shutil.copy2(Path(__file__).with_name("guest.sh"), top / "vm/guest.sh")
        (top / "vm/guest.sh").chmod(0o755)
        of_base = f"{_SITE_PACKAGES}/!({_IMPORT_CHECKOUT})"
        _run("mksquashfs", top / CHECKOUT[1:], top / "vm", path, *_SQUASHFS, "-wildcards", "-e", of_base)


def _compile(top: Path) -> None:
    """Everything, and the guest's tests once more as pytest rewrites them: emulated it takes half a minute a guest."""
    script = "python -m compileall -q enforcer tests && python -c 'from tests.vm import guest; guest.collect()'"
    # With a path of its own, and without what would keep Python from writing.
    environment = ("env", "--ignore-environment", "LC_ALL=C.UTF-8", f"PATH={CHECKOUT}/.venv/bin:/usr/bin:/bin")
    _run("chroot", top, *environment, "sh", "-ec", f"cd {CHECKOUT} && {script}")


def _make_venv(top: Path) -> None:
    """Around the base's packages, what makes their directory an environment with this checkout installed."""
    environment = top / CHECKOUT[1:] / ".venv"
    (environment / "bin").mkdir()  # beside the packages
    (environment / "bin/python").symlink_to("/usr/bin/python3")
    (environment / "pyvenv.cfg").write_text(
        f"home = /usr/bin\ninclude-system-site-packages = true\nversion = {_PYTHON}\n"
    )
    site = top / _SITE_PACKAGES
    (site / _IMPORT_CHECKOUT).write_text(f"{CHECKOUT}\n")
    command = environment / "bin/registry-enforcer"
    command.write_text(f"#!{CHECKOUT}/.venv/bin/python\nimport sys\nfrom enforcer.cli import main\nsys.exit(main())\n")
    command.chmod(stat.S_IRWXU)
