"""Where a value stands in a TOML text: tomllib forgets the lines, and an operator's mistake must name one.

Walked only after a mistake was found, so that a correct policy of 100,000 names pays nothing for it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

Path = tuple[str | int, ...]  # keys, and positions in arrays: ("registry", 2, "hosts", 0)

_TOKEN = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}'
    r"|'''.*?'{3,5}"
    r'|"(?:\\.|[^"\\])*"'
    r"|'[^']*'"
    r"|#[^\n]*"
    r"|[][{}=,.\n]"
    r"""|[^][{}=,.\s"'#]+""",
    re.DOTALL,
)


def line_of(text: str, path: Path) -> int:
    """The line, 1-based, where `path` stands, or else what of it there is; `text` is valid TOML."""
    depth, line = 0, 1
    for found, at in _statements(_Tokens(text)):
        if depth < len(found) and path[: len(found)] == found:
            depth, line = len(found), at
    return line


class _Tokens:
    """The text token by token without comments; `now` is "" at its end."""

    def __init__(self, text: str) -> None:
        self._matches = _TOKEN.finditer(text)
        self.now = ""
        self.line = 1  # where `now` begins
        self.take()

    def take(self) -> str:
        """Return `now` and go on to the next token."""
        taken = self.now
        self.line += taken.count("\n")
        self.now = next((found for match in self._matches if not (found := match[0]).startswith("#")), "")
        return taken


def _statements(tokens: _Tokens) -> Iterator[tuple[Path, int]]:
    table: Path = ()
    lengths: Counter[Path] = Counter()  # of the arrays of tables so far
    while tokens.now:
        line = tokens.line
        if tokens.now == "\n":
            tokens.take()
        elif tokens.now == "[":
            tokens.take()
            is_array = tokens.now == "["
            if is_array:
                tokens.take()
            table, names = (), _key(tokens)
            for position, name in enumerate(names, 1):
                table += (name,)
                if is_array and position == len(names):
                    lengths[table] += 1
                if lengths[table]:
                    table += (lengths[table] - 1,)
            yield table, line
            while tokens.now == "]":
                tokens.take()
        else:
            yield from _pair(tokens, table)


def _pair(tokens: _Tokens, table: Path) -> Iterator[tuple[Path, int]]:
    line = tokens.line
    path = table
    for part in _key(tokens):
        path += (part,)
        yield path, line
    tokens.take()  # the equals sign
    yield from _value(tokens, path)


def _key(tokens: _Tokens) -> list[str]:
    parts = [tokens.take().strip("\"'")]
    while tokens.now == ".":
        tokens.take()
        parts.append(tokens.take().strip("\"'"))
    return parts


def _value(tokens: _Tokens, path: Path) -> Iterator[tuple[Path, int]]:
    opening = tokens.take()
    if opening not in ("[", "{"):
        while tokens.now not in (",", "]", "}", "\n", ""):  # 1.5 and 2026-11-23 20:00 are several tokens
            tokens.take()
        return
    position = 0
    while tokens.now not in ("]", "}", ""):
        if tokens.now in (",", "\n"):
            tokens.take()
        elif opening == "{":
            yield from _pair(tokens, path)
        else:
            yield (*path, position), tokens.line
            yield from _value(tokens, (*path, position))
            position += 1
    tokens.take()
