"""The state file survives what happens to files, and a damaged one is set aside and named."""

from __future__ import annotations

import errno
import json
import os
import time
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from enforcer import state
from enforcer.policy import HostPattern

SAVED_AT = 1_899_999_000
ENTRY = state.SavedAddress(
    *(ip_address("198.18.0.1"), 443, "a.corp.example", "corp", HostPattern("corp.example", wildcard=True)),
    expires_at=1_900_000_000,
    seconds_left=1_000,
)


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: SAVED_AT)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    state.save(tmp_path / "state", [ENTRY])
    assert state.load(tmp_path / "state") == [ENTRY]
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "state" / state.FILE_NAME).stat().st_mode & 0o777 == 0o600


def test_what_an_entry_had_left_when_it_was_saved_is_loaded_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a clock that is set back meanwhile lengthens no life."""
    state.save(tmp_path, [ENTRY])
    monkeypatch.setattr(time, "time", lambda: SAVED_AT - 86_400)
    assert [entry.seconds_left for entry in state.load(tmp_path)] == [1_000]


def test_without_a_file_nothing_is_loaded(tmp_path: Path) -> None:
    assert state.load(tmp_path) == []


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"version": 2, "learned": []}', '{"version": 1, "learned": [[1]]}', "[" * 100_000,
     '{"version": 1, "saved_at": "now", "learned": []}', '{"version": 1, "saved_at": -1, "learned": []}',
     '{"version": 1, "learned": [["nowhere", 443, "a", "r", "a.b", 1]]}',
     '{"version": 1, "learned": [["192.0.2.1", "443", "a", "r", "a.b", 1]]}',
     '{"version": 1, "learned": [["192.0.2.1", 443, "a", "r", "*", 1]]}',
     # Believed, these would end the daemon at every start, or reach nftables or a terminal.
     '{"version": 1, "learned": [["2606::1%eth0", 443, "a", "r", "a.b", 1]]}',
     '{"version": 1, "learned": [["192.0.2.1", 65536, "a", "r", "a.b", 1]]}',
     '{"version": 1, "learned": [["192.0.2.1", true, "a", "r", "a.b", 1]]}',
     '{"version": 1, "learned": [["192.0.2.1", 443, "a", "r", "a.b", 1' + "0" * 400 + "]]}",
     '{"version": 1, "learned": [["192.0.2.1", 443, "\\u001b[2J", "r", "a.b", 1]]}'],
)  # fmt: skip
def test_a_damaged_file_is_set_aside_and_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / state.FILE_NAME
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(state.StateError, match="set aside"):
        state.load(tmp_path)
    assert not path.exists()
    assert path.with_name(f"{state.FILE_NAME}.bad").read_text() == text
    assert state.load(tmp_path) == []


def test_a_truncated_file_gives_nothing_wherever_it_ends(tmp_path: Path) -> None:
    state.save(tmp_path, [ENTRY])
    path = tmp_path / state.FILE_NAME
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(state.StateError, match="set aside"):
            state.load(tmp_path)


def test_a_file_larger_than_any_of_ours_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state.save(tmp_path, [ENTRY])
    size = (tmp_path / state.FILE_NAME).stat().st_size
    monkeypatch.setattr(state, "MAX_BYTES", size)
    assert state.load(tmp_path) == [ENTRY]
    monkeypatch.setattr(state, "MAX_BYTES", size - 1)
    with pytest.raises(state.StateError, match=f"longer than {size - 1} bytes; set aside"):
        state.load(tmp_path)


@given(st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_content_of_the_file_gets_past_as_another_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / state.FILE_NAME
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(state.StateError):
        state.load(tmp_path)


def test_a_file_that_others_may_write_is_not_believed(tmp_path: Path) -> None:
    state.save(tmp_path, [ENTRY])
    (tmp_path / state.FILE_NAME).chmod(0o666)
    with pytest.raises(state.StateError, match=r"can be written by others \(mode 0666\); set aside"):
        state.load(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / state.FILE_NAME)
    with pytest.raises(state.StateError, match="not a regular file; set aside"):
        state.load(tmp_path)


@pytest.mark.root
@pytest.mark.parametrize(("owner", "mode"), [(65_533, 0o755), (0, 0o777)], ids=["of another", "of all"])
def test_a_directory_that_others_may_write_gives_nothing_and_takes_nothing(
    tmp_path: Path, owner: int, mode: int
) -> None:
    directory = tmp_path / "state"
    state.save(directory, [ENTRY])
    before = (directory / state.FILE_NAME).read_bytes()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (directory / f"{state.FILE_NAME}.new").symlink_to(victim)
    (directory / f"{state.FILE_NAME}.bad").symlink_to(victim)
    directory.chmod(mode)
    os.chown(directory, owner, -1)
    with pytest.raises(state.StateError, match=r"learned\.json: .*state "):
        state.load(directory)
    with pytest.raises(state.StateError, match="is not written: "):
        state.save(directory, [])
    assert (directory / state.FILE_NAME).read_bytes() == before
    assert victim.read_text() == "precious"
    directory.chmod(0o755)
    os.chown(directory, 0, -1)
    assert state.load(directory) == [ENTRY]
    state.save(directory, [])
    assert (state.load(directory), victim.read_text()) == ([], "precious")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state.save(tmp_path, [ENTRY])

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(state.StateError, match="No space left"):
        state.save(tmp_path, [])
    assert state.load(tmp_path) == [ENTRY]


def test_the_file_is_plain_json_with_a_version(tmp_path: Path) -> None:
    state.save(tmp_path, [ENTRY])
    assert json.loads((tmp_path / state.FILE_NAME).read_text())["version"] == state.VERSION
