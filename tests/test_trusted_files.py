"""What root reads and writes is nobody else's: each refusal beside the twin that passes."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from enforcer import trusted_files
from enforcer.trusted_files import UntrustedError

pytestmark = pytest.mark.root

OTHER = 65_533
TEXT = b"presets = []\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "etc" / "policy.toml"
    path.parent.mkdir()
    path.write_bytes(TEXT)
    path.chmod(0o644)
    return path


def through_a_link(file: Path) -> Path:
    link = file.parent.parent / "link.toml"
    link.symlink_to("etc/../etc/policy.toml")
    return link


def through_a_directory_link(file: Path) -> Path:
    link = file.parent.parent / "there"
    link.symlink_to(file.parent.absolute())
    return link / file.name


def in_a_sticky_directory(file: Path) -> Path:
    file.parent.chmod(0o1777)
    return file


def owned_by_root_in_full(file: Path) -> Path:
    file.chmod(0o400)
    return file


@pytest.mark.parametrize(
    "arrange",
    [lambda file: file, through_a_link, through_a_directory_link, in_a_sticky_directory, owned_by_root_in_full],
    ids=["plain", "link", "directory link", "sticky", "0400"],
)
def test_what_root_alone_could_write_is_read(file: Path, arrange: Callable[[Path], Path]) -> None:
    assert trusted_files.read(arrange(file), 1_000) == TEXT


def group_writes(file: Path) -> Path:
    file.chmod(0o664)
    return file


def all_write(file: Path) -> Path:
    file.chmod(0o666)
    return file


def owned_by_another(file: Path) -> Path:
    os.chown(file, OTHER, 0)
    return file


def in_a_directory_that_all_write(file: Path) -> Path:
    file.parent.chmod(0o777)
    return file


def in_a_directory_that_a_group_writes(file: Path) -> Path:
    file.parent.chmod(0o775)
    return file


def in_a_directory_of_another(file: Path) -> Path:
    os.chown(file.parent, OTHER, 0)
    return file


def far_below_what_all_write(file: Path) -> Path:
    file.parent.parent.chmod(0o777)
    return file


def another_ones_link_in_a_sticky_directory(file: Path) -> Path:
    shared = file.parent.parent / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    link = shared / "policy.toml"
    link.symlink_to(file)
    os.chown(link, OTHER, 0, follow_symlinks=False)
    return link


def a_link_out_of_what_root_writes(file: Path) -> Path:
    all_write(file)
    return through_a_link(file)


def a_pipe(file: Path) -> Path:
    file.unlink()
    os.mkfifo(file, 0o600)
    return file


def a_directory(file: Path) -> Path:
    return file.parent


@pytest.mark.parametrize(
    ("arrange", "why"),
    [
        (group_writes, "policy.toml can be written by others .mode 0664.; chmod go-w"),
        (all_write, "policy.toml can be written by others .mode 0666.; chmod go-w"),
        (owned_by_another, f"policy.toml belongs to user {OTHER} and not to root; chown root"),
        (in_a_directory_that_all_write, "what is in .*/etc can be replaced by others .mode 0777.; chmod go-w .*/etc,"),
        (in_a_directory_that_a_group_writes, "what is in .*/etc can be replaced by others .mode 0775."),
        (in_a_directory_of_another, f"/etc belongs to user {OTHER} and not to root"),
        (far_below_what_all_write, "can be replaced by others .mode 0777."),
        (another_ones_link_in_a_sticky_directory, "what is in .*/shared can be replaced by others .mode 1777."),
        (a_link_out_of_what_root_writes, "can be written by others"),
        (a_pipe, "is not a regular file"),
        (a_directory, "is not a regular file"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_others_could_have_written_is_not_read(file: Path, arrange: Callable[[Path], Path], why: str) -> None:
    path = arrange(file)
    with pytest.raises(UntrustedError, match=why):
        trusted_files.read(path, 1_000)


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        trusted_files.read(tmp_path / "a", 10)


def test_a_missing_file_and_a_file_as_directory_are_what_the_kernel_says(file: Path) -> None:
    with pytest.raises(FileNotFoundError):
        trusted_files.read(file.parent / "absent", 10)
    with pytest.raises(FileNotFoundError):
        trusted_files.read(file.parent / "absent" / "x", 10)
    with pytest.raises(NotADirectoryError):
        trusted_files.read(file / "x", 10)


def test_no_descriptor_is_left_open(file: Path) -> None:
    before = set(Path("/proc/self/fd").iterdir())
    trusted_files.read(through_a_link(file), 10)
    with trusted_files.directory(file.parent):
        pass
    os.close(trusted_files.append(file, 0o600))
    with pytest.raises(UntrustedError):
        trusted_files.read(all_write(file), 10)
    with pytest.raises(UntrustedError):
        trusted_files.append(file, 0o600)
    assert set(Path("/proc/self/fd").iterdir()) == before


def test_private_file_that_others_may_read_is_refused(file: Path) -> None:
    with pytest.raises(UntrustedError, match=f"can be read by others than its owner; chmod 600 {file}"):
        trusted_files.read(file, 10, private=True)
    file.chmod(0o600)
    assert trusted_files.read(file, 1_000, private=True) == TEXT


def test_who_enforces_nothing_may_read_what_others_wrote(file: Path) -> None:
    assert trusted_files.read(all_write(file), 1_000, trusting=True) == TEXT


def test_a_file_that_is_swapped_all_the_time_never_gives_the_attackers_words(tmp_path: Path) -> None:
    """Another user, in a sticky directory of all, turns one name into a file of his and into a link to root's."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    roots = tmp_path / "roots.toml"
    roots.write_bytes(TEXT)
    name = shared / "policy.toml"
    pid = os.fork()
    if pid == 0:
        try:
            os.chdir(shared)
            os.setgid(OTHER)
            os.setuid(OTHER)
            while True:
                Path("mine").write_bytes(b"evil")
                Path("mine").replace(name.name)
                Path("mine").symlink_to(roots)
                Path("mine").replace(name.name)
        finally:
            os._exit(1)
    try:
        refused = 0
        for _ in range(2_000):
            try:
                assert trusted_files.read(name, 1_000) == TEXT
            except (UntrustedError, OSError):
                refused += 1
        assert refused == 2_000
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


