"""Completion as each shell does it: the script is loaded and asked what it offers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from enforcer import cli, completion

NAMES = [command.name for command in cli.COMMANDS]
COMMANDS = {command.name: command for command in cli._completable()}


def script(shell: str) -> str:
    return completion.render(shell, list(COMMANDS.values()))


def of_shell(shell: str, *arguments: str, stdin: str = "", cwd: Path | None = None) -> str:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed: make setup")
    done = subprocess.run(
        [shell, *arguments], input=stdin, capture_output=True, text=True, timeout=30, check=False, cwd=cwd
    )
    assert done.stderr == "", done.stderr
    return done.stdout


def bash_offers(*words: str, cwd: Path | None = None) -> list[str]:
    """What bash offers for the last of `words`."""
    quoted = " ".join(f"'{word}'" for word in words)
    ask = f"COMP_WORDS=(registry-enforcer {quoted}); COMP_CWORD={len(words)}; _registry_enforcer 2>/dev/null"
    return of_shell("bash", "-s", stdin=f'{script("bash")}\n{ask}\nprintf "%s\\n" "${{COMPREPLY[@]}}"', cwd=cwd).split()


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_every_command_and_option_is_in_it(shell: str) -> None:
    text = script(shell)
    for command in COMMANDS.values():
        assert command.name in text
        for argument in command.options:
            option = max(argument.options, key=len)
            assert (option if shell != "fish" else f"-l {option[2:]}") in text


def test_table_has_what_the_parsers_take() -> None:
    assert list(COMMANDS) == NAMES
    run = {option for argument in COMMANDS["run"].options for option in argument.options}
    assert {"--policy", "--bpffs", "--cgroup", "--state-dir", "--metrics", "--loader", "--run-dir"} <= run
    assert COMMANDS["ca"].places[0].choices == ("init",)


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_shell_takes_the_script(shell: str, tmp_path: Path) -> None:
    path = tmp_path / "completion"
    path.write_text(script(shell))
    of_shell(shell, "-n", str(path))


def test_bash_offers_commands_options_values_and_files(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").touch()
    assert bash_offers("") == [*NAMES, "--help", "--version"]
    assert bash_offers("exp") == ["explain"]
    assert bash_offers("status", "--j") == ["--json"]
    assert bash_offers("run", "--loader", "") == ["libbpf", "bcc"]
    assert bash_offers("ca", "i") == ["init"]
    assert bash_offers("check", "pol", cwd=tmp_path) == ["policy.toml"]
    assert bash_offers("run", "--policy", "pol", cwd=tmp_path) == ["policy.toml"]
    assert bash_offers("check", "--j", cwd=tmp_path) == ["--json"]
    assert bash_offers("run", "--metrics", "", cwd=tmp_path) == []
    assert bash_offers("nonsense", "", cwd=tmp_path) == []


def test_fish_offers_commands_options_and_values(tmp_path: Path) -> None:
    path = tmp_path / "completion.fish"
    path.write_text(script("fish"))

    def offers(line: str) -> list[str]:
        listed = of_shell("fish", "--no-config", "-c", f"source {path}; complete --do-complete '{line}'")
        return [entry.split("\t")[0] for entry in listed.splitlines()]

    assert offers("registry-enforcer exp") == ["explain"]
    assert set(offers("registry-enforcer ")) >= set(NAMES)
    assert "--json" in offers("registry-enforcer status --")
    assert offers("registry-enforcer run --loader ") == ["bcc", "libbpf"]


def test_zsh_offers_commands_options_and_values(tmp_path: Path) -> None:
    (tmp_path / "_registry-enforcer").write_text(script("zsh"))
    driver = """
zmodload zsh/zpty
zpty z zsh -f -i
zpty -w z "PS1=; fpath=($1 \\$fpath); autoload -U compinit; compinit -u -d $1/dump; zstyle ':completion:*' verbose no"
zpty -w z "bindkey '^I' complete-word; setopt no_beep; LISTMAX=10000; print loaded"
zpty -r z line '*loaded*loaded*'
zpty -w -n z "registry-enforcer $2"$'\\t'
sleep 0.5
zpty -w -n z $'\\x05'" # end"$'\\n'
zpty -r z line '*# end*'
print -r -- $line
zpty -d z
"""

    def completed(text: str) -> str:
        return of_shell("zsh", "-f", "-s", str(tmp_path), text, stdin=driver)

    assert "registry-enforcer explain" in completed("exp")
    assert "--follow" in completed("log --fol")
    assert "libbpf" in completed("run --loader li")
