"""Shell completion, rendered from the table of commands: what the parsers take and nothing else.

All of it is literal text in the scripts: completing runs nothing but the shell's own functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

SHELLS = ("bash", "zsh", "fish")
_PROGRAM = "registry-enforcer"
_FUNCTION = "_registry_enforcer"


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a command."""

    name: str
    options: tuple[str, ...]  # "--policy"; empty: it is known by its place
    help: str
    choices: tuple[str, ...] = ()
    takes_value: bool = True
    is_file: bool = False  # of its value


@dataclass(frozen=True, slots=True)
class Command:
    """One row of the table."""

    name: str
    summary: str
    arguments: tuple[Argument, ...]

    @property
    def options(self) -> list[Argument]:
        """What begins with a hyphen."""
        return [argument for argument in self.arguments if argument.options]

    @property
    def places(self) -> list[Argument]:
        """What does not."""
        return [argument for argument in self.arguments if not argument.options]


def render(shell: str, commands: Sequence[Command]) -> str:
    """The script for one of SHELLS."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](commands)


def _words(texts: Iterable[str]) -> str:
    return " ".join(texts)


# --- bash ------------------------------------------------------------------------------------------------------------
def _bash(commands: Sequence[Command]) -> str:
    return f"""\
# bash completion for {_PROGRAM}; printed by `{_PROGRAM} completion bash`
{_FUNCTION}() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}} words= files=
    if ((COMP_CWORD == 1)); then
        words="{_words([command.name for command in commands] + ["--help", "--version"])}"
    else
        case ${{COMP_WORDS[1]}}:$before in
{chr(10).join(line for command in commands for line in _bash_values(command))}
            *)
                case ${{COMP_WORDS[1]}} in
{chr(10).join(_bash_command(command) for command in commands)}
                esac
                [[ $word != -* || -z $files ]] || files=
                ;;
        esac
    fi
    COMPREPLY=()
    # shellcheck disable=SC2207 # words of this script, without spaces
    [[ -z $words ]] || COMPREPLY=($(compgen -W "$words" -- "$word"))
    if [[ -n $files ]]; then
        compopt -o filenames 2>/dev/null
        local line
        while IFS= read -r line; do COMPREPLY+=("$line"); done < <(compgen -f -- "$word")
    fi
}}
complete -F {_FUNCTION} {_PROGRAM}
"""


def _bash_values(command: Command) -> Iterator[str]:
    """What follows an option that takes a value."""
    for argument in command.options:
        if argument.takes_value:
            pattern = " | ".join(f"{command.name}:{option}" for option in argument.options)
            yield f"            {pattern}) {_bash_value(argument)} ;;"


def _bash_value(argument: Argument) -> str:
    if argument.choices:
        return f'words="{_words(argument.choices)}"'
    return "files=1" if argument.is_file else ":"


def _bash_command(command: Command) -> str:
    words = [option for argument in command.options for option in argument.options]
    words += [choice for argument in command.places for choice in argument.choices]
    files = "; files=1" if any(argument.is_file for argument in command.places) else ""
    return f'                    {command.name}) words="{_words(words)}"{files} ;;'


# --- zsh -------------------------------------------------------------------------------------------------------------
def _zsh(commands: Sequence[Command]) -> str:
    named = "\n".join(f"        {_quoted(_zsh_escaped(c.name) + ':' + c.summary)}" for c in commands)
    specs = {c.name: _words(_quoted(_zsh_argument(argument)) for argument in c.arguments) for c in commands}
    cases = "\n".join(f"                {name}) _arguments -S {arguments} ;;" for name, arguments in specs.items())
    return f"""\
#compdef {_PROGRAM}
# zsh completion for {_PROGRAM}; printed by `{_PROGRAM} completion zsh`
{_FUNCTION}() {{
    local curcontext=$curcontext state line
    local -a commands
    commands=(
{named}
    )
    _arguments -C '(- *)--help[show help]' '(- *)--version[show the version]' '1: :->command' '*:: :->arguments'
    case $state in
        command) _describe command commands ;;
        arguments)
            case $words[1] in
{cases}
            esac
            ;;
    esac
}}
{_FUNCTION} "$@"
"""


def _zsh_argument(argument: Argument) -> str:
    value = f"({_words(argument.choices)})" if argument.choices else "_files" if argument.is_file else " "
    if not argument.options:
        return f":{_zsh_escaped(argument.name)}:{value}"
    text = _zsh_escaped(argument.help).replace("[", r"\[").replace("]", r"\]")
    option = max(argument.options, key=len)
    return f"*{option}[{text}]" + (f":value:{value}" if argument.takes_value else "")


def _zsh_escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace(":", r"\:")


# --- fish ------------------------------------------------------------------------------------------------------------
def _fish(commands: Sequence[Command]) -> str:
    lines = [
        f"# fish completion for {_PROGRAM}; printed by `{_PROGRAM} completion fish`",
        f"complete -c {_PROGRAM} -f",
        f"complete -c {_PROGRAM} -n __fish_use_subcommand -l version -d 'show the version'",
    ]
    for command in commands:
        lines.append(f"complete -c {_PROGRAM} -n __fish_use_subcommand -a {command.name} -d {_quoted(command.summary)}")
        condition = f"-n '__fish_seen_subcommand_from {command.name}'"
        lines += [f"complete -c {_PROGRAM} {condition}{_fish_argument(argument)}" for argument in command.arguments]
    return "\n".join(lines) + "\n"


def _fish_argument(argument: Argument) -> str:
    text = "".join(
        f" -l {option[2:]}" if option.startswith("--") else f" -s {option[1:]}" for option in argument.options
    )
    if argument.choices:
        text += f" -a {_quoted(_words(argument.choices))}"
    if argument.is_file:
        text += " -F"
    if argument.options and argument.takes_value:
        text += " -r" if argument.is_file else " -x"
    return text + (f" -d {_quoted(argument.help)}" if argument.help else "")


def _quoted(text: str) -> str:
    """One word for any of the shells."""
    return "'" + text.replace("'", r"'\''") + "'"