# --- directories -----------------------------------------------------------------------------------------------------
def test_a_directory_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    with trusted_files.directory(tmp_path / "run" / "x", make=True) as descriptor:
        assert os.fstat(descriptor).st_ino == (tmp_path / "run" / "x").stat().st_ino
    assert stat.S_IMODE((tmp_path / "run" / "x").stat().st_mode) == 0o700
    with trusted_files.directory(tmp_path / "run" / "x", make=True), trusted_files.directory(Path("/")):
        pass


@pytest.mark.parametrize(("owner", "mode"), [(0, 0o777), (0, 0o770), (0, 0o1777), (OTHER, 0o700)])
def test_a_directory_that_others_may_write_is_refused(tmp_path: Path, owner: int, mode: int) -> None:
    path = tmp_path / "run"
    path.mkdir()
    path.chmod(mode)
    os.chown(path, owner, -1)
    with pytest.raises(UntrustedError, match="run "), trusted_files.directory(path, make=True):
        pass


# --- appending -------------------------------------------------------------------------------------------------------
@pytest.fixture
def log_directory(tmp_path: Path) -> Iterator[Path]:
    """As Ubuntu has it: /var/log is a group's, what is below it is root's."""
    path = tmp_path / "log" / "registry-enforcer"
    path.mkdir(parents=True, mode=0o750)
    path.parent.chmod(0o775)
    os.chown(path.parent, 0, OTHER)
    yield path
    path.parent.chmod(0o755)


def test_what_is_appended_is_there_and_its_file_is_ours(log_directory: Path) -> None:
    for _ in range(2):
        descriptor = trusted_files.append(log_directory / "audit.jsonl", 0o640)
        os.write(descriptor, b"x\n")
        os.close(descriptor)
    assert (log_directory / "audit.jsonl").read_bytes() == b"x\nx\n"
    assert stat.S_IMODE((log_directory / "audit.jsonl").stat().st_mode) == 0o640


def test_nothing_is_appended_where_a_group_writes(log_directory: Path) -> None:
    with pytest.raises(UntrustedError, match="log can be written by others"):
        trusted_files.append(log_directory.parent / "audit.jsonl", 0o640)
    log_directory.parent.chmod(0o1777)
    os.close(trusted_files.append(log_directory.parent / "audit.jsonl", 0o640))


def test_what_others_put_in_the_way_is_not_appended_to(log_directory: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    audit = log_directory / "audit.jsonl"

    audit.symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        trusted_files.append(audit, 0o640)
    audit.unlink()

    os.link(victim, audit)
    with pytest.raises(UntrustedError, match="another name"):
        trusted_files.append(audit, 0o640)
    audit.unlink()

    audit.write_text("forged")
    os.chown(audit, OTHER, -1)
    with pytest.raises(UntrustedError, match=f"belongs to user {OTHER}"):
        trusted_files.append(audit, 0o640)
    audit.unlink()

    # A member of the group moves the directory away and puts a link, or a directory of its own, in its place.
    log_directory.rename(log_directory.with_name("away"))
    log_directory.symlink_to(tmp_path)
    with pytest.raises(UntrustedError, match="can be replaced by others"):
        trusted_files.append(audit, 0o640)
    log_directory.unlink()
    log_directory.mkdir()
    os.chown(log_directory, OTHER, -1)
    with pytest.raises(UntrustedError):
        trusted_files.append(audit, 0o640)
    assert victim.read_text() == "precious"
    assert not (tmp_path / "audit.jsonl").exists()


def test_a_pipe_in_its_place_holds_nobody_up(log_directory: Path) -> None:
    os.mkfifo(log_directory / "audit.jsonl")
    with pytest.raises((UntrustedError, OSError)):
        trusted_files.append(log_directory / "audit.jsonl", 0o640)
    reader = os.open(log_directory / "audit.jsonl", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(UntrustedError, match="not a regular file"):
            trusted_files.append(log_directory / "audit.jsonl", 0o640)
    finally:
        os.close(reader)
