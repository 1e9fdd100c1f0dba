"""The commands as an operator meets them: what they print, and their exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from enforcer import bpf, cli

POLICY = """
organization = "Example Corp"
contact = "platform@example.com"
presets = ["docker-hub"]
[[registry]]
name = "corp"
hosts = ["registry.corp.example"]
"""


@pytest.fixture
def policy_file(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(POLICY)
    return path


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of one command in this process."""
    try:
        code = cli.main(arguments)
    except SystemExit as ended:  # argparse
        code = ended.code if isinstance(ended.code, int) else 1
    output = capsys.readouterr()
    return code, output.out, output.err


def test_check_is_content_with_a_right_policy(policy_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output, _ = run("check", str(policy_file), capsys=capsys)
    assert (code, "ok: 2 registries" in output) == (0, True)
    code, output, _ = run("check", str(policy_file), "--json", capsys=capsys)
    assert (code, json.loads(output)["registries"]) == (0, 2)


@pytest.mark.parametrize(
    ("text", "line"),
    [("", 1), ("[[registry]]\nname = 'x'\nhosts = ['foo.*']\n", 3), ("ports = [0]\n", 1), ("registry = 1\n", 1)],
    ids=["empty", "wildcard", "port", "type"],
)
def test_check_names_file_and_line_of_a_wrong_policy(
    text: str, line: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    code, output, error = run("check", str(path), capsys=capsys)
    assert (code, output) == (2, "")
    assert error.startswith(f"{path}:{line}: ")
    assert "; " in error


@pytest.mark.root
def test_check_of_a_checkouts_file_says_that_run_would_refuse_it(
    policy_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "note: run and reload refuse" not in run("check", str(policy_file), capsys=capsys)[1]
    policy_file.chmod(0o666)
    code, output, _ = run("check", str(policy_file), capsys=capsys)
    assert code == 0
    assert f"note: run and reload refuse this file: {policy_file} can be written by others" in output


@pytest.mark.root
def test_check_of_a_pipe_is_answered() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "enforcer.cli", "check", "/dev/stdin"],
        input='presets = ["ghcr"]', capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "note: run and reload cannot read this file" in done.stdout


def test_check_of_a_missing_file_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = run("check", str(tmp_path / "none.toml"), capsys=capsys)
    assert (code, str(tmp_path) in error) == (2, True)


def test_explain_says_yes_to_a_listed_name_and_no_to_another(
    policy_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--run-dir", str(tmp_path / "run"), "--policy", str(policy_file)]
    code, output, _ = run("explain", "registry.corp.example", *places, capsys=capsys)
    assert (code, "corp" in output) == (0, True)
    code, output, _ = run("explain", "evil.example:443", *places, capsys=capsys)
    assert (code, "platform@example.com" in output) == (1, True)


@pytest.mark.parametrize("subject", ["", "a b", "host:99999", "[::1", "http://x/"])
def test_explain_refuses_what_is_neither_name_nor_address(
    subject: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = run("explain", subject, "--run-dir", str(tmp_path), capsys=capsys)
    assert (code, bool(error)) == (2, True)


def test_without_a_daemon_status_and_an_address_are_not_running(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["status"], ["explain", "192.0.2.1"]):
        code, _, error = run(*command, "--run-dir", str(tmp_path), capsys=capsys)
        assert (code, "registry-enforcer run" in error) == (3, True)


@pytest.mark.parametrize("address", ["9742", "127.0.0.1", "127.0.0.1:http", "127.0.0.1:70000", ":1"])
def test_a_wrong_metrics_address_is_bad_input(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = run("run", "--metrics", address, capsys=capsys)
    assert (code, "127.0.0.1:9742" in error) == (2, True)


@pytest.mark.parametrize("command", [command.name for command in cli.COMMANDS])
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, output, _ = run(command, "--help", capsys=capsys)
    assert (code, f"Example: registry-enforcer {command}" in " ".join(output.split())) == (0, True)


def test_an_unknown_command_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("stop", capsys=capsys)[0] == 2


def test_a_closed_pipe_is_no_error(policy_file: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "enforcer.cli", "check", str(policy_file), "--json"],
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=30,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.root
@pytest.mark.parametrize("command", ["run", "remove"])
def test_what_changes_the_kernel_wants_root(command: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", sys.executable, "-m", "enforcer.cli", command],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, "needs root" in done.stderr) == (2, True)


# --- ca --------------------------------------------------------------------------------------------------------------
def test_ca_that_init_makes_is_one_that_check_accepts(
    policy_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init = ("ca", "init", "--directory", str(tmp_path), "--policy", str(policy_file))
    code, output, _ = run(*init, capsys=capsys)
    assert code == 0
    lines = output[output.index("[refusal]") :]
    policy_file.write_text(POLICY + lines)
    assert run("check", str(policy_file), capsys=capsys)[0] == 0
    assert all(engine in output for engine in ("docker", "podman", "containerd", "update-ca-certificates"))
    code, _, error = run(*init, capsys=capsys)
    assert code == 2
    assert "exists already; remove both files" in error


@pytest.mark.root
def test_no_key_is_made_where_others_write(
    policy_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "shared"
    directory.mkdir()
    directory.chmod(0o777)
    code, _, error = run("ca", "init", "--directory", str(directory), "--policy", str(policy_file), capsys=capsys)
    assert (code, list(directory.iterdir())) == (2, [])
    assert f"{directory} can be written by others (mode 0777); chmod go-w {directory}, or name another" in error


def test_ca_that_cannot_be_used_is_a_mistake_of_its_line(policy_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ca = '[refusal]\nmessage = "{name}"\nca = { certificate = "/absent.crt", key = "/absent.key" }\n'
    policy_file.write_text(POLICY + ca)
    code, _, error = run("check", str(policy_file), capsys=capsys)
    line = (POLICY + ca).split("\n").index(ca.split("\n")[2]) + 1
    assert code == 2
    assert error.startswith(f"{policy_file}:{line}: the certificate /absent.crt cannot be read: ")


# 0.09 s instead of 0.34 s of processor time, at each question.
@pytest.mark.parametrize("command", ["status", "log", "explain 192.0.2.1", "--help"])
def test_who_only_asks_a_daemon_does_not_load_its_libraries(command: str, tmp_path: Path) -> None:
    script = (
        "import contextlib, sys\n"
        "from enforcer import cli\n"
        f"with contextlib.suppress(SystemExit): cli.main({command.split()!r} + sys.argv[1:])\n"
        "print('loaded', {'pyroute2', 'prometheus_client', 'dns', 'cryptography', 'enforcer.bpf'} & {*sys.modules})"
    )
    where = [] if command == "--help" else ["--run-dir", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", script, *where], check=False, capture_output=True, text=True)
    assert "loaded set()" in done.stdout, done.stdout + done.stderr
    assert ("no daemon answers" in done.stderr) == (command != "--help")


def test_loaders_are_those_there_are() -> None:
    assert set(cli.LOADERS) == {loader.value for loader in bpf.Loader}


def test_who_waits_for_the_kernels_first_random_numbers_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = []

    def none_yet(_size: int, flags: int = 0) -> bytes:
        asked.append(flags)
        if flags & os.GRND_NONBLOCK:
            raise BlockingIOError
        return b"?"

    arguments = ("run", "--policy", str(tmp_path / "missing"), "--run-dir", str(tmp_path / "run"))
    code, _, error = run(*arguments, capsys=capsys)
    assert (code, "random numbers" in error) == (2, False)
    monkeypatch.setattr(os, "getrandom", none_yet)
    code, _, error = run(*arguments, capsys=capsys)
    assert (code, "waiting for the kernel's first random numbers" in error) == (2, os.geteuid() == 0)
    assert asked == ([os.GRND_NONBLOCK, 0] if os.geteuid() == 0 else [])
